"""The discrete adjoint of many members: their accepted steps replayed backward, all at once.

One sweep goes over the steps of all members: its first batch holds the last step of each, and
members leave as their steps run out. A few steps of each member are replayed at once where the
batch is small: steps do not depend on one another, given the states at their starts, and cotangents
pass from one to the next by the steps' Jacobians.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.comparison import entry_sizes, expect_reproduced
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.implicit import MakeStages
from pysciml_node.replay.members.limits import StepLimits
from pysciml_node.replay.members.moving import MovingEnds, StepMoves
from pysciml_node.replay.members.stacked import MemberSteps, StackedMembers
from pysciml_node.replay.members.stages import MemberStages, StepOfMembers
from pysciml_node.replay.newton import left_missing
from pysciml_node.replay.stages import Method
from pysciml_node.steps.field import Accumulator
from pysciml_node.steps.inputs import Inputs
from pysciml_node.torch_engine.members.pullback import Outputs, StagesBack, Steps
from pysciml_node.torch_engine.members.tape import SavedPlaces

# Steps of one member are replayed at once while their rows are fewer than this, and their Jacobians
# have no more columns than that: measured, see benchmarks/members.py.
_ROWS = 16384
_COLUMNS = 4


class Again(Protocol):
    """Takes steps of a solve again, with their operations recorded."""

    def __call__(
        self,
        u: Tensor,  # (R, N)
        members: Array,  # (R,)
        span: tuple[Array, Array, Array],  # starts, sizes and ends, (R,) each
        inside: tuple[Array, Array, Array],  # places among these, thetas and times, (Q,) each
        moved: tuple[Tensor, Tensor] | None,  # zeros that move starts and sizes, (R,) each
    ) -> list[Tensor]:
        """The states at the ends of steps, `(R, N)`, and those inside, `(Q, N)`, if any."""


def states_of(stages: StepOfMembers, inside: tuple[Array, Array, Array]) -> list[Tensor]:
    """What `Again` returns, of steps that have begun."""
    ends = stages.solution(with_error=False)
    return [ends, stages.inside(*inside)[0]] if len(inside[0]) else [ends]


@dataclass(frozen=True)
class StagesAgain:
    """Steps of Runge-Kutta methods again.

    Args:
        method: the method.
        field: of all members.
        options: between which times the field may be seen.
        kind: makes the stages.
    """

    method: Method
    field: MembersField
    options: MemberOptions
    kind: MakeStages

    def __call__(
        self,
        u: Tensor,
        members: Array,
        span: tuple[Array, Array, Array],
        inside: tuple[Array, Array, Array],
        moved: tuple[Tensor, Tensor] | None,
    ) -> list[Tensor]:
        """The states at the ends of steps, and inside."""
        p = self.field.parameters(members)
        stages = self.kind(self.method, self.field, members, p, u, True)
        t, h, _ = span
        stages.begin(u, t, h, self.limits(members, t, h))
        if moved is not None:
            stages.move(*moved)
        return states_of(stages, inside)

    @cached_property
    def limits(self) -> StepLimits:
        """Of all steps."""
        return StepLimits(self.options, self.method.nodes.dtype)


@dataclass
class Replay:
    """What a sweep needs of a solve that has run."""

    again: Again
    field: MembersField
    captured: Inputs
    starts: Array  # of the intervals, (M,)
    steps: MemberSteps
    places: SavedPlaces | None
    moves: StepMoves | None  # where the ends of the intervals receive gradients


@dataclass
class _Inside:
    """Saved states inside steps, ordered by how far from the end of its member each step is."""

    depth: Array  # 1 for the last step
    step: Array  # among all steps
    theta: Array
    when: Array
    cotangent: Array  # its row in the flat cotangents of saved states


def members_sweep(
    replay: Replay,
    result: StackedMembers,
    u0: Tensor,
    states: Tensor,
    saved: Tensor | None,
    at_steps: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Pull all cotangents of a solve back to the starts, the intervals and the field's inputs.

    Args:
        replay: the solve.
        result: whose counts of evaluations and steps are added to.
        u0: starts, `(M, N)`.
        states: at the ends of the steps, `(P, N)`.
        saved: cotangents of the saved states, `(M, T, N)`; `None` is zero.
        at_steps: cotangents of `states`; `None` is zero.
    """
    field = replay.field
    later = field.later(replay.steps.later_starts(replay.starts, u0, states))
    with replay.captured.sweep(replayed=True, later=later):
        before = field.nfe.copy()
        sweep = _Sweep(replay, u0, states, saved, at_steps)
        start = sweep.run()
        gradients = (start, *sweep.of_ends.sums, *sweep.sums.sums)
    evaluations = field.nfe - before
    result.add("nfe_backward", evaluations)
    result.add("nvjp", evaluations)
    result.add("naccept_backward", sweep.counts)
    return gradients


class _Sweep:
    """One backward sweep."""

    def __init__(
        self,
        replay: Replay,
        u0: Tensor,
        states: Tensor,
        saved: Tensor | None,
        at_steps: Tensor | None,
    ) -> None:
        self.replay, self.u0, self.states = replay, u0, states
        self.sums = Accumulator(replay.captured.leaves)
        self.of_ends = Accumulator([u0])
        self.moving: MovingEnds | None = None
        self.wanted = [*replay.captured.leaves]
        if replay.moves is not None:
            ends = torch.zeros(len(u0), 2, dtype=torch.float64, requires_grad=True)
            self.moving = MovingEnds(ends)
            self.wanted.insert(0, ends)
        self.saved = None if saved is None else saved.reshape(-1, saved.shape[2])
        steps = replay.steps
        arrives = np.zeros(len(steps.sizes), dtype=bool)
        self.arriving = at_steps
        if at_steps is not None:
            # A sum over short rows is quicker as a product. NaN is not zero.
            sums = torch.mv(at_steps.abs(), u0.new_ones(u0.shape[1], dtype=u0.dtype.to_real()))
            arrives |= (sums != 0).cpu().numpy()
        self.at_start: tuple[Array, Tensor] | None = None
        self.inside = _Inside(*(np.empty(0, np.int64),) * 5)
        if self.saved is not None and replay.places is not None:
            arrives |= self._take_saved(replay.places, self.saved)
        self._arrives = arrives
        # The steps after the last cotangent that arrives have nothing to pull back.
        member = np.repeat(np.arange(len(steps.counts)), steps.counts)
        number = np.arange(len(arrives)) - steps.offsets[member]
        self.counts = np.zeros(len(steps.counts), dtype=np.int64)
        np.maximum.at(self.counts, member[arrives], number[arrives] + 1)
        self.inside.depth = self.counts[member[self.inside.step]] - number[self.inside.step]
        order = np.argsort(self.inside.depth, kind="stable")
        for name in ("depth", "step", "theta", "when", "cotangent"):
            setattr(self.inside, name, getattr(self.inside, name)[order])
        self._differences: list[Tensor] = []
        # The row of each step that has been taken again among those that were with it.
        self._row = np.full(len(steps.sizes), -1)
        again, self.back = replay.again, None
        implicit = isinstance(again, StagesAgain) and again.kind is not MemberStages
        self._missing = left_missing(u0.dtype) if implicit else 0.0
        if isinstance(again, StagesAgain) and again.kind is MemberStages and self.moving is None:
            self.limits = again.limits
            self.back = StagesBack(again.method, replay.field, replay.captured, self.sums)

    def _take_saved(self, places: SavedPlaces, saved: Tensor) -> Array:
        """Sort the cotangents of saved states by where they enter; says which steps have some."""
        steps, times = self.replay.steps, len(saved) // len(self.u0)
        row = places.row * times + places.time
        step = steps.offsets[places.row] + places.step
        within = ~np.isnan(places.theta)
        self.inside = _Inside(
            *(step[within], step[within]),
            *(places.theta[within], places.when[within], row[within]),
        )
        ends = ~within & (places.step >= 0)
        arrives = np.zeros(len(steps.sizes), dtype=bool)
        arrives[step[within]] = True
        arrives[step[ends]] = True
        if ends.any():
            total = torch.zeros_like(self.states) if self.arriving is None else self.arriving
            at, index = (torch.from_numpy(x[ends]).to(saved.device) for x in (step, row))
            self.arriving = total.index_add(0, at, saved.index_select(0, index))
        starts = places.step < 0
        if starts.any():
            index = torch.from_numpy(row[starts]).to(saved.device)
            self.at_start = places.row[starts], saved.index_select(0, index)
        return arrives

    def run(self) -> Tensor:
        """The cotangents of the starts, `(M, N)`; those of the inputs are in `sums`."""
        # Members with many steps come first, so that those under way are always the first ones.
        order = np.argsort(-self.counts, kind="stable")
        cotangent = torch.zeros_like(self.u0)
        for depths in self._windows(self.counts[order]):
            self._window(order, depths, cotangent)
        self._expect_reproduced()
        start = torch.empty_like(cotangent)
        start[torch.from_numpy(order).to(start.device)] = cotangent
        if self.at_start is not None:
            rows, values = self.at_start
            start.index_add_(0, torch.from_numpy(rows).to(start.device), values)
        return start

    def _windows(self, counts: Array) -> Iterator[list[tuple[int, int]]]:
        """Depths that are replayed at once, each with the number of members that are under way."""
        most = int(counts.max(initial=0))
        live = np.searchsorted(-counts, -np.arange(1, most + 1), side="right")
        several = self.u0.shape[1] <= _COLUMNS and not self.u0.is_complex()
        window: list[tuple[int, int]] = []
        rows = 0
        for depth, count in enumerate(live.tolist(), start=1):
            if window and (not several or rows + count > _ROWS):
                yield window
                window, rows = [], 0
            window.append((depth, count))
            rows += count
        if window:
            yield window

    def _window(self, order: Array, depths: list[tuple[int, int]], cotangent: Tensor) -> None:
        """Replay some steps of each member and pull the cotangent back through them, in place."""
        steps = self.replay.steps
        members = np.concatenate([order[:count] for _, count in depths])
        depth = np.repeat([d for d, _ in depths], [count for _, count in depths])
        number = self.counts[members] - depth
        at = steps.offsets[members] + number
        begin = torch.from_numpy(np.where(number > 0, at - 1, 0)).to(self.u0.device)
        index = torch.from_numpy(at).to(self.u0.device)
        u = self.states.index_select(0, begin)
        first = np.flatnonzero(number == 0)
        if len(first):
            starts = torch.from_numpy(members[first]).to(u.device)
            u.index_copy_(0, torch.from_numpy(first).to(u.device), self.u0.index_select(0, starts))
        recorded, arriving = self.states.index_select(0, index), None
        if self.arriving is not None and self._arrives[at].any():
            arriving = self.arriving.index_select(0, index)
        if len(self.inside.step):
            self._row[at] = np.arange(len(at))
        if self.back is not None:
            t, h = steps.starts[at], steps.sizes[at]
            following = self._following(members, number, depth > depths[0][0])
            again = Steps(u, members, t, h, following, [count for _, count in depths])
            self._compare(self.back.again(again, self.limits(members, t, h)), recorded, u)
            self.back.pull(self._outputs(depths), arriving, cotangent)
            return
        u = u.requires_grad_()
        outputs, bars = self._replayed(u, members, at, depths)
        u1 = outputs[0]
        self._compare(u1.detach(), recorded, u.detach())
        if len(depths) == 1:
            live = cotangent[: len(members)]
            if arriving is not None:
                live += arriving
            bar, *others = self._pull(outputs, [u, *self.wanted], [live.clone(), *bars])
            live.copy_(torch.zeros_like(live) if bar is None else bar)
        else:
            ends = self._chain(outputs, bars, u, depths, arriving, cotangent)
            others = self._pull(outputs, self.wanted, [ends, *bars]) if self.wanted else []
        if self.moving is not None:
            self.of_ends.add([others.pop(0)])
        self.sums.add(others)

    def _inside(self, depths: list[tuple[int, int]]) -> slice:
        """Where the saved states inside of some steps stand."""
        depth = self.inside.depth
        first, last = (np.searchsorted(depth, d) for d in (depths[0][0], depths[-1][0] + 1))
        return slice(int(first), int(last))

    def _outputs(self, depths: list[tuple[int, int]]) -> Outputs | None:
        """The cotangents inside of steps that are taken again."""
        here, inside = self._inside(depths), self.inside
        if here.start == here.stop or self.saved is None:
            return None
        rows = torch.from_numpy(inside.cotangent[here]).to(self.saved.device)
        cotangents = self.saved.index_select(0, rows)
        return Outputs(self._row[inside.step[here]], inside.theta[here], cotangents)

    def _following(self, members: Array, number: Array, within: Array) -> Array:
        """The rows of the steps that follow some; see `Steps`."""
        steps = self.replay.steps
        if not len(self.inside.step):
            return np.full(len(members), -1)
        at = steps.offsets[members] + number
        # At a stop the field may jump.
        joined = (number + 1 < self.counts[members]) & (steps.stops[at] < 0)
        row = self._row[np.where(joined, at + 1, at)]
        found: Array = np.where(joined, np.where(within, row, -2 - row), -1)
        return found

    def _replayed(
        self, u: Tensor, members: Array, at: Array, depths: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states at the ends of steps and inside them, and the cotangents of the latter."""
        replay, inside, steps = self.replay, self.inside, self.replay.steps
        here = self._inside(depths)
        within = self._row[inside.step[here]], inside.theta[here], inside.when[here]
        span = steps.starts[at], steps.sizes[at], steps.ends[at]
        moved, fresh = None, [u]
        with torch.enable_grad():
            if self.moving is not None and replay.moves is not None:
                moved = self.moving.of_steps(replay.moves.at(at))
                fresh.append(self.moving.ends)
            outputs = replay.again(u, members, span, within, moved)
        for output in outputs:
            replay.captured.expect_known(output, *fresh)
        if len(outputs) == 1:
            return outputs, []
        assert self.saved is not None
        rows = torch.from_numpy(inside.cotangent[here]).to(u.device)
        return outputs, [self.saved.index_select(0, rows)]

    @staticmethod
    def _pull(
        outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]
    ) -> list[Tensor | None]:
        # Parts of the graph may be the caller's own (a captured tensor that is no leaf).
        return list(
            torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
        )

    def _chain(
        self,
        outputs: list[Tensor],
        bars: list[Tensor],
        u: Tensor,
        depths: list[tuple[int, int]],
        arriving: Tensor | None,
        cotangent: Tensor,
    ) -> Tensor:
        """Pass the cotangent from step to step; returns those of the ends of all of them."""
        u1 = outputs[0]
        rows = []
        for i in range(u.shape[1]):
            unit = torch.zeros_like(u1)
            unit[:, i] = 1
            (row,) = torch.autograd.grad(u1, u, unit, retain_graph=True)
            rows.append(row)
        jacobians = torch.stack(rows, dim=1)  # (R, N, N)
        more = None
        if bars:
            (more,) = torch.autograd.grad(outputs[1:], u, bars, retain_graph=True)
        ends = torch.empty_like(u1)
        place = 0
        for _, count in depths:
            here = slice(place, place + count)
            live = cotangent[:count]
            if arriving is not None:
                live += arriving[here]
            ends[here] = live
            back = torch.bmm(live.unsqueeze(1), jacobians[here]).squeeze(1)
            live.copy_(back if more is None else back + more[here])
            place += count
        return ends

    def _compare(self, again: Tensor, recorded: Tensor, start: Tensor) -> None:
        """Remember how far replayed steps end from where they ended."""
        sizes = entry_sizes(recorded, start, self._missing)
        off = (again - recorded).abs() / sizes
        self._differences.append(torch.nan_to_num(off, nan=0.0).max())

    def _expect_reproduced(self) -> None:
        if self._differences:
            worst = torch.stack(self._differences).max()
            expect_reproduced(worst, self.replay.captured.suspects)
