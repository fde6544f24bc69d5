"""The time loop: one for every kind of step, forward and backward in time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.controllers import Controller, StepSizes
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.step import SLIVER, Step


@dataclass
class MarchOptions:
    """What a march needs besides its steps."""

    controller: Controller
    norm: ErrorNorm
    max_steps: int
    dt0: float | None = None
    dtmin: float = 0.0
    dtmax: float = math.inf
    tstops: tuple[float, ...] = ()  # in the order of integration, strictly between t0 and t1
    # Ends of the interval as tensors, where they receive gradients through the steps.
    time_tensors: tuple[Tensor, Tensor] | None = None


class Steps(ABC):
    """Accepted steps from `t0` to `t1`: iterate to get them.

    Args:
        u: what is stepped, at `t0`, `(N,)`.

    Attributes:
        u: the same at the end of the last step.
        naccept: how many there are.
        nreject: how many attempts were rejected.
        retcode: after the last step, how it ended.
        last: the last attempt, where it is known.
    """

    def __init__(self, u: Tensor) -> None:
        self.u = u
        self.naccept = self.nreject = 0
        self.retcode = ReturnCode.Default
        self.last: Step | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Step]:
        """The steps, once."""


class Loop(Steps):
    """Steps whose size a controller chooses, and which end on the stops.

    A kind of step says how one is taken (`take`), where sizes begin and end (`first_size`,
    `smallest`), and what it makes of the outcome (`accepted`, `rejected`).

    Args:
        u: what is stepped, at `t0`, `(N,)`.
        t0: start.
        t1: end.
        options: step control.

    Attributes:
        t: where the next step starts.
        stops: where steps have to end, `t1` last.
        passed: how many of these have been reached.
        sizes: the running state of the controller.
    """

    # A step of less than this fraction of the proposed size counts as cut short by a stop.
    whole = 0.9
    sizes: StepSizes

    def __init__(self, u: Tensor, t0: float, t1: float, options: MarchOptions) -> None:
        super().__init__(u)
        self.t, self.t0, self.t1, self.options = t0, t0, t1, options
        self.direction = 1.0 if t1 > t0 else -1.0
        self.stops = (*options.tstops, t1)
        self.passed = 0

    @property
    @abstractmethod
    def error_order(self) -> float:
        """Order of the embedded solution, for the controller."""

    @abstractmethod
    def first_size(self) -> float:
        """The signed size that the first step should have."""

    @abstractmethod
    def smallest(self) -> float:
        """The least size of the next step; those cut short by a stop may be smaller."""

    @abstractmethod
    def take(self, proposed: float, lands: bool) -> Step:
        """Try the next step.

        Args:
            proposed: its signed size.
            lands: whether a step of that size ends on the next stop.
        """

    def turn(self, h: float) -> float:
        """Look at the last attempt, and perhaps go on with another method.

        Args:
            h: signed size that the next attempt is to have.

        Returns:
            The size that it shall have.
        """
        return h

    def accepted(self, step: Step) -> None:
        """Go on behind a step that everyone has seen."""

    def rejected(self, step: Step) -> None:
        """Go back to the start of a step."""

    def size_accepted(self, step: Step, proposed: float, cut: bool) -> float:
        """The size of an accepted step that the controller is told."""
        return step.h

    def size_rejected(self, step: Step, proposed: float) -> float:
        """The size of a rejected step that the controller is told."""
        return step.h

    @override
    def __iter__(self) -> Iterator[Step]:
        options = self.options
        adaptive = options.controller.adaptive
        self.sizes = options.controller.start(self.error_order)
        h = self.first_size()
        while True:
            h, sizes = self.turn(h), self.sizes
            size = min(abs(h), options.dtmax)
            proposed = math.copysign(size, self.direction)
            ahead = abs(self.stops[self.passed] - self.t)
            lands = ahead <= size * (1 + SLIVER)
            if self._ends(h, adaptive and not lands, size):
                return
            sizes.attempts(self.t, self.u, math.copysign(ahead, proposed) if lands else proposed)
            step = self.last = self.take(proposed, lands)
            if adaptive and not sizes.accepts(step.h, step.error):
                self.nreject += 1
                self.rejected(step)
                h = sizes.rejected(self.size_rejected(step, proposed), step.error)
                continue
            self.naccept += 1
            self.u = step.u1
            h = proposed
            if adaptive:
                # A step cut short by a stop says little: keep the size that was proposed.
                cut = abs(step.end - step.t) < self.whole * size
                h = sizes.accepted(self.size_accepted(step, proposed, cut), step.error)
                h = max(h, proposed, key=abs) if cut else h
            yield step
            self.accepted(step)
            self.t = step.end
            if step.stop is not None:
                self.passed += 1
                if self.passed == len(self.stops):
                    self.retcode = ReturnCode.Success
                    return

    def _ends(self, h: float, limited: bool, size: float) -> bool:
        """Whether no further step is taken; `retcode` then says why."""
        if not math.isfinite(h):
            self.retcode = ReturnCode.Unstable
        elif self.naccept + self.nreject >= self.options.max_steps:
            self.retcode = ReturnCode.MaxIters
        # Steps cut short by a stop may be small; others below the limit mean failure.
        elif limited and size < self.smallest():
            bad = self.last is not None and not math.isfinite(self.last.error)
            self.retcode = ReturnCode.Unstable if bad else ReturnCode.DtLessThanMin
        else:
            return False
        return True
