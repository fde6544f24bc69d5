"""Gradients of times: the ends of the interval, saved times and stops, by closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

ADJOINTS = {
    "discrete": psn.DiscreteAdjoint(),
    "direct": psn.DirectAdjoint(),
    "interpolating": psn.InterpolatingAdjoint(),
    "gauss": psn.GaussAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS.keys())
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def ones() -> Tensor:
    return torch.ones(1, dtype=torch.float64)


@every_adjoint
@pytest.mark.parametrize(
    "options", [TIGHT, {"controller": psn.FixedStep(), "dt0": 0.125}], ids=["adaptive", "fixed"]
)
def test_the_start_with_a_list_of_saved_times(
    adjoint: psn.DiscreteAdjoint, options: dict[str, Any]
) -> None:
    """Saved times stay where they are, also where a step that moves with the start ends on one."""
    t0 = time(0.0)
    problem = psn.ODEProblem(lambda t, u: -u * (1 + 0 * t), ones(), (t0, 1.0))
    solution = psn.solve(problem, saveat=[0.3, 0.5], adjoint=adjoint, **options)
    (found,) = torch.autograd.grad(solution.u.sum(), t0)
    assert found.item() == pytest.approx(math.exp(-0.3) + math.exp(-0.5), rel=1e-5)


@every_adjoint
def test_saved_times_that_an_event_keeps_from_being_reached(adjoint: psn.DiscreteAdjoint) -> None:
    saveat = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -u, ones(), (0.0, 1.0))
    event = psn.Event(lambda t, u: u[0] - 0.6)
    solution = psn.solve(problem, saveat=saveat, events=event, adjoint=adjoint, **TIGHT)
    assert solution.u.shape == (2, 1)
    (found,) = torch.autograd.grad(solution.u.sum(), saveat)
    expected = [-math.exp(-0.2), -math.exp(-0.4), 0.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@every_adjoint
@pytest.mark.parametrize(
    "forcing",
    [lambda t: math.cos(t), lambda t: float(np.interp(t.numpy(), [0.0, 1.0], [0.5, 1.5]))],
    ids=["math", "numpy"],
)
@pytest.mark.filterwarnings("error")
def test_the_time_is_a_number_where_nobody_asks_for_its_gradient(
    adjoint: psn.DiscreteAdjoint, forcing: Callable[[Tensor], float]
) -> None:
    """`u' = k a(t) u`: `u(1) = exp(k A)` with the integral `A`, and its derivative is `A u(1)`."""
    k, integral = time(1.0), math.sin(1.0) if forcing(torch.zeros(())) == 1.0 else 1.0
    problem = psn.ODEProblem(lambda t, u: k * forcing(t) * u, ones(), (0.0, 1.0))
    u1 = psn.solve(problem, adjoint=adjoint, **TIGHT).u1
    (found,) = torch.autograd.grad(u1.sum(), k)
    assert u1.item() == pytest.approx(math.exp(integral), rel=1e-8)
    assert found.item() == pytest.approx(integral * math.exp(integral), rel=1e-8)


@pytest.mark.parametrize("saveat", [None, [0.5, 1.0]])
def test_a_random_end_is_learned_like_any_other(saveat: list[float] | None) -> None:
    end = time(1.0)
    node = psn.NeuralODE(
        lambda t, u: -u, tspan=(0.0, end), regularizers=[psn.RandomEndTime(0.2)], **TIGHT
    )
    solution = node(ones(), saveat=saveat) if saveat else node(ones())
    (found,) = torch.autograd.grad(solution.u1.sum(), end)
    assert found.item() == pytest.approx(-solution.u1.item(), rel=1e-6)


def test_stops_that_require_gradients_are_refused_with_what_gives_them() -> None:
    """A field that switches at a stop: the derivative is the jump, `f(S-) - f(S+)`."""
    stop = time(0.4)

    def part(sign: float, u: Tensor, start: Any, end: Any) -> Tensor:
        problem = psn.ODEProblem(lambda t, u: sign * torch.ones_like(u), u, (start, end))
        return psn.solve(problem).u1

    with pytest.raises(ValueError, match=r"tstops must not require gradients.*\n.*both ends"):
        psn.solve(psn.ODEProblem(lambda t, u: -u, ones(), (0.0, 1.0)), tstops=[stop])
    end = part(-1.0, part(1.0, 0 * ones(), 0.0, stop), stop, 1.0)
    (found,) = torch.autograd.grad(end.sum(), stop)
    assert found.item() == pytest.approx(2.0)


HIDING = {
    "detached": lambda t, u: torch.cos(t.detach()) * u,
    "a number": lambda t, u: math.cos(float(t.detach())) * u,
    "in part": lambda t, u: torch.cos(t.detach()) * u + 0 * t,
}


@every_adjoint
@pytest.mark.parametrize("field", HIDING.values(), ids=HIDING.keys())
@pytest.mark.parametrize(
    "options", [TIGHT, {"controller": psn.FixedStep(), "dt0": 0.01}], ids=["adaptive", "fixed"]
)
def test_the_ends_where_the_field_hides_its_time(
    adjoint: psn.DiscreteAdjoint, field: Any, options: dict[str, Any]
) -> None:
    """`f(t1, u1)` and `-(du/du0) f(t0, u0)`, whatever the field does with its time."""
    t0, t1 = time(0.1), time(1.0)
    solution = psn.solve(psn.ODEProblem(field, ones(), (t0, t1)), adjoint=adjoint, **options)
    end = math.exp(math.sin(1.0) - math.sin(0.1))
    found = torch.autograd.grad(solution.u1.sum(), (t0, t1), retain_graph=True)
    assert [x.item() for x in found] == pytest.approx(
        [-math.cos(0.1) * end, math.cos(1.0) * end], rel=1e-5
    )
    (inside,) = torch.autograd.grad(solution(0.5).sum(), t0)
    expected = -math.cos(0.1) * math.exp(math.sin(0.5) - math.sin(0.1))
    assert inside.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()], ids=["discrete", "direct"]
)
def test_what_an_entry_hides_beside_a_great_one(adjoint: psn.DiscreteAdjoint) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((-u[0], torch.cos(2 * t.detach()) - u[1]))

    t0, t1 = time(0.1), time(1.3)
    u0 = torch.tensor([1e9, 1.0], dtype=torch.float64)
    atol = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    problem = psn.ODEProblem(f, u0, (t0, t1))
    end = psn.solve(problem, rtol=1e-9, atol=atol, adjoint=adjoint).u1[1]
    found = torch.autograd.grad(end, (t0, t1))
    expected = [-math.exp(-1.2) * (math.cos(0.2) - 1), math.cos(2.6) - float(end.detach())]
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-5)


def growth(t: float, start: float) -> float:
    """The solution of `u' = cos(t) u` from 1 at a start."""
    return math.exp(math.sin(t) - math.sin(start))


@every_adjoint
@pytest.mark.parametrize("field", [lambda t, u: torch.cos(t) * u, HIDING["detached"]])
@pytest.mark.parametrize("dt0", [0.6, 0.25])
def test_dense_output_beside_the_ends(adjoint: psn.Adjoint, field: Any, dt0: float) -> None:
    """In the first step it moves with the start; the ends are themselves, asked for alone or not.

    At the start the solution is `u0`, and at the end it moves along `f`.
    """
    t0, t1 = time(0.1), time(0.7)
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": dt0, "adjoint": adjoint}
    solution = psn.solve(psn.ODEProblem(field, ones(), (t0, t1)), psn.Vern9(), **options)
    for times in ([0.1], [0.2], [0.6], [0.7], [0.1, 0.2, 0.6, 0.7]):
        rows = solution(torch.tensor(times, dtype=torch.float64))
        for t, row in zip(times, rows, strict=True):
            found = torch.autograd.grad(
                row.sum() + 0 * (t0 + t1), (t0, t1), retain_graph=True, allow_unused=True
            )
            expected = [
                -math.cos(0.1) * growth(t, 0.1) if t > 0.1 else 0.0,
                math.cos(0.7) * growth(0.7, 0.1) if t == 0.7 else 0.0,
            ]
            assert [float(x) for x in found if x is not None] == pytest.approx(expected, abs=1e-6)
    assert (solution.u[0] + 0 * t0).requires_grad
    (start,) = torch.autograd.grad((solution.u[0] + 0 * t0).sum(), t0)
    assert start.item() == 0.0


@every_adjoint
def test_dense_output_in_the_first_step_after_an_event(adjoint: psn.Adjoint) -> None:
    """`u = k + (t - k) / 2` where the rate halves at the level `k`: alone and as members."""
    level = time(0.4)
    problem = psn.ODEProblem(
        lambda t, u: u[1:] * torch.tensor([1.0, 0.0]).double(),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        (0.0, 1.0),
    )
    slower = psn.Event(lambda t, u: u[0] - level, affect=lambda t, u: u * torch.tensor([1.0, 0.5]))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.3, "adjoint": adjoint}
    many = psn.EnsembleProblem(problem, torch.stack((problem.u0, problem.u0)))
    for solution in (
        psn.solve(problem, events=slower, **options),
        psn.solve(many, events=slower, **options).solutions[1],
    ):
        for t in (0.45, 0.6, 0.9):
            (found,) = torch.autograd.grad(solution(t)[0], level, retain_graph=True)
            assert found.item() == pytest.approx(0.5, rel=1e-8)


@pytest.mark.parametrize("name", ["seen", "detached"])
def test_native_solves_of_fields_that_hide_their_time(name: str) -> None:
    """Native code has the derivatives of the ends that the loop in Python has."""
    if not available()[0]:
        pytest.skip(available()[1])
    field = HIDING.get(name, lambda t, u: torch.cos(t) * u)
    t0, t1 = time(0.1), time(0.7)
    problem = psn.ODEProblem(field, ones(), (t0, t1))
    solution = psn.solve(problem, saveat=[0.1, 0.4, 0.7], compile=True, **TIGHT)
    inside, end = -math.cos(0.1) * growth(0.4, 0.1), growth(0.7, 0.1)
    rates = [-math.cos(0.1) * end, math.cos(0.7) * end]
    for value, expected in (
        (solution.u1, rates),
        (solution.u[2], rates),
        (solution.u[1], [inside, 0.0]),
        (solution.u[0], [0.0, 0.0]),
        (solution(0.4), [inside, 0.0]),
        (solution(0.7), rates),
    ):
        found = torch.autograd.grad(value.sum(), (t0, t1), retain_graph=True, allow_unused=True)
        assert [float(x or 0) for x in found] == pytest.approx(expected, abs=1e-6)


@every_adjoint
def test_saved_times_on_the_ends_of_the_interval(adjoint: psn.DiscreteAdjoint) -> None:
    """A solution moves along `f` with the time at which it is asked for, there as anywhere."""
    saveat = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -u * (1 + 0 * t), ones(), (0.0, 1.0))
    solution = psn.solve(problem, saveat=saveat, adjoint=adjoint, **TIGHT)
    (found,) = torch.autograd.grad(solution.u.sum(), saveat)
    assert found.tolist() == pytest.approx([-math.exp(-t) for t in (0, 0.5, 1)], rel=1e-6)


@every_adjoint
def test_the_event_of_a_field_that_hides_its_time(adjoint: psn.DiscreteAdjoint) -> None:
    t0 = time(0.1)
    problem = psn.ODEProblem(lambda t, u: torch.cos(t.detach()) + 0 * u, 0 * ones(), (t0, 1.4))
    event = psn.Event(lambda t, u: u[0] - 0.5)
    solution = psn.solve(problem, events=event, adjoint=adjoint, **TIGHT)
    at = math.asin(0.5 + math.sin(0.1))
    assert solution.event_t.item() == pytest.approx(at, rel=1e-7)
    (found,) = torch.autograd.grad(solution.event_t, t0)
    assert found.item() == pytest.approx(math.cos(0.1) / math.cos(at), rel=1e-5)


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_times_that_change_after_a_solve_were_what_they_were(
    members: bool, learned: bool, compile: bool
) -> None:
    """As an optimizer changes them, in place."""
    if compile and not available()[0]:
        pytest.skip(available()[1])
    start, end = time(0.1), time(1.0)
    span = torch.tensor([0.1, 1.0], dtype=torch.float64)
    saveat = torch.tensor([0.4, 0.9], dtype=torch.float64)
    problem: Any = psn.ODEProblem(lambda t, u: t * u, ones(), (start, end))
    if members:
        saveat = torch.stack((saveat, saveat))
        span = torch.stack((span, span)).requires_grad_(learned)
        problem = psn.EnsembleProblem(problem, torch.ones(2, 1, dtype=torch.float64), tspan=span)
    for x in (start, end):
        x.requires_grad_(learned and not members)
    saveat.requires_grad_(learned and not (compile and members))
    adjoint = psn.DiscreteAdjoint() if compile else psn.DirectAdjoint()
    solution = psn.solve(problem, saveat=saveat, adjoint=adjoint, compile=compile, **TIGHT)
    with torch.no_grad():
        for x in (start, end, span, saveat):
            x *= 0.5
    one = solution[1] if members else solution
    assert solution.t.tolist() == ([[0.4, 0.9]] * 2 if members else [0.4, 0.9])
    assert one.t.tolist() == [0.4, 0.9]
    times = torch.tensor([0.2, 0.75, 0.95], dtype=torch.float64)
    expected = ((times**2 - 0.01) / 2).exp()[:, None]
    with torch.no_grad():
        torch.testing.assert_close(one(times), expected, rtol=1e-7, atol=0)
    assert one.step_times[0] == 0.1
    assert one.step_times[-1] == 1.0


@every_adjoint
@pytest.mark.parametrize("effect", [None, lambda t, u: 3 * u])
@pytest.mark.parametrize("end", [0.5, 1.0])
def test_a_saved_time_on_an_event_that_ends_the_solve(
    adjoint: psn.Adjoint, effect: Any, end: float
) -> None:
    """It moves along the field, as on any end of the interval."""
    saveat = torch.tensor([0.25, end], dtype=torch.float64, requires_grad=True)
    event = psn.Event(at=[end], affect=effect, terminal=True)
    problem = psn.ODEProblem(lambda t, u: -u, ones(), (0.0, 1.0))
    solution = psn.solve(problem, saveat=saveat, adjoint=adjoint, events=event, **TIGHT)
    (found,) = torch.autograd.grad(solution.u.sum(), saveat)
    after = math.exp(-end) * (3 if effect else 1)
    assert found.tolist() == pytest.approx([-math.exp(-0.25), -after], rel=1e-6)
