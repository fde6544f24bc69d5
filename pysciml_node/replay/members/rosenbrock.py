"""The stages of one Rosenbrock step of many members: Jacobians and linear systems in one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.replay.stages import Method
from pysciml_node.tableaus.implicit import RosenbrockTableau


class RosenbrockStages(MemberStages):
    """Slopes from one linear system for each member, factored once a step.

    Jacobians are taken row by row, each row of all members in one backward pass: members do not
    depend on one another. Arguments are those of `MemberStages`.
    """

    def __init__(
        self, method: Method, field: MembersField, rows: Array, p: Any, like: Tensor, recorded: bool
    ) -> None:
        super().__init__(method, field, rows, p, like, recorded)
        assert isinstance(method.tableau, RosenbrockTableau)
        self.table = method.tableau

    @override
    def know(self, k: Tensor) -> None:
        """The first evaluation is made with its Jacobian."""

    @override
    def evaluate(self, upto: int) -> Tensor | None:
        if self.count:
            return None
        value, jacobian, slope = self._linearized()
        self.field.tally(self.rows, self.method.stages)
        gamma = self.table.gamma
        matrix = torch.eye(value.shape[1]).to(value) - (gamma * self.h[:, :1, None]) * jacobian
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        for i in range(self.method.stages):
            rate = value
            if i:
                at = self.increments.state(self.method.rows[i])
                coupled = self.increments.combine(self.method.couplings[i])
                rate = self.field(self.times[i], at, self.p) + coupled / self.h
            if self.table.time_weights[i]:
                rate = rate + slope * (self.table.time_weights[i] * self.h)
            solved = torch.linalg.lu_solve(factors, pivots, (gamma * rate).unsqueeze(2))
            self.increments.put(i, solved.squeeze(2))
        self.count = self.method.stages
        return None

    def _linearized(self) -> tuple[Tensor, Tensor, Tensor]:
        """`f`, `(L, N)`, `df/du`, `(L, N, N)`, and `df/dt`, `(L, N)`, at the starts."""
        recorded = self.recorded and torch.is_grad_enabled()
        with torch.enable_grad():
            attached = recorded and self.u.requires_grad
            u = self.u if attached else self.u.detach().clone().requires_grad_()
            t = self.times[0]
            if not (recorded and t.requires_grad):
                t = t.detach().clone().requires_grad_()
            value = self.field(t, u, self.p)
            rows, slopes = [], []
            for i in range(value.shape[1]):
                row, slope = self._row(value, i, (u, t), recorded)
                rows.append(row)
                slopes.append(slope)
        found = value, torch.stack(rows, dim=1), torch.stack(slopes, dim=1)
        return found if recorded else (found[0].detach(), found[1].detach(), found[2].detach())

    @staticmethod
    def _row(
        value: Tensor, i: int, at: tuple[Tensor, Tensor], recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """Row `i` of all Jacobians, and of all derivatives in time."""
        if not value.requires_grad:
            return torch.zeros_like(at[0]), torch.zeros_like(at[1])
        row, slope = torch.autograd.grad(
            value[:, i].sum(),
            at,
            create_graph=recorded,
            retain_graph=True,
            materialize_grads=True,
        )
        return row, slope
