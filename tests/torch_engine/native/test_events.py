"""Events whose conditions are native code: closed forms, the loop in Python, and refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from bouncing import (
    TIGHT,
    D,
    Level,
    assert_both_sides_of_a_jump,
    assert_twenty_bounces,
    bouncing,
    fall,
    leaf,
)
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])


def test_twenty_bounces_with_their_gradients() -> None:
    assert_twenty_bounces(compile=True)


def test_both_sides_of_a_jump_are_kept_and_the_later_one_counts() -> None:
    h, g, e = (x.detach() for x in (leaf(2.0), leaf(9.81), leaf(0.9)))
    assert_both_sides_of_a_jump(bouncing(h, g, e, 1.5, compile=True))


def test_bounces_that_pile_up_fail_as_those_of_the_loop_do() -> None:
    h, g, e = (x.detach() for x in (leaf(1.0), leaf(9.81), leaf(0.5)))
    native, eager = (bouncing(h, g, e, 9.0, compile=c, throw=False) for c in (True, False))
    assert native.retcode is eager.retcode is psn.ReturnCode.DtLessThanMin
    assert len(native.jumps) == len(eager.jumps)
    torch.testing.assert_close(native.u1, eager.u1, rtol=0, atol=1e-12)


# Equal steps -----------------------------------------------------------------------------------


LEVEL = Level(1.5)
P = {"rate": leaf(2.0), "level": leaf(0.4)}
BESIDE, KICK = leaf(0.3), leaf(0.8)


def swing(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    """A driven pendulum."""
    return torch.stack((u[1], -(p["rate"] ** 2) * torch.sin(u[0]) + 0.1 * torch.cos(t)))


def kicked(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.stack((u[0], KICK * u[1] + 0.1 * p["level"] * torch.sin(t)))


EVENTS: dict[str, Any] = {
    "a parameter and p": psn.Event(lambda t, u: u[0] - P["level"] * BESIDE - 0.1, affect=kicked),
    "rising": psn.Event(lambda t, u: u[0] - 0.2, direction=1, affect=kicked),
    "falling": psn.Event(lambda t, u: u[0] - 0.2, direction=-1, affect=kicked),
    "neural": psn.Event(LEVEL, affect=kicked),
    "terminal": psn.Event(lambda t, u: u[0] + P["level"]),
    "terminal with an affect": psn.Event(lambda t, u: u[1], affect=kicked, terminal=True),
    "only noted": psn.Event(lambda t, u: u[0] * u[1], terminal=False),
    "a comparison": psn.Event(lambda t, u: (u[0] > 0.2) & (t > 0.5), affect=lambda t, u, p: -u),
    "coarse": psn.Event(lambda t, u: u[0], xtol=1e-3, affect=kicked),
    "two in one step": [
        psn.Event(lambda t, u: t - 0.42, affect=lambda t, u, p: u + p["level"]),
        psn.Event(lambda t, u: t - 0.4 * BESIDE / 0.3, affect=lambda t, u, p: u * p["rate"]),
    ],
    "simultaneous": [
        psn.Event(lambda t, u: t - 0.42, affect=lambda t, u, p: u + p["level"]),
        psn.Event(lambda t, u: (t - 0.42) * 3, affect=lambda t, u, p: u * p["rate"]),
        psn.Event(at=[0.42, 1.0], affect=lambda t, u, p: u - BESIDE),
    ],
    "at times and by conditions": [
        psn.Event(at=[0.3, 1.7], affect=kicked),
        psn.Event(lambda t, u: u[0] - P["level"] * BESIDE, affect=kicked),
        psn.Event(lambda t, u: u[1] + 4.0),
    ],
}


def run(name: str, compile: Any, algorithm: Any = None, **options: Any) -> Any:
    """A solution with events, and gradients of all that it has to all that it depends on."""
    u0, span = leaf(1.0, -0.5), options.pop("span", (0.0, 3.0))
    problem = psn.ODEProblem(swing, u0, span, p=P)
    options = {"controller": psn.FixedStep(), "dt0": 0.11} | options
    solution = psn.solve(
        problem, algorithm or psn.Tsit5(), events=EVENTS[name], compile=compile, **options
    )
    weights = torch.linspace(-1, 2, solution.u.numel(), dtype=D).reshape(solution.u.shape)
    loss = (solution.u * weights).sum() + (solution.u1**3).sum()
    for i, jump in enumerate(solution.jumps):
        loss = loss + (i + 1) * (jump.t + (jump.after * jump.before).sum())
    if solution.event_t is not None:
        loss = loss + 3 * solution.event_t
    if name == "a comparison":  # its time has no derivative
        return solution, ()
    wanted = [u0, *P.values(), BESIDE, KICK, *LEVEL.parameters()]
    times = (x for x in (*span, options.get("saveat")) if isinstance(x, Tensor))
    wanted += [x for x in times if x.requires_grad]
    return solution, torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_alike(found: Any, expected: Any, atol: float = 1e-10) -> None:
    (native, bars), (eager, others) = found, expected
    assert native.retcode is eager.retcode
    assert native.event == eager.event
    # Where gradients are asked for, the loop in Python evaluates an implicit step's start twice.
    explicit = isinstance(native.algorithm, ExplicitRungeKutta)
    counts, others_counts = native.stats.asdict(), eager.stats.asdict()
    for name in ("naccept", "nreject", *(("nfe",) if explicit else ())):
        assert counts[name] == others_counts[name], name
    assert [jump.event for jump in native.jumps] == [jump.event for jump in eager.jumps]
    for one, other in zip(native.jumps, eager.jumps, strict=True):
        torch.testing.assert_close(one.t, other.t, rtol=0, atol=atol)
        torch.testing.assert_close(one.before, other.before, rtol=0, atol=atol)
        torch.testing.assert_close(one.after, other.after, rtol=0, atol=atol)
    torch.testing.assert_close(native.t, eager.t, rtol=0, atol=atol)
    torch.testing.assert_close(native.u, eager.u, rtol=atol, atol=atol)
    torch.testing.assert_close(native.u1, eager.u1, rtol=atol, atol=atol)
    for one, other in zip(bars, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=atol, atol=atol)


@pytest.mark.parametrize("name", EVENTS)
def test_equal_steps_give_equal_events_states_and_gradients(name: str) -> None:
    found, expected = run(name, True), run(name, False)
    assert found[0].jumps or found[0].event is not None
    assert_alike(found, expected)


METHODS: list[Any] = [
    psn.Euler(), psn.BS3(), psn.RK4(), psn.DP5(), psn.DP8(), psn.Vern7(), psn.Vern9(),
    psn.Rosenbrock23(), psn.Rodas5P(),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", METHODS, ids=repr)
def test_methods(algorithm: Any) -> None:
    name = "at times and by conditions"
    assert_alike(run(name, True, algorithm), run(name, False, algorithm))


OPTIONS: dict[str, dict[str, Any]] = {
    "saved times": {"saveat": torch.linspace(0.0, 3.0, 31, dtype=D)},
    "saved times that move": {"saveat": leaf(0.0, 0.05, 0.3, 0.9, 1.7, 3.0)},
    "ends that move": {"span": (leaf(0.1), leaf(2.9)), "saveat": leaf(0.1, 0.5, 1.7, 2.9)},
    "backward": {"span": (3.0, 0.1), "saveat": torch.tensor([2.9, 1.0, 0.1], dtype=D)},
    "stops": {"tstops": [0.42, 1.0, 2.0]},
    "many steps": {"dt0": 0.003},
    "a grid": {"controller": psn.FixedStep((0.1, 0.35, 0.9, 2.0)), "dt0": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    for events in ("at times and by conditions", "terminal"):
        assert_alike(run(events, True, **OPTIONS[name]), run(events, False, **OPTIONS[name]))


def test_adaptive_steps_find_the_same_events() -> None:
    adaptive: dict[str, Any] = {"controller": psn.PIController(), "dt0": None} | TIGHT
    for name in EVENTS:
        (native, _), (eager, _) = (run(name, compile, **adaptive) for compile in (True, False))
        assert [jump.event for jump in native.jumps] == [jump.event for jump in eager.jumps], name
        atol = 1e-3 if name == "coarse" else 1e-7
        torch.testing.assert_close(native.u1, eager.u1, rtol=0, atol=atol)


def test_gradients_agree_with_finite_differences() -> None:
    options: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13, "compile": True}

    def values(u0: Tensor, level: Tensor, kick: Tensor) -> tuple[Tensor, Tensor]:
        jump = psn.Event(lambda t, u: u[0] - level * t, affect=lambda t, u: u + kick * t)
        problem = psn.ODEProblem(lambda t, u: torch.cos(t) + 0 * u + 1, u0, (0.0, 2.0))
        solution = psn.solve(problem, psn.DP8(), events=jump, **options)
        (met,) = solution.jumps
        return met.t, solution.u1

    given = (leaf(-0.5).reshape(1).detach().requires_grad_(), leaf(0.6), leaf(0.7))
    assert torch.autograd.gradcheck(values, given, eps=1e-5, atol=1e-7)


# Where conditions are zero at the start, and several at once -------------------------------------


def oscillate(events: Any, compile: bool = True, **options: Any) -> psn.Solution:
    """`u = sin t` with its derivative."""
    u0, span = torch.tensor([0.0, 1.0], dtype=D), options.pop("tspan", (0.0, 20.0))
    problem = psn.ODEProblem(lambda t, u: torch.stack((u[1], -u[0])), u0, span)
    return psn.solve(problem, events=events, compile=compile, **TIGHT | options)


def test_a_condition_that_is_zero_at_the_start_is_no_event() -> None:
    """Else a ball could not leave the ground. The sine is next zero at pi."""
    solution = oscillate(psn.Event(lambda t, u: u[0]))
    assert float(solution.event_t) == pytest.approx(math.pi, rel=1e-9)


def test_a_start_on_a_surface_is_no_event_whatever_the_rounding() -> None:
    """Sums and functions of native code are rounded in other ways than torch's."""
    generator, level = torch.Generator().manual_seed(2), torch.zeros((), dtype=D)

    def above(t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u).mean() - level

    events = [psn.Event(above), psn.Event(lambda t, u: -above(t, u))]
    for u0 in torch.rand(20, 7, dtype=D, generator=generator):
        level.copy_(torch.tanh(u0).mean())
        problem = psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0))
        assert psn.solve(problem, events=events, compile=True).event is None


@pytest.mark.parametrize(
    ("direction", "time"), [(-1, math.pi / 6 + 2 * math.pi / 3), (1, math.pi / 6), (0, math.pi / 6)]
)
def test_direction(direction: int, time: float) -> None:
    """`sin t - 1/2` rises at 30 degrees and falls at 150."""
    solution = oscillate(psn.Event(lambda t, u: u[0] - 0.5, direction))
    assert float(solution.event_t) == pytest.approx(time, rel=1e-9)


def test_direction_is_along_the_integration() -> None:
    """Backward from 0 the sine falls: it passes -1/2 falling, and rising behind its trough."""
    for direction, angle in ((-1, -math.pi / 6), (1, -5 * math.pi / 6)):
        event = psn.Event(lambda t, u: u[0] + 0.5, direction)
        solution = oscillate(event, tspan=(0.0, -20.0))
        assert float(solution.event_t) == pytest.approx(angle, rel=1e-9)


def test_the_first_of_several_that_one_step_passes() -> None:
    times = [0.9, 0.3, 0.6]
    events = [psn.Event(lambda t, u, at=at: t - at) for at in times]
    solution = oscillate(events, controller=psn.FixedStep(), dt0=5.0)
    assert solution.event == 1
    assert float(solution.event_t) == pytest.approx(0.3, rel=1e-12)


def test_no_event_changes_nothing() -> None:
    plain, watched = oscillate(()), oscillate(psn.Event(lambda t, u: u[0] - 2))
    assert watched.event is None
    assert watched.event_t is None
    assert watched.stats == plain.stats
    assert torch.equal(plain.u, watched.u)


@pytest.mark.parametrize("dt0", [0.05, 0.5, 2.0])
def test_what_leaves_its_zero_turning_round_has_crossed(dt0: float) -> None:
    """A bounce much shorter than a step ends in its first hundredth, as in the loop in Python."""
    up = torch.tensor([0.0, 1e-3], dtype=D)
    bounce = psn.Event(
        lambda t, u: u[0], direction=-1, affect=lambda t, u, p: torch.stack((u[0], -0.8 * u[1]))
    )
    problem = psn.ODEProblem(fall, up, (0.0, 1e-3), p=torch.tensor(9.81, dtype=D))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": dt0 * 1e-3, "throw": False}
    native, eager = (
        psn.solve(problem, events=bounce, compile=compile, **options) for compile in (True, False)
    )
    count = len(native.jumps)
    assert count == len(eager.jumps) > 0
    assert native.retcode is eager.retcode
    # Bounces take 2 v / g each, and v falls by a fifth at each.
    last = 1e-3 - math.fsum(2e-3 / 9.81 * 0.8**i for i in range(count))
    exact = torch.tensor(
        [0.8**count * 1e-3 * last - 9.81 / 2 * last**2, 0.8**count * 1e-3], dtype=D
    )
    exact[1] -= 9.81 * last
    # An event is known up to a bracket of 4 eps of its step h, and up to what rounding is of the
    # dense output: eight times eps / 2 of terms that together are 9 g h^2 theta, where the height
    # changes by g h^2 theta / 2 in h. Velocities behind are g times that off, and later bounces
    # make 9 times as much of it. The steps with events are together 5e-3 long.
    bound = 9 * 9.81 * 5e-3 * (4 + 8 * 9) * torch.finfo(D).eps
    for solution in (native, eager):
        torch.testing.assert_close(solution.u1, exact, rtol=0, atol=bound)


# Other states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_of_several_parts(dtype: torch.dtype) -> None:
    weight = torch.tensor(0.7, dtype=dtype, requires_grad=True)

    def field(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"v": -u["x"], "x": weight * u["v"]}

    event = psn.Event(
        lambda t, u: u["x"].max() - 0.3 * u["v"].sum(),
        affect=lambda t, u: {"x": u["x"] / 2, "v": u["v"] + 0.1},
    )
    found = []
    for compile in (True, False):
        u0 = {"x": torch.linspace(-1, 0.5, 5, dtype=dtype), "v": torch.ones(5, dtype=dtype) / 2}
        u0["v"].requires_grad_()
        problem = psn.ODEProblem(field, u0, (0.0, 9.0))
        options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "saveat": [1.0, 4.0]}
        sol = psn.solve(problem, psn.DP5(), events=event, compile=compile, **options)
        assert len(sol.jumps) > 1
        loss = sol.u["x"].square().sum() + sol.u1["v"].sum() + sum(jump.t for jump in sol.jumps)
        bars = torch.autograd.grad(loss, [u0["v"], weight])
        found.append([sol.u["x"], sol.u["v"], *(jump.t for jump in sol.jumps), *bars])
    atol = 1e-10 if dtype is D else 1e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=atol, atol=atol)


def test_layers_with_events_and_integrals() -> None:
    """The condition of a layer sees its own state; what it captures may change between solves."""

    class Down(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -torch.ones_like(u)

    level = [0.0]
    node = psn.NeuralODE(
        Down(),
        psn.Tsit5(),
        tspan=(0.0, 2.0),
        events=psn.Event(lambda t, u: u.sum() - level[0]),
        regularizers=[psn.KineticEnergy()],
        compile=True,
    )
    for level[0] in (0.5, 0.25, 0.75):
        solution = node(torch.ones(1, 1, dtype=D))
        assert float(solution.event_t.detach()) == pytest.approx(1 - level[0], abs=1e-12)


def test_members_each_have_their_own_events() -> None:
    h, g = leaf(1.0, 2.0, 3.0), torch.tensor(9.81, dtype=D)
    land = psn.Event(lambda t, u: u[0])
    problem = psn.ODEProblem(fall, torch.ones(2, dtype=D), (0.0, 3.0), p=g)
    many = psn.EnsembleProblem(problem, torch.stack((h, torch.zeros_like(h)), 1))
    solution = psn.solve(many, events=land, compile=True, **TIGHT)
    times = torch.stack([member.event_t for member in solution])
    torch.testing.assert_close(times, torch.sqrt(2 * h / g), rtol=1e-10, atol=0)
    (bar,) = torch.autograd.grad(times.sum(), h)
    torch.testing.assert_close(bar, (1 / torch.sqrt(2 * h * g)).detach(), rtol=1e-9, atol=0)


# Refusals ----------------------------------------------------------------------------------------


def branches(t: Tensor, u: Tensor) -> Tensor:
    return u[0] - 0.5 if u[0] > 0 else u[0] - 0.6


SEEN: list[Any] = []


def records(t: Tensor, u: Tensor) -> Tensor:
    SEEN.append(t)
    return u[0] - 0.5


def prints(t: Tensor, u: Tensor) -> Tensor:
    print("looked at")
    return u[0] - 0.5


CALLS = torch.zeros((), dtype=D)


def counts(t: Tensor, u: Tensor) -> Tensor:
    CALLS.add_(1)
    return u[0] - 0.5


def asks(t: Tensor, u: Tensor) -> Tensor:
    return u[0] - (0.9 if torch.is_grad_enabled() else 0.5)


REFUSED: dict[str, tuple[Any, str]] = {
    "branches": (branches, "branches cannot be exported"),
    "an operation": (lambda t, u: torch.linalg.det(u.diag()) - 0.25, "det"),
    "two numbers": (lambda t, u: u - 0.5, "one real number"),
    "a tuple": (lambda t, u: (u[0] - 0.5,), "one real number"),
    "records": (records, "records may change Python's objects"),
    "prints": (prints, "prints may change Python's objects, or print"),
    "counts": (counts, "counts"),
    "asks": (asks, "asks whether gradients are recorded"),
}


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


@pytest.mark.parametrize("name", REFUSED)
def test_conditions_without_native_code_are_named(name: str) -> None:
    condition, named = REFUSED[name]
    problem = psn.ODEProblem(decay, torch.ones(2, dtype=D), (0.0, 1.0))
    event = psn.Event(condition)
    with pytest.raises(psn.CompileError, match="an event's condition has no native code") as caught:
        psn.solve(problem, compile=True, events=event, **TIGHT)
    assert named in str(caught.value)
    assert "compile=False" in str(caught.value)
    attempt._told.clear()
    if name in ("two numbers", "a tuple"):
        with pytest.warns(psn.PsnWarning), pytest.raises(TypeError, match="one real number"):
            psn.solve(problem, compile="auto", events=event, **TIGHT)
        return
    with pytest.warns(psn.PsnWarning, match="an event's condition"):
        found = psn.solve(problem, compile="auto", events=event, **TIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psn.solve(problem, compile="auto", events=event, **TIGHT)
    assert float(found.event_t) == pytest.approx(math.log(2), rel=1e-9)
