"""The parameters' gradient, summed up over the backward steps of many members."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.problems.state import tensors_of
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.steps.field import Accumulator
from pysciml_node.steps.graph import pull_back
from pysciml_node.steps.inputs import Inputs
from pysciml_node.tableaus.implicit import DiagonallyImplicitTableau
from pysciml_node.torch_engine.members.costates import Costates
from pysciml_node.torch_engine.members.tape import Attempts, Tried

# The field is evaluated at so many points at once that their states and parameters have about this
# many entries.
_ENTRIES = 2**17


class Quadrature:
    """Sums of `(df/dtheta)^T c` over points of members' solutions.

    Args:
        field: the field of all members.
        captured: its inputs.

    Attributes:
        sums: the gradients of the inputs.
        count: points of each member so far, `(M,)`.
    """

    def __init__(self, field: MembersField, captured: Inputs) -> None:
        self.field, self.captured = field, captured
        self.sums = Accumulator(captured.leaves)
        self.count = np.zeros(len(field.nfe), dtype=np.int64)
        own = sum(x.numel() for x in tensors_of(field.given["p"])) if field.own else 0
        self._own = own // max(len(field.nfe), 1)
        self._points: list[tuple[Array, Tensor, Tensor, Tensor]] = []
        self._entries = 0

    def add(self, members: Array, t: Tensor, u: Tensor, cotangents: Tensor) -> None:
        """Add points of some members, which may be named several times.

        Args:
            members: which, `(Q,)`.
            t: times, `(Q,)`.
            u: the states there, `(Q, N)`.
            cotangents: `c`, `(Q, N)`.
        """
        self._points.append((members, t, u, cotangents))
        self._entries += len(members) * (u.shape[1] + self._own)
        if self._entries > _ENTRIES:
            self._flush()

    def finish(self) -> None:
        """Add what is left. Where there was no point at all the gradients are zero."""
        if self._points:
            self._flush()
        elif not self.count.any():
            self.sums.add([torch.zeros_like(leaf) for leaf in self.captured.leaves])

    def _flush(self) -> None:
        members = np.concatenate([point[0] for point in self._points])
        t, u, cotangents = (torch.cat(x) for x in list(zip(*self._points, strict=True))[1:])
        self._points, self._entries = [], 0
        np.add.at(self.count, members, 1)
        self.field.tally(members)
        with torch.enable_grad():
            value = self.field(t, u, self.field.parameters(members))
        self.captured.expect_known(value)
        self.sums.add(pull_back(value, self.captured.leaves, cotangents))


class SumOfSteps:
    """Takes in backward steps, as a `Tape` does forward ones.

    Args:
        equations: what is stepped.
        quadrature: is given the points of the steps.
        gauss: whether they are those of Gauss quadrature; else they are the stages.
        like: rows, `(R, V)`.

    Attributes:
        vectors: the rows of all members at the ends of their marches, `(R, V)`.
        ends: where those that have failed stopped.
    """

    def __init__(
        self, equations: Costates, quadrature: Quadrature, gauss: bool, like: Tensor
    ) -> None:
        self.equations, self.quadrature, self.gauss = equations, quadrature, gauss
        self.vectors = torch.full_like(like, torch.nan)
        self.ends: dict[int, float] = {}

    def step(self, stages: MemberStages, u1: Tensor, tried: Tried) -> tuple[Array, Tensor] | None:
        """Take in the steps that some members have taken; see `Tape.step`."""
        del u1
        if not self.quadrature.captured.leaves:
            return None
        places = np.flatnonzero(tried.accepted)
        return (self._nodes if self.gauss else self._stages)(stages, tried, places)

    def leave(self, rows: Array, u: Tensor, places: Array, failed: Attempts | None) -> None:
        """Members leave the batch; see `Tape.leave`."""
        index, at = (torch.from_numpy(x).to(u.device) for x in (rows, places))
        self.vectors.index_copy_(0, index, u.index_select(0, at))
        if failed is not None:
            self.ends.update(zip(failed.rows.tolist(), failed.t.tolist(), strict=True))

    def _nodes(
        self, stages: MemberStages, tried: Tried, places: Array
    ) -> tuple[Array, Tensor] | None:
        """The nodes of Gauss quadrature, and the costates there."""
        nodes, weights = np.polynomial.legendre.leggauss(stages.method.tableau.order // 2 + 1)
        theta = (nodes + 1) / 2
        t, h = tried.t[places], tried.h[places]
        when = t + theta[:, None] * h
        found, ends = stages.inside(
            np.tile(places, len(theta)), np.repeat(theta, len(places)), when.reshape(-1)
        )
        times = torch.from_numpy(when).to(stages.method.nodes)
        costates = found.view(*when.shape, -1)
        self._add(tried.rows[places], times, costates, -weights[:, None] * h / 2)
        return ends

    def _stages(self, stages: MemberStages, tried: Tried, places: Array) -> None:
        """The stages that count in the result of a step."""
        weights = np.array(stages.method.b.numbers)
        counted, index = np.flatnonzero(weights), torch.from_numpy(places)
        times = torch.stack([stages.times[i] for i in counted.tolist()])
        vectors = torch.stack([self._argument(stages, i) for i in counted.tolist()])
        self._add(
            tried.rows[places],
            times.index_select(1, index.to(times.device)),
            vectors.index_select(1, index.to(vectors.device)),
            -weights[counted, None] * tried.h[places],
        )

    @staticmethod
    def _argument(stages: MemberStages, i: int) -> Tensor:
        """The rows at a stage, `(L, V)`."""
        if not i:
            return stages.u
        at = stages.increments.state(stages.method.rows[i])
        table = stages.method.tableau
        if isinstance(table, DiagonallyImplicitTableau):
            return at + table.gamma * stages.increments.first(i + 1, None)[i]
        return at

    def _add(self, rows: Array, times: Tensor, vectors: Tensor, shares: Array) -> None:
        """Add points of some members.

        Args:
            rows: which of those that go backward, `(A,)`.
            times: `(K, A)`.
            vectors: what is stepped, `(K, A, V)`.
            shares: of the points, `(K, A)`.
        """
        equations, size = self.equations, self.equations.size
        members, count = equations.members[rows], len(times)
        unit = equations.unit.index_select(0, torch.from_numpy(rows).to(equations.unit.device))
        scale = torch.from_numpy(shares).to(unit) * unit
        cotangents = (vectors[..., :size] * scale.unsqueeze(2)).reshape(-1, size)
        if equations.with_state:
            states = vectors[..., size:]
        else:
            states = equations.dense.several(members, times.cpu().double().numpy())
        self.quadrature.add(
            np.tile(members, count),
            times.reshape(-1),
            states.reshape(-1, size),
            equations.dense.mass.transposed(cotangents),
        )
