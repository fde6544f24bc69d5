"""The scaled error of a step and the first step size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysciml_node.torch_engine.stages import FlatFunction, Method, Stages


class Tolerance:
    """Root-mean-square norm of an error in units of `atol + rtol * max(|u|, |u1|)`.

    Args:
        rtol: a number, or a flat tensor `(N,)`.
        atol: a number, or a flat tensor `(N,)`; entries with `atol = inf` never count.
    """

    def __init__(self, rtol: float | Tensor, atol: float | Tensor, size: int) -> None:
        self.rtol, self.atol = rtol, atol
        counted = int(torch.isfinite(atol).sum()) if isinstance(atol, Tensor) else size
        self.root = math.sqrt(max(counted, 1))
        self._last: Tensor | None = None
        self._last_abs: Tensor | None = None

    def scale(self, u: Tensor, u1: Tensor | None = None) -> Tensor:
        """`atol + rtol * max(|u|, |u1|)`, shape `(N,)`."""
        largest = u.abs() if u is not self._last or self._last_abs is None else self._last_abs
        if u1 is not None:
            # The end of an accepted step is the start of the next: keep its absolute value.
            self._last, self._last_abs = u1, u1.abs()
            largest = torch.maximum(largest, self._last_abs)
        scale: Tensor = largest * self.rtol + self.atol
        return scale

    def norm(self, scaled: Tensor) -> Tensor:
        """Root-mean-square of a vector already divided by its scale; a 0-d tensor."""
        norm: Tensor = torch.linalg.vector_norm(scaled)
        return norm / self.root

    def step_error(self, stages: Stages, h: float | Tensor, u: Tensor, u1: Tensor) -> Tensor:
        """The scaled error estimate of a step from `u` to `u1`; a 0-d tensor."""
        method, vectors = stages.method, stages.vectors
        error = vectors.scaled_norm(method.b_error, u, u1, self)
        if method.b_error_low is not None:
            low = vectors.scaled_norm(method.b_error_low, u, u1, self)
            combined = error**2 / torch.sqrt(error**2 + 0.01 * low**2)
            # Both vanish for an equilibrium.
            error = torch.where(error == 0, torch.zeros_like(error), combined)
        scaled: Tensor = error * abs(h)
        return scaled


def initial_step(
    field: FlatFunction,
    method: Method,
    tolerance: Tolerance,
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
    scale = tolerance.scale(u)
    norms = torch.stack((tolerance.norm(u / scale), tolerance.norm(k / scale)))
    d0, d1 = norms.tolist()
    if not math.isfinite(d1):
        return math.nan
    length = abs(span)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = math.copysign(min(h0, length), span)
    time = method.nodes.new_full((), t + h0)
    d2 = float(tolerance.norm((field(time, u + h0 * k) - k) / scale)) / abs(h0)
    largest = max(d1, d2)
    if not math.isfinite(largest):
        return h0
    if largest <= 1e-15:
        h1 = max(1e-6, abs(h0) * 1e-3)
    else:
        h1 = (0.01 / largest) ** (1 / method.tableau.order)
    return math.copysign(min(100 * abs(h0), h1, length), span)
