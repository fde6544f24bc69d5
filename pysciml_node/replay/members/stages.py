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
from pysciml_node.replay.members.norm import MembersNorm
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

    def error(self, scale: Tensor, norm: MembersNorm) -> Tensor:
        """The scaled error estimates of the steps, `(L,)`."""

    def inside(
        self, places: Array, theta: Array, when: Array
    ) -> tuple[Tensor, tuple[Array, Tensor] | None]:
        """States inside the steps; see `MemberStages.inside`."""


class _Increments(ABC):
    """The stages' `h k_i`, `(L, N)` each, and their combinations."""

    @abstractmethod
    def put(self, i: int, k: Tensor, h: Tensor) -> None:
        """Store `h k` as that of stage `i`."""

    @abstractmethod
    def combine(self, base: Tensor | None, weights: Weights) -> Tensor:
        """`base + sum_j weights_j h k_j` over the first stages, `(L, N)`."""

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

    @override
    def put(self, i: int, k: Tensor, h: Tensor) -> None:
        torch.mul(k, h, out=self._rows[i])

    @override
    def combine(self, base: Tensor | None, weights: Weights) -> Tensor:
        count = len(weights.numbers)
        columns = self._heads.get(count)
        if columns is None:
            columns = self._heads[count] = self._flat[:count].T
        if base is None:
            out = torch.addmv(self._flat[0], columns, weights.tensor, beta=0)
        else:
            out = torch.addmv(base.view(-1), columns, weights.tensor)
        return out.view_as(self._rows[0])

    @override
    def first(self, count: int, rows: Tensor | None) -> Tensor:
        head = self._buffer[:count]
        return head if rows is None else head.index_select(1, rows)


class _Recorded(_Increments):
    """Separate tensors with their autograd history."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []

    @override
    def put(self, i: int, k: Tensor, h: Tensor) -> None:
        del self._vectors[i:]
        self._vectors.append(k * h)

    @override
    def combine(self, base: Tensor | None, weights: Weights) -> Tensor:
        first, *others = self._vectors[: len(weights.numbers)]
        if not others:
            out = first * weights.numbers[0]
            return out if base is None else base + out
        columns = torch.stack([first, *others]).view(len(weights.numbers), -1).T
        if base is None:
            return torch.mv(columns, weights.tensor).view_as(first)
        return torch.addmv(base.reshape(-1), columns, weights.tensor).view_as(first)

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
        self.method, self.field, self.rows, self.p = method, field, rows, p
        self.like, self.recorded = like, recorded
        self.increments: _Increments = _Recorded() if recorded else _Stored(method.all_stages, like)
        self.count = 0
        self.end: Tensor | None = None
        # Zeros by which starts and sizes of the steps move, `(L,)` each.
        self._moves: tuple[Tensor, Tensor] | None = None
        self._nodes = np.array(method.host_nodes)[:, None]
        self._dense = method.dense.numpy()
        self.u: Tensor
        self.h: Tensor
        self.times: Sequence[Tensor]

    def begin(self, u: Tensor, t: Array, h: Array, limits: tuple[Array, Array]) -> None:
        """Start a step.

        Args:
            u: states, `(L, N)`.
            t: times of them, `(L,)` in float64.
            h: signed sizes of the steps, `(L,)` in float64.
            limits: the earliest and the latest time at which the field may be seen, `(L,)` each.
        """
        like = self.method.nodes
        # Twice as quick as np.clip.
        inside = np.minimum(np.maximum(t + self._nodes * h, limits[0]), limits[1])
        self.times = torch.from_numpy(inside).to(like.device, like.dtype).unbind()
        self.u, self.h = u, torch.from_numpy(h).to(like.device, like.dtype).unsqueeze(1)
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

    def know(self, k: Tensor) -> None:
        """Take the first stage as it is known, `(L, N)`."""
        self.increments.put(0, k, self.h)
        self.count = 1

    def evaluate(self, upto: int) -> Tensor | None:
        """Evaluate the stages that are missing up to `upto`; returns the last one's argument."""
        argument = None
        if upto > self.count:
            self.field.tally(self.rows, upto - self.count)
        for i in range(self.count, upto):
            argument = self.increments.combine(self.u, self.method.rows[i]) if i else self.u
            k = self.field(self.times[i], argument, self.p)
            self.increments.put(i, k, self.h)
            if i == self.method.end_stage:
                self.end = k
        self.count = max(self.count, upto)
        return argument

    def solution(self, with_error: bool) -> Tensor:
        """The states at the ends of the steps, `(L, N)`."""
        method = self.method
        count = method.stages
        if not method.tableau.fsal:
            self.evaluate(count)
            return self.increments.combine(self.u, method.b)
        if with_error:
            end = self.evaluate(count)
            if end is not None:
                return end
        else:
            # The last stage serves the error estimate and the next step alone.
            self.evaluate(count - 1)
        return self.increments.combine(self.u, method.rows[count - 1])

    def error(self, scale: Tensor, norm: MembersNorm) -> Tensor:
        """The scaled error estimates of the steps, `(L,)`."""
        error = norm(self.increments.combine(None, self.method.b_error), scale)
        if self.method.b_error_low is not None:
            low = norm(self.increments.combine(None, self.method.b_error_low), scale)
            combined = error.square() / torch.sqrt(error.square() + 0.01 * low.square())
            # Both vanish for an equilibrium.
            error = torch.where(error == 0, torch.zeros_like(error), combined)
        return error

    def some(self, rows: Array) -> MemberStages:
        """The same step of some of the members only: places in `rows`, each once."""
        index = torch.from_numpy(rows).to(self.u.device)
        part = MemberStages(
            self.method,
            self.field,
            self.rows[rows],
            self.field.parameters(self.rows[rows]),
            self.u.index_select(0, index),
            self.recorded,
        )
        part.u, part.h = part.like, self.h.index_select(0, index)
        part.times = tuple(t.index_select(0, index) for t in self.times)
        if self._moves is not None:
            start, size = (x.index_select(0, torch.from_numpy(rows)) for x in self._moves)
            part._moves = start, size
        for i, increment in enumerate(self.increments.first(self.count, index).unbind()):
            part.increments.put(i, increment, torch.ones_like(part.h))
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
        h = self.h.detach().squeeze(1).cpu().double().index_select(0, index)
        at: Tensor = (torch.from_numpy(theta) * h - start) / (h + size)
        return at
