"""Watchers of the accepted steps of a solve in Julia: events and the progress bar."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine.process.buffers import from_real, real_size
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.steps.event_search import Signs, condition_value
from pysciml_node.steps.progress import step_listener


@dataclass
class _Shown:
    """A step as the progress bar wants it."""

    end: float
    h: float


class Watcher:
    """Looks at accepted steps; ends the solve at the first event.

    Attributes:
        event: index of the event that was found, or `None`.
        t: its time.
    """

    def __init__(self, problem: ODEProblem, options: SolveOptions) -> None:
        self.problem, self.events = problem, options.events
        self.progress = options.progress
        self.event: int | None = None
        self.t = problem.t0
        self._fired = options.fired

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._signs = Signs(self.problem, self.events, self._fired)
        self._show = self._stack.enter_context(step_listener(self.progress, self.problem))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(self, t: float, end: float) -> bool:
        """Look at the step from `t` to `end`; whether the solve ends in it."""
        if self._show is not None:
            self._show(_Shown(end, end - t))
        if not self.events:
            return False
        after = [self._value(event, end) for event in self.events]
        crossing = self._signs.first_crossing(
            after, lambda i, theta: self._value(self.events[i], t + theta * (end - t)), end - t
        )
        if crossing is None:
            return False
        theta, self.event = crossing
        self.t = t + theta * (end - t)
        return True

    def _state(self, t: float) -> Tensor:
        """Dense output inside the step that Julia has just taken."""
        spec = self.problem.spec
        size = real_size(spec)
        out = torch.empty(size, dtype=spec.real_dtype)
        enter("look!", t=t, address=out, n=size)
        return from_real(out, spec.dtype).to(spec.device)

    def _value(self, event: Event, t: float) -> float:
        return condition_value(event, self.problem, t, self._state(t))


def last_step(options: SolveOptions, h: float, saveat: tuple[float, ...]) -> SolveOptions:
    """Options of the single step of size `h` that ends at an event."""
    return dataclasses.replace(
        options,
        saveat=saveat,
        saveat_tensor=None,
        tstops=(),
        events=(),
        progress=False,
        controller=FixedStep(),
        dt0=abs(h),
    )
