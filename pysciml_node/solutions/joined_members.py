"""Members whose solves consist of pieces, with jumps of the state between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.state import map_tensors
from pysciml_node.solutions.joined import JoinedStats, joined_trajectory
from pysciml_node.solutions.jump import Jump
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.portable import mapped_problem, portable_problem
from pysciml_node.solutions.solution import ReturnCode, Solution


@dataclass(frozen=True)
class Round:
    """A piece of each of some members, solved at once.

    Attributes:
        rows: which members, increasing, `(L,)`.
        members: their pieces.
        changed: whether an event has changed the state where the piece starts, `(L,)`.
    """

    rows: Array
    members: Members
    changed: Array


@dataclass(frozen=True)
class JumpsOfMembers:
    """An event that has happened to some members at once.

    Attributes:
        rows: which members, increasing, `(L,)`.
        event: its index.
        t: its times, `(L,)`.
        before: the flat states that it met, `(L, N)`.
        after: those that it left.
    """

    rows: Array
    event: int
    t: Tensor
    before: Tensor
    after: Tensor


def _place(rows: Array, m: int) -> int | None:
    """Where a member stands among increasing rows; `None` where it does not."""
    i = int(np.searchsorted(rows, m))
    return i if i < len(rows) and rows[i] == m else None


@dataclass
class JoinedMembers:
    """The results of members that were solved from event to event, all at once.

    Attributes:
        ensemble: what was solved.
        codes: how each ended.
        rounds: their pieces.
        jumps: what the events have done, in order.
        stopped: the event that has ended each member, or -1, `(M,)`.
        changed: whether an event has changed the state at its very end, `(M,)`.
        at_start: whether an event has happened at its start, `(M,)`.
        ends: flat states that they got to, `(M, N)`.
        times: numbers that were asked for, `(M, T)`; or `None`.
        at_times: flat states there, `(M, T, N)`, NaN where a member did not get to.
        reached: how many of the times each got to, `(M,)`.
        stop_times: of the events that have ended members, where these do nothing else, `(M,)`.
        detached: whether gradients have been left behind.
    """

    ensemble: EnsembleProblem
    codes: Sequence[ReturnCode]
    rounds: list[Round]
    jumps: list[JumpsOfMembers]
    stopped: Array
    changed: Array
    at_start: Array
    ends: Tensor
    times: Array | None
    at_times: Tensor | None
    reached: Array
    stop_times: Tensor | None = None
    detached: bool = False
    _made: dict[int, Solution] = field(default_factory=dict, init=False)

    def final(self) -> Tensor:
        """The states that they got to, `(M, N)`."""
        return self.ends

    def saved(self) -> Tensor | None:
        """The states at `saveat`, `(M, T, N)`; NaN where a member did not get to."""
        return self.at_times

    def count(self, name: str) -> Array:
        """A field of `Stats` for each member, `(M,)`, as it stands now."""
        total = np.zeros(len(self.codes), dtype=np.int64)
        for one in self.rounds:
            total[one.rows] += one.members.count(name)
        return total

    def solution(self, m: int) -> Solution:
        """The solution of one member, made when it is asked for and kept."""
        if m not in self._made:
            self._made[m] = self._make(m)
        return self._made[m]

    def _make(self, m: int) -> Solution:
        pieces: list[Solution] = []
        changed: list[bool] = []
        for one in self.rounds:
            i = _place(one.rows, m)
            if i is not None:
                pieces.append(one.members.solution(i))
                changed.append(bool(one.changed[i]))
        jumps = tuple(self._jumps(m))
        problem, stopped = self.ensemble.member(m), int(self.stopped[m])
        spec, last = problem.spec, pieces[-1]
        event = None if stopped < 0 else stopped
        changes: dict[str, Any] = {
            "u1": spec.unflatten(self.ends[m]),
            "event": event,
            "retcode": self.codes[m],
            "detached": self.detached,
        }
        if self.stop_times is not None:
            time = None if event is None else self.stop_times[m]
            return dataclasses.replace(last, **changes, event_t=time)
        if self.times is None:
            start = jumps[0] if self.at_start[m] else None
            t, saved = self._rows(m, pieces, changed, start)
        else:
            t = problem.time_tensor(self.times[m, : self.reached[m]].tolist())
            assert self.at_times is not None
            saved = spec.unflatten(self.at_times[m, : self.reached[m]])
        end = self.ends[m] if self.changed[m] else None
        return dataclasses.replace(
            last,
            **changes,
            problem=problem,
            stats=JoinedStats([piece.stats for piece in pieces]),
            t=t,
            trajectory=joined_trajectory(pieces, end),
            saved=saved,
            event_t=None if event is None else jumps[-1].t,
            jumps=jumps,
        )

    def _jumps(self, m: int) -> list[Jump]:
        """What the events have done to one member."""
        unflatten = self.ensemble.problem.spec.unflatten
        found = []
        for one in self.jumps:
            i = _place(one.rows, m)
            if i is not None:
                before = unflatten(one.before[i])
                same = one.after is one.before
                after = before if same else unflatten(one.after[i])
                found.append(Jump(one.event, one.t[i], before, after))
        return found

    def _rows(
        self, m: int, pieces: list[Solution], changed: list[bool], start: Jump | None
    ) -> tuple[Tensor, Any]:
        """The times of the steps of a member, and the states: both sides of each jump."""
        problem, spec = pieces[0].problem, self.ensemble.problem.spec
        times: list[Tensor] = []
        states: list[Any] = []

        def keep(t: Tensor, u: Any) -> None:
            times.append(t)
            states.append(u)

        if start is not None:
            one = map_tensors(lambda x: x[None], start.before)
            keep(problem.time_tensor([problem.t0]), one)
        for n, piece in enumerate(pieces):
            # The start of a piece is the end of the one before, unless the state has jumped.
            first = int(n > 0 and not changed[n])
            keep(piece.t[first:], map_tensors(lambda x, first=first: x[first:], piece.u))
        if self.changed[m]:
            end = pieces[-1].trajectory.times[-1]
            keep(problem.time_tensor([end]), spec.unflatten(self.ends[m][None]))
        parts = [spec.parts(u) for u in states]
        rows = [torch.cat(column) for column in zip(*parts, strict=True)]
        return torch.cat(times), spec.assemble(rows)

    def children(self) -> list[Any]:
        """The tensors, and those of the pieces."""
        own: list[Any] = [self.ends, self.at_times, self.stop_times]
        own += [(one.t, one.before, one.after) for one in self.jumps]
        return [*own, *(one.members.children() for one in self.rounds)]

    def replaced(self, children: list[Any]) -> JoinedMembers:
        """The same with other tensors."""
        ends, at_times, stop_times, *others = children
        count = len(self.jumps)
        jumps = [
            dataclasses.replace(one, t=t, before=before, after=after)
            for one, (t, before, after) in zip(self.jumps, others[:count], strict=True)
        ]
        rounds = [
            dataclasses.replace(one, members=one.members.replaced(theirs))
            for one, theirs in zip(self.rounds, others[count:], strict=True)
        ]
        return dataclasses.replace(
            self, ends=ends, at_times=at_times, stop_times=stop_times, jumps=jumps, rounds=rounds
        )

    def detach(self) -> JoinedMembers:
        """The same without the graph."""
        rounds = [dataclasses.replace(one, members=one.members.detach()) for one in self.rounds]
        copy = dataclasses.replace(self, rounds=rounds)
        copy = copy.replaced(map_tensors(Tensor.detach, copy.children()))
        return dataclasses.replace(
            copy, ensemble=_mapped(self.ensemble, Tensor.detach), detached=True
        )

    def __getstate__(self) -> dict[str, Any]:
        copy = self.detach()
        copy.ensemble = dataclasses.replace(
            copy.ensemble, problem=portable_problem(copy.ensemble.problem)
        )
        return copy.__dict__


def _mapped(ensemble: EnsembleProblem, fn: Callable[[Tensor], Tensor]) -> EnsembleProblem:
    """The same ensemble with a function applied to its tensors."""
    changes = {name: map_tensors(fn, getattr(ensemble, name)) for name in ("u0", "p", "tspan")}
    problem = mapped_problem(ensemble.problem, fn)
    return dataclasses.replace(ensemble, problem=problem, **changes)
