"""The size of the first step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pysciml_node.algorithms.elementwise import NUMBERS, Maths
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
    h0 = math.copysign(trial_size(NUMBERS, d0, d1, length), span)
    time = method.nodes.new_full((), t + h0)
    change = norm.raw(field(time, u + h0 * k) - k, scale)
    d2 = norm.read(change) / abs(h0)
    order = method.tableau.order
    return math.copysign(first_size(NUMBERS, abs(h0), d1, d2, order, length), span)


def trial_size(maths: Maths, d0: Any, d1: Any, length: Any) -> Any:
    """Size of the Euler step that tells how fast the field changes.

    Args:
        maths: for numbers or arrays.
        d0: norm of the state.
        d1: norm of its derivative.
        length: of the interval.
    """
    tiny = (d0 < 1e-5) | (d1 < 1e-5)
    return maths.minimum(maths.where(tiny, 1e-6, 0.01 * d0 / maths.where(tiny, 1.0, d1)), length)


def first_size(maths: Maths, h0: Any, d1: Any, d2: Any, order: float, length: Any) -> Any:
    """Size of the first step.

    Args:
        maths: for numbers or arrays.
        h0: size of the Euler step.
        d1: norm of the derivative at its start.
        d2: norm of the second derivative, from the difference over it.
        order: of the method.
        length: of the interval.
    """
    largest = maths.maximum(d1, d2)
    tiny = largest <= 1e-15
    power = maths.power(0.01 / maths.where(tiny, 1.0, largest), 1 / order)
    h1 = maths.where(tiny, maths.maximum(1e-6, h0 * 1e-3), power)
    return maths.where(
        maths.isfinite(largest), maths.minimum(maths.minimum(100 * h0, h1), length), h0
    )
