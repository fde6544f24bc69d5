"""The norm in which errors are measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
