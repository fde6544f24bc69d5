"""Events: times at which something happens to a solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pysciml_node import checks

Affect = Callable[..., Any]


@dataclass(frozen=True)
class Event(checks.Configured):
    """Where a condition on the solution crosses zero, or at given times: a stop, a jump, or a mark.

    After each accepted step the sign of the condition tells whether there was an event, and the
    dense output tells where. The step is then taken again with the shorter size, so the state at
    the event is the result of a step. The time of the event is differentiable by the implicit
    function theorem: `dt = -dg / (dg/dt + dg/du . f)`.

    Where events are simultaneous, those at given times come first, then those with a condition,
    each kind in the order in which they are listed; each sees the state that the one before it has
    left.

    Args:
        condition: real scalar function of time (a 0-d tensor) and state. Either this or `at`.
        direction: `1` for crossings from negative to positive along the integration, `-1` for
            those from positive to negative, `0` for both.
        xtol: width of the bracket at which the search ends, relative to the step; the default
            follows the state's dtype.
        affect: what happens to the state: `affect(t, u)`, or `affect(t, u, p)` where the problem
            has a `p`, returns the new state in the structure, shapes and dtype of `u`. It is
            differentiated.
        terminal: whether the solve ends there; by default it does where there is no `affect`. An
            event that is neither terminal nor has an `affect` is only noted, in `solution.jumps`.
        at: times of the event, a sequence of numbers or a 1-d tensor, which receives gradients
            where it requires them.

    Raises:
        TypeError: neither a condition nor times, or both; an `affect` that cannot be called.
        ValueError: `direction` is not -1, 0 or 1, or a direction for given times.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> def fall(t, u):
        ...     return torch.stack((u[1], torch.tensor(-9.81)))
        >>> bounce = psn.Event(
        ...     lambda t, u: u[0], direction=-1, affect=lambda t, u: u * torch.tensor([1.0, -0.9])
        ... )
        >>> ball = psn.ODEProblem(fall, torch.tensor([1.0, 0.0]), (0.0, 2.0))
        >>> len(psn.solve(ball, events=bounce).jumps)
        3

    Reference: R. T. Q. Chen, B. Amos, M. Nickel, Learning Neural Event Functions for Ordinary
    Differential Equations, arXiv 2011.03902.
    """

    condition: Callable[[Tensor, Any], Tensor] | None = None
    direction: int = 0
    xtol: float | None = None
    affect: Affect | None = None
    terminal: bool | None = None
    at: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if (self.condition is None) == (self.at is None):
            both = "both" if self.at is not None else "neither"
            raise TypeError(
                f"an Event has a condition or times, but {both} are given.\n"
                "  Write Event(lambda t, u: u[0]) or Event(at=[1.0, 2.0])."
            )
        direction = checks.choice("direction", self.direction, (-1, 0, 1))
        if self.at is not None:
            if direction:
                raise ValueError(
                    "direction is for conditions that cross zero, but times are given.\n"
                    "  Leave direction out."
                )
            checks.numbers("at", self.at)
        else:
            checks.function("condition", self.condition, "t", "u")
        given: Any = self.affect
        if callable(given) and checks.takes(given, 3):
            checks.expect_time_first("affect", given)
        elif given is not None:
            hint = "Write affect(t, u) or affect(t, u, p)."
            checks.function("affect", given, "t", "u", hint=hint)
        terminal = self.affect is None and self.at is None
        if self.terminal is not None:
            terminal = checks.flag("terminal", self.terminal)
        xtol = None if self.xtol is None else checks.number("xtol", self.xtol, at_least=0)
        checks.settle(self, direction=direction, xtol=xtol, terminal=terminal)

    def value(self, t: Tensor, u: Any) -> Tensor:
        """The condition at a time and a state."""
        assert self.condition is not None
        return self.condition(t, u)

    @property
    def stops(self) -> bool:
        """Whether it does no more than end the solve where a condition crosses zero."""
        return bool(self.terminal) and self.affect is None and self.at is None

    def crosses(self, before: float, after: float) -> bool:
        """Whether the condition's values at the ends of a step show a crossing."""
        rising, falling = before < 0 <= after, before > 0 >= after
        return (rising and self.direction >= 0) or (falling and self.direction <= 0)
