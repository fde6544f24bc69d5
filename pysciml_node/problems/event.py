"""Events: times at which a condition on the solution changes sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pysciml_node import checks


@dataclass(frozen=True)
class Event(checks.Configured):
    """Stops a solve where `condition(t, u)` crosses zero.

    After each accepted step the sign of the condition tells whether there was an event, and the
    dense output tells where. The step is then taken again with the shorter size, so the state at
    the event is the result of a step. The time of the event is differentiable by the implicit
    function theorem: `dt = -dg / (dg/dt + dg/du . f)`.

    Args:
        condition: real scalar function of time (a 0-d tensor) and state.
        direction: `1` for crossings from negative to positive along the integration, `-1` for
            those from positive to negative, `0` for both.
        xtol: width of the bracket at which the search ends, relative to the step; the default
            follows the state's dtype.

    Raises:
        ValueError: `direction` is not -1, 0 or 1.

    Reference: R. T. Q. Chen, B. Amos, M. Nickel, Learning Neural Event Functions for Ordinary
    Differential Equations, arXiv 2011.03902.
    """

    condition: Callable[[Tensor, Any], Tensor]
    direction: int = 0
    xtol: float | None = None

    def __post_init__(self) -> None:
        checks.function("condition", self.condition, "t", "u")
        direction = checks.choice("direction", self.direction, (-1, 0, 1))
        xtol = None if self.xtol is None else checks.number("xtol", self.xtol, at_least=0)
        checks.settle(self, direction=direction, xtol=xtol)

    def crosses(self, before: float, after: float) -> bool:
        """Whether the condition's values at the ends of a step show a crossing."""
        rising, falling = before < 0 <= after, before > 0 >= after
        return (rising and self.direction >= 0) or (falling and self.direction <= 0)
