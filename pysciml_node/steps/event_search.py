"""Finds where a condition crosses zero inside an accepted step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem


def condition_value(event: Event, problem: ODEProblem, t: float, u: Tensor) -> float:
    """An event's condition at a time and a flat state.

    Raises:
        TypeError: it is no single real number.
    """
    with torch.no_grad():
        value = event.condition(problem.time_tensor([t])[0], problem.spec.unflatten(u.detach()))
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


def first_crossing(
    events: Sequence[Event],
    before: Sequence[float],
    after: Sequence[float],
    locate: Callable[[int], float],
) -> tuple[float, int] | None:
    """Where in a step the first event lies, as a fraction, and which it is; `None` without one.

    Args:
        events: all that are watched.
        before: their conditions at the step's start.
        after: and at its end.
        locate: the crossing of one event in the step.
    """
    crossing = [i for i, event in enumerate(events) if event.crosses(before[i], after[i])]
    return min(((locate(i), i) for i in crossing), default=None)


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
