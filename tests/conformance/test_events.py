"""Events on every engine: where they stop a solve, what is saved, how their times move."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

GROUND = psn.Event(lambda t, u: u[0], direction=-1)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def fall(t: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """Height and velocity under gravity."""
    return torch.stack((u[1], -g))


def leaves() -> tuple[Tensor, Tensor]:
    u0 = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
    return u0, torch.tensor(9.81, dtype=torch.float64, requires_grad=True)


def landing(u0: Tensor, g: Tensor) -> Tensor:
    return (u0[1] + torch.sqrt(u0[1] ** 2 + 2 * g * u0[0])) / g


@pytest.mark.parametrize(
    "adjoint", [None, psn.InterpolatingAdjoint()], ids=["default", "continuous"]
)
def test_landing_time_and_velocity_with_their_gradients(
    adjoint: psn.InterpolatingAdjoint | None, engine: str
) -> None:
    u0, g = leaves()
    problem = psn.ODEProblem(fall, u0, (0.0, 5.0), p=g)
    solution = psn.solve(problem, events=GROUND, adjoint=adjoint, engine=engine, **TIGHT)
    assert solution.retcode is psn.ReturnCode.Terminated
    assert solution.event == 0
    assert solution.event_t is not None
    time = landing(u0, g)
    torch.testing.assert_close(solution.event_t, time, rtol=1e-9, atol=0)
    velocity = u0[1] - g * time
    torch.testing.assert_close(solution.u1[1], velocity, rtol=1e-9, atol=0)
    found = torch.autograd.grad(solution.event_t + solution.u1[1], (u0, g))
    expected = torch.autograd.grad(time + velocity, (u0, g))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_what_is_saved_ends_with_the_event(engine: str) -> None:
    u0, g = (x.detach() for x in leaves())
    times = torch.linspace(0.0, 5.0, 51, dtype=torch.float64)
    problem = psn.ODEProblem(fall, u0, (0.0, 5.0), p=g)
    solution = psn.solve(problem, events=GROUND, saveat=times, engine=engine, **TIGHT)
    count = int(torch.floor(landing(u0, g) / 0.1)) + 1
    assert solution.u.shape == (count, 2)
    t = times[:count]
    height = u0[0] + u0[1] * t - g * t**2 / 2
    torch.testing.assert_close(solution.u[:, 0], height, rtol=1e-8, atol=1e-8)


def test_the_first_of_several_events_stops(engine: str) -> None:
    u0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    events = [psn.Event(lambda t, u, c=c: u[0] - c) for c in (-0.5, 0.5)]
    problem = psn.ODEProblem(lambda t, u: torch.stack((u[1], -u[0])), u0, (0.0, 10.0))
    solution = psn.solve(problem, events=events, engine=engine, **TIGHT)
    assert solution.event == 1
    assert solution.event_t is not None
    assert float(solution.event_t) == pytest.approx(math.pi / 3, rel=1e-9)


def test_no_event_no_stop(engine: str) -> None:
    problem = psn.ODEProblem(lambda t, u: u, torch.ones(1, dtype=torch.float64), (0.0, 1.0))
    solution = psn.solve(problem, events=psn.Event(lambda t, u: u[0]), engine=engine)
    assert solution.success
    assert solution.event is None


@pytest.mark.parametrize(
    "adjoint", [None, psn.InterpolatingAdjoint()], ids=["default", "continuous"]
)
def test_bounces_and_doses_with_their_gradients(
    adjoint: psn.InterpolatingAdjoint | None, engine: str
) -> None:
    """A ball that bounces and is pushed at t = 1, against its closed form."""
    u0, g = leaves()
    push = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    events = [
        psn.Event(
            lambda t, u: u[0],
            direction=-1,
            affect=lambda t, u, p: torch.stack((u[0], -0.9 * u[1])),
        ),
        psn.Event(at=[1.0], affect=lambda t, u, p: torch.stack((u[0], u[1] + push))),
    ]
    problem = psn.ODEProblem(fall, u0, (0.0, 1.5), p=g)
    solution = psn.solve(
        problem, events=events, adjoint=adjoint, engine=engine, saveat=[0.5, 1.0], **TIGHT
    )
    time = landing(u0, g)
    speed = -0.9 * (u0[1] - g * time)
    rest = 1.0 - time
    pushed = torch.stack((speed * rest - g * rest**2 / 2, speed - g * rest + push))
    exact = torch.stack((pushed[0] + pushed[1] * 0.5 - g * 0.125, pushed[1] - g * 0.5))
    assert [jump.event for jump in solution.jumps] == [0, 1]
    torch.testing.assert_close(solution.jumps[0].t, time, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.u[1], pushed, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.u1, exact, rtol=1e-8, atol=1e-8)
    one = torch.autograd.grad(solution.u1.sum() + solution.jumps[0].t, (u0, g, push))
    other = torch.autograd.grad(exact.sum() + time, (u0, g, push))
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, "auto"], ids=["", "compile"])
def test_a_jump_over_a_threshold_is_no_crossing(engine: str, compiled: Any) -> None:
    """A dose lifts a decaying amount above 2; only its way down through 2 is a crossing."""
    dose = psn.Event(at=[1.0], affect=lambda t, u: u + 2.0)
    passing = psn.Event(lambda t, u: u[0] - 2.0, terminal=False)
    start = torch.ones(1, dtype=torch.float64)
    problem = psn.ODEProblem(lambda t, u: -u, start, (0.0, 3.0))
    compiled = compiled if engine == "torch" else False
    solution = psn.solve(problem, events=[dose, passing], engine=engine, compile=compiled, **TIGHT)
    assert [jump.event for jump in solution.jumps] == [0, 1]
    down = 1 + math.log((math.exp(-1) + 2) / 2)
    assert float(solution.jumps[1].t) == pytest.approx(down, rel=1e-9)


def test_bounces_that_pile_up_end_at_their_time(engine: str) -> None:
    """A ball that loses half its speed at each bounce has bounced for good at 3 sqrt(2 h / g)."""
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    g = torch.tensor(9.81, dtype=torch.float64)
    bounce = psn.Event(
        lambda t, u: u[0],
        direction=-1,
        affect=lambda t, u, p: torch.stack((u[0], -0.5 * u[1])),
    )
    problem = psn.ODEProblem(fall, start, (0.0, 5.0), p=g)
    solution = psn.solve(problem, events=bounce, engine=engine, throw=False, **TIGHT)
    assert solution.retcode is psn.ReturnCode.DtLessThanMin
    assert float(solution.t[-1]) == pytest.approx(3 * math.sqrt(2 / 9.81), rel=1e-9)
