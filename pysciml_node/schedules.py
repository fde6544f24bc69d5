"""Schedules: weights that change over training. A schedule maps a step number to a number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """Base of all schedules: a frozen function of the training step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Value at `step`, which counts from 0."""


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, but is {value}.")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value always."""

    value: float

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return self.value


@dataclass(frozen=True)
class Exponential(Schedule):
    """From `start` to `end` in `steps`, by a constant factor a step; `end` from there on.

    `start * (end / start)**(step / steps)`: arXiv 2303.02262, section 4.

    Raises:
        ValueError: an argument that is not positive.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "steps"):
            _positive(name, getattr(self, name))

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return self.start * math.pow(self.end / self.start, min(step / self.steps, 1.0))


@dataclass(frozen=True)
class InverseDecay(Schedule):
    """`start / (1 + rate * step)`."""

    start: float
    rate: float

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise ValueError(f"rate must not be negative, but is {self.rate}.")

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return self.start / (1.0 + self.rate * step)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` in `steps` along half a cosine; `end` from there on."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _positive("steps", self.steps)

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        share = 0.5 * (1.0 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return self.end + (self.start - self.end) * share


@dataclass(frozen=True)
class Annealing(Schedule):
    """From 0 to 1: `max(0, 1 - rate**(step - delay))`.

    For the weight of a latent variable's divergence from its prior, which at full strength from
    the start would stop the encoder from learning.

    Args:
        rate: what is left of the way to 1 after each step, between 0 and 1.
        delay: steps that the value stays 0.

    Raises:
        ValueError: a rate that is not between 0 and 1.
    """

    rate: float = 0.99
    delay: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be between 0 and 1, but is {self.rate}.")

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return 1.0 - math.pow(self.rate, max(step - self.delay, 0))


def as_schedule(weight: float | Schedule) -> Schedule:
    """A number as a constant schedule.

    Raises:
        TypeError: neither a number nor a schedule.
        ValueError: not finite.
    """
    if isinstance(weight, Schedule):
        return weight
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"weight must be a number or a schedule, but is {weight!r}.")
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite, but is {weight}.")
    return Constant(float(weight))
