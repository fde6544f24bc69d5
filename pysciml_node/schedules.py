"""Schedules: weights that change over training. A schedule maps a step number to a number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pysciml_node import checks
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution


class Schedule(checks.Configured, ABC):
    """Base of all schedules: a frozen function of the training step.

    A schedule can be scaled, `0.1 * schedule`. One that adjusts itself to what happens in training
    (`pysciml_node.Budget`) overrides `observe`, `state_dict` and `load_state_dict` too.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Value at `step`, which counts from 0."""

    def __mul__(self, factor: float) -> Schedule:
        return Scaled(self, factor)

    def __rmul__(self, factor: float) -> Schedule:
        return Scaled(self, factor)

    def observe(self, source: object, solution: Solution | EnsembleSolution) -> None:
        """Take note of a solve in training mode, before its penalties are evaluated.

        Args:
            source: who solved; the same object each time.
            solution: what was solved.
        """
        return

    def charge(self, penalty: float) -> None:
        """Take note of a penalty of that solve, without its weight, which is read afterwards."""
        return

    @property
    def observes(self) -> bool:
        """Whether `observe` does anything."""
        return type(self).observe is not Schedule.observe

    def state_dict(self) -> dict[str, Any]:
        """What has become of the schedule, beside the step number; nothing for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        return


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
class Scaled(Schedule):
    """`factor` times another schedule.

    Examples:
        >>> (0.5 * Constant(3.0))(0)
        1.5
    """

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        _settle(self, "factor")

    def __call__(self, step: int) -> float:
        """Value at `step`."""
        return self.factor * self.schedule(step)

    def state_dict(self) -> dict[str, Any]:
        """That of the other schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.schedule.load_state_dict(state)


def unscaled(schedule: Schedule) -> tuple[Schedule, float]:
    """The schedule that another is a multiple of, and the factor."""
    if not isinstance(schedule, Scaled):
        return schedule, 1.0
    inner, factor = unscaled(schedule.schedule)
    return inner, factor * schedule.factor


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
