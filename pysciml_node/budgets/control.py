"""The controller: a dual variable in logarithmic coordinates.

To minimize a loss `L` subject to `cost <= target` is to find the saddle point of `L + w * R`, where
`R` is a penalty that the cost falls with and `w >= 0` the dual variable. Dual ascent raises `w` where
the cost is too high and projects it at 0. The scale of `R` is unknown, so the ascent is not in `w`
but in

    theta = log(1 + w / unit),        w = unit * (exp(theta) - 1),

in which steps are additive near 0, where the projection has to be exact, and factors far from it.
The constraint is the logarithm of the cost over its target, so that steps have no units at all.

The cost answers late: parameters have to move. Against such a lag, `cost' = (f(theta) - cost) / tau`
with a slope `-s` of `f`, ascent alone oscillates, with a damping of `1 / (2 sqrt(gain * s * tau))`.
So `theta` also has a part in proportion to the violation, which raises the damping by the factor
`1 + proportional * s`; this is the method of multipliers, whose augmented Lagrangian has the same
two parts.

References: R. T. Rockafellar, Math. Programming 5 (1973) 354-373; A. Stooke, J. Achiam, P. Abbeel,
Responsive Safety in Reinforcement Learning by PID Lagrangian Methods, ICML 2020, arXiv 2007.03964.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Of the limit: what the weighted penalty is at theta = log 2.
_UNIT_SHARE = 0.01


@dataclass
class Average:
    """An exponential average that is right from its first value on.

    Attributes:
        memory: of how many values.
        total: weighted sum of the values.
        mass: sum of the weights; 0 before the first value.
    """

    memory: float
    total: float = 0.0
    mass: float = 0.0

    def add(self, value: float) -> float:
        """Take a value in and return the average."""
        rate = 1.0 / max(self.memory, 1.0)
        self.total += rate * (value - self.total)
        self.mass += rate * (1.0 - self.mass)
        return self.value

    @property
    def value(self) -> float:
        """The average so far; NaN before the first value."""
        return self.total / self.mass if self.mass else math.nan

    def numbers(self) -> list[float]:
        """The state."""
        return [self.total, self.mass]

    def restore(self, numbers: list[float]) -> None:
        """Continue from `numbers`."""
        self.total, self.mass = numbers


@dataclass
class DualWeight:
    """The weight of a penalty as a function of how far the cost is from its target.

    Args:
        response: training steps in which the integral part moves by as much as the proportional
            part is; of the order of the lag with which the cost answers.
        limit: the weighted penalty is at most this, in units of the loss.
        proportional: change of `theta` for a violation of 1, that is for a cost of `e` targets.

    Attributes:
        level: the integral part of `theta`, at least 0.
        theta: where the weight stands.
        unit: the weight at `theta = log 2`; 0 until a penalty has been seen.
        limited: training steps in a row in which the weight wanted to be above its limit.
    """

    response: float
    limit: float
    proportional: float = 4.0
    level: float = 0.0
    theta: float = 0.0
    unit: float = 0.0
    limited: int = 0
    usual: Average = field(default_factory=lambda: Average(1.0))

    def __post_init__(self) -> None:
        self.usual.memory = self.response

    def update(self, violation: float, penalty: float) -> None:
        """Move the weight by one training step.

        Args:
            violation: `log(cost / target)`.
            penalty: the penalty without its weight, averaged; at least 0.
        """
        if self.unit == 0.0 and penalty > 0.0:
            self.unit = _UNIT_SHARE * self.limit / penalty
        if self.unit == 0.0:
            return
        top = math.log1p(self.limit / penalty / self.unit) if penalty > 0.0 else math.inf
        wanted = self.level + self.proportional * violation
        # Anti-windup: the integral part waits while it could not move the weight anyway.
        if wanted < top or violation < 0.0:
            self.level += self.proportional * violation / self.response
        self.level = min(max(self.level, 0.0), top)
        self.theta = min(max(self.level + self.proportional * violation, 0.0), top)
        self.limited = self.limited + 1 if wanted >= top and violation > 0.0 else 0
        self.usual.add(self.theta)

    def settle(self) -> None:
        """Keep the weight where it has been of late."""
        if self.usual.mass:
            self.theta = self.level = self.usual.value

    @property
    def weight(self) -> float:
        """The weight, `unit * (exp(theta) - 1)`."""
        return self.unit * math.expm1(self.theta)

    def numbers(self) -> list[float]:
        """The state."""
        return [self.level, self.theta, self.unit, float(self.limited), *self.usual.numbers()]

    def restore(self, numbers: list[float]) -> None:
        """Continue from `numbers`."""
        self.level, self.theta, self.unit, limited, *usual = numbers
        self.limited = int(limited)
        self.usual.restore(usual)
