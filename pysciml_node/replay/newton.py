"""When Newton's iteration for a slope of an implicit step has come to its end.

A change has to be small in two ways. Beside the greatest entry of the state it is near rounding,
which the discrete adjoint relies on. And in units of the tolerance, entry by entry, what is still
missing after it is a small share: an entry beside much greater ones has the error that was asked
for. Changes of sizes `d1` and `d2`, one after the other, leave

    d2 theta / (1 - theta),   theta = d2 / d1,

missing, as the iteration converges linearly (Hairer and Wanner, Solving Ordinary Differential
Equations II, section IV.8).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions, SolveOptions, Tolerances
from pysciml_node.problems.ensemble import Array

ITERATIONS = 10
"""After so many with the Jacobian of the step's start one is made at the stage itself, and after as
many more the step is given up."""

SLOW = 0.5
"""By so much a change has to be smaller than the one before it, or another Jacobian is taken."""

_SHARE = 1e-2
"""Of the tolerance, that an iteration may leave missing."""


def newton_rounding(dtype: torch.dtype, power: float = 0.75) -> float:
    """The accuracy of Newton's iteration beside the greatest entry, a power of the rounding."""
    accuracy: float = torch.finfo(dtype).eps ** power
    return accuracy


def noise(dtype: torch.dtype) -> float:
    """The size beside the greatest entry below which changes may be of rounding alone."""
    return 100 * newton_rounding(dtype, 1.0)


def left_missing(dtype: torch.dtype) -> float:
    """What implicit steps that are recorded differ by from others, beside the greatest entry."""
    return 10 * newton_rounding(dtype)


def newton_scale(known: Tensor, guess: Tensor, step: Any) -> Tensor:
    """The greatest entry of an argument over the weight of the slope, `()`, or `(L,)` of members.

    Args:
        known: the argument of the stage without its own slope, `(N,)` or `(L, N)`.
        guess: of the slope, likewise.
        step: its weight in the argument; `(L, 1)` of many members.
    """
    size = abs(step)
    scale: Tensor = known.abs().amax(-1, keepdim=True) / size
    scale = scale + guess.abs().amax(-1, keepdim=True)
    return scale.squeeze(-1)


@dataclass(frozen=True)
class Accuracy:
    """What may be missing of the argument of a stage, entry by entry: `atol + rtol * size`.

    The size is that of what the argument is the sum of: the state at the start of the step, and
    what slopes add to it. They may cancel, and no more than their rounding can be asked for then.

    Attributes:
        rtol: a number, or `(N,)`; of members `(M, 1)` or `(M, N)`.
        atol: likewise.
    """

    rtol: float | Tensor
    atol: float | Tensor

    @staticmethod
    def near_rounding(dtype: torch.dtype, power: float = 0.75) -> Accuracy:
        """Of each entry beside itself: for steps without a tolerance."""
        return Accuracy(newton_rounding(dtype, power), 0.0)

    @staticmethod
    def of(options: SolveOptions, dtype: torch.dtype, size: int) -> Accuracy:
        """As the options of a solve ask for.

        Args:
            options: have the tolerances, and say whether steps adapt to them.
            dtype: of the state.
            size: its entries, of which the later ones may drive no steps.
        """
        if not options.controller.adaptive:
            return Accuracy.near_rounding(dtype)
        return Accuracy.within(options.tolerances, size)

    @staticmethod
    def within(tolerances: Tolerances, size: int) -> Accuracy:
        """A share of the tolerances; entries without one have the tightest of the others."""
        tightest = tolerances.tightest
        rtol, atol = (
            _SHARE * _completed(given, least, size)
            for given, least in zip((tolerances.rtol, tolerances.atol), tightest, strict=True)
        )
        return Accuracy(rtol, atol)

    @staticmethod
    def of_members(options: MemberOptions, dtype: torch.dtype, size: int) -> Accuracy:
        """The same of many members, each with tolerances of its own where it has any."""
        common = Accuracy.of(options.common, dtype, size)
        if not options.common.controller.adaptive:
            return common
        own = {
            name: _SHARE * given
            for name, given in (("rtol", options.rtol), ("atol", options.atol))
            if given is not None
        }
        return replace(common, **own)

    def of_rows(self, rows: Array) -> Accuracy:
        """That of some members, `(L,)`."""

        def taken(x: float | Tensor) -> float | Tensor:
            if not isinstance(x, Tensor) or x.ndim < 2:
                return x
            return x.index_select(0, torch.from_numpy(rows).to(x.device))

        return Accuracy(taken(self.rtol), taken(self.atol))

    def missing(
        self,
        u: Tensor,
        known: Tensor,
        slope: Tensor,
        step: Any,
        change: Tensor,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What an iteration leaves missing, 1 being what it may; and `theta`, 0 at first.

        It is above `SLOW` where the matrix of the iteration has served its time, and may be 1 or
        more where rounding is all that is left.

        Args:
            u: the state at the start of the step, `(N,)` or `(L, N)`.
            known: the argument of the stage without its own slope.
            slope: its slope.
            step: the weight of the slope in the argument; `(L, 1)` of many members.
            change: the last one of the slope.
            before: the one before it, if there was one.

        Returns:
            Two tensors, `()` or `(L,)`.
        """
        size = abs(step)
        parts = torch.maximum(u.abs(), known.abs()) + size * slope.abs()
        units = parts * _like(self.rtol, known) + _like(self.atol, known)
        # What is zero, and stays so, is missing nothing.
        units = units + torch.finfo(units.dtype).tiny
        now = (size * change.abs() / units).amax(-1)
        if before is None:
            return now, torch.zeros_like(now)
        last = (size * before.abs() / units).amax(-1)
        left = torch.where(last > now, now * now / (last - now), now)
        return torch.minimum(now, left), now / last


def _like(tolerance: float | Tensor, state: Tensor) -> float | Tensor:
    """As it is, or where the state is and as precise."""
    if not isinstance(tolerance, Tensor):
        return tolerance
    return tolerance.to(state.device, state.dtype.to_real())


def _completed(tolerance: float | Tensor, tightest: float, size: int) -> float | Tensor:
    if not isinstance(tolerance, Tensor):
        return tolerance
    missing = tolerance.new_full((size - len(tolerance),), tightest)
    whole = torch.cat((tolerance, missing))
    return torch.where(whole.isfinite(), whole, tightest)
