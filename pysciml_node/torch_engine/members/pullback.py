"""Runge-Kutta steps of many members pulled back, each stage by a graph of its own.

The equations are those of `replay.adjoint_discrete`. Where several steps of each member are taken
at once, the Jacobians of all their stages are formed first, and the cotangents then pass from step
to step by small products, an operation for all members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.replay.stages import Method
from pysciml_node.replay.vectors import Weights
from pysciml_node.steps.field import Accumulator
from pysciml_node.steps.graph import pull_back, pull_back_all
from pysciml_node.steps.inputs import Inputs


@dataclass(frozen=True)
class Line:
    """An evaluation of the field with its graph: `f(t, state)`, `(R, N)` both."""

    state: Tensor
    value: Tensor


class LinearizedField:
    """The field of some members, of whose evaluations the graphs are kept.

    Args:
        field: of all members.
        captured: the inputs of the field.

    Attributes:
        lines: the evaluations so far.
    """

    def __init__(self, field: MembersField, captured: Inputs) -> None:
        self.field, self.captured = field, captured
        self.tally = field.tally
        self.lines: list[Line] = []

    def parameters(self, rows: Array) -> Any:
        """The `p` of some members, with the graph."""
        with torch.enable_grad():
            return self.field.parameters(rows)

    def __call__(self, t: Tensor, u: Tensor, p: Any) -> Tensor:
        """Evaluate, and keep the graph."""
        with torch.enable_grad():
            state = u.detach().requires_grad_()
            value = self.field(t, state, p)
        self.captured.expect_known(value, state)
        self.lines.append(Line(state, value))
        return value.detach()


@dataclass
class Steps:
    """Some steps of some members, `R` of them, those of the members' ends first.

    Attributes:
        u: states at their starts, `(R, N)`.
        members: whose they are, `(R,)`.
        t: their starts, `(R,)`.
        h: their sizes, `(R,)`.
        following: the rows of the steps that follow; `-1` where these do not begin as the ones
            before end, and `-2 - r` for row `r` of the steps that were pulled back before.
        counts: how many of them are the first before the end of their member, how many the second,
            and so on.
    """

    u: Tensor
    members: Array
    t: Array
    h: Array
    following: Array
    counts: list[int]


@dataclass
class Outputs:
    """Cotangents of states inside of some steps, `Q` of them.

    Attributes:
        rows: the steps, `(Q,)`.
        theta: where in them, `(Q,)`.
        cotangents: `(Q, N)`.
    """

    rows: Array
    theta: Array
    cotangents: Tensor


class _Given(NamedTuple):
    """Cotangents that do not come from a later step, `(R, N)` or, turned, `(N, R)` each."""

    arriving: Any  # of the ends
    upon: Any = None  # of the increments of the main stages, `(count, R, N)`
    first: Any = None  # of the first stages
    more: Any = None  # of the starts

    def turned(self) -> _Given:
        """With rows last."""
        return _Given(*(None if x is None else x.mT.contiguous() for x in self))

    def at(self, here: slice) -> _Given:
        """Those of some rows, turned."""
        return _Given(*(None if x is None else x[..., here] for x in self))


class _Ends(NamedTuple):
    """Whose first stage the stage at the end of each of some steps is, as places among these."""

    near: Array  # of a step that is taken again with them
    far: Array  # of one that was before
    own: Array  # of none
    own_line: Line | None  # the evaluations of the latter


def _put_turned(out: Tensor, x: Tensor) -> None:
    """Copy the transpose of `x`."""
    if x.device.type == "cpu":
        # In a quarter of torch's time.
        out.numpy()[:] = x.numpy().T
    else:
        out.copy_(x.T)


class StagesBack:
    """Pulls cotangents back through steps of an explicit Runge-Kutta method.

    Args:
        method: the method.
        field: of all members.
        captured: the inputs of the field.
        sums: their gradients.
    """

    def __init__(
        self, method: Method, field: MembersField, captured: Inputs, sums: Accumulator
    ) -> None:
        self.method, self.sums, self.captured = method, sums, captured
        self.field = LinearizedField(field, captured)
        # The last stage of these serves the error estimate and the next step alone.
        self.count = method.stages - method.tableau.fsal
        self._steps: Steps
        self._stages: MemberStages
        self._main: list[Line]
        self._ends: Tensor
        self._before: Line | None = None

    def again(self, steps: Steps, limits: tuple[Array, Array]) -> Tensor:
        """Take steps again; returns the states at their ends, `(R, N)`."""
        field: Any = self.field
        p = field.parameters(steps.members)
        stages = MemberStages(self.method, field, steps.members, p, steps.u, recorded=False)
        stages.begin(steps.u, steps.t, steps.h, limits)
        self._ends = stages.solution(with_error=False)
        self._steps, self._stages = steps, stages
        self._main, self.field.lines = self.field.lines, []
        return self._ends

    def pull(self, outputs: Outputs | None, arriving: Tensor | None, cotangent: Tensor) -> None:
        """Pull cotangents back through the steps that have been taken again.

        Args:
            outputs: inside the steps.
            arriving: cotangents that arrive at the ends of the steps, `(R, N)`; `None` is zero.
            cotangent: of the ends of the first rows; then of where the steps begin, in place.
        """
        like = self._steps.u
        given = _Given(arriving)
        if outputs is not None:
            zeros = (torch.zeros_like(like) for _ in range(2))
            given = _Given(
                torch.zeros_like(like) if arriving is None else arriving,
                like.new_zeros((self.count, *like.shape)),
                *zeros,
            )
            self._pull_outputs(outputs, given)
        if len(self._steps.counts) == 1:
            self._pull_once(given, cotangent)
        else:
            self._pull_many(given, cotangent)
        self._before = self._main[0]

    # States inside the steps: their cotangents do not wait for those of the ends.

    def _pull_outputs(self, outputs: Outputs, given: _Given) -> None:
        """Add what the cotangents of states inside the steps are upon all others."""
        method, count = self.method, self.count
        rows, at = np.unique(outputs.rows, return_inverse=True)
        part = self._stages
        if len(rows) < len(self._steps.members):
            part = part.some(rows)
        index, places = self._index(rows), self._index(at)
        weights = method.dense_weights(torch.from_numpy(outputs.theta)).T.unsqueeze(2)
        shares = weights * outputs.cotangents
        of_stages = shares.new_zeros((len(shares), *part.u.shape)).index_add_(1, places, shares)
        of_starts = torch.zeros_like(part.u).index_add_(0, places, outputs.cotangents)
        shared = None
        if method.end_stage is not None:
            shared = self._share_ends(part, rows)
        known = part.count
        part.evaluate(method.all_stages)
        extra, self.field.lines = self.field.lines, []
        for i in reversed(range(known, method.all_stages)):
            bar = self._vjp(extra[i - known], of_stages[i] * part.h)
            of_starts += bar
            for j, weight in enumerate(method.host_rows[i]):
                of_stages[j].add_(bar, alpha=weight)
        if shared is not None:
            self._pull_ends(shared, rows, of_stages[count] * part.h, given)
        given.upon.index_copy_(1, index, of_stages[:count])
        given.more.index_copy_(0, index, of_starts)

    def _share_ends(self, part: MemberStages, rows: Array) -> _Ends:
        """Give the steps their stages at the end, which may be first stages of others."""
        following = self._steps.following[rows]
        near, far = np.flatnonzero(following >= 0), np.flatnonzero(following < -1)
        own = np.flatnonzero(following == -1)
        values, line = torch.empty_like(part.u), None
        for places, there in ((near, following), (far, -2 - following)):
            if len(places):
                known = self._main[0] if places is near else self._before
                assert known is not None
                chosen = known.value.detach().index_select(0, self._index(there[places]))
                values.index_copy_(0, self._index(places), chosen)
        if len(own):
            index, members = self._index(own), part.rows[own]
            t = part.times[self.count].index_select(0, index)
            u1 = self._ends.index_select(0, self._index(rows[own]))
            self.field.tally(members)
            chosen = self.field(t, u1, self.field.parameters(members))
            line = self.field.lines.pop()
            values.index_copy_(0, index, chosen)
        part.know(values)
        return _Ends(near, far, own, line)

    def _pull_ends(self, ends: _Ends, rows: Array, bars: Tensor, given: _Given) -> None:
        """Pull the cotangents `(S, N)` of stages at the ends of some steps back."""
        following = self._steps.following[rows]
        if len(ends.near):
            there = self._index(following[ends.near])
            given.first.index_add_(0, there, bars.index_select(0, self._index(ends.near)))
        if ends.own_line is not None:
            back = self._vjp(ends.own_line, bars.index_select(0, self._index(ends.own)))
            given.arriving.index_add_(0, self._index(rows[ends.own]), back)
        if len(ends.far):
            assert self._before is not None
            there = self._index(-2 - following[ends.far])
            every = torch.zeros_like(self._before.state)
            every.index_copy_(0, there, bars.index_select(0, self._index(ends.far)))
            back = self._vjp(self._before, every).index_select(0, there)
            given.arriving.index_add_(0, self._index(rows[ends.far]), back)

    # From the ends of the steps to their starts.

    def _pull_once(self, given: _Given, cotangent: Tensor) -> None:
        """Through one step of each member."""
        live = cotangent[: len(self._steps.members)]
        end = live if given.arriving is None else live + given.arriving

        def back(i: int, bar: Tensor) -> Tensor:
            return self._vjp(self._main[i], bar)

        live.copy_(self._through(end, self._stages.h, given, back))

    def _pull_many(self, given: _Given, cotangent: Tensor) -> None:
        """Through several steps of each member.

        Here the entries of states come first and members last, along which torch's loops run.
        """
        jacobians, steps = self._jacobians(), self._steps
        given = given.turned()
        bars = torch.empty_like(jacobians[:, 0])
        live = cotangent.T.contiguous()
        h = torch.from_numpy(steps.h).to(self.method.nodes)
        place = 0
        for count in steps.counts:
            here = slice(place, place + count)
            part, maps, kept = given.at(here), jacobians[..., here], bars[..., here]

            def back(i: int, bar: Tensor, maps: Tensor = maps, kept: Tensor = kept) -> Tensor:
                kept[i] = bar
                return (bar.unsqueeze(1) * maps[i]).sum(0)

            end = live[:, :count]
            if part.arriving is not None:
                end = end + part.arriving
            live[:, :count] = self._through(end, h[here], part, back)
            place += count
        cotangent.copy_(live.T)
        values = [line.value for line in self._main]
        rows = [bar.T.contiguous() for bar in bars]
        self.sums.add(pull_back_all(values, self.captured.leaves, rows))

    def _jacobians(self) -> Tensor:
        """Of the field at all stages, `(count, N, N, R)`: by entries of `f`, then of the state."""
        like = self._steps.u
        size = like.shape[1]
        values, states = zip(*((line.value, line.state) for line in self._main), strict=True)
        jacobians = like.new_empty((self.count, size, size, len(like)))
        for n in range(size):
            unit = torch.zeros_like(like)
            unit[:, n] = 1
            rows = pull_back_all(values, states, [unit] * self.count)
            for i, row in enumerate(rows):
                if row is None:
                    jacobians[i, n] = 0
                else:
                    _put_turned(jacobians[i, n], row)
        return jacobians

    def _through(
        self, end: Tensor, h: Tensor, given: _Given, back: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """From cotangents of the ends of steps to those of their starts.

        Args:
            end: the former.
            h: sizes of the steps, which broadcast to these.
            given: what else there is.
            back: from a stage and the cotangent of its value to that of its argument.
        """
        # They stand in the order in which they arise.
        found = end.new_empty((1 + self.count, *end.shape))
        columns = found.view(1 + self.count, -1).T
        found[0] = end
        for i in reversed(range(self.count)):
            done = self.count - i
            bar = torch.mv(columns[:, :done], self._weights[i]).view_as(found[0])
            if given.upon is not None:
                bar = bar + given.upon[i]
            bar = bar * h
            if given.first is not None and not i:
                bar = bar + given.first
            found[done] = back(i, bar)
        start = found.sum(0)
        return start if given.more is None else start + given.more

    @cached_property
    def _weights(self) -> list[Tensor]:
        """Of the cotangents of the end and of later stages' arguments upon each stage."""
        method, count = self.method, self.count
        b, rows = method.tableau.b, method.host_rows
        upon = ((b[i], *(rows[j][i] for j in range(count - 1, i, -1))) for i in range(count))
        return [Weights.of(row, method.b.tensor).tensor for row in upon]

    def _vjp(self, line: Line, bar: Tensor) -> Tensor:
        """Pull a cotangent back to the state, and to the inputs, whose sums are added to."""
        state, *inputs = pull_back(line.value, [line.state, *self.captured.leaves], bar)
        self.sums.add(inputs)
        return torch.zeros_like(bar) if state is None else state

    def _index(self, places: Array) -> Tensor:
        return torch.from_numpy(places).to(self._steps.u.device)
