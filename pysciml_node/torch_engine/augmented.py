"""The right-hand side of a backward march: the adjoint equation along the forward solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.implicit import stages_for
from pysciml_node.replay.jacobians import jacobian_of
from pysciml_node.replay.linearization import (
    Linearization,
    Solver,
    lu_solver,
    shifted,
)
from pysciml_node.replay.newton import left_missing
from pysciml_node.replay.stages import FlatFunction, Method, Stages
from pysciml_node.replay.vectors import Real, vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import BackwardPass
from pysciml_node.steps.field import Accumulator, DifferentiableField
from pysciml_node.steps.graph import pull_back
from pysciml_node.tableaus import ImplicitTableau


class MassMatrix:
    """A mass matrix that can be inverted, or none.

    With `M du/dt = f` the cotangent `v` of the state obeys `dv/dt = -(df/du)^T M^-T v`.

    Args:
        matrix: `M`, `(N, N)`; `None` stands for the identity.
    """

    def __init__(self, matrix: Tensor | None) -> None:
        self._factors = None if matrix is None else torch.linalg.lu_factor(matrix)

    def solve(self, right: Tensor) -> Tensor:
        """`M^-1 b` for `b` of shape `(N,)` or `(N, m)`."""
        if self._factors is None:
            return right
        columns = right if right.ndim == 2 else right.unsqueeze(1)
        solved: Tensor = torch.linalg.lu_solve(*self._factors, columns)
        return solved.view_as(right)

    def transposed(self, right: Tensor) -> Tensor:
        """`M^-T b` for `b` of shape `(N,)`."""
        if self._factors is None:
            return right
        row: Tensor = torch.linalg.lu_solve(*self._factors, right.unsqueeze(0), left=False)
        return row.squeeze(0)


class DenseForward:
    """The forward solution at any time, its last used step's stages kept.

    Attributes:
        comparison: of the steps that are taken again with those of the solve.
    """

    def __init__(
        self, field: DifferentiableField, methods: Sequence[Method], backward: BackwardPass
    ) -> None:
        self.record, self.states = backward.record, backward.states
        times = self.record.times
        self.sign = 1.0 if times[-1] >= times[0] else -1.0
        self.ordered = np.asarray(times) * self.sign
        self.parts = [
            stages_for(
                method,
                field.field,
                self.record.marks,
                vectors_like(self.states[0], method.all_stages),
                field.field.mass,
            )
            for method in methods
        ]
        self.current, self.comparison = -1, Comparison()

    def __call__(self, t: float) -> Tensor:
        """The state `(N,)` at `t`."""
        if t == self.record.times[-1]:
            return self.states[-1]
        n, theta = self._place(t)
        if t == self.record.times[n]:
            return self.states[n]
        fresh, start = n != self.current, self._start(n)
        stages = self._step(n)
        with torch.no_grad():
            value = stages.dense(*start, torch.tensor([theta], dtype=torch.float64))[0]
            if fresh:
                again = stages.solution(*start, with_error=False)
                implicit = isinstance(stages.method.tableau, ImplicitTableau)
                missing = left_missing(again.dtype) if implicit else 0.0
                self.comparison.add(again, self.states[n + 1], start[2], missing)
        return value

    def slope(self, t: float) -> Tensor:
        """Derivative of that in time, `(N,)`."""
        n, theta = self._place(t)
        stages, (start, h, u) = self._step(n), self._start(n)
        weights = stages.method.dense_weights(
            torch.tensor([theta], dtype=torch.float64), derivative=True
        )
        with torch.no_grad():
            stages.evaluate(start, h, u, stages.method.all_stages)
            return stages.vectors.combine_many(None, 1.0, weights)[0]

    def _place(self, t: float) -> tuple[int, float]:
        """The step that contains a time, and where in it."""
        n = int(np.searchsorted(self.ordered, t * self.sign, side="right")) - 1
        n = min(max(n, 0), len(self.record.sizes) - 1)
        theta = (t - self.record.times[n]) / self.record.sizes[n]
        return n, min(max(theta, 0.0), 1.0)

    def _start(self, n: int) -> tuple[float, float, Tensor]:
        """Start and size of a step, and the state there."""
        return self.record.times[n], self.record.sizes[n], self.states[n]

    def _step(self, n: int) -> Stages:
        """The stages of a step, those of the last one used again."""
        stages = self.parts[self.record.method_of(n)]
        if n != self.current:
            stages.count, self.current = 0, n
        return stages


def _size(cotangent: Tensor) -> float:
    """Root-mean-square of a cotangent that is not zero; its squares neither over- nor underflow."""
    peak = cotangent.abs().max()
    scaled = torch.linalg.vector_norm(cotangent / peak) / math.sqrt(cotangent.numel())
    return float(peak * scaled)


class Augmented:
    """The right-hand side of a backward march, on a flat vector.

    Layout: `[costate, state (backsolve only), parameter gradients (not for Gauss)]`, of which the
    costate and the gradients are in units of `unit`.
    """

    def __init__(
        self,
        field: DifferentiableField,
        dense: DenseForward,
        stats: Stats,
        mass: MassMatrix,
        with_state: bool = False,
        with_leaves: bool = True,
    ) -> None:
        self.field, self.dense, self.stats, self.mass = field, dense, stats, mass
        self.with_state, self.with_leaves = with_state, with_leaves
        self.size = dense.states[0].numel()
        self.driven = 2 * self.size if with_state else self.size
        # Complex states carry real parameters' gradients in their real parts; real states carry
        # complex ones' as pairs.
        self.complex = dense.states[0].is_complex()
        self.lengths = [self._length(leaf) for leaf in field.leaves] if with_leaves else []
        # Leaves that the field turns out not to use get no gradient, rather than zeros.
        self._used = [False] * len(self.lengths)
        self.unit = 1.0
        self.jacobian_of = jacobian_of(field.field)

    def start(self, t: float, cotangent: Tensor) -> Tensor:
        """The vector where the first cotangent enters."""
        empty = cotangent.new_zeros(self.driven + sum(self.lengths))
        return self.jump(empty, cotangent, t)

    def costate(self, vector: Tensor) -> Tensor:
        """The adjoint state in a vector."""
        return vector[: self.size] * self.unit

    def jump(self, vector: Tensor, cotangent: Tensor, t: float) -> Tensor:
        """The vector after a cotangent has entered, in units of the size that it has then."""
        costate = self.costate(vector) + cotangent
        # What enters may cancel what is there.
        unit = _size(costate) if bool(costate.any()) else self.unit
        vector = vector * (self.unit / unit)
        vector[: self.size] = costate / unit
        if self.with_state:
            vector[self.size : 2 * self.size] = self.dense(t)
        self.unit = unit
        return vector

    def __call__(self, t: Tensor, vector: Tensor) -> Tensor:
        """Time derivative of the vector."""
        costate = vector[: self.size]
        if self.with_state:
            state = vector[self.size : 2 * self.size]
        else:
            state = self.dense(float(t))
        line = self.field.linearize(t, state)
        self.stats.nvjp += 1
        pulled, _, leaves = line.vjp(self.mass.transposed(costate), with_leaves=self.with_leaves)
        out = self._packed(vector, pulled, leaves)
        if self.with_state:
            out[self.size : 2 * self.size] = line.value
        return out

    def _packed(
        self, like: Tensor, pulled: Tensor | None, leaves: Sequence[Tensor | None]
    ) -> Tensor:
        """Minus what a cotangent is pulled back to, as a vector."""
        out = torch.zeros_like(like)
        if pulled is not None:
            out[: self.size] = -pulled
        self._put_leaves(out, leaves)
        return out

    def _length(self, leaf: Tensor) -> int:
        """How many entries of the vector the gradient of a leaf has."""
        return leaf.numel() if self.complex else leaf.numel() * (1 + leaf.is_complex())

    def _put_leaves(self, out: Tensor, leaves: Sequence[Tensor | None]) -> None:
        position = self.driven
        for i, (gradient, length) in enumerate(zip(leaves, self.lengths, strict=False)):
            if gradient is not None:
                self._used[i] = True
                if gradient.is_complex() and not self.complex:
                    gradient = torch.view_as_real(gradient.resolve_conj())
                out[position : position + length] = -gradient.reshape(-1)
            position += length

    def linearize(
        self,
        field: FlatFunction,
        t: Tensor,
        u: Tensor,
        *,
        with_time: bool,
        recorded: bool,
        differentiable: bool,
    ) -> AdjointLinearization:
        """The right-hand side at `(t, u)` with its derivatives, for implicit steps.

        It is linear in the vector. In time it changes along the forward solution.
        """
        state = self.dense(float(t)).detach().clone().requires_grad_()
        time = t.detach().clone().requires_grad_(with_time)
        wanted = [state, *(self.field.leaves if self.with_leaves else ())]
        cotangent = self.mass.transposed(u[: self.size])
        with torch.enable_grad():
            value = self.field.field(time, state)
            self.field.captured.expect_known(value, state, time)
            self.stats.nvjp += 1
            if not value.requires_grad:
                nothing = state.new_zeros((self.size, self.size))
                return AdjointLinearization(torch.zeros_like(u), None, nothing, self, value)
            pulled = torch.autograd.grad(
                value,
                wanted,
                cotangent,
                create_graph=with_time,
                retain_graph=True,
                allow_unused=True,
            )
            jacobian = self.jacobian_of(value, state, False)
            slopes = None
            if with_time:
                along = self.dense.slope(float(t))
                moved = _derivatives_along(pulled, (time, state), (torch.ones_like(time), along))
                slopes = self._packed(u, moved[0], moved[1:])
        first, *leaves = (None if x is None else x.detach() for x in pulled)
        return AdjointLinearization(
            self._packed(u, first, leaves), slopes, self.mass.solve(jacobian), self, value
        )

    def pulled_leaves(self, value: Tensor, costate: Tensor) -> Tensor:
        """The gradients' part of the right-hand side for another costate, `f` being at hand."""
        out = costate.new_zeros(self.driven + sum(self.lengths))
        if self.lengths and value.requires_grad:
            leaves = pull_back(value, self.field.leaves, self.mass.transposed(costate))
            self._put_leaves(out, leaves)
        return out[self.driven :]

    def collect(self, vector: Tensor, sums: Accumulator) -> None:
        """Hand over the parameter gradients that the march has integrated."""
        pieces = torch.split(vector[self.driven :], self.lengths) if self.lengths else ()
        gradients: list[Tensor | None] = []
        for piece, leaf, used in zip(pieces, self.field.leaves, self._used, strict=False):
            if not used:
                gradients.append(None)
                continue
            piece = piece * self.unit
            if leaf.is_complex() and not self.complex:
                piece = torch.view_as_complex(piece.view(-1, 2))
            shaped = piece.view(leaf.shape)
            gradients.append((shaped if leaf.is_complex() else shaped.real).to(leaf))
        if gradients:
            sums.add(gradients)


@dataclass(frozen=True)
class AdjointLinearization(Linearization):
    """The adjoint equation at one time: `-J^T` for the costate, which drives all else.

    Attributes:
        jacobian: `M^-1 df/du` of the forward equation, `(N, N)`.
        augmented: the right-hand side.
        forward: `f` with its graph, `(N,)`.
    """

    jacobian: Tensor
    augmented: Augmented
    forward: Tensor

    @override
    def solver(self, scale: Real, mass: Tensor | None) -> Solver:
        assert mass is None
        size = len(self.jacobian)
        solve = lu_solver(shifted(-self.jacobian.T, scale, None))

        def both(right: Tensor) -> Tensor:
            costate = solve(right[:size])
            rest = right[size:] + scale * self.augmented.pulled_leaves(self.forward, costate)
            return torch.cat((costate, rest))

        return both

    @override
    def bound(self) -> float:
        norm: Tensor = torch.linalg.matrix_norm(self.jacobian, 1)
        return float(norm)


def _derivatives_along(
    values: Sequence[Tensor | None], places: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor | None]:
    """Derivatives of recorded values along a direction, from pullbacks alone.

    What a dummy cotangent is pulled back to is linear in it; its slope is wanted.
    """
    moving = [x for x in values if x is not None and x.requires_grad]
    dummies = [torch.zeros_like(x, requires_grad=True) for x in moving]
    slopes: dict[int, Tensor | None] = {}
    if moving:
        pulled = torch.autograd.grad(
            moving, places, dummies, create_graph=True, retain_graph=True, allow_unused=True
        )
        terms = [
            (x * way).sum()
            for x, way in zip(pulled, directions, strict=True)
            if x is not None and x.requires_grad
        ]
        if terms:
            total = torch.stack(terms).sum()
            rates = torch.autograd.grad(total, dummies, retain_graph=True, allow_unused=True)
            slopes = {id(x): rate for x, rate in zip(moving, rates, strict=True)}
    return [slopes.get(id(x)) for x in values]
