"""What a budget has measured and done, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pysciml_node._optional import require

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

    def plot(self, path: Path) -> None:
        """Draw cost, weight and weighted penalty over training.

        Args:
            path: file to write; its folder is made when absent.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figures = require("matplotlib.figure", extra="plots", purpose="draw the picture")
        figure = figures.Figure(figsize=(11.0, 3.4), layout="constrained")
        costs, weights, prices = figure.subplots(1, 3)
        steps = range(1, len(self) + 1)
        costs.plot(steps, self.cost, ".", color="#bbbbbb", markersize=3, label="measured")
        costs.plot(steps, self.smooth, color="#0072b2", linewidth=1, label="smooth")
        costs.plot(steps, self.target, "--", color="#d55e00", label="budget")
        costs.set(xlabel="training step", ylabel=self.unit)
        costs.legend()
        weights.plot(steps, self.weight, color="#0072b2")
        weights.set(xlabel="training step", ylabel="weight")
        price = [w * p for w, p in zip(self.weight, self.penalty, strict=True)]
        prices.plot(steps, price, ".", color="#0072b2", markersize=3)
        prices.set(xlabel="training step", ylabel="weighted penalty")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
