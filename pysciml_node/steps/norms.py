"""The norm in which errors are measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import Norm
from pysciml_node.algorithms.options import Tolerances


class ErrorNorm:
    """Root-mean-square norm of an error in units of `atol + rtol * max(|u|, |u1|)`.

    `raw` is cheap and lacks a factor, which `complete` and `read` put in: on the device, and on the
    host.

    Args:
        tolerances: give the unit, and say which entries count.
        norm: another norm of the entries that count, in units of these.

    Attributes:
        shift: `atol / rtol` where scales are given over a number `rtol`, else `None`.
        factor: what turns a raw norm into the root-mean-square.
    """

    def __init__(self, tolerances: Tolerances, norm: Norm | None = None) -> None:
        rtol, atol = tolerances.rtol, tolerances.atol
        self.rtol, self.atol, self.size, self._norm = rtol, atol, tolerances.driven, norm
        # A number rtol is divided out of the scale, to save a pass, and put into the factor.
        self.shift: float | None = None
        self.factor = 1 / math.sqrt(max(tolerances.counted, 1)) if norm is None else 1.0
        numbers = isinstance(rtol, int | float) and isinstance(atol, int | float)
        numbers = numbers and norm is None
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
        scaled = self.counted(vector) / scale
        if self._norm is not None:
            return self._norm(scaled)
        norm: Tensor = torch.linalg.vector_norm(scaled)
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
