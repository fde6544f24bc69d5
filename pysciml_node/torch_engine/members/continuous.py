"""The continuous adjoints of many members: one march backward over all of them.

Each member has a time, a step size and stops of its own, as forward: it stops where its cotangents
enter and where its forward steps had to stop. The equations are those of `adjoint_continuous`.

The parameters' gradient acts neither back on the costates nor on the step sizes. So it is no part
of what is stepped: it is summed up over the accepted steps of all members, in one tensor for all.
The weights of the method at its stages give what the steps would make of it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.adjoints import BacksolveAdjoint, GaussAdjoint, _ContinuousAdjoint
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import MemberOptions, Tolerances, backward_limits
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.comparison import expect_same
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.implicit import MakeStages, member_stages_for
from pysciml_node.replay.members.limits import StepLimits
from pysciml_node.replay.members.stacked import MemberSteps, StackedMembers
from pysciml_node.replay.stages import Method
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.inputs import Inputs
from pysciml_node.torch_engine.adjoint_continuous import BackwardFailure
from pysciml_node.torch_engine.members.costates import Costates, DenseOfMembers
from pysciml_node.torch_engine.members.entering import Entering
from pysciml_node.torch_engine.members.quadrature import Quadrature, SumOfSteps
from pysciml_node.torch_engine.members.runge_kutta import StagesMarch
from pysciml_node.torch_engine.members.stops import Stops
from pysciml_node.torch_engine.members.tape import SavedPlaces


@dataclass
class Solved:
    """What a sweep needs of a solve that has run."""

    method: Method
    kind: MakeStages
    field: MembersField
    captured: Inputs
    options: MemberOptions
    steps: MemberSteps
    places: SavedPlaces | None
    moving: bool  # whether the ends of the intervals receive gradients


def continuous_sweep_of_members(
    solved: Solved,
    result: StackedMembers,
    u0: Tensor,
    states: Tensor,
    saved: Tensor | None,
    at_steps: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Pull all cotangents of a solve back by the adjoint equations of its members.

    Args:
        solved: the solve.
        result: whose counts of evaluations and steps are added to.
        u0: starts, `(M, N)`.
        states: at the ends of the steps, `(P, N)`.
        saved: cotangents of the saved states, `(M, T, N)`; `None` is zero.
        at_steps: cotangents of `states`; `None` is zero.

    Returns:
        Cotangents of the starts, of the intervals where they receive any, and of the inputs.

    Raises:
        BackwardFailure: the march of a member has failed.
    """
    field = solved.field
    starts = solved.steps.later_starts(solved.options.spans[0], u0, states)
    with solved.captured.sweep(replayed=False, later=field.later(starts)):
        before = field.nfe.copy()
        sweep = _Sweep(solved, u0, states, saved, at_steps)
        start = sweep.run()
        ends = sweep.ends(start) if solved.moving else None
        sweep.expect_same()
    result.add("nfe_backward", field.nfe - before + sweep.evaluations)
    result.add("nvjp", sweep.evaluations + sweep.quadrature.count)
    result.add("naccept_backward", sweep.naccept)
    result.add("nreject_backward", sweep.nreject)
    return (sweep.with_starts(start), ends, *sweep.quadrature.sums.sums)


class _Sweep:
    """One backward sweep.

    Attributes:
        evaluations: of the adjoint equation, `(M,)`.
        naccept: backward steps of each, `(M,)`.
        nreject: rejected ones, `(M,)`.
    """

    def __init__(
        self,
        solved: Solved,
        u0: Tensor,
        states: Tensor,
        saved: Tensor | None,
        at_steps: Tensor | None,
    ) -> None:
        self.solved, self.u0, self.states = solved, u0, states
        options, steps, method = solved.options, solved.steps, solved.method
        self.entering = Entering.of(steps, options.spans, solved.places, saved, at_steps, u0)
        limits = StepLimits(options, method.nodes.dtype)
        self.dense = DenseOfMembers(method, solved.kind, solved.field, limits, steps, u0, states)
        self.quadrature = Quadrature(solved.field, solved.captured)
        self.evaluations, self.naccept, self.nreject = np.zeros((3, len(u0)), dtype=np.int64)

    def run(self) -> Tensor:
        """The costates at the starts, without what enters there, `(M, N)`."""
        entering, starts = self.entering, self.solved.options.spans[0]
        costates = torch.zeros_like(self.u0)
        self._spread_bad(costates)
        last = np.append(entering.times, np.nan)[entering.offsets[:-1]]
        some = (np.diff(entering.offsets) > 0) & entering.finite
        # Nothing enters after the first of their times.
        members = np.flatnonzero(some & (last != starts))
        if len(members):
            found = self._march_back(members, last[members])
            costates.index_copy_(0, self._index(members), found)
        self.quadrature.finish()
        return costates

    def _spread_bad(self, costates: Tensor) -> None:
        """Let cotangents that are not finite go through, as through any other operation."""
        bad = np.flatnonzero(~self.entering.finite)
        if not len(bad):
            return
        index = self._index(bad)
        u = self.u0.index_select(0, index)
        nan = torch.full_like(u, torch.nan)
        costates.index_copy_(0, index, nan)
        self.quadrature.add(bad, self._times(self.solved.options.spans[0][bad]), u, nan)

    def _march_back(self, members: Array, first: Array) -> Tensor:
        """The costates of some members at their starts, `(R, N)`.

        Args:
            members: which, `(R,)`.
            first: the times at which their first cotangents enter, `(R,)`.
        """
        solved, entering = self.solved, self.entering
        adjoint = solved.options.common.adjoint
        equations = Costates(
            solved.field,
            solved.captured,
            self.dense,
            members,
            # The state is put back onto the stored one wherever a cotangent enters.
            with_state=isinstance(adjoint, BacksolveAdjoint),
        )
        values = entering.values.index_select(0, self._index(entering.offsets[members]))
        vectors = equations.start(values, first)
        gauss = isinstance(adjoint, GaussAdjoint)
        tape = SumOfSteps(equations, self.quadrature, gauss, vectors)
        options = _backward_options(solved.options, members, first, equations.driven)
        march = _Backward(solved, equations, options, entering, tape)
        every = np.arange(len(members))
        t, part = self._times(first), equations.parameters(every)
        equations.tally(every)
        march.run(vectors, equations(t, vectors, part))
        self.evaluations[members] = equations.nfe
        self.naccept[members], self.nreject[members] = march.naccept, march.nreject
        _expect_success(adjoint, members, march.codes, tape.ends)
        return equations.costates(tape.vectors)

    def ends(self, costates: Tensor) -> Tensor:
        """Cotangents of the intervals, `(M, 2)` in float64; `costates` are those at the starts."""
        steps, spans = self.solved.steps, self.solved.options.spans
        start = -_along(costates, self._rates(spans[0], self.u0))
        # Where nothing enters the rate does not matter, which may be NaN.
        some = np.diff(self.entering.offsets) > 0
        start = torch.where(torch.from_numpy(some).to(start.device), start, 0.0)
        offsets, end = steps.offsets, torch.zeros_like(start)
        # A solve that an event has stopped does not reach the end of its interval.
        last = np.append(steps.ends, np.nan)[offsets[1:] - 1]
        reached = np.flatnonzero((steps.counts > 0) & (last == spans[1]))
        there, values = self.entering.at(reached, spans[1][reached])
        members = reached[there]
        if len(members):
            final = self.states.index_select(0, self._index(offsets[members + 1] - 1))
            every = torch.zeros_like(self.u0).index_copy_(0, self._index(members), final)
            rates = self._rates(spans[1], every).index_select(0, self._index(members))
            end.index_copy_(0, self._index(members), _along(values, rates))
        return torch.stack((start, end), dim=1).cpu().double()

    def with_starts(self, costates: Tensor) -> Tensor:
        """The costates at the starts with what enters there."""
        members = np.arange(len(self.u0))
        there, values = self.entering.at(members, self.solved.options.spans[0])
        return costates.index_add(0, self._index(there), values)

    def expect_same(self) -> None:
        """Compare the field at the starts with its first evaluation."""
        solved = self.solved
        again = self._field(solved.options.spans[0], self.u0)
        expect_same((again,), solved.captured.first, solved.captured.suspects)

    def _rates(self, t: Array, u: Tensor) -> Tensor:
        """Derivatives of the solutions of all members, `(M, N)`."""
        return self.dense.mass.solve(self._field(t, u))

    def _field(self, t: Array, u: Tensor) -> Tensor:
        field, every = self.solved.field, np.arange(len(u))
        field.tally(every)
        with torch.no_grad():
            return field(self._times(t), u, field.parameters(every))

    def _times(self, t: Array) -> Tensor:
        return torch.from_numpy(t).to(self.solved.method.nodes)

    def _index(self, places: Array) -> Tensor:
        return torch.from_numpy(places).to(self.u0.device)


def _along(cotangents: Tensor, rates: Tensor) -> Tensor:
    """Real parts of the products of rows, `(L,)`."""
    return (cotangents.conj() * rates).sum(1).real


def _backward_options(
    options: MemberOptions, members: Array, first: Array, driven: int
) -> MemberOptions:
    """The options of a march backward; arguments as of `_Sweep._march_back`."""
    common = options.common
    rtol, atol, max_steps = backward_limits(common.adjoint, common)
    index, own = torch.from_numpy(members), {}
    for name in ("rtol", "atol"):
        given = getattr(options, name)
        if given is not None and getattr(common.adjoint, name) is None:
            # The tightest of those of a state's entries.
            own[name] = given[index.to(given.device)].amin(1, keepdim=True)
    return MemberOptions(
        common=dataclasses.replace(
            common,
            tolerances=Tolerances(rtol, atol, driven),
            saveat=None,
            saveat_tensor=None,
            dt0=None,
            dtmin=0.0,
            dtmax=math.inf,
            max_steps=max_steps,
            controller=common.controller if common.controller.adaptive else FixedStep(),
            events=(),
            fired=(),
        ),
        spans=(first, options.spans[0][members]),
        **own,
    )


def _expect_success(
    adjoint: Any, members: Array, codes: list[ReturnCode], ends: dict[int, float]
) -> None:
    """Raise where the march of a member has failed."""
    failed = [r for r, code in enumerate(codes) if not code.successful]
    if not failed:
        return
    assert isinstance(adjoint, _ContinuousAdjoint)
    name, r = type(adjoint).__name__, failed[0]
    named = ", ".join(str(members[i]) for i in failed[:20]) + (", ..." if failed[20:] else "")
    where = f" at t={ends[r]:.6g}" if r in ends else ""
    raise BackwardFailure(
        f"the backward solves of {name} of {len(failed)} members failed: {named}. That of member "
        f"{members[r]} stopped{where}: {codes[r].value}.\n"
        "  Try, in order: adjoint=DiscreteAdjoint(); looser tolerances for the adjoint, as in "
        f"{name}(rtol=1e-4, atol=1e-4); a larger max_steps."
    )


class _Backward(StagesMarch):
    """The march, at whose stops cotangents enter.

    Args:
        solved: the forward solve.
        equations: the right-hand sides.
        options: of the march.
        entering: what enters.
        tape: is told of accepted steps.
    """

    def __init__(
        self,
        solved: Solved,
        equations: Costates,
        options: MemberOptions,
        entering: Entering,
        tape: SumOfSteps,
    ) -> None:
        # What a march asks of a field and of a tape these give too.
        field: Any = equations
        listener: Any = tape
        stops = Stops(options, _stops(solved.steps, equations.members, entering, options.spans))
        kind = member_stages_for(solved.method, options)
        super().__init__(solved.method, field, options, listener, False, kind, stops=stops)
        self.equations, self.entering = equations, entering
        steps = solved.steps
        largest = np.zeros(len(steps.counts))
        np.maximum.at(largest, np.repeat(np.arange(len(largest)), steps.counts), abs(steps.sizes))
        self._largest = largest[equations.members]
        # The cotangent that enters next.
        self._next = entering.offsets[equations.members] + 1

    @override
    def _first_sizes(self) -> Array:
        if self.adaptive:
            return super()._first_sizes()
        # Fixed steps backward where forward had them, all of one size.
        sizes: Array = np.copysign(self._largest, self.stops.direction)
        return sizes

    @override
    def _arrive(self, there: Array, ended: Array | None) -> None:
        live, entering = self.live, self.entering
        entry, last = self._next[live.rows], self.stops.last(live.stop)
        due = there & ~last & (np.append(entering.times, np.nan)[entry] == live.t)
        due &= entry < entering.offsets[self.equations.members[live.rows] + 1]
        places = np.flatnonzero(due)
        if len(places):
            index = torch.from_numpy(places).to(self.u.device)
            values = entering.values.index_select(
                0, torch.from_numpy(entry[places]).to(self.u.device)
            )
            rows = live.rows[places]
            vectors = self.u.index_select(0, index)
            jumped = self.equations.jump(vectors, rows, values, live.t[places])
            self.u = self.u.index_copy(0, index, jumped)
            self._next[rows] += 1
        super()._arrive(there, ended)


def _stops(
    steps: MemberSteps, members: Array, entering: Entering, spans: tuple[Array, Array]
) -> Array:
    """The stops of the march of each member, `(R, S)`; infinite ones fill the rows.

    Where the forward march had to stop, the field may have a kink.
    """
    place = np.full(len(steps.counts), -1)
    place[members] = np.arange(len(members))
    kinks = np.flatnonzero(steps.stops >= 0)
    owners = (
        np.repeat(np.arange(len(place)), steps.counts)[kinks],
        np.repeat(np.arange(len(place)), np.diff(entering.offsets)),
    )
    row = place[np.concatenate(owners)]
    times = np.concatenate((steps.ends[kinks], entering.times))
    first, last = (ends[row] for ends in spans)
    inside = (row >= 0) & (np.minimum(first, last) < times) & (times < np.maximum(first, last))
    pairs = np.unique(np.stack((row[inside], times[inside]), axis=1), axis=0)
    row, times = pairs[:, 0].astype(np.int64), pairs[:, 1]
    counts = np.bincount(row, minlength=len(members))
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(members), int(counts.max(initial=0))), np.inf)
    table[row, column] = times
    return table
