"""Events: located on the solution, and differentiable by the implicit function theorem."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def leaf(*values: float) -> Tensor:
    tensor = torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)
    return tensor.requires_grad_()


def ball(t: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """Height and velocity under gravity."""
    return torch.stack((u[1], -g))


GROUND = psn.Event(lambda t, u: u[0], direction=-1)


def landing(u0: Tensor, g: Tensor, t0: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Time and velocity of the landing, in closed form."""
    x, v = u0
    speed = torch.sqrt(v**2 + 2 * g * x)
    return t0 + (v + speed) / g, -speed


@every_adjoint
def test_time_and_state_of_a_landing_and_their_gradients(adjoint: psn.DirectAdjoint) -> None:
    u0, g, t0, t1 = leaf(1.0, 0.5), leaf(9.81), leaf(0.3), leaf(3.0)
    solution = psn.solve(
        psn.ODEProblem(ball, u0, (t0, t1), p=g), adjoint=adjoint, events=GROUND, **TIGHT
    )
    time, velocity = landing(u0, g, t0)
    assert solution.retcode is psn.ReturnCode.Terminated
    assert solution.success
    assert solution.event == 0
    assert solution.event_t is not None
    torch.testing.assert_close(solution.event_t, time, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.u1[1], velocity, rtol=1e-12, atol=1e-12)
    assert abs(solution.u1[0].item()) < 1e-12
    assert solution.t[-1].item() == solution.event_t.item()
    for found, expected in ((solution.event_t, time), (solution.u1[1], velocity)):
        wanted = (u0, g, t0, t1)
        gradients = torch.autograd.grad(
            found, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        closed = torch.autograd.grad(
            expected, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(gradients, closed, rtol=1e-8, atol=1e-8)


@every_adjoint
def test_the_height_at_the_landing_does_not_move(adjoint: psn.DirectAdjoint) -> None:
    """`u1` lies on the event's surface, whatever the inputs."""
    u0, g = leaf(1.0, 0.5), leaf(9.81)
    solution = psn.solve(
        psn.ODEProblem(ball, u0, (0.0, 3.0), p=g), adjoint=adjoint, events=GROUND, **TIGHT
    )
    gradients = torch.autograd.grad(solution.u1[0], (u0, g))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@every_adjoint
def test_bounces(adjoint: psn.DirectAdjoint) -> None:
    """A ball that keeps a share of its speed: the time of its third landing, by restarts.

    `t_3 = s / g + 2 e s / g + 2 e^2 s / g`, with `s` the first landing's speed from rest.
    """
    height, g, share = leaf(1.3), leaf(9.81), leaf(0.8)
    u0, t0 = torch.stack((height, torch.zeros_like(height))), torch.zeros((), dtype=torch.float64)
    for bounce in range(3):
        solution = psn.solve(
            psn.ODEProblem(ball, u0, (t0, 9.0), p=g), adjoint=adjoint, events=GROUND, **TIGHT
        )
        assert solution.event_t is not None, bounce
        t0 = solution.event_t
        u0 = torch.stack((torch.zeros_like(height), -share * solution.u1[1]))
    speed = torch.sqrt(2 * g * height)
    expected = speed / g * (1 + 2 * share + 2 * share**2)
    torch.testing.assert_close(t0, expected, rtol=1e-10, atol=0)
    wanted = (height, g, share)
    torch.testing.assert_close(
        torch.autograd.grad(t0, wanted), torch.autograd.grad(expected, wanted), rtol=1e-7, atol=1e-7
    )


@every_adjoint
def test_conditions_that_depend_on_time_and_parameters(adjoint: psn.DirectAdjoint) -> None:
    """`e^(a t)` meets the line `c t + 2`, where `c` is known to the condition alone."""
    a, c = leaf(1.0), leaf(0.5)
    problem = psn.ODEProblem(lambda t, u, p: p * u, torch.ones(1).double(), (0.0, 3.0), p=a)
    event = psn.Event(lambda t, u: u[0] - c * t - 2)
    solution = psn.solve(problem, adjoint=adjoint, events=event, **TIGHT)
    assert solution.event_t is not None
    t = solution.event_t.item()
    assert math.exp(t) == pytest.approx(0.5 * t + 2, abs=1e-9)
    found = torch.autograd.grad(solution.event_t, (a, c))
    slope = math.exp(t) - 0.5
    assert found[0].item() == pytest.approx(-t * math.exp(t) / slope, rel=1e-7)
    assert found[1].item() == pytest.approx(t / slope, rel=1e-7)


@every_adjoint
def test_events_of_complex_states(adjoint: psn.DirectAdjoint) -> None:
    """`e^(i w t) (1 - i)` becomes real at `t = pi / (4 w)`."""
    w = leaf(2.0)
    problem = psn.ODEProblem(
        lambda t, z: 1j * w * z, torch.tensor([1 - 1j], dtype=torch.complex128), (0.0, 3.0)
    )
    event = psn.Event(lambda t, z: z.imag[0])
    solution = psn.solve(problem, adjoint=adjoint, events=event, **TIGHT)
    assert solution.event_t is not None
    assert solution.event_t.item() == pytest.approx(math.pi / 8, rel=1e-9)
    (gradient,) = torch.autograd.grad(solution.event_t, w)
    assert gradient.item() == pytest.approx(-math.pi / 16, rel=1e-8)


@every_adjoint
def test_the_time_of_an_event_is_one_number_whatever_the_shape_of_its_condition(
    adjoint: psn.DirectAdjoint,
) -> None:
    u0 = leaf(1.0, 0.5)
    problem = psn.ODEProblem(ball, u0, (0.0, 3.0), p=leaf(9.81))
    for shape in ((), (1,), (1, 1)):
        event = psn.Event(lambda t, u, shape=shape: u[0].reshape(shape), direction=-1)
        solution = psn.solve(problem, adjoint=adjoint, events=event, **TIGHT)
        assert solution.event_t is not None
        assert solution.event_t.shape == ()
        assert solution.u1.shape == (2,)
        (found,) = torch.autograd.grad(solution.event_t, u0)
        (expected,) = torch.autograd.grad(landing(u0, problem.p)[0], u0)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def oscillate(**options: Any) -> psn.Solution:
    """`u = sin t` with its derivative."""
    u0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    span = options.pop("tspan", (0.0, 20.0))
    problem = psn.ODEProblem(lambda t, u: torch.stack((u[1], -u[0])), u0, span)
    return psn.solve(problem, rtol=1e-10, atol=1e-10, **options)


@pytest.mark.parametrize(
    ("direction", "time"), [(-1, math.pi / 6 + 2 * math.pi / 3), (1, math.pi / 6), (0, math.pi / 6)]
)
def test_direction(direction: int, time: float) -> None:
    """`sin t - 1/2` rises at 30 degrees and falls at 150."""
    solution = oscillate(events=psn.Event(lambda t, u: u[0] - 0.5, direction))
    assert solution.event_t is not None
    assert solution.event_t.item() == pytest.approx(time, rel=1e-9)


def test_direction_is_along_the_integration() -> None:
    """Backward from 0 the sine falls: it passes -1/2 falling, and rising behind its trough."""
    for direction, angle in ((-1, -math.pi / 6), (1, -5 * math.pi / 6)):
        event = psn.Event(lambda t, u: u[0] + 0.5, direction)
        solution = oscillate(events=event, tspan=(0.0, -20.0))
        assert solution.event_t is not None
        assert solution.event_t.item() == pytest.approx(angle, rel=1e-9)


def test_the_first_of_several_events() -> None:
    """Also where one step passes over all of them."""
    times = [0.9, 0.3, 0.6]
    events = [psn.Event(lambda t, u, at=at: t - at) for at in times]
    for options in ({}, {"controller": psn.FixedStep(), "dt0": 5.0, "algorithm": psn.RK4()}):
        solution = oscillate(events=events, **options)
        assert solution.event == 1
        assert solution.event_t is not None
        assert solution.event_t.item() == pytest.approx(0.3, rel=1e-12)


def test_an_event_in_the_first_step() -> None:
    solution = oscillate(events=psn.Event(lambda t, u: u[0] - 1e-7))
    assert solution.stats.naccept == 1
    assert solution.event_t is not None
    assert solution.event_t.item() == pytest.approx(1e-7, rel=1e-6)


def test_an_event_in_the_last_step() -> None:
    solution = oscillate(events=psn.Event(lambda t, u: t - 19.999), dtmax=0.5)
    assert solution.event_t is not None
    assert solution.event_t.item() == pytest.approx(19.999, rel=1e-12)


def test_a_condition_that_is_zero_at_the_start_is_no_event() -> None:
    """Else a ball could not leave the ground. The sine is next zero at pi."""
    solution = oscillate(events=psn.Event(lambda t, u: u[0]))
    assert solution.event_t is not None
    assert solution.event_t.item() == pytest.approx(math.pi, rel=1e-9)


def test_no_event() -> None:
    plain, watched = oscillate(), oscillate(events=psn.Event(lambda t, u: u[0] - 2))
    assert watched.retcode is psn.ReturnCode.Success
    assert watched.event is None
    assert watched.event_t is None
    assert torch.equal(plain.u1, watched.u1)


def test_saved_states_end_with_the_event() -> None:
    times = torch.linspace(0.0, 20.0, 201, dtype=torch.float64)
    solution = oscillate(events=psn.Event(lambda t, u: u[0]), saveat=times)
    assert torch.equal(solution.t, times[times < math.pi])
    torch.testing.assert_close(solution.u[:, 0], torch.sin(solution.t), rtol=0, atol=1e-8)


def test_the_state_at_the_event_is_a_steps_own_result() -> None:
    """One Euler step of 1 is cut at the crossing of its own straight line."""
    problem = psn.ODEProblem(lambda t, u: 0 * u + 3, torch.zeros(1).double(), (0.0, 5.0))
    solution = psn.solve(
        problem,
        psn.Euler(),
        controller=psn.FixedStep(),
        dt0=1.0,
        events=psn.Event(lambda t, u: u[0] - 2),
    )
    assert solution.u1.item() == pytest.approx(2.0, rel=1e-14)
    assert solution.event_t is not None
    assert solution.event_t.item() == pytest.approx(2 / 3, rel=1e-14)


def test_a_coarser_search() -> None:
    """`xtol` is the width of the last bracket, in units of the step."""
    wide = psn.Event(lambda t, u: u[0] - 0.5, xtol=1e-2)
    solution = oscillate(events=wide, dtmax=0.1)
    assert solution.event_t is not None
    assert 0 <= solution.event_t.item() - math.pi / 6 <= 1e-3


def test_events_without_gradients() -> None:
    with torch.no_grad():
        solution = oscillate(events=psn.Event(lambda t, u: u[0] - 0.5))
    assert solution.event_t is not None
    assert not solution.event_t.requires_grad
    assert not solution.u1.requires_grad


def test_second_derivatives_are_refused() -> None:
    """One Newton step does not have them."""
    u0, g = leaf(1.0, 0.5), leaf(9.81)
    solution = psn.solve(
        psn.ODEProblem(ball, u0, (0.0, 3.0), p=g), adjoint=psn.DirectAdjoint(), events=GROUND
    )
    (gradient,) = torch.autograd.grad(solution.event_t, g, create_graph=True)
    with pytest.raises(RuntimeError, match="the time of an event, gives only the first"):
        torch.autograd.grad(gradient, g)


@pytest.mark.parametrize("direction", [2, "up", None])
def test_bad_directions(direction: Any) -> None:
    with pytest.raises(ValueError, match="direction must be one of -1, 0, 1"):
        psn.Event(lambda t, u: u, direction)


@pytest.mark.parametrize("members", [False, True])
def test_a_condition_that_changes_the_state_is_refused(members: bool) -> None:
    """It is given the solver's own."""
    problem: Any = psn.ODEProblem(lambda t, u: -u, torch.ones(2, dtype=torch.float64), (0.0, 1.0))
    if members:
        problem = psn.EnsembleProblem(problem, u0=torch.ones(3, 2, dtype=torch.float64))
    event = psn.Event(lambda t, u: u.mul_(0.99)[0] - 0.5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed its input in place"):
        psn.solve(problem, events=event, engine="torch")


def test_bad_conditions() -> None:
    with pytest.raises(TypeError, match="condition must be callable"):
        psn.Event(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", [0, 1])
def test_a_condition_that_is_a_comparison(direction: int) -> None:
    u0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: 1 + 0 * u, u0, (0.0, 2.0))
    event = psn.Event(lambda t, u: u.mean() > 0.5, direction=direction)
    solution = psn.solve(problem, events=event)
    assert solution.event_t.item() == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(RuntimeError, match=r"no known derivative.*\n.*crosses zero"):
        solution.u1.sum().backward()
    never = psn.solve(problem, events=psn.Event(lambda t, u: u.mean() > 0.5, direction=-1))
    assert never.event_t is None


def test_a_condition_that_is_detached_or_constant_after_a_time() -> None:
    u0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: 0 * u + 1, u0, (0.0, 5.0))
    conditions = {
        "constant": lambda t, u: torch.zeros_like(t) if t > 2 else u[0] + 5,
        "detached": lambda t, u: u[0].detach() - 3,
        "flat": lambda t, u: torch.sign(u[0] - 3),
    }
    for name, condition in conditions.items():
        solution = psn.solve(problem, events=psn.Event(condition))
        assert solution.event_t.item() == pytest.approx(2.0, abs=1e-11), name
        assert solution.u1.item() == pytest.approx(3.0, abs=1e-11), name
        with pytest.raises(RuntimeError, match="no known derivative"):
            solution.event_t.backward()
