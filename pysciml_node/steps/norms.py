"""The norm in which errors are measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysciml_node.algorithms.options import Tolerances


class ErrorNorm:
    """Root-mean-square norm of an error in units of `atol + rtol * max(|u|, |u1|)`.

    `raw` is cheap and lacks a factor, which `complete` and `read` put in: on the device, and on the
    host.

    Args:
        tolerances: give the unit, and say which entries count.

    Attributes:
        shift: `atol / rtol` where scales are given over a number `rtol`, else `None`.
        factor: what turns a raw norm into the root-mean-square.
    """

    def __init__(self, tolerances: Tolerances) -> None:
        rtol, atol = tolerances.rtol, tolerances.atol
        self.rtol, self.atol, self.size = rtol, atol, tolerances.driven
        # A number rtol is divided out of the scale, to save a pass, and put into the factor.
        self.shift: float | None = None
        self.factor = 1 / math.sqrt(max(tolerances.counted, 1))
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

    def raw(self, vector: Tensor, scale: Tensor) -> Tensor:
        """Norm of a vector in units of `scale`, without the factor; a 0-d tensor."""
        norm: Tensor = torch.linalg.vector_norm(self.counted(vector) / scale)
        return norm

    def complete(self, raw: Tensor, times: float = 1.0) -> Tensor:
        """A raw norm with its factor, multiplied by `times`; a 0-d tensor."""
        return raw * (self.factor * times)

    def read(self, raw: Tensor, times: float = 1.0) -> float:
        """The same as a number: one host read."""
        number: float = raw.item() * self.factor * times
        return number

    def read_all(self, scale: Tensor, *vectors: Tensor) -> list[float]:
        """The norms of vectors in units of `scale` as numbers: one host read."""
        raws = torch.stack([self.raw(vector, scale) for vector in vectors])
        return [number * self.factor for number in raws.tolist()]
