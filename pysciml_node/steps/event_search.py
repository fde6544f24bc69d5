"""Finds where conditions cross zero inside accepted steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.steps.field import FlatField, expect_untouched
from pysciml_node.steps.start import versions_of


def condition_value(event: Event, problem: ODEProblem, t: float, u: Tensor) -> float:
    """An event's condition at a time and a flat state.

    Raises:
        TypeError: it is no single real number.
    """
    versions = versions_of([u])
    with torch.no_grad():
        value = event.value(problem.time_tensor([t])[0], problem.spec.unflatten(u.detach()))
    expect_untouched([u], versions, "an event's condition")
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"an event's condition must return one real number as a tensor, but gave {shape}."
            "\n  Reduce it, for example by .min() or .max() over the batch."
        )
    if value.dtype == torch.bool:
        # A comparison: false counts as negative.
        return 1.0 if bool(value) else -1.0
    return float(value)


# An event that has just happened leaves its condition near zero, of either sign: what counts as its
# sign at the start is the one at this share of the first step, as in SciML's callbacks.
AFTER = 0.01
# Where a line along the field is looked at on both sides of such a start, in steps.
BESIDE = 0.001


class Signs:
    """The signs of conditions from step to step.

    Args:
        problem: for its start.
        events: all that are watched.
        fired: which of them have just happened at the start.

    Attributes:
        before: the conditions at the start of the next step.
        unsettled: those of which the sign at the start is not known.
    """

    def __init__(
        self, problem: ODEProblem, events: Sequence[Event], fired: Sequence[int] = ()
    ) -> None:
        self.events, self.problem = events, problem
        start = problem.spec.flatten(problem.u0).detach()
        self.before = [condition_value(event, problem, problem.t0, start) for event in events]
        self.unsettled = {*fired, *(i for i, value in enumerate(self.before) if value == 0)}

    def first_crossing(
        self, after: list[float], value: Callable[[int, float], float], h: float
    ) -> tuple[float, int] | None:
        """Where in a step the first event lies, as a fraction, and which it is; `None` without one.

        Args:
            after: the conditions at the end of the step.
            value: the condition of one event at a fraction of the step.
            h: signed size of the step.
        """
        for i in self.unsettled:
            self.before[i] = self._leaving(i, value(i, AFTER), h)
        self.unsettled = set()
        before, self.before = self.before, after
        crossing = [i for i, event in enumerate(self.events) if event.crosses(before[i], after[i])]
        located = (
            (locate_crossing(partial(value, i), self.events[i], before[i], self.problem), i)
            for i in crossing
        )
        return min(located, default=None)

    def _leaving(self, i: int, later: float, h: float) -> float:
        """With which sign a condition leaves its zero at the start.

        It may be back at zero before `later` is seen: what leaves with the other sign has crossed.
        """
        problem, event = self.problem, self.events[i]
        if not event.crosses(-later, later) or problem.mass is not None:
            return later
        u = problem.spec.flatten(problem.u0).detach()
        with torch.no_grad():
            rate = FlatField(problem)(problem.time_tensor([problem.t0])[0], u)
        early, late = (
            condition_value(event, problem, problem.t0 + dt, u + dt * rate)
            for dt in (-BESIDE * h, BESIDE * h)
        )
        return -later if early * later > 0 > late * later else later


def locate_crossing(
    value: Callable[[float], float], event: Event, before: float, problem: ODEProblem
) -> float:
    """Where in a step a condition crosses zero, as a fraction, by bisection.

    Args:
        value: the condition at a fraction of the step.
        event: for its `xtol`.
        before: the condition at the step's start.
        problem: for its precision.
    """
    eps = torch.finfo(problem.spec.real_dtype).eps
    width = max(event.xtol or 0.0, 4 * eps)
    low, high = 0.0, 1.0
    sign = 1.0 if before > 0 else -1.0
    while high - low > width:
        middle = 0.5 * (low + high)
        if sign * value(middle) > 0:
            low = middle
        else:
            high = middle
    return high
