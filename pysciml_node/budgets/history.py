"""What a budget has measured and done, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_COLUMNS = ("cost", "smooth", "penalty", "weight", "target")


@dataclass
class History:
    """One entry a training step in each list.

    Attributes:
        unit: of the cost.
        cost: what was measured; NaN where nothing was.
        smooth: the same without the jumps of whole steps, which the weight is chosen by.
        penalty: the penalty without its weight.
        weight: what the next training step's weight is.
        target: the budget; NaN before it is known.
    """

    unit: str
    cost: list[float] = field(default_factory=list)
    smooth: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    target: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.cost)

    def add(self, cost: float, smooth: float, penalty: float, weight: float, target: float) -> None:
        """Take note of a training step."""
        row = (cost, smooth, penalty, weight, target)
        for name, value in zip(_COLUMNS, row, strict=True):
            getattr(self, name).append(value)

    def tensor(self) -> Tensor:
        """All of it, `(5, training steps)`."""
        columns = [getattr(self, name) for name in _COLUMNS]
        return torch.tensor(columns, dtype=torch.float64, device="cpu")

    def restore(self, table: Tensor) -> None:
        """Replace all of it."""
        for name, column in zip(_COLUMNS, table.tolist(), strict=True):
            setattr(self, name, column)
