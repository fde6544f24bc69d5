"""A field with its derivatives, as implicit steps need them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override

from pysciml_node.problems.state import tangent_of
from pysciml_node.replay.stages import FlatFunction
from pysciml_node.replay.vectors import Real

# Rows of a Jacobian that are pulled back together: their graphs share memory bandwidth, and more
# of them would only take memory.
_ROWS = 256
# Up to so many rows a batch costs more than it saves.
_FEW = 4


JacobianOf = Callable[[Tensor, Tensor, bool], Tensor]
"""From a value and the state it is of to `(N, N)`, differentiable or not."""

Solver = Callable[[Tensor], Tensor]
"""Solves one linear system for right-hand sides `(N,)`."""


@dataclass(frozen=True)
class Linearization(ABC):
    """A field at one time and state, with what implicit steps do with its derivatives there.

    Attributes:
        value: `f(t, u)`, `(N,)`.
        time: `df/dt`, `(N,)`, or `None` for a field that does not see time.
    """

    value: Tensor
    time: Tensor | None

    # Whether one at another state costs less than what it saves Newton's iteration.
    matrix_free: ClassVar[bool] = False

    @abstractmethod
    def solver(self, scale: Real, mass: Tensor | None) -> Solver:
        """Solves `(M - scale J) x = b`; `None` for `M` stands for the identity."""

    @abstractmethod
    def bound(self) -> float:
        """A bound of the largest eigenvalue of `J`."""


@dataclass(frozen=True)
class DenseLinearization(Linearization):
    """With the Jacobian as a matrix.

    Attributes:
        jacobian: `df/du`, `(N, N)`.
    """

    jacobian: Tensor

    @override
    def solver(self, scale: Real, mass: Tensor | None) -> Solver:
        return lu_solver(shifted(self.jacobian, scale, mass))

    @override
    def bound(self) -> float:
        norm: Tensor = torch.linalg.matrix_norm(self.jacobian.detach(), math.inf)
        return float(norm)


def shifted(jacobian: Tensor, scale: Real, mass: Tensor | None) -> Tensor:
    """`M - scale J`."""
    scaled = jacobian * -scale
    if mass is not None:
        return scaled + mass
    return scaled + torch.eye(len(jacobian), dtype=jacobian.dtype, device=jacobian.device)


def lu_solver(matrix: Tensor) -> Solver:
    """Solves with a matrix, or with many `(L, N, N)`, which is factored once."""
    differentiated = matrix.requires_grad
    with torch.no_grad() if differentiated else nullcontext():
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def solve(right: Tensor) -> Tensor:
        column = right.unsqueeze(-1)
        if differentiated:
            solved = _Solved.apply(matrix, column, factors, pivots, False)  # type: ignore[no-untyped-call]
        else:
            solved = torch.linalg.lu_solve(factors, pivots, column)
        found: Tensor = solved.squeeze(-1)
        return found

    return solve


class _Solved(torch.autograd.Function):
    """Solves `A x = b`, or `A^H x = b`, by the factors of `A`, which stay constant.

    The derivatives are those of the equation: `A dx = db - dA x`. Those of the factors, which torch
    would take instead, cost several times as much.
    """

    @staticmethod
    @override
    def forward(
        matrix: Tensor, right: Tensor, factors: Tensor, pivots: Tensor, adjoint: bool
    ) -> Tensor:
        size, shape = factors.shape[-1], right.shape
        if factors.ndim > 3:
            # With more than one axis of batches torch reads beyond the factors.
            factors, pivots = factors.reshape(-1, size, size), pivots.reshape(-1, size)
            right = right.reshape(-1, size, shape[-1])
        solved: Tensor = torch.linalg.lu_solve(factors, pivots, right, adjoint=adjoint)
        return solved.reshape(shape)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        matrix, _, factors, pivots, ctx.adjoint = inputs
        ctx.save_for_backward(matrix, factors, pivots, output)
        ctx.save_for_forward(matrix, factors, pivots, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,) * 5
        matrix, factors, pivots, solved = ctx.saved_tensors
        right = _Solved.apply(matrix, cotangent, factors, pivots, not ctx.adjoint)  # type: ignore[no-untyped-call]
        left, row = (solved, right) if ctx.adjoint else (right, solved)
        return -left * row.mH, right, None, None, None

    @staticmethod
    @override
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        # The rule of lu_solve mixes up batches of factors with batches of right-hand sides.
        *tensors, adjoint = given
        batches = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims, strict=False)
        ]
        return _Solved.apply(*batches, adjoint), 0  # type: ignore[no-untyped-call]

    @staticmethod
    @override
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        matrix, factors, pivots, solved = ctx.saved_tensors
        of_matrix, of_right = tangents[:2]
        if of_right is None:
            of_right = torch.zeros_like(solved)
        if of_matrix is not None:
            of_right = of_right - (of_matrix.mH if ctx.adjoint else of_matrix) @ solved
        change: Tensor = _Solved.apply(  # type: ignore[no-untyped-call]
            matrix, of_right, factors, pivots, ctx.adjoint
        )
        return change


class Linearizer(Protocol):
    """Linearizes a field; as `linearize`."""

    def __call__(
        self,
        field: FlatFunction,
        t: Tensor,
        u: Tensor,
        *,
        with_time: bool,
        recorded: bool,
        differentiable: bool,
    ) -> Linearization:
        """The field with its derivatives at `(t, u)`."""


def linearize(
    field: FlatFunction,
    t: Tensor,
    u: Tensor,
    *,
    with_time: bool,
    recorded: bool,
    differentiable: bool,
    jacobian_of: JacobianOf | None = None,
) -> DenseLinearization:
    """Evaluate the field with its Jacobian, by one batch of vector-Jacobian products.

    Args:
        field: the derivative as a function of time and flat state.
        t: a 0-d tensor.
        u: the state, `(N,)`.
        with_time: whether `df/dt` is wanted.
        recorded: whether autograd is to follow the value.
        differentiable: whether autograd is to follow the derivatives too.
        jacobian_of: takes the Jacobian of an evaluation; default `dense_jacobian`.
    """
    if torch._C._are_functorch_transforms_active():
        return _transformed(field, t, u, with_time)
    jacobian_of = jacobian_of or dense_jacobian
    value = None
    if recorded and not u.requires_grad:
        value = field(t, u)
        # Where nothing needs a gradient, the point below must not seem to.
        recorded = value.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        attached = recorded and u.requires_grad
        state = u if attached else _apart(u)
        time = t if recorded and t.requires_grad else _apart(t, with_time)
        if attached and with_time:
            time = time_behind(state, time)
        rate = field(time, state)
        if value is None:
            value = rate if recorded else rate.detach()
        if not rate.requires_grad:
            return DenseLinearization(value, None, u.new_zeros((u.numel(), u.numel())))
        jacobian = jacobian_of(rate, state, recorded and differentiable)
        slope = time_derivative(rate, time, recorded and differentiable) if with_time else None
    return DenseLinearization(value, slope, jacobian)


def _transformed(field: FlatFunction, t: Tensor, u: Tensor, with_time: bool) -> DenseLinearization:
    """The field inside a transform of `torch.func`, which knows no `requires_grad_`."""

    def rate(t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        value = field(t, u)
        return value, value

    take = torch.func.jacrev(rate, argnums=(0, 1), has_aux=True, chunk_size=_ROWS)
    (slope, jacobian), value = take(t, u)
    return DenseLinearization(value, slope if with_time else None, jacobian)


def _apart(x: Tensor, requires_grad: bool = True) -> Tensor:
    """A copy without a graph, which keeps the derivative that it has in forward mode."""
    alone = x.detach().clone().requires_grad_(requires_grad)
    tangent = tangent_of(x) if forward_ad._current_level >= 0 else None
    if tangent is None:
        return alone
    dual: Tensor = forward_ad.make_dual(alone, tangent)  # type: ignore[no-untyped-call]
    return dual


def dense_jacobian(value: Tensor, state: Tensor, differentiable: bool) -> Tensor:
    """`d value / d state`, `(N, N)`."""
    basis = torch.eye(state.numel(), dtype=state.dtype, device=state.device)
    return pulled_rows(value, state, basis, differentiable)


def pulled_rows(value: Tensor, source: Tensor, cotangents: Tensor, differentiable: bool) -> Tensor:
    """Cotangents `(m, N)` pulled back from a value to its source, in batches where that goes.

    Where the value is `(L, N)` so is each cotangent.
    """

    def pulled(part: Tensor, batched: bool) -> Tensor:
        rows: Tensor = torch.autograd.grad(
            value,
            source,
            part,
            is_grads_batched=batched,
            retain_graph=True,
            create_graph=differentiable,
            materialize_grads=True,
        )[0]
        return rows

    if len(cotangents) > _FEW:
        try:
            return torch.cat(
                [pulled(part, batched=True) for part in torch.split(cotangents, _ROWS)]
            )
        except RuntimeError:
            # Not every operation knows of batches of cotangents.
            pass
    return torch.stack([pulled(row, batched=False) for row in cotangents])


def time_behind(state: Tensor, time: Tensor) -> Tensor:
    """The same time, made of a state that has a graph as well, none of which it depends on.

    Autograd looks at all that was made after what it differentiates by. With a time that is older
    than the state these are all steps before, at every step.
    """
    always = torch.ones((), dtype=torch.bool, device=time.device)
    return torch.where(always, time, state.flatten()[0])


def time_derivative(value: Tensor, time: Tensor, differentiable: bool) -> Tensor | None:
    """`d value / d time`, each row's by its own time where there are many.

    The pullback to time is linear in the cotangent; its slope is wanted. Where that is
    differentiated once more it is taken entry by entry: the derivative of the slope would be a
    third one, which torch has wrong for layer and batch normalization.
    """
    cotangent = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(
        value, time, cotangent, create_graph=True, retain_graph=True, allow_unused=True
    )
    if pulled is None or not pulled.requires_grad:
        return None
    if differentiable:
        units = torch.eye(value.shape[-1]).to(value)
        if value.ndim > 1:
            units = units.unsqueeze(1).expand(len(units), *value.shape)
        slopes = pulled_rows(value, time, units, differentiable=True)
        return slopes.movedim(0, -1).reshape(value.shape)
    (slope,) = torch.autograd.grad(pulled.sum(), cotangent, retain_graph=True, allow_unused=True)
    return cast("Tensor | None", slope)
