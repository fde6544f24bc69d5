"""Ensembles with events: all members go from event to event at once.

In each round every member that is under way is solved up to its next event, all of them in one
batch. Then the events happen, mapped over those members that meet them. It is what `jumps` does for
a single solve, and gradients go through it by the same rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import Array, MemberOptions
from pysciml_node.problems.ensemble import EnsembleProblem, pieces_of
from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import moves
from pysciml_node.replay.members.events import affected, condition_of
from pysciml_node.replay.members.field import GraphWatch, MembersField
from pysciml_node.replay.members.stacked import MemberEvents, MembersUpToEvents
from pysciml_node.solutions.joined_members import JoinedMembers, JumpsOfMembers, Round
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.event_gradient import root_shift
from pysciml_node.steps.guard import guard
from pysciml_node.steps.surroundings import Surroundings

# Of all members at once, which a property of each is slow for.
_SUCCESSFUL = frozenset(id(code) for code in ReturnCode if code.successful)

Batch = Callable[[EnsembleProblem, Algorithm, MemberOptions], MembersUpToEvents | None]


class OneByOne(Exception):
    """The members have to be solved one after the other."""


def run_with_events(
    ensemble: EnsembleProblem, batch: Batch, algorithm: Algorithm, options: MemberOptions
) -> Members | None:
    """Solve members with events at once; `None` where they have to go one after the other.

    Args:
        ensemble: what is solved.
        batch: solves members up to their first events, or returns `None`.
        algorithm: how.
        options: of all, and of each.
    """
    directions = np.sign(options.spans[1] - options.spans[0])
    if len(ensemble) == 1 or not isinstance(ensemble.problem, ODEProblem):
        return None
    if (directions != directions[0]).any() or options.saveat_tensor is not None:
        return None
    try:
        return _Rounds(ensemble, batch, algorithm, options).result()
    except OneByOne:
        return None


class _Schedule:
    """The times that events name, in the order of integration, and of the events among equals.

    Args:
        events: of the solve.
        spans: the members' intervals.
        sign: their direction.
    """

    def __init__(self, events: tuple[Event, ...], spans: tuple[Array, Array], sign: float) -> None:
        given = [(i, event.at) for i, event in enumerate(events) if event.at is not None]
        tensors = [torch.as_tensor(at, dtype=torch.float64).cpu() for _, at in given]
        moving = torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.float64)
        of = np.repeat([i for i, _ in given], [len(x) for x in tensors]).astype(np.int64)
        times = moving.detach().numpy()
        order = np.argsort(sign * times, kind="stable")
        # What follows the last is never due.
        self.times: Array = np.append(times[order], np.inf)
        self.events: Array = np.append(of[order], -1)
        nothing = torch.zeros(1, dtype=torch.float64)
        shifts = (moving - moving.detach())[torch.from_numpy(order)]
        self.shifts = torch.cat((shifts, nothing))
        low, high = np.minimum(*spans).max(), np.maximum(*spans).min()
        self.inside = bool(((low <= times) & (times <= high)).all())


class _Effect:
    """What an event does beside a change of the state.

    Args:
        event: has an `affect` that has not been called so far.
    """

    def __init__(self, event: Event) -> None:
        self.reach = Surroundings({"affect": event.affect})
        self.watch = GraphWatch()
        self._values = {id(x): x.clone() for x in self.reach.tensors if not x.requires_grad}

    def seen(self) -> bool:
        """Whether there is any."""
        return self.watch.seen or self.reach.changed() or bool(self.reach.changed_in_place())

    def put_back(self) -> None:
        """Undo it."""
        with torch.no_grad():
            for x in self.reach.changed_in_place():
                if id(x) in self._values:
                    x.copy_(self._values[id(x)])
        self.reach.put_back()


def _distinct(t0: Array, t1: Array) -> Array:
    """Whether there is room for a step between two times."""
    far: Array = abs(t1 - t0) > 16 * np.spacing(np.maximum(abs(t0), abs(t1)))
    return far


class _Rounds:
    """One solve of all members in rounds.

    All arrays have an entry for each member, `(M,)`, unless said otherwise.
    """

    def __init__(
        self, ensemble: EnsembleProblem, batch: Batch, algorithm: Algorithm, options: MemberOptions
    ) -> None:
        self.ensemble, self.algorithm, self.options = ensemble, algorithm, options
        self.batch, self.spec, self.field = batch, ensemble.problem.spec, MembersField(ensemble)
        self.events, count = options.common.events, len(ensemble)
        self.conditions = [i for i, e in enumerate(self.events) if e.condition is not None]
        functions = [(e.condition, e.affect) for e in self.events]
        p = ensemble.problem.p if ensemble.p is None else ensemble.p
        self.reach = Surroundings({"events": functions, "p": p})
        self.tried: set[int] = set()  # events whose effects have been seen
        self.t0, self.t1 = options.spans
        self.sign = float(np.sign(self.t1[0] - self.t0[0]))
        self.schedule = _Schedule(self.events, options.spans, self.sign)
        if not self.schedule.inside:
            raise OneByOne
        self.only_stops = all(event.stops for event in self.events)
        # Where each member is, and zeros by which its time moves.
        self.now, self.u = self.t0.copy(), ensemble.starts()
        self.shift, self.end_shift = torch.zeros(2, count, dtype=torch.float64)
        if ensemble.tspan is not None and moves(ensemble.tspan):
            given = ensemble.tspan.cpu().double()
            self.shift, self.end_shift = (given - given.detach()).unbind(1)
        self.next = np.zeros(count, dtype=np.int64)  # in the schedule
        self.fired = np.zeros((count, len(self.events)), dtype=bool)
        self.changed, self.over = np.zeros((2, count), dtype=bool)
        self.stopped = np.full(count, -1)
        self.spent, self.saved = np.zeros((2, count), dtype=np.int64)
        self.codes = [ReturnCode.Success] * count
        self.rounds: list[Round] = []
        self.jumps: list[JumpsOfMembers] = []
        self.stop_times: Tensor | None = None
        self.times: Array | None = None
        if options.times is not None:
            own = options.common.saveat if options.saveat is None else options.saveat
            self.times = np.broadcast_to(np.array(own), (count, options.times))
        self._values: list[tuple[Array, Tensor]] = []  # of saved states: flat places

    def result(self) -> JoinedMembers:
        """Solve, and put the pieces together.

        Raises:
            OneByOne: that cannot be done at once.
        """
        every = np.arange(len(self.ensemble))
        at_start = self._due(every)
        self._happen(every, np.zeros_like(self.fired))
        if (self.stopped >= 0).any():
            raise OneByOne  # One member says what is wrong.
        while len(rows := self._under_way()):
            self._round(rows)
        if self.times is not None:
            self._keep_ends()
        for m in np.flatnonzero(self.stopped >= 0):
            self.codes[m] = ReturnCode.Terminated
        return JoinedMembers(
            ensemble=self.ensemble,
            codes=self.codes,
            rounds=self.rounds,
            jumps=self.jumps,
            stopped=self.stopped,
            changed=self.changed,
            at_start=at_start,
            ends=self.u,
            times=self.times,
            at_times=self._at_times(),
            reached=self.saved,
            stop_times=self.stop_times,
        )

    def _under_way(self) -> Array:
        """The members that have a piece before them, `(L,)`."""
        while True:
            rows = np.flatnonzero(~self.over & (self.now != self.t1))
            end, shift = self._ends(rows)
            far = _distinct(self.now[rows], end)
            near = rows[~far]
            if not len(near):
                return rows
            self.now[near] = end[~far]
            self._move(near, shift[torch.from_numpy(np.flatnonzero(~far))])
            self._happen(near, np.zeros((len(near), len(self.events)), dtype=bool))

    def _ends(self, rows: Array) -> tuple[Array, Tensor]:
        """Where the next pieces end at the latest, and the zeros by which this moves, `(L,)`."""
        due, index = self.next[rows], torch.from_numpy(rows)
        times, shift = self.schedule.times[due], self.end_shift[index]
        listed = np.isfinite(times)
        end = np.where(listed, times, self.t1[rows])
        scheduled = self.schedule.shifts[torch.from_numpy(due)]
        return end, torch.where(torch.from_numpy(listed), scheduled, shift)

    def _round(self, rows: Array) -> None:
        """Solve a piece of each of some members, and let happen what follows."""
        end, shift = self._ends(rows)
        start = self.now[rows].copy()
        pieces = self._pieces(rows, end, shift)
        stacked = self.batch(pieces, self.algorithm, self._options(rows, end))
        if stacked is None or (self.conditions and not self.rounds and self.reach.keeps_mapped()):
            self._refuse()
        nothing = MemberEvents(np.full(len(rows), -1), np.zeros((len(rows), 0), dtype=bool))
        events = stacked.events or nothing
        self.rounds.append(Round(rows, stacked, self.changed[rows].copy()))
        self.spent[rows] += stacked.count("naccept") + stacked.count("nreject")
        steps = stacked.steps
        last = np.append(steps.ends, np.nan)[steps.offsets[1:] - 1]
        reached = np.where(steps.counts > 0, last, start)
        first = events.first
        good = np.array([id(code) in _SUCCESSFUL for code in stacked.codes])
        self.now[rows] = np.where(good & (first < 0), end, reached)
        self.u = self.u.index_copy(0, self._index(rows), stacked.final())
        begin = self.shift[torch.from_numpy(rows)]
        self._move(rows, shift)
        hit = np.flatnonzero(first >= 0)
        if len(hit) and torch.is_grad_enabled():
            self._meet(rows, hit, begin, stacked, first)
        fired = np.zeros((len(rows), len(self.events)), dtype=bool)
        fired[:, self.conditions] = events.fired
        happening = good & (fired.any(1) | self._due(rows)) & ~np.array(self.only_stops)
        if self.times is not None:
            self._save(rows, stacked, happening)
        if self.only_stops:
            self.stopped[rows], self.over[rows] = first, True
            self.stop_times = self._time(rows)
        self._fail(rows, start, stacked.codes, good, fired, happening)
        going = np.flatnonzero(~self.over[rows])
        self._happen(rows[going], fired[going])

    def _pieces(self, rows: Array, end: Array, shift: Tensor) -> EnsembleProblem:
        spans = torch.from_numpy(np.stack((self.now[rows], end), axis=1))
        begin = self.shift[torch.from_numpy(rows)]
        if begin.requires_grad or shift.requires_grad:
            spans = spans + torch.stack((begin, shift), dim=1)
        return pieces_of(self.ensemble, rows, self.u.index_select(0, self._index(rows)), spans)

    def _options(self, rows: Array, end: Array) -> MemberOptions:
        """The options of pieces that begin where the members are."""
        options, common = self.options, self.options.common
        changes: dict[str, Any] = {"saveat": None}
        if self.rounds and common.controller.adaptive:
            changes["dt0"] = None
        own: dict[str, Any] = {
            name: value[torch.from_numpy(rows).to(value.device)]
            for name in ("rtol", "atol")
            if (value := getattr(options, name)) is not None
        }
        if self.times is not None:
            own["saveat"] = self._wanted(rows)
        return dataclasses.replace(
            options,
            common=dataclasses.replace(
                common, **changes, events=tuple(self.events[i] for i in self.conditions)
            ),
            spans=(self.now[rows].copy(), end),
            fired=self.fired[rows][:, self.conditions],
            spent=self.spent[rows],
            **own,
        )

    def _wanted(self, rows: Array) -> Array:
        """The output times that lie before the members, `(L, T')`; infinite ones fill the rows."""
        assert self.times is not None
        size = self.times.shape[1]
        left = size - self.saved[rows]
        at = self.saved[rows][:, None] + np.arange(max(int(left.max()), 1))
        given = self.times[rows[:, None], np.minimum(at, size - 1)]
        wanted: Array = np.where(at < size, given, self.sign * np.inf)
        return wanted

    def _meet(
        self, rows: Array, hit: Array, begin: Tensor, stacked: MembersUpToEvents, first: Array
    ) -> None:
        """Let the times of events move, and the states there with them.

        Args:
            rows: the members of the round.
            hit: which of them a condition has stopped.
            begin: zeros by which the starts of their pieces move, `(L,)`.
            stacked: their pieces.
            first: the condition that has stopped each, or -1, `(L,)`.
        """
        stacked.add("nfe", np.isin(np.arange(len(rows)), hit).astype(np.int64))
        steps = stacked.steps
        # A stop that lies before it fixes the end of the last step.
        stops = np.concatenate(([0], np.cumsum(steps.stops >= 0)))
        free = stops[steps.offsets[1:]] == stops[steps.offsets[:-1]]
        # In the continuous equation no step moves with its start.
        free &= self.options.common.adjoint.discrete
        for i in np.unique(first[hit]):
            of = np.flatnonzero(first == i)
            own, index = rows[of], self._index(rows[of])
            start = torch.where(torch.from_numpy(free[of]), begin[torch.from_numpy(of)], 0.0)
            self._move(own, start)
            u = self.u.index_select(0, index)
            shift, rate = self._root(self.events[self.conditions[i]], own, u)
            self._move(own, start + shift.to("cpu", torch.float64))
            self.u = self.u.index_copy(0, index, u + rate * shift.unsqueeze(1))

    def _root(self, event: Event, rows: Array, u: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros with the derivatives of times of events, `(L,)`, and `du/dt` there, `(L, N)`."""
        t = self._time(rows)
        with torch.no_grad():
            rate = self.field(t, u, self.field.parameters(rows))
            mass = self.ensemble.problem.mass
            if mass is not None:
                rate = torch.linalg.solve_ex(mass, rate.T).result.T
        with GraphWatch() as watch:
            shift = root_shift(lambda t, u: condition_of(event, self.spec, t, u), t, u, rate)
        if watch.seen:
            self._refuse()
        guard((shift,), self.reach, (t, u))
        return shift, rate

    def _fail(
        self,
        rows: Array,
        start: Array,
        codes: Sequence[ReturnCode],
        good: Array,
        fired: Array,
        happening: Array,
    ) -> None:
        """Stop with members that cannot go on, having arrived where they are."""
        now = self.now[rows]
        # An event that keeps happening may leave no time for a step, as a ball's bounces do.
        again = (self.fired[rows] & fired).any(1) & ~_distinct(start, now)
        tried = happening & (now != self.t1[rows])
        tried &= self.spent[rows] >= self.options.common.max_steps
        for i in np.flatnonzero(~good | again | tried).tolist():
            code, m = codes[i], rows[i]
            if good[i]:
                code = ReturnCode.DtLessThanMin if again[i] else ReturnCode.MaxIters
            self.codes[m], self.over[m], self.changed[m] = code, True, False

    def _due(self, rows: Array) -> Array:
        """Which members are where the next event of the schedule happens, `(L,)`."""
        due: Array = self.schedule.times[self.next[rows]] == self.now[rows]
        return due

    def _happen(self, rows: Array, fired: Array) -> None:
        """Let events happen, one after the other.

        Args:
            rows: to these members.
            fired: by conditions, `(L, E)`; beside what is due.
        """
        self.fired[rows], self.changed[rows] = fired, False
        while (due := self._due(rows)).any():
            heads = self.schedule.events[self.next[rows]]
            for i in np.unique(heads[due]):
                self._event(int(i), rows[due & (heads == i)])
            self.next[rows[due]] += 1
        for i in self.conditions:
            self._event(i, rows[fired[:, i]])
        self.over |= self.stopped >= 0

    def _event(self, i: int, rows: Array) -> None:
        """Let one event happen to some members."""
        if not len(rows):
            return
        event, index, t = self.events[i], self._index(rows), self._time(rows)
        before = after = self.u.index_select(0, index)
        if event.affect is not None:
            after = self._affected(i, rows, t, before)
            self.u = self.u.index_copy(0, index, after)
            self.changed[rows] = True
        self.jumps.append(JumpsOfMembers(rows, i, t, before, after))
        if event.terminal:
            self.stopped[rows] = np.where(self.stopped[rows] < 0, i, self.stopped[rows])

    def _affected(self, i: int, rows: Array, t: Tensor, before: Tensor) -> Tensor:
        """The states that an event leaves, `(L, N)`, by one call for all.

        An effect that changes anything else, such as a list of times, wants a call for each.
        """
        event, own = self.events[i], self.field.own
        effect = None if i in self.tried else _Effect(event)
        self.tried.add(i)
        try:
            with nullcontext() if effect is None else effect.watch:
                after = affected(event, self.spec, t, before, self.field.parameters(rows), own)
        except Exception as error:
            # Whatever vmap cannot do; what it raises by itself, one member raises again.
            self._refuse(error, effect)
        if effect is not None and effect.seen():
            self._refuse(None, effect)
        guard((after,), self.reach, (t, before))
        return after

    def _refuse(self, error: Exception | None = None, effect: _Effect | None = None) -> NoReturn:
        """Leave everything as it was, for the members one by one."""
        if effect is not None:
            effect.put_back()
        self.reach.put_back()
        raise OneByOne from error

    def _save(self, rows: Array, stacked: MembersUpToEvents, happening: Array) -> None:
        """Take what the pieces have saved; at a jump the state after it counts."""
        states, wanted, end = stacked.saved(), self._wanted(rows), self.now[rows][:, None]
        assert states is not None
        here = (self.sign * wanted < self.sign * end) | (~happening[:, None] & (wanted == end))
        here &= np.arange(wanted.shape[1]) < stacked.reached[:, None]
        of, at = np.nonzero(here)
        self._keep(rows[of], self.saved[rows][of] + at, states[self._index(of), self._index(at)])
        self.saved[rows] += here.sum(1)

    def _keep_ends(self) -> None:
        """Keep the states at the ends that no piece has saved: those that jumps have left."""
        assert self.times is not None
        left = np.arange(self.times.shape[1]) >= self.saved[:, None]
        rows, at = np.nonzero(left & (self.sign * self.times <= self.sign * self.now[:, None]))
        self._keep(rows, at, self.u.index_select(0, self._index(rows)))
        self.saved += np.bincount(rows, minlength=len(self.saved))

    def _keep(self, rows: Array, at: Array, states: Tensor) -> None:
        assert self.times is not None
        self._values.append((rows * self.times.shape[1] + at, states))

    def _at_times(self) -> Tensor | None:
        """All saved states, `(M, T, N)`."""
        if self.times is None:
            return None
        count, size = self.times.shape
        empty = self.u.new_full((count * size, self.u.shape[1]), torch.nan)
        places = self._index(np.concatenate([places for places, _ in self._values]))
        values = torch.cat([states for _, states in self._values])
        return empty.index_copy(0, places, values).view(count, size, -1)

    def _move(self, rows: Array, shift: Tensor) -> None:
        """Let times of members move as these zeros do."""
        if shift.requires_grad or self.shift.requires_grad:
            self.shift = self.shift.index_copy(0, torch.from_numpy(rows), shift)

    def _time(self, rows: Array) -> Tensor:
        """Where members are, with what moves it, `(L,)`."""
        t = torch.from_numpy(self.now[rows])
        if self.shift.requires_grad:
            t = t + self.shift[torch.from_numpy(rows)]
        return t.to(self.spec.device, self.spec.real_dtype)

    def _index(self, rows: Array) -> Tensor:
        return torch.from_numpy(rows).to(self.u.device)
