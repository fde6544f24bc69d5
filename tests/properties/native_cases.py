"""Native solves by random methods and options, beside the loop in Python."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from random_fields import RandomField
from torch import Tensor

import pysciml_node as psn
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.algorithms.switching import SwitchingMethod
from pysciml_node.problems.ode import time_number
from pysciml_node.torch_engine import switching
from pysciml_node.torch_engine.native import departure

D = torch.float64
EXPLICIT = [
    "Euler", "Midpoint", "Heun", "Ralston", "BS3", "RK4", "Tsit5", "DP5", "DP8", "Vern7", "Vern9",
]  # fmt: skip
ROSENBROCK = ["Rosenbrock23", "Rodas5P"]
DIAGONAL = ["KenCarp4", "TRBDF2"]
SWITCHING = ["AutoTsit5", "AutoVern7"]
CONTROLLERS = ["PIController", "IController", "PIDController"]
SOLVES = 6
"""Solves of a field by a method, whose native code they share."""

ASKED_FOR = int(os.environ.get("PSN_FUZZ", "0"))

dtypes = st.sampled_from([D, D, D, torch.float32])


def examples(count: int) -> Any:
    """Settings of a test that draws so many fields, or those that are asked for."""
    return settings(
        max_examples=ASKED_FOR or count, derandomize=not ASKED_FOR, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if ASKED_FOR else [])),
    )  # fmt: skip


@contextmanager
def quick_turns(share: float) -> Iterator[None]:
    """Solves by two methods that change after two or three attempts.

    Args:
        share: of the explicit method's stability radius, above which a step is stiff.
    """
    limits = {"SHARE": share, "MOST_STIFF": 2, "MOST_SMOOTH": 1}
    with mock.patch.multiple(switching, **limits), mock.patch.multiple(departure, **limits):
        yield


def strided(x: Tensor, draw: st.DrawFn) -> Tensor:
    """The same numbers, lying in memory in some other way."""
    if not x.ndim:
        return x
    ways = [x, x.movedim(0, -1).contiguous().movedim(-1, 0), torch.stack([x, x], -1)[..., 0]]
    return draw(st.sampled_from([*ways, x[:1].clone().expand(x.shape)]))


def of_dtype(made: RandomField, dtype: torch.dtype) -> RandomField:
    """The field with parameters, and a `p` of leaves, of a dtype."""
    made = made.to(dtype)
    made.given = [x.detach().to(dtype).requires_grad_() for x in made.given]
    return made


def initial(draw: st.DrawFn, made: RandomField, dtype: torch.dtype) -> list[Tensor]:
    """The parts of an initial state, leaves."""
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    u0 = [torch.randn(shape, dtype=D, generator=numbers).to(dtype) for shape in made.state]
    return [strided(x, draw).requires_grad_() for x in u0]


@dataclass
class Case:
    """One solve of a field.

    Attributes:
        field: the field.
        u0: parts of the initial state, leaves.
        span: start and end; leaves where they receive gradients.
        options: of `solve`.
        graded: whether gradients are taken.
        dense: where the dense output is read, as a share of the interval; None for nowhere.
        p: what is given as `p` in place of the field's, for members.
    """

    field: RandomField
    u0: list[Tensor]
    span: tuple[Any, Any]
    options: dict[str, Any]
    graded: bool
    dense: float | None = None
    p: list[Tensor] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return self.u0[0].dtype

    @property
    def fixed(self) -> bool:
        """Whether no error estimate drives the steps."""
        return isinstance(self.options["controller"], psn.FixedStep)

    @property
    def exact(self) -> float:
        """How close results along the same steps have to be; roots are as exact as steep."""
        if self.dtype is not D:
            return 2e-4
        return 1e-8 if "events" in self.options else 1e-12

    def leaves(self) -> list[Tensor]:
        """All that a solve depends on and that receives gradients."""
        times = [x for x in (*self.span, self.options.get("saveat")) if isinstance(x, Tensor)]
        every = [*self.u0, *times, *self.field.weights, *self.p]
        return [x for x in every if x.requires_grad]

    def solution(self, compile: bool) -> Any:
        """The solution."""
        p = tuple(self.p) or None
        problem = psn.ODEProblem(self.field, self.field.assembled(self.u0), self.span, p=p)
        return psn.solve(problem, compile=compile, engine="torch", throw=False, **self.options)

    def outcome(self, compile: bool) -> Outcome:
        """What a solve leaves that another has to leave too."""
        with torch.set_grad_enabled(self.graded):
            solution = self.solution(compile)
            found = [*self.field.parts(solution.u), *self.field.parts(solution.u1)]
            if self.dense is not None and solution.success and solution.event is None:
                a, b = map(time_number, self.span)
                found += self.field.parts(solution(a + self.dense * (b - a)))
            found += [jump.t.reshape(1) for jump in solution.jumps]
            bars = self.gradients([x for x in found if x.requires_grad])
        stats = solution.stats
        counts = [solution.retcode, solution.event, stats.naccept, stats.nreject]
        counts += [jump.event for jump in solution.jumps]
        if isinstance(self.options["algorithm"], ExplicitRungeKutta):
            counts.append(stats.nfe)
        return Outcome(counts, [x.detach() for x in found], bars, solution.step_times.tolist())

    def gradients(self, of: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of a function of all these."""
        if not (self.graded and of):
            return []
        terms = []
        for x in of:
            weights = torch.linspace(-1.0, 2.0, x.numel(), dtype=x.dtype).reshape(x.shape)
            terms.append((weights * x + torch.sin(x)).sum() / max(1, x.numel()) ** 0.5)
        return torch.autograd.grad(
            torch.stack(terms).sum(), self.leaves(), allow_unused=True, materialize_grads=True
        )

    def by_steps(self, times: list[float]) -> Case:
        """The same, with steps that end at these times, the start first."""
        left_out = ("dt0", "dtmax", "dtmin", "rtol", "atol")
        options = {name: x for name, x in self.options.items() if name not in left_out}
        options["controller"] = psn.FixedStep(times[1:-1])
        if len(times) < 3:
            options |= {"controller": psn.FixedStep(), "dt0": abs(times[-1] - times[0])}
        return replace(self, options=options)


@dataclass
class Outcome:
    """What a solve leaves: numbers of steps and the like, states, gradients, ends of steps."""

    counts: list[Any]
    states: list[Tensor]
    bars: Sequence[Tensor]
    times: list[float]


def expect_near(found: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        size = float(other.nan_to_num().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=bound * (1 + size), equal_nan=True)


def expect_alike(case: Case) -> None:
    """A native solve is the loop's: the same steps, and along these the same states and gradients.

    Error estimates are small differences of large numbers, and so are not the same to the last
    bits; nor are the sizes of adaptive steps. States are compared along the native ones.
    """
    native, eager = case.outcome(True), case.outcome(False)
    double = case.dtype is D
    if double or case.fixed:
        assert native.counts == eager.counts
    exact = case.exact
    if case.fixed:
        expect_near(native.states, eager.states, exact)
        expect_near(native.bars, eager.bars, exact)
    elif double:
        expect_near(native.states, eager.states, 1e-6)
        expect_near(native.bars, eager.bars, 1e-6)
        # Along given steps the method changes elsewhere.
        switches = isinstance(case.options["algorithm"], SwitchingMethod)
        succeeded = native.counts[0] is psn.ReturnCode.Success
        if succeeded and not (switches or case.options.get("events")):
            again = case.by_steps(native.times).outcome(False)
            assert len(again.times) == len(native.times)
            expect_near(native.states, again.states, exact)
            # Steps to given times move with the ends of the interval in another way.
            times = {id(x) for x in (*case.span, case.options.get("saveat"))}
            kept = [id(x) not in times for x in case.leaves()]
            expect_near([*compress(native.bars, kept)], [*compress(again.bars, kept)], exact)


SHARES = [0.0, 0.0, 0.125, 0.3, 0.31, 0.5, 0.5, 0.77, 0.9, 1.0, 1.0]


@st.composite
def stepping(draw: st.DrawFn, algorithm: Any) -> dict[str, Any]:
    """Options that members have as single solves do."""
    # Values of stages are kept for the gradient, or computed again.
    memory = draw(st.sampled_from([0, 1 << 20]))
    chosen: dict[str, Any] = {
        "algorithm": algorithm, "adjoint": psn.DiscreteAdjoint(memory=memory)
    }  # fmt: skip
    if draw(st.booleans()):
        chosen |= {"controller": psn.FixedStep(), "dt0": draw(st.sampled_from([0.11, 0.25, 2.0]))}
    else:
        chosen["controller"] = getattr(psn, draw(st.sampled_from(CONTROLLERS)))()
        chosen["rtol"] = draw(st.sampled_from([0.0, 1e-2, 1e-3, 1e-5]))
        chosen["atol"] = draw(st.sampled_from([1e-2, 1e-3, 1e-5]))
        for name, sizes in {"dt0": (0.01, 0.4, 3.0), "dtmax": (0.07, 0.3), "dtmin": (0.1,)}.items():
            if draw(st.sampled_from([False, False, True])):
                chosen[name] = draw(st.sampled_from(sizes))
        if chosen.get("dtmin", 0) > chosen.get("dtmax", 1):
            del chosen["dtmin"]
    chosen["max_steps"] = draw(st.sampled_from([200, 200, 200, 3]))
    return chosen


@st.composite
def algorithms(draw: st.DrawFn, made: RandomField, most: int, implicit: list[str]) -> Any:
    """A method; now and then one of the implicit ones, for states of up to `most` entries."""
    small = sum(map(math.prod, made.state)) <= most
    stiff = small and draw(st.sampled_from([False, False, True]))
    return getattr(psn, draw(st.sampled_from(implicit if stiff else EXPLICIT)))()


def chance(draw: st.DrawFn, one_in: int) -> bool:
    """Whether something that is rare happens."""
    return draw(st.integers(1, one_in)) == one_in


def tolerances(draw: st.DrawFn, made: RandomField, sizes: list[float]) -> Any:
    """Numbers for each entry of a state, one of a part at least finite, or no error would count."""
    parts, finite = [], [x for x in sizes if x < math.inf]
    for shape in made.state:
        further = draw(st.lists(st.sampled_from(sizes if shape else finite), max_size=2))
        listed = [draw(st.sampled_from(finite)), *further]
        count = math.prod(shape)
        parts.append(torch.tensor((listed * count)[:count], dtype=D).reshape(shape))
    return made.assembled(parts)


def of_entries(draw: st.DrawFn, made: RandomField) -> dict[str, Any]:
    """A tolerance of each entry of a state; where an absolute one is infinite it does not count."""
    name = draw(st.sampled_from(["rtol", "atol"]))
    return {
        name: tolerances(draw, made, [1e-2, 1e-3, 1e-4, *([math.inf] if name == "atol" else [])])
    }


@st.composite
def events(draw: st.DrawFn, made: RandomField, time: float | None) -> dict[str, Any]:
    """Now and then, what happens where the state or the time crosses a level, or at a time."""
    if not chance(draw, 6) or 0 in map(math.prod, made.state):
        return {}
    kind = "level" if time is None else draw(st.sampled_from(["at", "level", "time", "both"]))

    def changed(t: Tensor, u: Any, *p: Any) -> Any:
        return made.assembled([0.7 * x + 0.1 * torch.sin(t) for x in made.parts(u)])

    def level(t: Tensor, u: Any) -> Tensor:
        return sum(torch.sin(x).mean() for x in made.parts(u)) - 0.1 * t - 0.05  # type: ignore[return-value]

    affect, direction = draw(st.sampled_from([changed, None])), draw(st.sampled_from([-1, 0, 1]))
    terminal = draw(st.sampled_from([None, True, False]))
    listed = []
    if kind in ("level", "both"):
        listed.append(psn.Event(level, direction=direction, affect=affect, terminal=terminal))
    if kind in ("time", "both"):
        listed.append(psn.Event(lambda t, u: t - time, affect=affect, terminal=terminal))
    if kind == "at":
        listed.append(psn.Event(at=[time], affect=affect, terminal=terminal))
    return {"events": listed}
