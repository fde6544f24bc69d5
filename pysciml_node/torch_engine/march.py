"""The time loop: one loop for every method, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import Controller
from pysciml_node.replay.first_step import initial_step
from pysciml_node.replay.norms import Tolerance
from pysciml_node.replay.stages import Stages
from pysciml_node.replay.vectors import Real
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.step import SLIVER, Attempt, Step


def _size_between(t: float, end: float) -> float:
    """The size `h` with which `t + h` is `end` to the last bit, where there is one."""
    h = end - t
    for near in (h, math.nextafter(h, -math.inf), math.nextafter(h, math.inf)):
        if t + near == end:
            return near
    return h


@dataclass
class MarchOptions:
    """What a march needs besides the field and the state."""

    controller: Controller
    tolerance: Tolerance
    max_steps: int
    dt0: float | None = None
    dtmin: float = 0.0
    dtmax: float = math.inf
    tstops: tuple[float, ...] = ()  # in the order of integration, strictly between t0 and t1
    # Ends of the interval as tensors, where they receive gradients through the steps.
    time_tensors: tuple[Tensor, Tensor] | None = None


@dataclass
class March:
    """Steps from `t0` to `t1`: iterate to get the accepted ones.

    While a step is being looked at, `stages` holds its stage derivatives. After the last step,
    `retcode` says how the march ended.

    Args:
        stages: the method and the field.
        u: the state at `t0`, shape `(N,)`.
        t0: start.
        t1: end.
        options: step control.
        k: derivative at the start, where it is known.
    """

    stages: Stages
    u: Tensor
    t0: float
    t1: float
    options: MarchOptions
    k: Tensor | None = None
    naccept: int = 0
    nreject: int = 0
    retcode: ReturnCode = field(init=False)
    last: Attempt | None = None

    def __post_init__(self) -> None:
        self.retcode = ReturnCode.Default

    def replace(self, u: Tensor) -> None:
        """Go on from another state (a jump at a stop); the step size is kept."""
        self.u, self.k = u, None

    def __iter__(self) -> Iterator[Step]:
        options, stages = self.options, self.stages
        adaptive = options.controller.adaptive
        sizes = options.controller.start(stages.method.tableau.error_order)
        stops = (*options.tstops, self.t1)
        direction = 1.0 if self.t1 > self.t0 else -1.0
        t, next_stop = self.t0, 0
        time: Real = t if options.time_tensors is None else options.time_tensors[0]
        h = self._first_size(time, direction)
        if math.isfinite(h):
            # The first size is a guess: only the error of a step asks for less than the limit.
            h = max(h, math.copysign(options.dtmin, direction), key=abs)
        while True:
            if not math.isfinite(h):
                self.retcode = ReturnCode.Unstable
                return
            if self.naccept + self.nreject >= options.max_steps:
                self.retcode = ReturnCode.MaxIters
                return
            proposed = math.copysign(min(abs(h), options.dtmax), direction)
            stop = stops[next_stop]
            lands = abs(stop - t) <= abs(proposed) * (1 + SLIVER)
            h = _size_between(t, stop) if lands else proposed
            # Steps cut short by a stop may be small; others below the limit mean failure.
            smallest = max(options.dtmin, 4 * math.ulp(t))
            if adaptive and abs(proposed) < smallest and not lands:
                bad = self.last is not None and not math.isfinite(self.last.error)
                self.retcode = ReturnCode.Unstable if bad else ReturnCode.DtLessThanMin
                return
            size: Real = h
            if lands and options.time_tensors is not None:
                last = next_stop == len(stops) - 1
                size = (options.time_tensors[1] if last else stop) - time
            u = self.u
            if stages.count == 0:
                stages.begin(self._first_stage(time, size))
            u1 = stages.solution(time, size, u, with_error=adaptive)
            error = math.nan
            if adaptive:
                # The one host read of a step.
                norm = stages.error(u, u1, options.tolerance).item()
                error = norm * options.tolerance.factor * abs(h)
            self.last = Attempt(t, h, u, u1, error)
            if adaptive and not error <= 1.0:
                self.nreject += 1
                stages.count = 1
                h = sizes.rejected(h, error)
                continue
            self.naccept += 1
            self.u, self.k = u1, None
            end = stop if lands else t + h
            yield Step(t, h, end, u, u1, error, next_stop if lands else None, time, size)
            # The field may jump at a stop: its value there belongs to the next step.
            if self.u is u1 and not lands:
                self.k = stages.next_first()
            stages.count = 0
            t = end
            if lands:
                next_stop += 1
                if next_stop == len(stops):
                    self.retcode = ReturnCode.Success
                    return
            time = t if options.time_tensors is None else self._advance(time, lands, t)
            if adaptive:
                following = sizes.accepted(h, error)
                # A step cut short by a stop says little: keep the size that was proposed.
                cut = abs(h) < 0.9 * abs(proposed)
                h = max(following, proposed, key=abs) if cut else following
            else:
                h = proposed

    @staticmethod
    def _advance(time: Real, lands: bool, t: float) -> Real:
        """Time as a tensor: it moves with `t0` until a stop fixes it."""
        if not isinstance(time, Tensor):
            return t
        return torch.full_like(time, t) if lands else t + (time - time.detach())

    def _first_stage(self, time: Real, size: Real) -> Tensor:
        if self.k is None:
            self.k = self.stages.field(self.stages.times(time, size)[0], self.u)
        return self.k

    def _first_size(self, time: Real, direction: float) -> float:
        options, stages = self.options, self.stages
        if options.dt0 is not None:
            return math.copysign(abs(options.dt0), direction)
        k = self._first_stage(time, 0.0).detach()
        with torch.no_grad():
            return initial_step(
                stages.field,
                stages.method,
                options.tolerance,
                self.t0,
                self.u.detach(),
                k,
                self.t1 - self.t0,
            )
