"""One step: accepted, or attempted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pysciml_node.problems.ode import Time as Real

SLIVER = 1e-8
"""A step that ends within this fraction of itself from a stop is made to end on it, so that
rounding never leaves a sliver."""


FAR = 64.0
"""An interval of which an end is more than so many of its lengths from zero is far from it: ends of
steps are rounded by more than their sizes are, and these have to be those of the way between them.
Elsewhere they are left as they are: steps that become ever smaller, before a pole, differ little
between solves that round differently."""


def is_far(t0: float, t1: float) -> bool:
    """Whether an interval is far from zero."""
    return max(abs(t0), abs(t1)) > FAR * abs(t1 - t0)


def size_from(t: float, proposed: float) -> float:
    """The size of a step from `t` that ends on no stop, far from zero: that of the way it goes."""
    return (t + proposed - t) or proposed


@dataclass
class Step:
    """An accepted step: `u` at `t` to `u1` at `end = t + h` (the stop itself where it ends on one).

    `error` is its scaled error estimate (NaN for fixed steps); `stop` says which of the stops
    it ends on (`len(tstops)` is `t1`), or is `None`; `method` which of the solve's methods took it.
    """

    t: float
    h: float
    end: float
    u: Tensor
    u1: Tensor
    error: float
    stop: int | None
    time: Real
    size: Real
    method: int = 0


@dataclass
class Attempt:
    """The last attempt, kept to explain a failure."""

    t: float
    h: float
    u: Tensor
    u1: Tensor
    error: float
