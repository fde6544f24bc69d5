"""One step: accepted, or attempted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pysciml_node.problems.ode import Time as Real

SLIVER = 1e-8
"""A step that ends within this fraction of itself from a stop is made to end on it, so that
rounding never leaves a sliver."""


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
