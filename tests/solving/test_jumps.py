"""Events that change the state: closed forms of states, times and gradients."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from bouncing import (
    TIGHT,
    assert_both_sides_of_a_jump,
    assert_twenty_bounces,
    bounces,
    bouncing,
    fall,
    leaf,
)
from torch import Tensor

import pysciml_node as psn
from pysciml_node.steps import contents
from pysciml_node.steps import guard as guards

ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
]
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


@every_adjoint
def test_twenty_bounces_with_their_gradients(adjoint: psn.DiscreteAdjoint) -> None:
    assert_twenty_bounces(adjoint=adjoint)


def test_both_sides_of_a_jump_are_kept_and_the_later_one_counts() -> None:
    h, g, e = (x.detach() for x in (leaf(2.0), leaf(9.81), leaf(0.9)))
    solution = bouncing(h, g, e, 1.5)
    (first, *_) = solution.jumps
    assert_both_sides_of_a_jump(solution)
    torch.testing.assert_close(first.after[1], -0.9 * first.before[1])
    times = torch.tensor([1.4, 0.1, 0.9, 0.3], dtype=torch.float64)
    rows = torch.stack([solution(t) for t in times])
    torch.testing.assert_close(solution(times), rows, rtol=1e-12, atol=1e-12)
    assert len(solution.step_times) == len(solution.step_errors) + 1
    assert bool((solution.step_times.diff() > 0).all())
    assert solution.retcode is psn.ReturnCode.Success
    assert solution.stats.naccept == len(solution.step_errors)


RATE = 0.7
DOSES = [0.0, 1.0, 2.5, 2.5, 4.0]


def concentration(t: Tensor, dose: Tensor, rate: Tensor, doses: list[float] | Tensor) -> Tensor:
    """After equal doses of a drug that decays, right-continuous."""
    times = torch.as_tensor(doses, dtype=torch.float64)
    given = times <= t[:, None]
    return (dose * torch.where(given, torch.exp(-rate * (t[:, None] - times)), 0.0)).sum(1)


@every_adjoint
def test_doses_against_their_closed_form(adjoint: psn.DiscreteAdjoint) -> None:
    dose, rate = leaf(1.5), leaf(RATE)
    saveat = torch.tensor([0.0, 0.5, 1.0, 2.5, 3.0, 4.0], dtype=torch.float64)
    problem = psn.ODEProblem(
        lambda t, u, p: -p * u, torch.zeros(1, dtype=torch.float64), (0.0, 4.0), p=rate
    )
    event = psn.Event(at=DOSES, affect=lambda t, u, p: u + dose)
    solution = psn.solve(problem, events=event, saveat=saveat, adjoint=adjoint, **TIGHT)
    exact = concentration(saveat, dose, rate, DOSES)
    torch.testing.assert_close(solution.t, saveat)
    torch.testing.assert_close(solution.u[:, 0], exact, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(solution.u1, solution.u[-1])
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    one = torch.autograd.grad(solution.u[:, 0] @ weights, (dose, rate))
    other = torch.autograd.grad(exact @ weights, (dose, rate))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@every_adjoint
def test_times_of_doses_receive_gradients(adjoint: psn.DiscreteAdjoint) -> None:
    times, rate = leaf(0.5, 2.0), leaf(RATE)
    problem = psn.ODEProblem(
        lambda t, u, p: -p * u, torch.ones(1, dtype=torch.float64), (0.0, 3.0), p=rate
    )
    event = psn.Event(at=times, affect=lambda t, u, p: 1.5 * u + 1.0 + t)
    solution = psn.solve(problem, events=event, adjoint=adjoint, **TIGHT)
    u, now = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in times:
        u, now = 1.5 * u * torch.exp(-rate * (t - now)) + 1.0 + t, t
    exact = u * torch.exp(-rate * (3.0 - now))
    torch.testing.assert_close(solution.u1, exact, rtol=1e-9, atol=0)
    one = torch.autograd.grad(solution.u1.sum(), (times, rate))
    other = torch.autograd.grad(exact.sum(), (times, rate))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_simultaneous_events_in_their_order() -> None:
    """Given times first, then conditions as listed; each sees what the one before has left."""
    events = [
        psn.Event(lambda t, u: t - 1, affect=lambda t, u: 10 * u),
        psn.Event(lambda t, u: 2 * (t - 1), affect=lambda t, u: u + 1),
        psn.Event(at=[1.0], affect=lambda t, u: u + 2),
    ]
    problem = psn.ODEProblem(lambda t, u: 0 * u, torch.ones(1, dtype=torch.float64), (0.0, 2.0))
    solution = psn.solve(problem, events=events)
    assert [jump.event for jump in solution.jumps] == [2, 0, 1]
    assert float(solution.u1) == 31.0


def test_terminal_events_end_after_their_effect() -> None:
    ending = psn.Event(lambda t, u: u[0] - 2, affect=lambda t, u: 0 * u, terminal=True)
    problem = psn.ODEProblem(lambda t, u: u, torch.ones(1, dtype=torch.float64), (0.0, 3.0))
    solution = psn.solve(problem, events=ending, saveat=[0.5, 2.0], **TIGHT)
    assert solution.retcode is psn.ReturnCode.Terminated
    assert solution.event == 0
    torch.testing.assert_close(
        float(solution.event_t), float(torch.log(torch.tensor(2.0).double()))
    )
    assert float(solution.u1) == 0.0
    assert solution.t.tolist() == [0.5]


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize(
    "event",
    [
        psn.Event(lambda t, u: u[0] - 0.5, affect=lambda t, u: 2 * u, terminal=True),
        psn.Event(at=[0.5], terminal=True),
    ],
    ids=["condition", "time"],
)
def test_an_end_before_all_output_times_saves_nothing(event: psn.Event, members: bool) -> None:
    problem: Any = psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (0.0, 2.0))
    if members:
        problem = psn.EnsembleProblem(problem, torch.ones(2, 1, dtype=torch.float64))
    solution = psn.solve(problem, events=event, saveat=[1.5, 2.0], **TIGHT)
    one = solution[0] if members else solution
    assert one.retcode is psn.ReturnCode.Terminated
    assert one.u.shape == (0, 1)
    assert one.t.shape == (0,)
    end = 1.0 if event.affect else torch.exp(torch.tensor(-0.5))
    assert float(one.u1) == pytest.approx(float(end), rel=1e-7)


def test_events_that_are_only_noted_change_nothing() -> None:
    def swing(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((u[1], -u[0]))

    start = torch.tensor([0.0, 1.0], dtype=torch.float64)
    problem = psn.ODEProblem(swing, start, (0.0, 10.0))
    solution = psn.solve(problem, events=psn.Event(lambda t, u: u[0], terminal=False), **TIGHT)
    crossings = torch.stack([jump.t for jump in solution.jumps])
    exact = torch.pi * torch.arange(1, 4, dtype=torch.float64)
    torch.testing.assert_close(crossings, exact, rtol=1e-9, atol=0)
    assert bool((solution.t.diff() > 0).all())
    ten = torch.tensor(10.0, dtype=torch.float64)
    torch.testing.assert_close(solution.u1, torch.stack((ten.sin(), ten.cos())), rtol=0, atol=1e-8)


def test_backward_in_time() -> None:
    problem = psn.ODEProblem(lambda t, u: u, torch.ones(1, dtype=torch.float64), (2.0, 0.0))
    event = psn.Event(at=[0.5, 1.5], affect=lambda t, u: u + 1)
    solution = psn.solve(problem, events=event, saveat=[1.5, 0.5, 0.0], **TIGHT)
    e = torch.exp(torch.tensor([-0.5, -1.0, -0.5], dtype=torch.float64))
    first = e[0] + 1
    second = first * e[1] + 1
    exact = torch.stack((first, second, second * e[2]))
    torch.testing.assert_close(solution.u[:, 0], exact, rtol=1e-9, atol=0)


def test_states_of_several_parts_fixed_steps_and_what_is_changed_in_place() -> None:
    def moving(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": u["v"], "v": 0 * u["v"]}

    def turn(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        u["v"].mul_(-1)
        return u

    start = {"x": torch.zeros(3, dtype=torch.float64), "v": torch.ones(3, dtype=torch.float64)}
    event = psn.Event(lambda t, u: u["x"].max() - 0.55, affect=turn, direction=1)
    solution = psn.solve(
        psn.ODEProblem(moving, start, (0.0, 1.0)),
        psn.RK4(),
        events=event,
        controller=psn.FixedStep(),
        dt0=0.1,
    )
    torch.testing.assert_close(solution.u1["x"], torch.full((3,), 0.1, dtype=torch.float64))
    (jump,) = solution.jumps
    assert float(jump.before["v"][0]) == 1.0
    assert float(jump.after["v"][0]) == -1.0


def test_members_have_events_of_their_own() -> None:
    heights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor(9.81, dtype=torch.float64)
    bounce = psn.Event(
        lambda t, u: u[0], direction=-1, affect=lambda t, u, p: u * u.new_tensor([1.0, -0.8])
    )
    start = torch.stack((heights, torch.zeros(3, dtype=torch.float64)), 1)
    problem = psn.ODEProblem(fall, start[0].detach(), (0.0, 1.0), p=g)
    solution = psn.solve(psn.EnsembleProblem(problem, u0=start), events=bounce, **TIGHT)
    times = torch.stack([member.jumps[0].t for member in solution])
    torch.testing.assert_close(times, torch.sqrt(2 * heights / g), rtol=1e-10, atol=0)
    (one,) = torch.autograd.grad(solution.u1.sum(), heights)
    other = [
        torch.autograd.grad(bouncing(h, g, g.new_tensor(0.8), 1.0).u1.sum(), h)[0]
        for h in heights.detach().clone().unbind()
        if h.requires_grad_() is not None
    ]
    torch.testing.assert_close(one, torch.stack(other), rtol=1e-8, atol=1e-8)


def test_stages_of_dense_output_keep_their_graph() -> None:
    # The search reads dense output, whose last stage is the first one of the step that follows.
    def gradient(adjoint: psn.DiscreteAdjoint) -> Tensor:
        start = leaf(1.0, 0.0)
        problem = psn.ODEProblem(lambda t, u: torch.stack((u[1], -u[0])) + t, start, (0.0, 3.0))
        event = psn.Event(lambda t, u: u[0] - 1.5, affect=lambda t, u: 0.9 * u)
        solution = psn.solve(problem, psn.Vern7(), events=event, adjoint=adjoint, **TIGHT)
        assert solution.jumps
        return torch.autograd.grad(solution.u1.sum(), start)[0]

    discrete, direct = gradient(psn.DiscreteAdjoint()), gradient(psn.DirectAdjoint())
    torch.testing.assert_close(direct, discrete, rtol=1e-9, atol=1e-9)


def test_layers_with_integrals_and_local_penalties() -> None:
    field = torch.nn.Linear(2, 2).double()
    node = psn.NeuralODE(
        lambda t, u: field(u),
        events=psn.Event(at=[0.5], affect=lambda t, u: 2 * u),
        regularizers=[psn.KineticEnergy(1.0), psn.LocalError(weight=1.0), psn.GlobalError(1.0)],
        **TIGHT,
    )
    u0 = torch.randn(4, 2, dtype=torch.float64)
    solution = node(u0)
    half = psn.NeuralODE(
        lambda t, u: field(u), tspan=(0.0, 0.5), regularizers=[psn.KineticEnergy(1.0)], **TIGHT
    )
    first = half(u0)
    second = half(2 * first.u1)
    torch.testing.assert_close(solution.u1, second.u1, rtol=1e-8, atol=1e-9)
    both = first.penalties["KineticEnergy"] + second.penalties["KineticEnergy"]
    torch.testing.assert_close(solution.penalties["KineticEnergy"], both, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(solution.jumps[0].after, 2 * first.u1, rtol=1e-8, atol=1e-9)
    solution.penalty.backward()
    assert field.weight.grad is not None


def test_solutions_with_jumps_travel() -> None:
    h, g, e = leaf(2.0), leaf(9.81), leaf(0.9)
    solution = bouncing(h, g, e, 1.0)
    solution.u1.sum().backward()
    assert solution.stats.nfe_backward > 0
    for other in (copy.deepcopy(solution), pickle.loads(pickle.dumps(solution)), solution.detach()):
        torch.testing.assert_close(other.u1, solution.u1.detach())
        torch.testing.assert_close(other.jumps[0].t, solution.jumps[0].t.detach())
        assert other.stats.asdict() == solution.stats.asdict()
        assert not other.jumps[0].after.requires_grad


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({}, "has a condition or times, but neither"),
        ({"condition": lambda t, u: u[0], "at": [1.0]}, "both"),
        ({"at": [1.0], "direction": 1}, "direction is for conditions"),
        ({"at": [1.0], "affect": 3}, "affect must be callable"),
    ],
)
def test_events_that_make_no_sense(event: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        psn.Event(**event)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (psn.Event(at=[3.0], affect=lambda t, u: u), r"inside tspan(.|\n)*Widen"),
        (psn.Event(at=[0.5], affect=lambda t, u, p: u), "affect must be callable"),
        (psn.Event(at=[0.5], affect=lambda t, u: u[:1]), r"like u0(.|\n)*Return the new state"),
        (psn.Event(at=[0.5], affect=lambda t, u: None), r"like u0(.|\n)*Return the new state"),
        (psn.Event(at=[0.0], terminal=True), "nothing to solve"),
    ],
)
def test_events_that_do_not_fit_the_problem(event: psn.Event, message: str) -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2, dtype=torch.float64), (0.0, 1.0))
    with pytest.raises((TypeError, ValueError), match=message):
        psn.solve(problem, events=event)


def test_a_failure_between_jumps_is_a_failure() -> None:
    problem = psn.ODEProblem(lambda t, u: u**2, torch.ones(1, dtype=torch.float64), (0.0, 2.0))
    event = psn.Event(at=[0.5], affect=lambda t, u: u)
    with pytest.raises(psn.SolverFailure) as failure:
        psn.solve(problem, events=event)
    assert abs(failure.value.solution.t[-1] - 1.0) < 1e-3
    solution = psn.solve(problem, events=event, saveat=[0.25, 0.75, 1.5], throw=False)
    assert solution.t.tolist() == [0.25, 0.75]


def test_steps_of_all_pieces_count() -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (0.0, 10.0))
    event = psn.Event(at=list(range(1, 10)), affect=lambda t, u: u + 1)
    solution = psn.solve(problem, events=event, max_steps=7, throw=False)
    assert solution.retcode is psn.ReturnCode.MaxIters
    assert solution.stats.naccept + solution.stats.nreject <= 8


def test_the_bounces_of_a_ball_pile_up_at_a_time_of_their_own() -> None:
    # The flights shrink by a half: they end at 3 sqrt(2 h / g), after infinitely many bounces.
    h, g, e = (x.detach() for x in (leaf(1.0), leaf(9.8), leaf(0.5)))
    with pytest.raises(psn.SolverFailure, match=r"(?s)again and again.*terminal event") as caught:
        bouncing(h, g, e, 50.0)
    solution = caught.value.solution
    assert solution.retcode is psn.ReturnCode.DtLessThanMin
    found = torch.stack([jump.t for jump in solution.jumps])
    times, _ = bounces(h, g, e, len(found))
    assert len(found) > 40
    torch.testing.assert_close(found, times, rtol=1e-13, atol=0)
    torch.testing.assert_close(solution.t[-1], 3 * torch.sqrt(2 * h / g), rtol=1e-13, atol=0)
    assert float(solution.u[:, 0].min()) > -1e-12


def test_events_without_an_end_run_into_max_steps() -> None:
    fire = psn.Event(lambda t, u: u[0] - 0.25, affect=lambda t, u: 0 * u)
    problem = psn.ODEProblem(lambda t, u: 1 + 0 * u, torch.zeros(1).double(), (0.0, 1e9))
    solution = psn.solve(problem, events=fire, max_steps=25, throw=False)
    assert solution.retcode is psn.ReturnCode.MaxIters
    assert solution.stats.naccept + solution.stats.nreject == 25
    assert bool((solution.step_times.diff() > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_output_counts_the_jump_at_the_end_and_at_rounded_times(dtype: torch.dtype) -> None:
    dose = psn.Event(at=[0.7, 1.0], affect=lambda t, u: u + 1)
    start = torch.ones(1, dtype=dtype, requires_grad=True)
    solution = psn.solve(psn.ODEProblem(lambda t, u: -u, start, (0.0, 1.0)), events=dose)
    saved = psn.solve(solution.problem, events=dose, saveat=[0.7, 1.0])
    times = torch.tensor([0.7, 1.0], dtype=dtype)
    torch.testing.assert_close(solution(times), saved.u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solution(1.0), solution.u1, rtol=0, atol=0)
    torch.testing.assert_close(solution.detach()(1.0), solution.u1.detach(), rtol=0, atol=0)
    (by_start,) = torch.autograd.grad(solution(1.0).sum(), start)
    torch.testing.assert_close(by_start, torch.exp(-torch.ones_like(start)), rtol=1e-5, atol=0)


def test_a_failed_piece_is_saved_once() -> None:
    dose = psn.Event(at=[0.5], affect=lambda t, u: u + 1)
    problem = psn.ODEProblem(lambda t, u: u**2, torch.ones(1).double(), (0.0, 3.0))
    solution = psn.solve(problem, events=dose, throw=False)
    assert not solution.success
    assert solution.t.tolist().count(0.5) == 2
    assert bool((solution.t[solution.t > 0.5].diff() > 0).all())


def test_integrals_over_pieces_that_are_shorter_than_an_interval_may_be() -> None:
    """Single precision tells fewer than 1000 times apart between these jumps."""
    node = psn.NeuralODE(
        lambda t, u: torch.ones_like(u),
        events=psn.Event(at=[0.5, 0.50001], affect=lambda t, u: u + 1),
        regularizers=[psn.KineticEnergy(1.0)],
    )
    solution = node(torch.zeros(1, 2))
    torch.testing.assert_close(solution.u1, torch.full((1, 2), 3.0))
    torch.testing.assert_close(solution.penalties["KineticEnergy"], torch.tensor(1.0))


@pytest.mark.parametrize("changed", ["factor", "scale", "p"])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("members", [True, False])
def test_what_events_read_is_as_it_was_or_refused(
    changed: str, members: bool, counted: bool
) -> None:
    """`u' = -u` falls to `1 / (2 factor)` at `log(2 factor u0)`, and is multiplied by `scale p`."""
    factor, scale, p = leaf(1.2), leaf(0.5), leaf(0.8)
    u0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    event = psn.Event(
        lambda t, u: factor * u[0] - 0.5, direction=-1, affect=lambda t, u, p: scale * p * u
    )
    problem: Any = psn.ODEProblem(lambda t, u, p: -u, u0, (0.0, 1.0), p=p)
    if members:
        problem = psn.EnsembleProblem(problem, u0=torch.stack((u0, 1.1 * u0)))
    solution = psn.solve(problem, events=event, **TIGHT)
    one = solution[0] if members else solution
    value = one.jumps[0].t + one.u1.sum()
    right = pytest.approx(1 + 0.4 * math.exp(-1), rel=1e-6)
    (slope,) = torch.autograd.grad(value, u0, retain_graph=True)
    assert slope.item() == right
    number = {"factor": factor, "scale": scale, "p": p}[changed]
    with torch.no_grad():
        (number if counted else number.data).mul_(3)
    with pytest.raises(RuntimeError, match=f"{changed} has been changed in place since"):
        torch.autograd.grad(value, u0)


@pytest.mark.parametrize("members", [True, False])
def test_events_note_what_their_graphs_read_of_a_large_module(
    members: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`affect` is a method of a module: of its parameters each event looks at the one it uses."""
    net = torch.nn.Module()
    net.factor, net.large = torch.nn.Parameter(torch.tensor(0.9)), torch.nn.Linear(100, 100)
    noted: list[torch.Tensor] = []

    class Noting(contents.Contents):
        def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
            noted.extend(given := [*tensors])
            super().__init__(given)

    monkeypatch.setattr(guards, "Contents", Noting)

    def affect(t: Any, u: Any) -> Any:
        return net.factor * u if net.large is not None else u

    u0 = torch.ones(1, requires_grad=True)
    problem: Any = psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0))
    if members:
        problem = psn.EnsembleProblem(problem, u0=u0.expand(2, 1))
    u1 = psn.solve(problem, events=psn.Event(at=[0.3, 0.6], affect=affect)).u1
    (slope,) = torch.autograd.grad(u1.sum(), net.factor)
    assert slope.item() == pytest.approx((1 + members) * 2 * 0.9 * math.exp(-1), rel=1e-5)
    assert [x for x in noted if x.numel() > 1] == []
    assert sum(x is net.factor for x in noted) >= 2
