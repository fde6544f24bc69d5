"""A training without a network: solves get cheaper as the weight grows, late, noisy, in steps."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import torch

import pysciml_node as psn


class Plant:
    """Steps `n` follow `log n <- log n + (log f(weight) - log n) / lag + noise`.

    `f` falls from `dearest` to `cheapest` and is half way, in logarithms, at the weight `half`.
    """

    def __init__(
        self, lag: float = 30.0, noise: float = 0.005, half: float = 5.0, slope: float = 1.0
    ) -> None:
        self.lag, self.noise, self.half, self.slope = lag, noise, half, slope
        self.dearest, self.cheapest = 20.0, 4.0
        self.steps = 8.0
        self.random = random.Random(0)

    def settled(self, weight: float) -> float:
        share = 1.0 / (1.0 + (weight / self.half) ** self.slope)
        return self.cheapest * (self.dearest / self.cheapest) ** share

    def move(self, weight: float) -> None:
        change = math.log(self.settled(weight) / self.steps) / self.lag
        self.steps *= math.exp(change + self.noise * self.random.gauss(0.0, 1.0))

    def penalty(self) -> float:
        return 0.003 * self.steps / 10 * self.random.uniform(0.5, 1.5)


def solve_of(steps: float) -> Any:
    """What a solve of so many steps leaves: whole steps, the last of them cut short."""
    count = math.ceil(steps)
    share = steps - (count - 1)
    errors = [0.17] * (count - 1) + [0.17 * share**5]
    return SimpleNamespace(
        stats=psn.Stats(nfe=2 + 6 * count, naccept=count),
        seconds=0.001 * count,
        algorithm=psn.Tsit5(),
        trajectory=SimpleNamespace(errors=errors),
        problem=SimpleNamespace(spec=SimpleNamespace(device=torch.device("cpu"))),
    )


def train(budget: psn.Budget, plant: Plant, steps: int) -> list[float]:
    """A training; the evaluations of each of its steps."""
    found = []
    for _ in range(steps):
        solve = solve_of(plant.steps)
        budget.observe(plant, solve)
        budget.charge(plant.penalty())
        plant.move(budget.weight)
        found.append(float(solve.stats.nfe))
    return found
