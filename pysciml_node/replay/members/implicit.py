"""The stages of one implicit step of many members: Jacobians and linear systems in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.linearization import (
    DenseLinearization,
    Solver,
    lu_solver,
    pulled_rows,
    time_behind,
    time_derivative,
)
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.replay.newton import (
    ITERATIONS,
    SLOW,
    Accuracy,
    newton_rounding,
    newton_scale,
    noise,
)
from pysciml_node.replay.stages import Method
from pysciml_node.tableaus.implicit import DiagonallyImplicitTableau, RosenbrockTableau

MakeStages = Callable[[Method, MembersField, Array, Any, Tensor, bool], MemberStages]
"""Makes the stages of some members; arguments as of `MemberStages`."""


def member_stages_for(method: Method, options: MemberOptions, derivatives: int = 1) -> MakeStages:
    """What makes the stages of a step, as the method's tableau asks for.

    Args:
        method: the method.
        options: of the members, whose numbers the stages are given.
        derivatives: how often autograd may differentiate what is recorded.
    """
    if isinstance(method.tableau, RosenbrockTableau):
        return RosenbrockStages
    if isinstance(method.tableau, DiagonallyImplicitTableau):
        return partial(DiagonalStages, options=options, derivatives=derivatives)
    return MemberStages


class _ImplicitStages(MemberStages):
    """Slopes that follow from linear systems, one for each member, all factored at once."""

    def _linearized(
        self, t: Tensor, u: Tensor, *, with_time: bool, recorded: bool, differentiable: bool
    ) -> DenseLinearization:
        """The field with its derivatives, as `linearize` gives them: with a leading `L`."""
        field, p, value = self.field, self.p, None
        recorded = recorded and torch.is_grad_enabled()
        given = None if recorded or not field.has_jacobian else field.jacobian(t, u, p)
        if given is not None and not with_time:
            # Newton's iteration takes approximations.
            return DenseLinearization(field(t, u, p), None, given)
        if recorded and not u.requires_grad:
            value = field(t, u, p)
            # Where nothing needs a gradient, the point below must not seem to.
            recorded = value.requires_grad
        with torch.enable_grad():
            attached = recorded and u.requires_grad
            state = u if attached else u.detach().clone().requires_grad_()
            time = t
            if not (recorded and t.requires_grad):
                time = t.detach().clone().requires_grad_(with_time)
            if attached and with_time:
                time = time_behind(state, time)
            rate = field(time, state, p)
            if value is None:
                value = rate if recorded else rate.detach()
            if not rate.requires_grad:
                return DenseLinearization(value, None, u.new_zeros((*u.shape, u.shape[1])))
            differentiable = differentiable and recorded
            slope = time_derivative(rate, time, differentiable) if with_time else None
            if given is None:
                given = jacobians_of(rate, state, differentiable)
            else:
                field.expect_jacobian(given, rate, state)
        return DenseLinearization(value, slope, given)

    def _solver(self, local: DenseLinearization, scale: Tensor) -> Solver:
        """Solves with `M - scale J` of each member; `scale` broadcasts to `(L, N)`."""
        mass = self.field.mass
        if mass is None:
            mass = torch.eye(local.value.shape[1]).to(local.value)
        return lu_solver(mass - scale[:, :1, None] * local.jacobian)


def jacobians_of(value: Tensor, state: Tensor, differentiable: bool) -> Tensor:
    """Those of all members, `(L, N, N)`, each row of all in one backward pass.

    Members do not depend on one another.
    """
    count, size = value.shape
    units = torch.eye(size).to(value).unsqueeze(1).expand(size, count, size)
    return pulled_rows(value, state, units, differentiable).movedim(0, 1)


class RosenbrockStages(_ImplicitStages):
    """Slopes of Rosenbrock methods."""

    @override
    def know(self, k: Tensor) -> None:
        """The first evaluation is made with its Jacobian."""

    @override
    def evaluate(self, upto: int) -> Tensor | None:
        if self.count:
            return None
        table = self.method.tableau
        assert isinstance(table, RosenbrockTableau)
        local = self._linearized(
            self.times[0],
            self.u,
            with_time=True,
            recorded=self.recorded,
            differentiable=self.recorded,
        )
        self.field.tally(self.rows, self.method.stages)
        solve, mass = self._solver(local, table.gamma * self.h), self.field.mass
        for i in range(self.method.stages):
            rate = local.value
            if i:
                at = self.increments.state(self.method.rows[i])
                coupled = self.increments.combine(self.method.couplings[i])
                if mass is not None:
                    coupled = coupled @ mass.T
                rate = self.field(self.times[i], at, self.p) + coupled / self.h
            if local.time is not None and table.time_weights[i]:
                rate = rate + local.time * (table.time_weights[i] * self.h)
            self.increments.put(i, solve(table.gamma * rate))
        self.count = self.method.stages
        return None


class DiagonalStages(_ImplicitStages):
    """Slopes of singly diagonally implicit methods, by Newton's iteration for all members at once.

    Those whose iteration has ended stay where it did. Where it does not converge the slopes stay
    finite, for gradients of the others, and the state at the end is NaN.

    Arguments are those of `MemberStages`, `options` of the members, and `derivatives`: how often
    autograd may differentiate what is recorded.
    """

    def __init__(
        self,
        method: Method,
        field: MembersField,
        rows: Array,
        p: Any,
        like: Tensor,
        recorded: bool,
        options: MemberOptions,
        derivatives: int = 1,
    ) -> None:
        super().__init__(method, field, rows, p, like, recorded)
        self._accuracy = Accuracy.of_members(options, like.dtype, like.shape[1])
        self.derivatives = derivatives if recorded else 0
        assert isinstance(method.tableau, DiagonallyImplicitTableau)
        self.gamma = method.tableau.gamma
        self._first: Tensor
        self._failed: Tensor

    @override
    def know(self, k: Tensor) -> None:
        super().know(k)
        self._first = k

    @override
    def evaluate(self, upto: int) -> Tensor | None:
        if self.count == self.method.stages:
            return None
        local = self._linearized(
            self.times[0],
            self.u,
            with_time=False,
            recorded=self.recorded and not self.count,
            differentiable=False,
        )
        self.field.tally(self.rows)
        if not self.count:
            self.know(local.value)
        self._failed = torch.zeros_like(self.h[:, 0], dtype=torch.bool)
        solve, slope = self._solver(local, self.gamma * self.h.detach()), self._first
        for i in range(1, self.method.stages):
            known = self.increments.state(self.method.rows[i])
            with torch.no_grad():
                slope = self._newton(i, known.detach(), slope.detach(), solve)
            for _ in range(self.derivatives):
                slope = self._corrected(i, known, slope)
            self.increments.put(i, slope)
        self.end = slope
        self.count = self.method.stages
        return None

    def _newton(self, i: int, known: Tensor, slope: Tensor, solve: Solver) -> Tensor:
        """The slopes `k = f(t, known + h gamma k)`, `(L, N)`."""
        t, step, u = self.times[i].detach(), self.gamma * self.h.detach(), self.u.detach()
        scale = newton_scale(known, slope, step[:, :1])
        close, rounding = scale * newton_rounding(u.dtype), scale * noise(u.dtype)
        accuracy, change = self._accuracy.of_rows(self.rows), None
        active = ~self._failed
        small = slow = torch.zeros_like(active)
        local = 0  # changes by Jacobians at the stage itself
        for iteration in range(2 * ITERATIONS):
            at = known + step * slope
            if not local and (iteration == ITERATIONS or bool((slow | ~active).all())):
                there = self._linearized(
                    t, at, with_time=False, recorded=False, differentiable=False
                )
                solve, rate, local = self._solver(there, step), there.value, 1
            else:
                rate, local = self.field(t, at, self.p), local + (local > 0)
            under_way = active.cpu().numpy()
            self.field.tally(self.rows if under_way.all() else self.rows[under_way])
            before, change = change, solve(rate - slope)
            slope = torch.where(active.unsqueeze(1), slope + change, slope)
            size = change.abs().amax(1)
            lost = active & ~(size < math.inf)
            self._failed = self._failed | lost
            small = size <= close
            missing, theta = accuracy.missing(u, known, slope, step[:, :1], change, before)
            slow, ended = small & (theta > SLOW), small & (missing <= 1)
            if local > 1:
                ended = ended | (small & (theta >= 1) & (size <= rounding))
            active = active & ~lost & ~ended
            if not active.any():
                break
        self._failed = self._failed | (active & ~small)
        return torch.where(self._failed.unsqueeze(1), torch.zeros_like(slope), slope)

    def _corrected(self, i: int, known: Tensor, slope: Tensor) -> Tensor:
        """One step of Newton's iteration at the solution, recorded; see `ImplicitStages`."""
        step = self.gamma * self.h
        local = self._linearized(
            self.times[i],
            known + step * slope,
            with_time=False,
            recorded=True,
            differentiable=self.derivatives > 1,
        )
        self.field.tally(self.rows)
        return slope + self._solver(local, step)(local.value - slope)

    @override
    def solution(self, with_error: bool) -> Tensor:
        self.evaluate(self.method.stages)
        u1 = self.increments.state(self.method.b)
        return u1.masked_fill(self._failed.unsqueeze(1), math.nan)
