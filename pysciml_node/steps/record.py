"""What a forward solve leaves behind: the accepted steps and where the saved states lie in them."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import Adjoint
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.step import Attempt, Step

# Entries of step states that room is made for at first.
_FIRST_ROOM = 1 << 16


def first_room(size: int) -> int:
    """Steps that a solve outside of Python makes room for at first.

    Args:
        size: entries of a state.
    """
    return max(4, min(64, _FIRST_ROOM // size))


@dataclass
class Record:
    """The accepted steps of a solve, as numbers; the states are kept beside it.

    Attributes:
        times: ends of the steps, `t0` first, length `n + 1`.
        sizes: signed step sizes, length `n`.
        errors: scaled error estimates, length `n`.
        stops: for each step the stop it ends on, or `None`.
        methods: which of the solve's methods took each step, length `n`; empty where it has one.
        inside: for a step, the saved times that lie inside it: their indices and the times.
        at_end: for a state index, the saved times that coincide with it.
        saved: how many of the requested times were reached.
        last: of a failed solve, the last attempt.
        marks: start, stops and end that were asked for.
        fixed: whether the times of steps stay where they are when the ends of the interval move.
        thinned: whether only the first and the last of the steps' states are kept.
    """

    times: list[float]
    sizes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    stops: list[int | None] = field(default_factory=list)
    inside: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    at_end: dict[int, list[int]] = field(default_factory=dict)
    saved: int = 0
    naccept: int = 0
    nreject: int = 0
    retcode: ReturnCode = ReturnCode.Default
    last: Attempt | None = None
    marks: tuple[float, ...] = ()
    event: int | None = None
    t1_stop: int = 0
    thinned: bool = False
    fixed: bool = False
    methods: list[int] = field(default_factory=list)

    @property
    def direction(self) -> int:
        """`1` forward in time, `-1` backward, as the solve went."""
        return 1 if self.marks[-1] > self.marks[0] else -1

    def method_of(self, n: int) -> int:
        """Which of the solve's methods took step `n`."""
        return self.methods[n] if self.methods else 0

    def fractions(self, n: int) -> list[float]:
        """Where the saved times inside step `n` lie in it, from 0 to 1."""
        if n not in self.inside:
            return []
        start, h = self.times[n], self.sizes[n]
        return [(t - start) / h for t in self.inside[n][1]]

    def place(self, asked: Sequence[float], places: Iterable[Sequence[float]]) -> None:
        """Note where saved times lie, as a loop outside of Python says it.

        Args:
            asked: the times that were asked for.
            places: of those that were reached: the number of a step, and where in the step; or that
                of a state, and NaN.
        """
        for i, (t, (place, theta)) in enumerate(zip(asked, places, strict=False)):
            if math.isnan(theta):
                self.at_end.setdefault(int(place), []).append(i)
            else:
                indices, times = self.inside.setdefault(int(place), ([], []))
                indices.append(i)
                times.append(t)

    def copy(self) -> Record:
        """The same steps, whose lists are not to be changed."""
        made = object.__new__(Record)
        made.__dict__.update(self.__dict__)
        return made

    def truncate(self, count: int) -> None:
        """Keep the first `count` times, and what was saved up to there."""
        steps = count - 1
        self.times = self.times[:count]  # others may share the lists
        self.sizes, self.errors = self.sizes[:steps], self.errors[:steps]
        self.stops, self.methods = self.stops[:steps], self.methods[:steps]
        self.inside = {n: kept for n, kept in self.inside.items() if n < steps}
        self.at_end = {n: kept for n, kept in self.at_end.items() if n < count}
        self.saved = sum(len(indices) for indices, _ in self.inside.values())
        self.saved += sum(len(indices) for indices in self.at_end.values())
        self.naccept = steps


def finite_part(ends: Tensor, places: Iterable[Sequence[float]]) -> tuple[int, int]:
    """Steps and saved times up to what is not finite: a solution has no more of them.

    Args:
        ends: states at the ends of the steps, the initial one first.
        places: of the saved times that were reached, as of `Record.place`.
    """
    finite: list[bool] = torch.isfinite(ends[1:]).all(1).tolist()
    steps = (*finite, False).index(False)
    return steps, sum(place + (not math.isnan(theta)) <= steps for place, theta in places)


class Outcome(NamedTuple):
    """What a solve leaves."""

    record: Record  # the n accepted steps
    # (N,) each, or of the shape that is stepped, n + 1 of them, at `record.times`
    states: list[Tensor]
    saved: Tensor  # (saved, N), the states at the times that were asked for


@dataclass(frozen=True)
class Kept:
    """Steps and states that are at hand; as `load` of a trajectory."""

    record: Record
    states: list[Tensor]

    def __call__(self) -> tuple[Record, list[Tensor]]:
        """Both."""
        return self.record, self.states


class Recorded:
    """What trajectories read off the accepted steps of a solve.

    `load` gives the steps and the states at their ends, when something looks at them.
    """

    load: Callable[[], tuple[Record, list[Tensor]]]

    @cached_property
    def _loaded(self) -> tuple[Record, list[Tensor]]:
        # Kept, so that it must not lack the graph where it is first read without gradients.
        with torch.inference_mode(False), torch.enable_grad():
            return self.load()

    @property
    def record(self) -> Record:
        """The accepted steps."""
        return self._loaded[0]

    @property
    def flat_states(self) -> list[Tensor]:
        """The states at `times`, each flat."""
        return self._loaded[1]

    @property
    def every_state(self) -> list[Tensor]:
        """The same, for what looks between the ends of the interval.

        Raises:
            RuntimeError: they were not all kept.
        """
        if self.record.thinned:
            raise RuntimeError(
                "the states of the steps are not kept in a solve without gradients that names its "
                "times by saveat and whose states are large.\n"
                "  Name all times that you need in saveat, or leave saveat out."
            )
        return self.flat_states

    @property
    def times(self) -> list[float]:
        """Ends of the accepted steps, `t0` first."""
        return self.record.times

    @property
    def errors(self) -> list[float]:
        """Scaled error estimates of the accepted steps."""
        return self.record.errors

    def __getstate__(self) -> dict[str, Any]:
        # Loading may need what cannot be pickled: the engine's own records.
        kept = Kept(self.record, [u.detach() for u in self.flat_states])
        state = {name: value for name, value in self.__dict__.items() if name != "_loaded"}
        return {**state, "load": kept}


def check_discrete(adjoint: Adjoint) -> None:
    """Estimates of all steps can be differentiated by the adjoints that see the steps.

    Raises:
        ValueError: the adjoint is a continuous one.
    """
    if not adjoint.discrete:
        raise ValueError(
            f"the estimates of all steps are not differentiable with {type(adjoint).__name__}: "
            "the stages of a step are not part of the continuous equation.\n"
            "  Use adjoint=DiscreteAdjoint(), or LocalError, which works with every adjoint."
        )


def detached(step: Step) -> Attempt:
    """An attempt for a record, which must not hold on to the graph that it is part of."""
    return Attempt(step.t, step.h, step.u.detach(), step.u1.detach(), step.error)


def check_finite(record: Record, states: list[Tensor], watched: bool) -> None:
    """Look once, at the end, for what has gone wrong where no error estimate would show it.

    Args:
        record: the accepted steps; changed in place, like the states.
        states: at their ends.
        watched: whether every step was controlled by the error of every entry of the state.
    """
    code = record.retcode
    if watched or not (code.successful or code is ReturnCode.Unstable):
        return
    last = states[-1].detach() if states[-1].requires_grad else states[-1]
    last = last if last.dim() == 1 else last.view(-1)
    # What is not finite makes the sum of squares so, which also happens where they are too large.
    if cmath.isfinite(torch.dot(last, last).item()):
        return
    # u0 stays, whatever it is.
    good = next((n for n, u in enumerate(states) if n and not bool(torch.isfinite(u).all())), None)
    if good is None:
        return
    if record.thinned:
        # Where it went wrong is not known any more.
        record.retcode = ReturnCode.Unstable
        return
    record.retcode = ReturnCode.Unstable
    record.truncate(good)
    del states[good:]
