"""The steps of ordinary equations, taken by the time loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.first_step import initial_step
from pysciml_node.replay.stages import Stages
from pysciml_node.replay.vectors import Real
from pysciml_node.steps.loop import Loop, MarchOptions
from pysciml_node.steps.step import Step, is_far, size_from


def _size_between(t: float, end: float) -> float:
    """The size `h` with which `t + h` is `end` to the last bit, where there is one."""
    h = end - t
    for near in (h, math.nextafter(h, -math.inf), math.nextafter(h, math.inf)):
        if t + near == end:
            return near
    return h


class March(Loop):
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

    def __init__(
        self,
        stages: Stages,
        u: Tensor,
        t0: float,
        t1: float,
        options: MarchOptions,
        k: Tensor | None = None,
    ) -> None:
        super().__init__(u, t0, t1, options)
        self.stages, self.k = stages, k
        self.far = is_far(t0, t1)
        self.time: Real = t0 if options.time_tensors is None else options.time_tensors[0]

    def replace(self, u: Tensor) -> None:
        """Go on from another state (a jump at a stop); the step size is kept."""
        self.u, self.k = u, None

    @property
    @override
    def error_order(self) -> float:
        return self.stages.method.tableau.error_order

    @override
    def smallest(self) -> float:
        return max(self.options.dtmin, 4 * math.ulp(self.t))

    @override
    def take(self, proposed: float, lands: bool) -> Step:
        stages, options, u, time = self.stages, self.options, self.u, self.time
        adaptive = options.controller.adaptive
        stop = self.stops[self.passed]
        if self.far and not lands:
            # The end may be rounded to the stop.
            lands = self.t + proposed == stop
            proposed = size_from(self.t, proposed)
        h = _size_between(self.t, stop) if lands else proposed
        size: Real = h
        if lands and options.time_tensors is not None:
            last = self.passed == len(self.stops) - 1
            size = (options.time_tensors[1] if last else stop) - time
        if stages.count == 0:
            self._begin(time, size)
        u1 = stages.solution(time, size, u, with_error=adaptive)
        # The one host read of a step.
        error = stages.error_size(h, u, u1, options.norm) if adaptive else math.nan
        end = stop if lands else self.t + h
        return Step(self.t, h, end, u, u1, error, self.passed if lands else None, time, size)

    @override
    def rejected(self, step: Step) -> None:
        self.stages.count = 1

    @override
    def accepted(self, step: Step) -> None:
        # The field may jump at a stop: its value there belongs to the next step. So may the state.
        lands = step.stop is not None
        self.k = self.stages.leave(not lands and self.u is step.u1)
        time = self.time
        if not isinstance(time, Tensor):
            self.time = step.end
        elif lands:
            self.time = torch.full_like(time, step.end)
        else:
            # It moves with `t0` until a stop fixes it.
            self.time = step.end + (time - time.detach())

    def between(self, step: Step, times: Sequence[float], moving: Tensor | None) -> Tensor:
        """The states `(m, N)` at `m` times inside the step that is being looked at.

        Args:
            step: the step.
            times: the times.
            moving: the same where they receive gradients.
        """
        if moving is not None:
            # Of times in single precision the place in a step needs more than they have.
            theta = (moving.double() - step.time) / step.size
        elif isinstance(step.time, Tensor) or isinstance(step.size, Tensor):
            theta = (torch.tensor(times, dtype=torch.float64) - step.time) / step.size
        else:
            theta = torch.tensor([(t - step.t) / step.h for t in times], dtype=torch.float64)
        return self.stages.dense(step.time, step.size, step.u, theta)

    def _begin(self, time: Real, size: Real) -> Tensor:
        """Begin the next step; returns its first stage."""
        if self.k is None:
            return self.stages.start(time, size, self.u)
        self.stages.begin(self.k)
        return self.k

    @override
    def first_size(self) -> float:
        options, stages = self.options, self.stages
        if options.dt0 is not None:
            h = math.copysign(abs(options.dt0), self.direction)
        else:
            k = self._begin(self.time, 0.0).detach()
            start, span = self.u.detach(), self.t1 - self.t0
            with torch.no_grad():
                h = initial_step(stages.field, stages.method, options.norm, self.t0, start, k, span)
        if not math.isfinite(h):
            return h
        # The first size is a guess: only the error of a step asks for less than the limit.
        return max(h, math.copysign(options.dtmin, self.direction), key=abs)
