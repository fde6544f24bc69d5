"""What the loop over members leaves: their accepted steps, and their states at requested times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.stacked import MemberSteps
from pysciml_node.replay.members.stages import StepOfMembers
from pysciml_node.steps.step import Attempt

# States of steps that nobody has asked for are kept up to this many bytes.
_MOST_KEPT = 2**25


class Tried(NamedTuple):
    """Steps that some members have tried at once, `(L,)` each."""

    rows: Array  # which members
    t: Array
    h: Array
    end: Array
    error: Array
    stop: Array | None  # which stop they end on, or -1; `None` where all are -1
    number: Array  # which step of its member each is
    accepted: Array


class Attempts(NamedTuple):
    """The last attempts of some members, kept to explain a failure."""

    rows: Array  # (L,), increasing
    t: Array  # (L,)
    h: Array  # (L,)
    u: Tensor  # (L, N)
    u1: Tensor  # (L, N)
    error: Array  # (L,)


@dataclass
class SavedPlaces:
    """Where the saved states lie: as many entries as there are of these.

    Attributes:
        row: the member.
        step: which of its steps it lies in, or ends; -1 is the start.
        time: which of its times it is.
        theta: where in the step, between 0 and 1; NaN at its end.
        when: the time itself.
    """

    row: Array
    step: Array
    time: Array
    theta: Array
    when: Array

    def where(self, kept: Array) -> SavedPlaces:
        """Some of them."""
        return SavedPlaces(*(column[kept] for column in self.columns))

    @property
    def columns(self) -> tuple[Array, ...]:
        """Its arrays."""
        return self.row, self.step, self.time, self.theta, self.when


class Tape:
    """Collects the accepted steps, and the states at the times that they pass over.

    Args:
        options: say which times.
        u0: initial states, `(M, N)`.
        recording: whether gradients may be taken; else the states of the steps are let go where
            other times are asked for and they take more than `_MOST_KEPT` bytes.
        moving: whether the ends of the intervals receive gradients. Free steps then move with the
            start, and the times that are asked for do not.

    Attributes:
        thinned: whether only the last state of each member is kept.
        failures: the last attempts of members that have failed, by member.
    """

    def __init__(
        self, options: MemberOptions, u0: Tensor, recording: bool, moving: bool = False
    ) -> None:
        t0, t1 = options.spans
        self.u0, self.count, self.moving = u0, len(t0), moving
        self.thinned = False
        self.failures: dict[int, Attempt] = {}
        self._steps: list[Tried] = []
        self._states: list[Tensor] = []
        self._finals: list[tuple[Array, Tensor]] = []
        self._size = options.times
        self._spare = self._size is not None and not recording
        self._bytes = 0
        self._places: list[SavedPlaces] = []
        self._values: list[Tensor] = []
        self._passed = np.zeros(self.count, dtype=np.int64)
        if self._size is None:
            return
        times = np.array([options.common.saveat]) if options.saveat is None else options.saveat
        self._sign = np.sign(t1 - t0)
        # One row for each member, or one for all; an infinite time follows the last.
        shared = options.saveat is None and bool((self._sign == self._sign[0]).all())
        signs = self._sign[:1, None] if shared else self._sign[:, None]
        beyond = np.full((len(signs), 1), np.inf)
        self._times = np.concatenate((times * signs, beyond), axis=1)
        self._row_of = np.zeros(self.count, dtype=np.int64) if shared else np.arange(self.count)
        every = np.arange(self.count)
        self._save_ends(every, np.full(self.count, -1), every, t0, u0)

    def step(self, stages: StepOfMembers, u1: Tensor, tried: Tried) -> tuple[Array, Tensor] | None:
        """Take in the steps that some members have taken.

        Args:
            stages: of the step.
            u1: the states at its end, `(L, N)`.
            tried: the steps, of which those that are not accepted are left out at the end.

        Returns:
            Places in the batch for which `f(t + h, u1)` was evaluated on the way, and these.
        """
        self._steps.append(tried)
        if not self.thinned:
            self._states.append(u1)
            self._bytes += u1.nbytes
            if self._spare and self._bytes > _MOST_KEPT:
                self._states, self.thinned = [], True
        if self._size is None:
            return None
        places = np.flatnonzero(tried.accepted)
        ends = self._save_inside(stages, tried, places)
        rows, number, end = tried.rows[places], tried.number[places], tried.end[places]
        self._save_ends(rows, number, places, end, u1)
        return ends

    def leave(self, rows: Array, u: Tensor, places: Array, failed: Attempts | None) -> None:
        """Members leave the batch.

        Args:
            rows: which.
            u: the states of all in the batch, `(L, N)`.
            places: theirs among these, `(R,)`.
            failed: the last attempts of those that have failed, if any.
        """
        if self._spare:
            index = torch.from_numpy(places).to(u.device)
            self._finals.append((rows, u.index_select(0, index)))
        if failed is not None:
            for i, m in enumerate(failed.rows.tolist()):
                t, h, error = (float(x[i]) for x in (failed.t, failed.h, failed.error))
                self.failures[m] = Attempt(t, h, failed.u[i], failed.u1[i], error)

    def _save_inside(
        self, stages: StepOfMembers, tried: Tried, places: Array
    ) -> tuple[Array, Tensor] | None:
        """States at times that lie inside the steps at some places."""
        rows = tried.rows[places]
        sign = self._sign[rows]
        row, end = self._row_of[rows], tried.end[places] * sign
        first = self._passed[rows]
        last = first.copy()
        # What ends on no stop moves, and a time that it ends at lies in it.
        closed = end
        if self.moving:
            free = True if tried.stop is None else tried.stop[places] < 0
            closed = np.nextafter(end, np.where(free, np.inf, end))
        while (passing := self._times[row, last] < closed).any():
            last += passing
        counts = last - first
        inside = np.flatnonzero(counts)
        if not len(inside):
            return None
        self._passed[rows] = last
        several = counts[inside]
        of = np.repeat(inside, several)
        within = np.arange(len(of)) - np.repeat(np.cumsum(several) - several, several)
        time = first[of] + within
        when = self._times[row[of], time] * sign[of]
        step = places[of]
        theta = (when - tried.t[step]) / tried.h[step]
        values, ends = stages.inside(step, theta, when)
        self._keep(SavedPlaces(rows[of], tried.number[step], time, theta, when), values)
        return ends

    def _save_ends(self, rows: Array, index: Array, places: Array, end: Array, u1: Tensor) -> None:
        """States at times at which the steps end."""
        row, end = self._row_of[rows], end * self._sign[rows]
        while (there := self._times[row, self._passed[rows]] == end).any():
            due = np.flatnonzero(there)
            chosen = u1.index_select(0, torch.from_numpy(places[due]).to(u1.device))
            time = self._passed[rows[due]].copy()
            theta = np.full(len(due), np.nan)
            places_of = SavedPlaces(rows[due], index[due], time, theta, end[due])
            self._keep(places_of, chosen)
            self._passed[rows[due]] += 1

    def _keep(self, places: SavedPlaces, values: Tensor) -> None:
        self._places.append(places)
        self._values.append(values)

    # What has been collected.

    @property
    def vectors(self) -> list[Tensor]:
        """The states of every attempt and those at the times that were asked for, as they came."""
        return [*self._states, *self._values]

    def steps(self, kept: Array | None = None) -> tuple[MemberSteps, Tensor]:
        """The steps, member after member, and the states at their ends `(P, N)`.

        Args:
            kept: how many steps of each member; default all.
        """
        order, counts = self._order(kept)

        def ordered(parts: Iterable[Array]) -> Array:
            column: Array = np.concatenate([np.empty(0), *parts])[order]
            return column

        none = (np.full(len(x.rows), -1) if x.stop is None else x.stop for x in self._steps)
        steps = MemberSteps(
            offsets=np.concatenate(([0], np.cumsum(counts))),
            starts=ordered(x.t for x in self._steps),
            sizes=ordered(x.h for x in self._steps),
            ends=ordered(x.end for x in self._steps),
            errors=ordered(x.error for x in self._steps),
            stops=ordered(none).astype(np.int64),
        )
        if self.thinned:
            rows = np.concatenate([rows for rows, _ in self._finals])
            finals = torch.cat([u for _, u in self._finals])
            return steps, finals[torch.from_numpy(np.argsort(rows)).to(finals.device)]
        if not self._states:
            return steps, self.u0.new_empty((0, self.u0.shape[1]))
        index = torch.from_numpy(order).to(self.u0.device)
        return steps, torch.cat(self._states).index_select(0, index)

    def _order(self, kept: Array | None) -> tuple[Array, Array]:
        """Where the accepted steps of all attempts stand, by member; and how many each has."""
        nothing = np.empty(0, dtype=np.int64)
        places = np.flatnonzero(np.concatenate([nothing, *(x.accepted for x in self._steps)]))
        rows = np.concatenate([nothing, *(x.rows for x in self._steps)])[places]
        number = np.concatenate([nothing, *(x.number for x in self._steps)])[places]
        if kept is not None:
            good = number < kept[rows]
            places, rows, number = places[good], rows[good], number[good]
        counts = np.bincount(rows, minlength=self.count)
        order = np.empty_like(places)
        order[(np.cumsum(counts) - counts)[rows] + number] = places
        return order, counts

    def saved(self, kept: Array | None = None) -> tuple[SavedPlaces, Tensor] | None:
        """Where the saved states lie, and these themselves, `(M, T, N)`; NaN where there are none.

        Args:
            kept: how many steps of each member count; default all.
        """
        if self._size is None:
            return None
        nothing = np.empty(0, dtype=np.int64)
        every = [SavedPlaces(*(nothing,) * 3, np.empty(0), np.empty(0)), *self._places]
        columns = zip(*(p.columns for p in every), strict=True)
        places = SavedPlaces(*(np.concatenate(column) for column in columns))
        values = torch.cat([self.u0[:0], *self._values])
        if kept is not None:
            good = places.step < kept[places.row]
            places = places.where(good)
            values = values[torch.from_numpy(np.flatnonzero(good)).to(values.device)]
        empty = values.new_full((self.count * self._size, values.shape[1]), torch.nan)
        at = torch.from_numpy(places.row * self._size + places.time).to(values.device)
        filled = empty.index_copy(0, at, values)
        return places, filled.view(self.count, self._size, -1)
