"""Schedules: weights that change over training. A schedule maps a step number to a number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pysciml_node import checks


class Schedule(checks.Configured, ABC):
    """Base of all schedules: a frozen function of the training step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Value at `step`, which counts from 0."""


def _settle(schedule: Schedule, *names: str, **limits: Any) -> None:
    for name in names:
        value = checks.number(name, getattr(schedule, name), **limits)
        checks.settle(schedule, **{name: value})


def _step(step: float) -> float:
    return checks.number("step", step)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value always."""

    value: float

    def __post_init__(self) -> None:
        _settle(self, "value")

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        _step(step)
        return self.value


@dataclass(frozen=True)
class Exponential(Schedule):
    """From `start` to `end` in `steps`, by a constant factor a step; `end` after that.

    `start * (end / start)**(step / steps)`: arXiv 2303.02262, section 4.

    Raises:
        ValueError: an argument that is not positive.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _settle(self, "start", "end", "steps", above=0)

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        share = min(_step(step) / self.steps, 1.0)
        return self.start * math.pow(self.end / self.start, share)


@dataclass(frozen=True)
class InverseDecay(Schedule):
    """`start / (1 + rate * step)`."""

    start: float
    rate: float

    def __post_init__(self) -> None:
        _settle(self, "start")
        _settle(self, "rate", at_least=0)

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return self.start / (1.0 + self.rate * _step(step))


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` in `steps` along half a cosine; `end` after that."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _settle(self, "start", "end")
        _settle(self, "steps", above=0)

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        share = 0.5 * (1.0 + math.cos(math.pi * min(_step(step) / self.steps, 1.0)))
        return self.end + (self.start - self.end) * share


@dataclass(frozen=True)
class Annealing(Schedule):
    """From 0 to 1: `max(0, 1 - rate**(step - delay))`.

    It is meant for the weight of a latent variable's divergence from its prior. At full strength
    from the start, that divergence would stop the encoder from learning.

    Args:
        rate: factor by which each step shrinks the distance to 1, between 0 and 1.
        delay: number of steps for which the value stays 0.

    Raises:
        ValueError: a rate that is not between 0 and 1.
    """

    rate: float = 0.99
    delay: int = 0

    def __post_init__(self) -> None:
        _settle(self, "rate", above=0, below=1)
        checks.settle(self, delay=checks.whole("delay", self.delay, at_least=0))

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return 1.0 - math.pow(self.rate, max(_step(step) - self.delay, 0))


def as_schedule(weight: float | Schedule, name: str = "weight") -> Schedule:
    """A number as a constant schedule.

    Args:
        weight: what was given.
        name: of the argument.

    Raises:
        TypeError: neither a number nor a schedule.
        ValueError: not finite.
    """
    if isinstance(weight, Schedule):
        return weight
    if checks.as_float(weight) is None:
        checks.refuse(name, "a number or a schedule", weight, "Write schedules.Cosine(...).")
    return Constant(checks.number(name, weight))
