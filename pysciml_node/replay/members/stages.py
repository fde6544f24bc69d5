"""The stages of one Runge-Kutta step of many members, each of its own size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.norm import Norm
from pysciml_node.replay.stages import Method
from pysciml_node.replay.vectors import Weights


class StepOfMembers(Protocol):
    """A step of some members that has begun, of any kind of method.

    Attributes:
        rows: which members, `(L,)`.
        p: their parameters.
        times: of the stages, `(L,)` each; the first is where the step starts.
    """

    rows: Array
    p: Any
    times: Sequence[Tensor]

    @property
    def end(self) -> Tensor | None:
        """The first stage of the step that follows, where this one has evaluated it."""

    def know(self, k: Tensor) -> None:
        """Take the first stage as it is known."""

    def solution(self, with_error: bool) -> Tensor:
        """The states at the ends of the steps, `(L, N)`."""

    def error(self, u1: Tensor, norm: Norm) -> Tensor:
        """The scaled error estimates of the steps to `u1`, `(L,)`."""

    def inside(
        self, places: Array, theta: Array, when: Array
    ) -> tuple[Tensor, tuple[Array, Tensor] | None]:
        """States inside the steps; see `MemberStages.inside`."""


def spread(x: Array, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of members, `(L,)`, that broadcast to states `(L, N)`."""
    # Short rows get one for each entry: torch's inner loops run along rows.
    size = like.shape[1]
    if size < 16 and like.device.type == "cpu":
        return torch.from_numpy(np.repeat(x, size)).to(dtype).view(-1, size)
    return torch.from_numpy(x).to(like.device, dtype).unsqueeze(1)


class _Increments(ABC):
    """The stages' `h k_i`, `(L, N)` each, and their combinations."""

    def begin(self, u: Tensor, h: Tensor) -> None:
        """Start a step.

        Args:
            u: states, `(L, N)`.
            h: the sizes, which broadcast to that.
        """
        self.u, self.h = u, h

    @abstractmethod
    def put(self, i: int, k: Tensor) -> None:
        """Store `h k` as that of stage `i`."""

    @abstractmethod
    def fill(self, increments: Tensor) -> None:
        """Take the first ones as they are, `(count, L, N)`."""

    @abstractmethod
    def combine(self, weights: Weights) -> Tensor:
        """`sum_j weights_j h k_j` over the first stages, `(L, N)`."""

    @abstractmethod
    def state(self, weights: Weights) -> Tensor:
        """`u + sum_j weights_j h k_j` over the first stages, `(L, N)`."""

    @abstractmethod
    def first(self, count: int, rows: Tensor | None) -> Tensor:
        """Those of the first stages, of some members, `(count, R, N)`."""


class _Stored(_Increments):
    """In one buffer, so that a combination is a single call."""

    def __init__(self, count: int, like: Tensor) -> None:
        self._buffer = like.new_empty((count, *like.shape))
        self._rows = self._buffer.unbind()
        self._flat = self._buffer.view(count, -1)
        self._heads: dict[int, Tensor] = {}
        self._start: Tensor

    @override
    def begin(self, u: Tensor, h: Tensor) -> None:
        super().begin(u, h)
        self._start = u.reshape(-1)

    @override
    def put(self, i: int, k: Tensor) -> None:
        torch.mul(k, self.h, out=self._rows[i])

    @override
    def fill(self, increments: Tensor) -> None:
        self._buffer[: len(increments)] = increments

    def _columns(self, weights: Weights) -> Tensor:
        count = len(weights.numbers)
        columns = self._heads.get(count)
        if columns is None:
            columns = self._heads[count] = self._flat[:count].T
        return columns

    @override
    def combine(self, weights: Weights) -> Tensor:
        return torch.mv(self._columns(weights), weights.tensor).view_as(self.u)

    @override
    def state(self, weights: Weights) -> Tensor:
        out = torch.addmv(self._start, self._columns(weights), weights.tensor)
        return out.view_as(self.u)

    @override
    def first(self, count: int, rows: Tensor | None) -> Tensor:
        head = self._buffer[:count]
        return head if rows is None else head.index_select(1, rows)


class _Recorded(_Increments):
    """Separate tensors with their autograd history."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []

    @override
    def put(self, i: int, k: Tensor) -> None:
        del self._vectors[i:]
        self._vectors.append(k * self.h)

    @override
    def fill(self, increments: Tensor) -> None:
        self._vectors = list(increments.unbind())

    def _columns(self, weights: Weights) -> Tensor:
        vectors = self._vectors[: len(weights.numbers)]
        return torch.stack(vectors).view(len(vectors), -1).T

    @override
    def combine(self, weights: Weights) -> Tensor:
        return torch.mv(self._columns(weights), weights.tensor).view_as(self.u)

    @override
    def state(self, weights: Weights) -> Tensor:
        if len(weights.numbers) == 1:
            return self.u + self._vectors[0] * weights.numbers[0]
        out = torch.addmv(self.u.reshape(-1), self._columns(weights), weights.tensor)
        return out.view_as(self.u)

    @override
    def first(self, count: int, rows: Tensor | None) -> Tensor:
        head = torch.stack(self._vectors[:count])
        return head if rows is None else head.index_select(1, rows)


class MemberStages:
    """The stages of a step that each of some members takes, one batch a stage.

    Args:
        method: the method.
        field: the field of all members.
        rows: which members, `(L,)`.
        p: their parameters.
        like: their states, `(L, N)`.
        recorded: whether autograd is to follow.

    Attributes:
        count: stages evaluated so far.
        end: `f(t + h, u1)`, where the method has such a stage and it has been evaluated, `(L, N)`.
        times: of all stages, `(L,)` each.
    """

    def __init__(
        self, method: Method, field: MembersField, rows: Array, p: Any, like: Tensor, recorded: bool
    ) -> None:
        self.method, self.field, self.recorded = method, field, recorded
        self.count = 0
        self.end: Tensor | None = None
        # Zeros by which starts and sizes of the steps move, `(L,)` each.
        self._moves: tuple[Tensor, Tensor] | None = None
        self.go_on(rows, p, like)
        self._nodes = np.array(method.host_nodes)[:, None]
        self._dense = method.dense.numpy()
        self.u: Tensor
        self.h: Tensor
        self.times: Sequence[Tensor]

    def go_on(self, rows: Array, p: Any, like: Tensor) -> None:
        """With some members only; see the class for the arguments."""
        self.rows, self.p = rows, p
        count = self.method.all_stages
        self.increments: _Increments = _Recorded() if self.recorded else _Stored(count, like)

    def begin(self, u: Tensor, t: Array, h: Array, limits: tuple[Array, Array] | None) -> None:
        """Start a step.

        Args:
            u: states, `(L, N)`.
            t: times of them, `(L,)` in float64.
            h: signed sizes of the steps, `(L,)` in float64.
            limits: the earliest and the latest time at which the field may be seen, `(L,)` each;
                `None` where the steps keep to them.
        """
        times = self._nodes * h
        times += t
        if limits is not None:
            # Twice as quick as np.clip.
            times = np.minimum(np.maximum(times, limits[0]), limits[1])
        like = self.method.nodes
        self.times = torch.from_numpy(times).to(like.device, like.dtype).unbind()
        self.u, self.h = u, spread(h, u, like.dtype)
        self.increments.begin(u, self.h)
        self.count, self.end, self._moves = 0, None, None

    def move(self, start: Tensor, size: Tensor) -> None:
        """Let the steps that have begun move.

        Args:
            start: zeros that are added to their starts, `(L,)` in float64 on the CPU.
            size: and to their sizes, likewise.
        """
        self._moves = start, size
        nodes = self.method.nodes
        begins, grows = start.to(nodes), size.to(nodes)
        moved = (begins + c * grows for c in self.method.host_nodes)
        self.times = [t + shift for t, shift in zip(self.times, moved, strict=True)]
        self.h = self.h + grows.unsqueeze(1)
        self.increments.begin(self.u, self.h)

    def know(self, k: Tensor) -> None:
        """Take the next stage as it is known, `(L, N)`."""
        self.increments.put(self.count, k)
        self.count += 1

    def evaluate(self, upto: int) -> Tensor | None:
        """Evaluate the stages that are missing up to `upto`; returns the last one's argument."""
        if upto <= self.count:
            return None
        self.field.tally(self.rows, upto - self.count)
        field, p, times, increments, rows = (
            self.field, self.p, self.times, self.increments, self.method.rows,
        )  # fmt: skip
        argument = self.u
        for i in range(self.count, upto):
            if i:
                argument = increments.state(rows[i])
            k = field(times[i], argument, p)
            increments.put(i, k)
            if i == self.method.end_stage:
                self.end = k
        self.count = upto
        return argument

    def solution(self, with_error: bool) -> Tensor:
        """The states at the ends of the steps, `(L, N)`."""
        method = self.method
        count = method.stages
        if not method.tableau.fsal:
            self.evaluate(count)
            return self.increments.state(method.b)
        if with_error:
            end = self.evaluate(count)
            if end is not None:
                return end
        else:
            # The last stage serves the error estimate and the next step alone.
            self.evaluate(count - 1)
        return self.increments.state(method.rows[count - 1])

    def error(self, u1: Tensor, norm: Norm) -> Tensor:
        """The scaled error estimates of the steps to `u1`, `(L,)`."""
        u = self.u
        error = norm(self.increments.combine(self.method.b_error), u, u1)
        if self.method.b_error_low is not None:
            low = norm(self.increments.combine(self.method.b_error_low), u, u1)
            combined = error.square() / torch.sqrt(error.square() + 0.01 * low.square())
            # Both vanish for an equilibrium.
            error = torch.where(error == 0, torch.zeros_like(error), combined)
        return error

    def stiffness(self) -> Tensor:
        """Shampine's estimates of dominant eigenvalues, `(L,)`, as those of `Stages`."""
        pair = self.method.tableau.stiffness_stages
        if pair is None:
            return self.method.nodes.new_full((len(self.rows),), torch.nan)
        self.evaluate(max(pair) + 1)
        first, second = (self.increments.state(self.method.rows[i]) if i else self.u for i in pair)
        slopes = self.increments.first(max(pair) + 1, None)
        rise = (slopes[pair[0]] - slopes[pair[1]]) / self.h
        top, bottom = (torch.linalg.vector_norm(x, dim=1) for x in (rise, first - second))
        ratio: Tensor = top / (bottom + torch.finfo(top.dtype).eps)
        return ratio

    def some(self, rows: Array) -> MemberStages:
        """The same step of some of the members only: places in `rows`, each once."""
        index = torch.from_numpy(rows).to(self.u.device)
        members, u = self.rows[rows], self.u.index_select(0, index)
        p = self.field.parameters(members)
        part = MemberStages(self.method, self.field, members, p, u, self.recorded)
        part.u, part.h = u, self.h.index_select(0, index)
        part.times = tuple(t.index_select(0, index) for t in self.times)
        if self._moves is not None:
            start, size = (x.index_select(0, torch.from_numpy(rows)) for x in self._moves)
            part._moves = start, size
        part.increments.begin(part.u, part.h)
        part.increments.fill(self.increments.first(self.count, index))
        part.count = self.count
        return part

    def inside(
        self, places: Array, theta: Array, when: Array
    ) -> tuple[Tensor, tuple[Array, Tensor] | None]:
        """States inside the steps, `(Q, N)`.

        Args:
            places: of the members in `rows`, `(Q,)`.
            theta: where in their steps, `(Q,)`.
            when: the times of these, `(Q,)`.

        Returns:
            The states; and places for which `f(t + h, u1)` was evaluated on the way, with these.
        """
        del when
        part: MemberStages = self
        common, needed = self.count, self.method.all_stages
        members, at = np.unique(places, return_inverse=True)
        if common < needed and len(members) < len(self.rows):
            part, places = self.some(members), at
        part.evaluate(needed)
        values = part.dense(places, theta)
        end_stage = self.method.end_stage
        if end_stage is None or end_stage < common or part.end is None:
            return values, None
        return values, (members, part.end)

    def dense(self, rows: Array, theta: Array) -> Tensor:
        """Dense output, `(Q, N)`; needs all stages.

        Args:
            rows: places of the members in `rows`, `(Q,)`.
            theta: where in their steps, `(Q,)` in float64.
        """
        power = np.arange(1, self._dense.shape[1] + 1)
        # Polynomials of theta cancel: their weights are formed in float64 on the host.
        if self._moves is None:
            weights = torch.from_numpy(self._dense @ (theta[:, None] ** power).T)
        else:
            at = self._moved(rows, theta).unsqueeze(1) ** torch.from_numpy(power)
            weights = torch.from_numpy(self._dense) @ at.T
        index = torch.from_numpy(rows).to(self.u.device)
        stages = self.increments.first(self.method.all_stages, index)
        shares = weights.to(stages).unsqueeze(2)
        return self.u.index_select(0, index) + (stages * shares).sum(0)

    def _moved(self, rows: Array, theta: Array) -> Tensor:
        """Where times that do not move lie in steps that do, `(Q,)`."""
        assert self._moves is not None
        index = torch.from_numpy(rows)
        start, size = (x.index_select(0, index) for x in self._moves)
        h = self.h.detach()[:, 0].cpu().double().index_select(0, index)
        at: Tensor = (torch.from_numpy(theta) * h - start) / (h + size)
        return at
