"""The norm in which the errors of members are measured, each in units of its own tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From errors of steps, their starts and their ends, `(L, N)` each, to sizes, `(L,)`."""


class MembersNorm:
    """Root-mean-square norms of errors `(L, N)` in units of `atol + rtol * max(|u|, |u1|)`.

    Args:
        options: give the tolerances.
        like: states, `(L, N)`.
    """

    def __init__(self, options: MemberOptions, like: Tensor) -> None:
        common = options.common.tolerances
        self.driven, self._size = common.driven, like.shape[1]
        counted = common.counted if options.atol is None else self.driven
        # The mean over the entries goes into the units.
        share = math.sqrt(max(counted, 1))
        # On the host numpy takes a third of the time.
        self._on_host = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)

        def units(given: float | Tensor) -> Any:
            if not isinstance(given, Tensor):
                return given * share
            scaled = given.detach() * share
            return scaled.numpy() if self._on_host else scaled

        self._rtol = units(common.rtol if options.rtol is None else options.rtol)
        self._atol = units(common.atol if options.atol is None else options.atol)
        self._ones = like.new_ones(self.driven)

    def keep(self, rows: Array) -> None:
        """Go on with some of the members."""
        self._rtol, self._atol = (self._kept(x, rows) for x in (self._rtol, self._atol))

    @staticmethod
    def _kept(tolerance: Any, rows: Array) -> Any:
        if getattr(tolerance, "ndim", 0) < 2:
            return tolerance
        if isinstance(tolerance, Tensor):
            return tolerance.index_select(0, torch.from_numpy(rows).to(tolerance.device))
        return tolerance[rows]

    def __call__(self, error: Tensor, u: Tensor, u1: Tensor) -> Tensor:
        """The norm of each row of errors of steps from `u` to `u1`, `(L,)`, without gradients."""
        if self._on_host:
            given, start, end = (x.detach().numpy() for x in (error, u, u1))
            scaled = self._scaled(np.maximum, given, start, end, self._rtol, self._atol)
            return torch.mv(torch.from_numpy(scaled * scaled), self._ones).sqrt_()
        return self.recorded(error, u, u1)

    def recorded(self, error: Tensor, u: Tensor, u1: Tensor) -> Tensor:
        """The same with gradients."""
        units = (
            torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            for x in (self._rtol, self._atol)
        )
        scaled = self._scaled(torch.maximum, error, u, u1, *units)
        norm: Tensor = torch.linalg.vector_norm(scaled, dim=1)
        return norm

    def _scaled(
        self, maximum: Callable[[Any, Any], Any], error: Any, u: Any, u1: Any, rtol: Any, atol: Any
    ) -> Any:
        """The errors of the entries that count in their units, as tensors or as arrays."""
        largest = maximum(abs(u), abs(u1))
        if self.driven < self._size:
            error, largest, rtol, atol = map(self._counted, (error, largest, rtol, atol))
        return error / (largest * rtol + atol)

    def _counted(self, entries: Any) -> Any:
        return entries[..., : self.driven] if getattr(entries, "ndim", 0) else entries
