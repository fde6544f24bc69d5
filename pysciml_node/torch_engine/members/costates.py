"""The adjoint equations of many members: their right-hand sides along the forward solutions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.implicit import MakeStages, jacobians_of
from pysciml_node.replay.members.limits import StepLimits
from pysciml_node.replay.members.stacked import MemberSteps
from pysciml_node.replay.stages import Method
from pysciml_node.steps.graph import pull_back
from pysciml_node.steps.inputs import Inputs

# The stages of so many steps are kept that they have no more entries than this: 32 MB in double
# precision. At least two steps of each member are.
_ENTRIES = 2**22


class Mass:
    """A mass matrix that can be inverted, or none, for rows of vectors."""

    def __init__(self, matrix: Tensor | None) -> None:
        self._factors = None if matrix is None else torch.linalg.lu_factor(matrix)

    def solve(self, right: Tensor) -> Tensor:
        """`M^-1 b` for each row."""
        if self._factors is None:
            return right
        solved: Tensor = torch.linalg.lu_solve(*self._factors, right.T).T
        return solved

    def transposed(self, right: Tensor) -> Tensor:
        """`M^-T b` for each row."""
        if self._factors is None:
            return right
        solved: Tensor = torch.linalg.lu_solve(*self._factors, right, left=False)
        return solved


class DenseOfMembers:
    """The forward solutions at any times.

    The stages of the steps are evaluated again where they are needed, a block of steps of each
    member at once. The last two blocks of each are kept: a step backward may begin in one of them
    and end in the other.

    Args:
        method: of the steps.
        kind: makes their stages.
        field: the field of all members.
        limits: between which times it may be seen.
        steps: all steps.
        u0: starts, `(M, N)`.
        states: at the ends of the steps, `(P, N)`.

    Attributes:
        mass: the mass matrix of the equation.
    """

    def __init__(
        self,
        method: Method,
        kind: MakeStages,
        field: MembersField,
        limits: StepLimits,
        steps: MemberSteps,
        u0: Tensor,
        states: Tensor,
    ) -> None:
        self.method, self.kind, self.field, self.limits = method, kind, field, limits
        self.steps, self.u0, self.states = steps, u0, states
        self.mass = Mass(field.mass)
        count, size = u0.shape
        backward = np.zeros(count, dtype=bool)
        moving = np.flatnonzero(steps.counts)
        backward[moving] = steps.sizes[steps.offsets[moving]] < 0
        self._sign = np.where(backward, -1.0, 1.0)
        # The steps' starts in order, of which the first has no lower bound, and an end without one.
        starts = steps.starts * np.repeat(self._sign, steps.counts)
        starts[steps.offsets[moving]] = -np.inf
        self._ordered = np.insert(starts, steps.offsets[1:], np.inf)
        self._last = np.maximum(steps.counts - 1, 0)
        # The start of each step, and its stages: a row for each that is kept.
        rows = method.all_stages + 1
        fitting = _ENTRIES // (2 * rows * count * size)
        self._block = min(max(fitting, 1), int(steps.counts.max(initial=1)))
        self._kept = u0.new_empty((count * 2 * self._block, rows, size))
        self._blocks = np.full((count, 2), -1)
        self._asked = np.full(count, -1)
        # Polynomials of theta cancel: their weights are formed in float64 on the host.
        dense = method.dense.numpy()
        self._weights = np.zeros((rows, dense.shape[1] + 1))
        self._weights[0, 0], self._weights[1:, 1:] = 1.0, dense

    def __call__(self, members: Array, t: Array) -> Tensor:
        """The states `(Q, N)` of some members, each named once, at times `(Q,)`."""
        number = self._number(members, t)
        self._prepare(members, number)
        return self._read(members, number, t, derivative=False)

    def slope(self, members: Array, t: Array) -> Tensor:
        """The derivatives of these in time, `(Q, N)`."""
        number = self._number(members, t)
        self._prepare(members, number)
        return self._read(members, number, t, derivative=True)

    def several(self, members: Array, times: Array) -> Tensor:
        """The states of some members `(Q,)` at several times of each, `(K, Q)`; `(K, Q, N)`."""
        count = len(times)
        every, t = np.tile(members, count), times.reshape(-1)
        number = self._number(every, t)
        blocks = (number // self._block).reshape(times.shape)
        if (blocks.max(0) - blocks.min(0) > 1).any():
            # They lie in more blocks than are kept.
            return torch.stack([self(members, t) for t in times])
        self._prepare(every, number)
        return self._read(every, number, t, derivative=False).view(*times.shape, -1)

    def _number(self, members: Array, t: Array) -> Array:
        """Which steps contain times, found from where the members were asked for before."""
        when, begin = t * self._sign[members], self.steps.offsets[members]
        # Each member has one more entry than it has steps.
        at = begin + members + self._last[members]
        while (move := (self._ordered[at + 1] <= when) * 1 - (when < self._ordered[at])).any():
            at += move
        number: Array = at - begin - members
        self._last[members] = number
        return number

    def _read(self, members: Array, number: Array, t: Array, derivative: bool) -> Tensor:
        """States in steps whose stages are kept, or their derivatives in time."""
        step = self.steps.offsets[members] + number
        h = self.steps.sizes[step]
        theta = np.minimum(np.maximum((t - self.steps.starts[step]) / h, 0.0), 1.0)
        basis = np.vander(theta, self._weights.shape[1], increasing=True)
        if derivative:
            basis = np.roll(basis, 1, axis=1) * np.arange(basis.shape[1]) / h[:, None]
        weights = torch.from_numpy(basis @ self._weights.T).to(self._kept)
        slot = torch.from_numpy(self._slot(members, number)).to(self._kept.device)
        kept = self._kept.index_select(0, slot)
        return torch.bmm(weights.unsqueeze(1), kept).squeeze(1)

    def _slot(self, members: Array, number: Array) -> Array:
        """Where steps are kept."""
        size = 2 * self._block
        slot: Array = members * size + number % size
        return slot

    def _prepare(self, members: Array, number: Array) -> None:
        """Evaluate the stages of steps that are not kept, and of those that are needed next."""
        block = number // self._block
        self._asked[members] = block
        missing = self._blocks[members, block % 2] != block
        if not missing.any():
            return
        wanted = np.stack((members, block), axis=1)[missing]
        following, every = self._asked - 1, np.arange(len(self._asked))
        soon = (following >= 0) & (self._blocks[every, following % 2] != following)
        # What is asked for stays, and so does the block that a member is in.
        soon &= self._blocks[every, self._asked % 2] == self._asked
        soon[wanted[:, 0]] = False
        soon[members[block != self._asked[members]]] = False
        ahead = np.stack((every, following), axis=1)[soon]
        self._fill(*np.unique(np.concatenate((wanted, ahead)), axis=0).T)
        assert (self._blocks[members, block % 2] == block).all()

    def _fill(self, members: Array, block: Array) -> None:
        """Evaluate the stages of blocks of some members, and keep them."""
        self._blocks[members, block % 2] = block
        counts = np.minimum(self.steps.counts[members] - block * self._block, self._block)
        rows = np.repeat(members, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        number = np.repeat(block * self._block, counts) + np.arange(len(rows)) - first
        at = self.steps.offsets[rows] + number
        u = self._starts(rows, number, at)
        p = self.field.parameters(rows)
        stages = self.kind(self.method, self.field, rows, p, u, False)
        t, h = self.steps.starts[at], self.steps.sizes[at]
        stages.begin(u, t, h, self.limits(rows, t, h))
        stages.evaluate(self.method.all_stages)
        increments = stages.increments.first(self.method.all_stages, None)
        slot = torch.from_numpy(self._slot(rows, number)).to(u.device)
        kept = torch.cat((u.unsqueeze(0), increments)).movedim(0, 1)
        self._kept.index_copy_(0, slot, kept)

    def _starts(self, rows: Array, number: Array, at: Array) -> Tensor:
        """The states at which steps begin, `(R, N)`."""
        device = self.u0.device
        before = torch.from_numpy(np.where(number > 0, at - 1, 0)).to(device)
        u = self.states.index_select(0, before)
        first = np.flatnonzero(number == 0)
        if len(first):
            starts = self.u0.index_select(0, torch.from_numpy(rows[first]).to(device))
            u.index_copy_(0, torch.from_numpy(first).to(device), starts)
        return u


class Part(NamedTuple):
    """Some of the members that go backward."""

    members: Array
    p: Any


class Costates:
    """The right-hand sides of the adjoint equations of some members, `(L, V)`.

    A row holds the costate and, for backsolve, the state. It is called as a `MembersField` is,
    whose members are those that go backward, and which is asked for in the same way.

    Args:
        field: the field of all members.
        captured: the inputs of the field.
        dense: the forward solutions.
        members: which of them go backward, `(R,)`.
        with_state: whether the state is recomputed.

    Attributes:
        nfe: evaluations for each, `(R,)`.
        size: of a state.
        driven: of a row; all of its entries drive the step size.
        unit: in which the costates are measured, `(R,)`.
    """

    # What is divided out is none of the equations' own.
    mass: None = None
    has_jacobian = True

    def __init__(
        self,
        field: MembersField,
        captured: Inputs,
        dense: DenseOfMembers,
        members: Array,
        with_state: bool,
    ) -> None:
        self.field, self.captured, self.dense = field, captured, dense
        self.members, self.with_state = members, with_state
        self.nfe = np.zeros(len(members), dtype=np.int64)
        self.size = dense.u0.shape[1]
        self.driven = 2 * self.size if with_state else self.size
        self.unit = dense.u0.new_ones(len(members), dtype=dense.u0.dtype.to_real())

    def start(self, entering: Tensor, t: Array) -> Tensor:
        """The rows where the first cotangents `(R, N)` enter, at times `(R,)`."""
        empty = entering.new_zeros((len(entering), self.driven))
        return self.jump(empty, np.arange(len(entering)), entering, t)

    def costates(self, vectors: Tensor) -> Tensor:
        """The adjoint states in the rows of all members, `(R, N)`."""
        return vectors[:, : self.size] * self.unit.unsqueeze(1)

    def jump(self, vectors: Tensor, rows: Array, entering: Tensor, t: Array) -> Tensor:
        """Rows of some members after cotangents have entered, in units of their size then.

        Args:
            vectors: the rows, `(L, V)`.
            rows: whose they are, `(L,)`.
            entering: what enters, `(L, N)`.
            t: when, `(L,)`.
        """
        size, index = self.size, torch.from_numpy(rows).to(vectors.device)
        before = self.unit.index_select(0, index)
        costate = vectors[:, :size] * before.unsqueeze(1) + entering
        peak = costate.abs().amax(1)
        # Squares of what has been scaled neither over- nor underflow.
        scaled = torch.linalg.vector_norm(costate / peak.unsqueeze(1), dim=1) / size**0.5
        # What enters may cancel what is there.
        unit = torch.where(peak > 0, peak * scaled, before)
        parts = [costate / unit.unsqueeze(1)]
        if self.with_state:
            parts.append(self.dense(self.members[rows], t))
        self.unit = self.unit.index_copy(0, index, unit)
        return torch.cat(parts, dim=1)

    def tally(self, rows: Array, evaluations: int = 1) -> None:
        """Count evaluations for some members, each named once."""
        self.nfe[rows] += evaluations

    def parameters(self, rows: Array) -> Part:
        """Some of the members, and their `p`."""
        members = self.members[rows]
        return Part(members, self.field.parameters(members))

    def __call__(self, t: Tensor, vectors: Tensor, part: Part) -> Tensor:
        """The derivatives in time; differentiable where a gradient of them may be taken.

        Args:
            t: times, `(L,)`.
            vectors: the rows.
            part: whose they are.
        """
        size = self.size
        recorded = torch.is_grad_enabled() and (vectors.requires_grad or t.requires_grad)
        moves = recorded and t.requires_grad
        state, time = self._state(t, vectors, part), t
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            at = state
            if moves:
                # In time the equation changes along the forward solution.
                slope = self.dense.slope(part.members, _numbers(t))
                at = state + (t - t.detach()).unsqueeze(1) * slope
            value = self.field(time, at, part.p)
            self.captured.expect_known(value, state, *((time,) if moves else ()))
            cotangent = self.dense.mass.transposed(vectors[:, :size])
            pulled: Tensor | None
            if recorded and value.requires_grad:
                (pulled,) = torch.autograd.grad(
                    value, state, cotangent, create_graph=True, allow_unused=True
                )
            else:
                (pulled,) = pull_back(value, [state], cotangent)
        back = torch.zeros_like(vectors[:, :size]) if pulled is None else -pulled
        if not self.with_state:
            return back
        return torch.cat((back, value.detach()), dim=1)

    def jacobian(self, t: Tensor, vectors: Tensor, part: Part) -> Tensor:
        """The derivatives of the right-hand sides, `-(M^-1 df/du)^T`, `(L, N, N)`."""
        self.field.tally(part.members)
        with torch.enable_grad():
            state = self._state(t, vectors, part).detach().requires_grad_()
            value = self.field(t.detach(), state, part.p)
            self.captured.expect_known(value, state)
            if not value.requires_grad:
                return state.new_zeros((*state.shape, self.size))
            columns = jacobians_of(value, state, False).mT
        return -self.dense.mass.solve(columns.reshape(-1, self.size)).view_as(columns)

    @staticmethod
    def expect_jacobian(given: Tensor, rate: Tensor, state: Tensor) -> None:
        """What `jacobian` gives need not be looked at; see `MembersField`."""

    def _state(self, t: Tensor, vectors: Tensor, part: Part) -> Tensor:
        if self.with_state:
            return vectors[:, self.size :]
        return self.dense(part.members, _numbers(t))


def _numbers(t: Tensor) -> Array:
    """Times on the host in float64."""
    numbers: Array = t.detach().cpu().double().numpy()
    return numbers
