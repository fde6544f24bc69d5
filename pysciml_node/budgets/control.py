"""The controller: a dual variable in logarithmic coordinates.

To minimize a loss `L` subject to `cost <= target` is to find the saddle point of `L + w * R`, where
`R` is a penalty that the cost falls with and `w >= 0` the dual variable. Dual ascent raises `w`
where the cost is too high and projects it at 0. The scale of `R` is unknown and changes in
training, so the ascent is not in `w` but in

    theta = log(1 + 50 price / limit),        price = w * (mean of R),

in which steps are additive near price 0, where the projection has to be exact, and factors far from
it, up to the limit at log 51. The constraint is the logarithm of the cost over its target. So
nothing in the ascent has a unit.

The cost answers late, because parameters have to move. Against such a lag, say
`cost' = (f(theta) - cost) / tau` with a slope `-s` of `f`, ascent alone oscillates, with a damping
of `1 / (2 sqrt(gain * s * tau))`. So `theta` also has a part in proportion to the violation, which
raises the damping by the factor `1 + proportional * s`. This is the method of multipliers, whose
augmented Lagrangian has the same two parts.

References: R. T. Rockafellar, Math. Programming 5 (1973) 354-373; A. Stooke, J. Achiam, P. Abbeel,
Responsive Safety in Reinforcement Learning by PID Lagrangian Methods, ICML 2020, arXiv 2007.03964.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# The price is small against this share of its limit where steps of theta are additive.
_SHARE = 0.02
_TOP = math.log1p(1 / _SHARE)
# The integral part falls so many times as fast as it rises where the cost is within the budget. It
# stays there long after the weight has gone, and meanwhile too much weight presses it further down.
_FALL = 3.0
# Violations beyond this are left to the proportional part while the cost is coming down: by the
# time that it has come all the way the integral part would be far too large.
_FAR = 0.1
# The same while it is not: more weight is needed, however far the cost has to go.
_FARTHEST = 0.3


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
        weight: the weight.
        limited: training steps in a row in which the weight wanted to be above its limit.
    """

    response: float
    limit: float
    proportional: float = 5.0
    level: float = 0.0
    weight: float = 0.0
    limited: int = 0
    usual: Average = field(default_factory=lambda: Average(1.0))

    def __post_init__(self) -> None:
        self.usual.memory = self.response / 2

    def update(self, now: float, trend: float, penalty: float) -> None:
        """Move the weight by one training step.

        Args:
            now: `log(cost / target)`.
            trend: what this changes by in the time in which the cost answers.
            penalty: the penalty without its weight, averaged; at least 0.
        """
        violation = now + trend
        wanted = self.level + self.proportional * violation
        # Anti-windup: the integral part waits while it could not move the weight anyway.
        if wanted < _TOP or violation < 0.0:
            pace = _FALL if now < 0.0 else 1.0
            highest = _FAR if trend < 0.0 else _FARTHEST
            bounded = min(max(violation, -pace * _FAR), highest)
            bounded *= pace if violation < 0.0 else 1.0
            self.level += self.proportional * bounded / self.response
        self.level = min(max(self.level, 0.0), _TOP)
        theta = min(max(self.level + self.proportional * violation, 0.0), _TOP)
        self.limited = self.limited + 1 if wanted >= _TOP and violation > 0.0 else 0
        self.usual.add(theta)
        self._set(theta, penalty)

    def settle(self, penalty: float) -> None:
        """Keep the weight where it has been of late.

        Args:
            penalty: as for `update`.
        """
        if self.usual.mass:
            self._set(self.usual.value, penalty)

    def _set(self, theta: float, penalty: float) -> None:
        price = _SHARE * self.limit * math.expm1(theta)
        self.weight = price / penalty if penalty > 0.0 else 0.0

    def numbers(self) -> list[float]:
        """The state."""
        return [self.level, self.weight, float(self.limited), *self.usual.numbers()]

    def restore(self, numbers: list[float]) -> None:
        """Continue from `numbers`."""
        self.level, self.weight, limited, *usual = numbers
        self.limited = int(limited)
        self.usual.restore(usual)
