"""The size of the first step."""

from __future__ import annotations

import math

from torch import Tensor

from pysciml_node.replay.stages import FlatFunction, Method
from pysciml_node.steps.norms import ErrorNorm


def initial_step(
    field: FlatFunction,
    method: Method,
    norm: ErrorNorm,
    t: float,
    u: Tensor,
    k: Tensor,
    span: float,
) -> float:
    """A first step size from the field at `(t, u)` and one explicit Euler step.

    Args:
        k: the derivative at `(t, u)`.
        span: signed length of the interval.

    Returns:
        A signed step, at most `span`. Costs one evaluation and two host reads.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4.
    """
    scale = norm.scale(u)
    d0, d1 = norm.read_all(scale, u, k)
    if not math.isfinite(d1):
        return math.nan
    length = abs(span)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = math.copysign(min(h0, length), span)
    time = method.nodes.new_full((), t + h0)
    change = norm.raw(field(time, u + h0 * k) - k, scale)
    d2 = norm.read(change) / abs(h0)
    largest = max(d1, d2)
    if not math.isfinite(largest):
        return h0
    if largest <= 1e-15:
        h1 = max(1e-6, abs(h0) * 1e-3)
    else:
        h1 = (0.01 / largest) ** (1 / method.tableau.order)
    return math.copysign(min(100 * abs(h0), h1, length), span)
