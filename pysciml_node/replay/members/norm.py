"""The norm in which the errors of members are measured, each in units of its own tolerance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions


class MembersNorm:
    """Root-mean-square norms of errors `(L, N)` in units of `atol + rtol * max(|u|, |u1|)`.

    Args:
        options: give the tolerances.
        size: number of entries of a state.

    Attributes:
        rtol: a number, or a tensor that broadcasts to `(L, N)`.
        atol: likewise.
    """

    def __init__(self, options: MemberOptions, size: int) -> None:
        common = options.common.tolerances
        self.driven = common.driven
        self.rtol: Any = common.rtol if options.rtol is None else options.rtol
        self.atol: Any = common.atol if options.atol is None else options.atol
        counted = common.counted if options.atol is None else self.driven
        self._rows: Tensor | None = None
        self._size = size
        self._share = 1 / math.sqrt(max(counted, 1))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the members."""
        if self._own(self.rtol):
            self.rtol = self.rtol.index_select(0, rows)
        if self._own(self.atol):
            self.atol = self.atol.index_select(0, rows)

    @staticmethod
    def _own(tolerance: Any) -> bool:
        return isinstance(tolerance, Tensor) and tolerance.ndim == 2

    def scale(self, largest: Tensor) -> Tensor:
        """`atol + rtol * largest` of the entries that count, `(L, driven)`."""
        if self.driven < self._size:
            largest = largest[:, : self.driven]
        if isinstance(self.rtol, float) and isinstance(self.atol, float):
            scale: Tensor = torch.add(largest.new_tensor(self.atol), largest, alpha=self.rtol)
            return scale
        rtol, atol = (self._counted(x) for x in (self.rtol, self.atol))
        own: Tensor = largest * rtol + atol
        return own

    def _counted(self, tolerance: Any) -> Any:
        if isinstance(tolerance, Tensor) and tolerance.shape[-1] > 1:
            return tolerance[..., : self.driven]
        return tolerance

    def __call__(self, error: Tensor, scale: Tensor) -> Tensor:
        """The norm of each row, `(L,)`."""
        if self.driven < self._size:
            error = error[:, : self.driven]
        norm: Tensor = torch.linalg.vector_norm(error / scale, dim=1)
        return norm * self._share
