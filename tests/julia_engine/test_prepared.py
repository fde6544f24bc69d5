"""What is prepared once for equal solves in Julia serves those alone."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.julia

D = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Decay(nn.Module):
    """A linear field with a rate, and a factor that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, 2.0], dtype=D))
        self.factor = 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`."""
        return -self.factor * self.rate * u


def rate_of(field: Callable[..., Any], **options: Any) -> Tensor:
    """The rates of a linear field, by the end of a solve."""
    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    end: Tensor = psn.solve(problem, psn.Tsit5(), engine="julia", **TIGHT, **options).u1
    return -end.log()


def test_whatever_changes_in_a_module_is_seen_by_the_next_solve() -> None:
    field = Decay()

    def look(expected: list[float]) -> None:
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                found = rate_of(field).detach()
            torch.testing.assert_close(found, torch.tensor(expected, dtype=D), rtol=1e-7, atol=0)

    look([0.5, 2.0])
    with torch.no_grad():
        field.rate += 1
    look([1.5, 3.0])
    field.factor = 2.0
    look([3.0, 6.0])
    field.rate = nn.Parameter(torch.tensor([0.25, 1.0], dtype=D))
    look([0.5, 2.0])
    field.register_forward_hook(lambda module, given, out: 3 * out)
    look([1.5, 6.0])


def test_gradients_go_to_what_requires_them_now() -> None:
    field = Decay()
    for needed in (True, False, True):
        field.rate.requires_grad_(needed)
        found = rate_of(field)
        assert found.requires_grad is needed
        if needed:
            # The rates are their own derivatives.
            (bar,) = torch.autograd.grad(found.sum(), field.rate)
            torch.testing.assert_close(bar, torch.ones(2, dtype=D), rtol=1e-6, atol=0)


def test_extra_arguments_of_another_form_are_another_solve() -> None:
    def field(t: Tensor, u: Tensor, p: Any) -> Tensor:
        return -p["rate"] * p.get("factor", 1.0) * u

    for p, rate in (
        ({"rate": torch.tensor(1.0, dtype=D)}, 1.0),
        ({"rate": torch.tensor(2.0, dtype=D)}, 2.0),
        ({"rate": torch.tensor(2.0, dtype=D), "factor": 2.0}, 4.0),
        ({"rate": torch.tensor(2.0, dtype=D), "factor": 3.0}, 6.0),
        ({"rate": torch.tensor([2.0], dtype=D, requires_grad=True)}, 2.0),
    ):
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0), p=p)
        end = psn.solve(problem, psn.Tsit5(), engine="julia", **TIGHT).u1
        assert end.item() == pytest.approx(math.exp(-rate), rel=1e-7)
        assert end.requires_grad is p["rate"].requires_grad


def test_other_intervals_times_and_steps_are_other_solves() -> None:
    def field(t: Tensor, u: Tensor) -> Tensor:
        return u

    u0 = torch.ones(1, dtype=D)
    for end in (1.0, 0.5, torch.tensor(0.25, dtype=D), 1.0):
        problem = psn.ODEProblem(field, u0, (0.0, end))
        for saveat in (None, [0.1, 0.2], [0.2]):
            found = psn.solve(problem, psn.Tsit5(), engine="julia", saveat=saveat, **TIGHT)
            torch.testing.assert_close(found.u, found.t[:, None].exp(), rtol=1e-7, atol=0)
            assert found.u1.item() == pytest.approx(math.exp(float(end)), rel=1e-7)
        for dt0 in (0.125, 0.0625):
            steps = {"dt0": dt0, "controller": psn.FixedStep()}
            found = psn.solve(problem, psn.Euler(), engine="julia", **steps)
            count = round(float(end) / dt0)
            assert found.stats.naccept == count
            assert found.u1.item() == pytest.approx((1 + dt0) ** count, rel=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_more_steps_than_there_is_room_for_are_all_there(gradients: bool) -> None:
    """Of Euler's method on `u' = -u` the states are powers."""
    u0 = torch.ones(3, dtype=D, requires_grad=gradients)
    problem = psn.ODEProblem(lambda t, u: -u, u0, (0.0, 2.0))
    steps = {"dt0": 0.01, "controller": psn.FixedStep()}
    found = psn.solve(problem, psn.Euler(), engine="julia", **steps)
    times = torch.arange(201, dtype=D) / 100
    torch.testing.assert_close(found.t, times, rtol=1e-13, atol=1e-15)
    powers = (0.99 ** torch.arange(201, dtype=D))[:, None].expand(201, 3)
    torch.testing.assert_close(found.u.detach(), powers, rtol=1e-12, atol=0)
    assert found.stats.naccept == 200
    if gradients:
        (bar,) = torch.autograd.grad(found.u1.sum(), u0)
        torch.testing.assert_close(bar, powers[-1], rtol=1e-12, atol=0)


def test_parts_that_are_made_later_are_those_of_the_solve() -> None:
    field = Decay()
    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    with torch.no_grad():
        found = psn.solve(problem, psn.Tsit5(), engine="julia", **TIGHT)
        field.rate.mul_(3)
        problem.u0.zero_()
        torch.testing.assert_close(
            found(0.3), torch.tensor([0.5, 2.0], dtype=D).mul(-0.3).exp(), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(found.u[-1], found.u1, rtol=0, atol=0)
        torch.testing.assert_close(found.u[0], torch.ones(2, dtype=D), rtol=0, atol=0)
    assert found.t[0] == 0
    assert found.t[-1] == 1
    again = pickle.loads(pickle.dumps(found))
    torch.testing.assert_close(again.u1, found.u1, rtol=0, atol=0)
    torch.testing.assert_close(again.t, found.t, rtol=0, atol=0)


def test_dense_output_is_of_the_numbers_that_the_solve_saw() -> None:
    """The gradient of `exp(-r t)` is `-t exp(-r t)`; through the steps torch refuses it by then."""
    rate = torch.tensor([0.5, 2.0], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -rate * u, torch.ones(2, dtype=D), (0.0, 1.0))
    expected = (-0.3 * rate.detach()).exp()
    behind_its_back = psn.solve(problem, psn.Tsit5(), engine="julia", **TIGHT)
    rate.data.mul_(3)
    dense = behind_its_back(0.3)
    torch.testing.assert_close(dense.detach(), expected, rtol=1e-6, atol=0)
    (bar,) = torch.autograd.grad(dense.sum(), rate)
    torch.testing.assert_close(bar, -0.3 * expected, rtol=1e-5, atol=0)
    trained = psn.solve(problem, psn.Tsit5(), engine="julia", **TIGHT)
    expected = (-0.3 * rate.detach()).exp()
    with torch.no_grad():
        rate.sub_(0.25)
    dense = trained(0.3)
    torch.testing.assert_close(dense.detach(), expected, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        torch.autograd.grad(dense.sum(), rate)


def test_gradients_of_later_dense_output_are_those_of_the_field_that_was_solved() -> None:
    """A field that Julia calls back, solved by a stiff method, whose dense output is SciML's."""
    rate, factor = torch.tensor([0.5, 2.0], dtype=D, requires_grad=True), [1.0]

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -factor[0] * rate * u * (1 if float(u.detach().sum()) > -9 else 2)

    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    found = psn.solve(problem, psn.Rodas5P(), engine="julia", **TIGHT)
    factor[0] = 3.0
    for state, t in ((found(0.3), 0.3), (found.u1, 1.0)):
        (bar,) = torch.autograd.grad(state.sum(), rate)
        expected = -t * (-t * rate.detach()).exp()
        torch.testing.assert_close(bar, expected, rtol=1e-5, atol=0)
    with torch.no_grad():
        rate.mul_(3)
    with pytest.raises(RuntimeError, match="rate has been changed in place"):
        torch.autograd.grad(found(0.3).sum(), rate)


def test_the_last_state_does_not_keep_the_others() -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2, dtype=D), (0.0, 1.0))
    end = psn.solve(problem, psn.Tsit5(), engine="julia").u1
    assert end.untyped_storage().nbytes() == 2 * 8


def test_a_solve_whose_last_state_is_not_finite_fails() -> None:
    """Euler's steps of `u' = u^2` in single precision."""
    problem = psn.ODEProblem(lambda t, u: u**2, torch.full((2,), 10.0), (0.0, 10.0))
    steps = {"dt0": 0.5, "controller": psn.FixedStep(), "throw": False}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = psn.solve(problem, psn.Euler(), engine="julia", **steps)
        assert found.retcode is psn.ReturnCode.Unstable
        assert torch.isfinite(found.u1).all()
        assert len(found.t) == found.stats.naccept + 1
