"""The cotangents that enter the adjoint equations of many members."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.stacked import MemberSteps
from pysciml_node.torch_engine.members.tape import SavedPlaces


@dataclass(frozen=True)
class Entering:
    """Cotangents by member and, for each, by time: from the end of its interval to the start.

    Attributes:
        offsets: those of member `m` are `offsets[m]` to `offsets[m + 1]`; `(M + 1,)`.
        times: `(Q,)` in float64.
        values: their sums at these times, none of which is zero, `(Q, N)`.
        finite: whether all of a member's are, `(M,)`.
    """

    offsets: Array
    times: Array
    values: Tensor
    finite: Array

    @staticmethod
    def of(
        steps: MemberSteps,
        spans: tuple[Array, Array],
        places: SavedPlaces | None,
        saved: Tensor | None,
        at_steps: Tensor | None,
        like: Tensor,
    ) -> Entering:
        """Sort the cotangents of a solve.

        Args:
            steps: of the solve.
            spans: starts and ends of the intervals, `(M,)` each.
            places: where the saved states lie.
            saved: their cotangents, `(M, T, N)`; `None` is zero.
            at_steps: those of the states at the ends of the steps, `(P, N)`; `None` is zero.
            like: starts, `(M, N)`.
        """
        rows, times, values = [np.empty(0, np.int64)], [np.empty(0)], [like[:0]]
        member = np.repeat(np.arange(len(like)), steps.counts)
        if at_steps is not None:
            # NaN is not zero.
            some = np.flatnonzero((at_steps != 0).any(1).cpu().numpy())
            rows.append(member[some])
            times.append(steps.ends[some])
            values.append(at_steps.index_select(0, _index(some, at_steps)))
        if saved is not None and places is not None:
            # What follows the last step stands for the start.
            ends = np.append(steps.ends, np.nan)[steps.offsets[places.row] + places.step]
            at = np.where(np.isnan(places.theta), ends, places.when)
            rows.append(places.row)
            times.append(np.where(places.step < 0, spans[0][places.row], at))
            index = torch.from_numpy(places.row * saved.shape[1] + places.time).to(saved.device)
            values.append(saved.reshape(-1, saved.shape[2]).index_select(0, index))
        sign = np.sign(spans[1] - spans[0])
        row, time = np.concatenate(rows), np.concatenate(times)
        return Entering._summed(row, time, torch.cat(values), sign)

    @staticmethod
    def _summed(row: Array, time: Array, values: Tensor, sign: Array) -> Entering:
        """Add up what enters a member at the same time, and leave out what is zero."""
        order = np.lexsort((-sign[row] * time, row))
        row, time = row[order], time[order]
        new = np.append(True, (row[1:] != row[:-1]) | (time[1:] != time[:-1]))[: len(row)]
        group = np.empty_like(order)
        group[order] = np.cumsum(new) - 1
        sums = values.new_zeros((int(new.sum()), values.shape[1]))
        sums.index_add_(0, torch.from_numpy(group).to(values.device), values)
        peaks = sums.abs().amax(1).cpu().numpy()
        row, time = row[new], time[new]
        finite = np.ones(len(sign), dtype=bool)
        finite[row[~np.isfinite(peaks)]] = False
        kept = np.flatnonzero(peaks != 0)
        counts = np.bincount(row[kept], minlength=len(sign))
        return Entering(
            np.concatenate(([0], np.cumsum(counts))),
            time[kept],
            sums.index_select(0, torch.from_numpy(kept).to(values.device)),
            finite,
        )

    def at(self, members: Array, times: Array) -> tuple[Array, Tensor]:
        """What enters some members at the first or the last of their times.

        Args:
            members: which, `(L,)`.
            times: of the first or the last, `(L,)`; others are not looked at.

        Returns:
            The places among these that have one, and the values there.
        """
        found = []
        for entry in (self.offsets[members], self.offsets[members + 1] - 1):
            some = self.offsets[members + 1] > self.offsets[members]
            some &= np.append(self.times, np.nan)[entry] == times
            found.append(np.where(some, entry, -1))
        entry = np.maximum(*found)
        there = np.flatnonzero(entry >= 0)
        return there, self.values.index_select(0, _index(entry[there], self.values))


def _index(places: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(places).to(like.device)
