"""Ends of members' intervals that receive gradients, and how their steps move with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.stacked import MemberSteps


@dataclass(frozen=True)
class StepMoves:
    """What moves steps of some members, `(R,)` each.

    A step moves with the start of its member until one has ended on a stop, and from there on
    nothing moves. The step that ends on the first stop makes up for it, and the last one grows with
    the end.

    Attributes:
        rows: the members.
        free: whether nothing fixes the start of the step.
        lands: whether the step ends on a stop.
        last: whether this is the end of the interval.
    """

    rows: Array
    free: Array
    lands: Array
    last: Array

    @staticmethod
    def of(steps: MemberSteps, ends: Array) -> StepMoves:
        """Those of all steps of a solve, `(P,)`; `ends` of the intervals are `(M,)`."""
        lands = steps.stops >= 0
        rows = np.repeat(np.arange(len(steps.counts)), steps.counts)
        before: Array = np.cumsum(lands) - lands
        first = np.append(before, 0)[steps.offsets[:-1]]
        return StepMoves(rows, before == first[rows], lands, lands & (steps.ends == ends[rows]))

    def at(self, places: Array) -> StepMoves:
        """Those of some of the steps."""
        return StepMoves(*(x[places] for x in (self.rows, self.free, self.lands, self.last)))


@dataclass(frozen=True)
class MovingEnds:
    """Zeros whose derivatives are those of the starts and ends of members' intervals.

    Attributes:
        ends: `(M, 2)` in float64 on the CPU.
    """

    ends: Tensor

    @staticmethod
    def of(tspan: Tensor) -> MovingEnds:
        """Zeros with the graph of intervals `(M, 2)`."""
        given = tspan.cpu().double()
        return MovingEnds(given - given.detach())

    def of_steps(self, moves: StepMoves) -> tuple[Tensor, Tensor]:
        """Zeros to add to the starts and to the sizes of steps, `(R,)` each."""
        ends = self.ends.index_select(0, torch.from_numpy(moves.rows))
        # A product with zero would make NaN of an infinite cotangent.
        start = torch.where(torch.from_numpy(moves.free), ends[:, 0], 0.0)
        end = torch.where(torch.from_numpy(moves.last), ends[:, 1], 0.0)
        return start, torch.where(torch.from_numpy(moves.lands), end - start, 0.0)
