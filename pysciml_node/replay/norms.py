"""The scaled error of a step and the first step size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysciml_node.replay.stages import FlatFunction, Method, Stages


class Tolerance:
    """Root-mean-square norm of an error in units of `atol + rtol * max(|u|, |u1|)`.

    Args:
        rtol: a number, or a flat tensor `(N,)`.
        atol: a number, or a flat tensor `(N,)`; entries with `atol = inf` never count.
        size: number of entries that count; those behind them never drive the step size.

    Attributes:
        shift: `atol / rtol` where scales are given over a number `rtol`, else `None`.
        factor: what turns a norm of `norm` into the root-mean-square.
    """

    def __init__(self, rtol: float | Tensor, atol: float | Tensor, size: int) -> None:
        self.rtol, self.atol, self.size = rtol, atol, size
        counted = int(torch.isfinite(atol).sum()) if isinstance(atol, Tensor) else size
        # A number rtol is divided out of the scale, to save a pass, and put into the factor.
        self.shift: float | None = None
        self.factor = 1 / math.sqrt(max(counted, 1))
        numbers = isinstance(rtol, int | float) and isinstance(atol, int | float)
        # A rtol of nearly nothing would make that scale overflow, and every error vanish.
        if numbers and rtol > 1e-9 and atol <= rtol * 1e9:
            self.shift = float(atol / rtol)
            self.factor /= float(rtol)
        self._last: Tensor | None = None
        self._last_abs: Tensor | None = None

    def counted(self, vector: Tensor) -> Tensor:
        """The entries of a vector that count."""
        return vector if vector.numel() == self.size else vector[: self.size]

    def scale(self, u: Tensor, u1: Tensor | None = None) -> Tensor:
        """`atol + rtol * max(|u|, |u1|)` of the entries that count, or this over a number rtol."""
        if u is self._last and self._last_abs is not None:
            largest = self._last_abs
        else:
            largest = self.counted(u).abs()
        if u1 is not None:
            # The end of an accepted step is the start of the next: keep its absolute value.
            self._last, self._last_abs = u1, self.counted(u1).abs()
            largest = torch.maximum(largest, self._last_abs)
        if self.shift is not None:
            return largest + self.shift
        scale: Tensor = largest * self.rtol + self.atol
        return scale

    def norm(self, vector: Tensor, scale: Tensor) -> Tensor:
        """Norm of a vector in units of `scale`, `factor` left out; a 0-d tensor."""
        norm: Tensor = torch.linalg.vector_norm(self.counted(vector) / scale)
        return norm

    def step_error(self, stages: Stages, u: Tensor, u1: Tensor) -> Tensor:
        """The error estimate of a step from `u` to `u1`, a 0-d tensor.

        Without `factor * |h|`, which costs nothing on the host.
        """
        method, vectors = stages.method, stages.vectors
        error = vectors.scaled_norm(method.b_error, u, u1, self)
        if method.b_error_low is not None:
            low = vectors.scaled_norm(method.b_error_low, u, u1, self)
            combined = error.square() / torch.sqrt(error.square() + 0.01 * low.square())
            # Both vanish for an equilibrium.
            error = torch.where(error == 0, torch.zeros_like(error), combined)
        return error


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
    norms = torch.stack((tolerance.norm(u, scale), tolerance.norm(k, scale)))
    d0, d1 = (norm * tolerance.factor for norm in norms.tolist())
    if not math.isfinite(d1):
        return math.nan
    length = abs(span)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = math.copysign(min(h0, length), span)
    time = method.nodes.new_full((), t + h0)
    change = tolerance.norm(field(time, u + h0 * k) - k, scale)
    d2 = change.item() * tolerance.factor / abs(h0)
    largest = max(d1, d2)
    if not math.isfinite(largest):
        return h0
    if largest <= 1e-15:
        h1 = max(1e-6, abs(h0) * 1e-3)
    else:
        h1 = (0.01 / largest) ** (1 / method.tableau.order)
    return math.copysign(min(100 * abs(h0), h1, length), span)
