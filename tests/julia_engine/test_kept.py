"""What small prepared solves work with is kept: nothing may tell later ones from the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.julia

D = torch.float64
WAYS: list[tuple[Any, dict[str, Any]]] = [
    (psn.Euler(), {"dt0": 0.13, "controller": psn.FixedStep()}),
    (psn.BS3(), {"rtol": 1e-5, "atol": 1e-5, "controller": psn.PIDController()}),
    (psn.RK4(), {"dt0": 0.01, "controller": psn.IController()}),
    (psn.DP5(), {"saveat": [0.0, 0.2, 0.35, 1.5]}),
    (psn.Tsit5(), {"saveat": [0.2, 0.35, 1.5], "tstops": [0.35]}),
    (psn.Vern7(), {"saveat": [0.2, 0.35, 1.5], "rtol": 1e-9, "atol": 1e-9}),
]


class Net(nn.Module):
    """A small field that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=D, generator=generator))
        self.rate = nn.Parameter(torch.tensor([0.5, 2.0], dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`."""
        return torch.tanh(self.weight @ torch.cat((u, t.reshape(1)))) - self.rate * torch.sin(u)


def solved(field: nn.Module, u0: Tensor, way: Any, sign: float = 1.0) -> list[Tensor]:
    """States, times, errors and counts of a solve, with its gradients behind them."""
    algorithm, options = way
    along = {
        key: [sign * t for t in options[key]] for key in ("saveat", "tstops") if key in options
    }
    u0 = u0.clone().requires_grad_()
    problem = psn.ODEProblem(field, u0, (0.0, 1.5 * sign))
    found = psn.solve(problem, algorithm, engine="julia", throw=False, **{**options, **along})
    loss = found.u.pow(2).sum() + found.u1.sum()
    gradients = torch.autograd.grad(loss, (u0, *field.parameters()))
    stats = found.stats.nfe, found.stats.naccept, found.stats.nreject
    errors = torch.tensor(found.trajectory.errors, dtype=D).nan_to_num(-1.0)
    return [found.u.detach(), found.t, found.u1.detach(), errors, torch.tensor(stats), *gradients]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: type(way[0]).__name__)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_later_solves_are_those_of_a_new_integrator(way: Any, sign: float) -> None:
    """The first solve of each new field has one of its own; the others follow one another."""
    field = Net()
    starts = [torch.tensor([0.3 + 0.4 * k, 1.0 - 0.7 * k], dtype=D) for k in (0, 1, 2, 1)]
    solved(field, starts[0], way, sign)
    later = [solved(field, start, way, sign) for start in starts]
    copies = [[x.clone() for x in found] for found in later]
    solved(field, -starts[0], way, sign)
    torch.testing.assert_close(later, copies, rtol=0, atol=0)  # nothing is written to again
    for start, found in zip(starts, later, strict=True):
        expected = solved(Net(), start, way, sign)
        torch.testing.assert_close(found[:5], expected[:5], rtol=0, atol=0)
        torch.testing.assert_close(found[5:], expected[5:], rtol=1e-12, atol=1e-12)


def test_nothing_is_left_of_solves_that_fail() -> None:
    """`u' = a u^2` from 1 to `1 / (1 - a)`; from 4 there is no solution, and from NaN no step."""
    factor = nn.Parameter(torch.tensor(0.5, dtype=D))

    def solve(u0: float, start: Tensor = factor, **options: Any) -> Any:
        problem = psn.ODEProblem(
            lambda t, u, p: p * u**2, torch.tensor([u0], dtype=D), (0.0, 1.0), start
        )
        return psn.solve(problem, engine="julia", throw=False, rtol=1e-9, atol=1e-9, **options)

    with torch.no_grad():
        solve(1.0)
        expected = solve(1.0)
        assert expected.u1.item() == pytest.approx(2.0, rel=1e-8)
        for u0 in (float("nan"), 4.0, 1e200):
            assert not solve(u0, max_steps=200).success
            assert not solve(u0).success
        again = solve(1.0)
    assert torch.equal(again.u, expected.u)
    assert again.stats.nfe == expected.stats.nfe


def test_numbers_of_parameters_are_those_of_the_solve() -> None:
    rate = torch.tensor([1.0], dtype=D)
    problem = psn.ODEProblem(lambda t, u, p: -p * u, torch.ones(1, dtype=D), (0.0, 1.0), rate)
    for value in (1.0, 1.0, 2.0, 0.0, -1.0):
        rate.fill_(value)
        end = psn.solve(problem, engine="julia", rtol=1e-10, atol=1e-10).u1
        torch.testing.assert_close(end, torch.exp(-rate), rtol=1e-8, atol=0)
