"""What an event has done to a solution."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Jump(NamedTuple):
    """What an event has done.

    Attributes:
        event: its index among the events of the solve.
        t: its time, a 0-d tensor, differentiable where the event moves.
        before: the state that it met, in the structure of `u0`.
        after: the state that it left; the same where it has no `affect`.
    """

    event: int
    t: Tensor
    before: Any
    after: Any
