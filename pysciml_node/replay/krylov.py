"""Linear systems of implicit steps without a matrix: GMRES with Jacobian-vector products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override

from pysciml_node.algorithms.krylov import GMRES
from pysciml_node.problems.state import moves
from pysciml_node.replay.linearization import Linearization, Solver
from pysciml_node.replay.stages import FlatFunction
from pysciml_node.replay.vectors import Real
from pysciml_node.steps.field import FlatField

Apply = Callable[[Tensor], Tensor]

# Products by which the largest eigenvalue is estimated.
_POWERS = 8


def gmres(apply: Apply, right: Tensor, rtol: float, restart: int, limit: int) -> Tensor | None:
    """Solve `A x = b`, to `|b - A x| <= rtol |b|`; `None` where that takes too long.

    Args:
        apply: `A`.
        right: `b`, `(N,)`.
        rtol: as above.
        restart: vectors that are kept.
        limit: of products.
    """
    total = torch.zeros_like(right)
    residual, goal = right, rtol * float(torch.linalg.vector_norm(right))
    if goal == 0:
        return total
    done = 0
    while math.isfinite(goal) and done < limit:
        change, count = _cycle(apply, residual, goal, min(restart, limit - done))
        total, done = total + change, done + count
        residual = right - apply(total)
        if float(torch.linalg.vector_norm(residual)) <= goal:
            return total
    return None


def _cycle(apply: Apply, residual: Tensor, goal: float, most: int) -> tuple[Tensor, int]:
    """The best change within one space, and how many products it took."""
    size = float(torch.linalg.vector_norm(residual))
    basis = residual.new_empty((most + 1, residual.numel()))
    basis[0] = residual / size
    hessenberg = np.zeros((most + 1, most))
    target = np.zeros(most + 1)
    target[0] = size
    weights: np.ndarray = np.zeros(0)
    for k in range(most):
        vector, known = apply(basis[k]), basis[: k + 1]
        # Twice is enough: rounding leaves parts of the basis in once.
        along = known @ vector
        vector = vector - known.T @ along
        again = known @ vector
        vector = vector - known.T @ again
        length = torch.linalg.vector_norm(vector)
        hessenberg[: k + 2, k] = torch.cat((along + again, length[None])).tolist()
        used = hessenberg[: k + 2, : k + 1]
        weights = np.linalg.lstsq(used, target[: k + 2], rcond=None)[0]
        missing = float(np.linalg.norm(target[: k + 2] - used @ weights))
        last = hessenberg[k + 1, k]
        if missing <= 0.5 * goal or not last > 1e-14 * abs(used).max():
            break
        basis[k + 1] = vector / last
    found = torch.from_numpy(weights).to(residual) @ basis[: len(weights)]
    return found, len(weights)


@dataclass(frozen=True)
class KrylovLinearization(Linearization):
    """With products of the Jacobian in place of a matrix.

    Attributes:
        product: `J v`.
        pullback: `J^T w`.
        settings: of the iteration.
        preconditioner: from `scale` to what nearly solves; `None` without one.
        recorded: whether its solutions are differentiated.
    """

    product: Apply
    pullback: Apply
    settings: GMRES
    preconditioner: Callable[[float], Apply] | None
    recorded: bool

    matrix_free = True

    @override
    def solver(self, scale: Real, mass: Tensor | None) -> Solver:
        assert mass is None
        size = float(scale.detach()) if isinstance(scale, Tensor) else scale
        nearly = None if self.preconditioner is None else self.preconditioner(size)
        settings = self.settings

        def found(right: Tensor, rtol: float, limit: int) -> Tensor | None:
            def apply(x: Tensor) -> Tensor:
                x = x if nearly is None else nearly(x)
                return x - size * self.product(x)

            with forward_ad._set_fwd_grad_enabled(False):
                solved = gmres(apply, right, rtol, settings.restart, limit)
                return solved if solved is None or nearly is None else nearly(solved)

        def pull(right: Tensor) -> Tensor:
            transposed = None if nearly is None else _transposed(nearly, right)

            def apply(x: Tensor) -> Tensor:
                x = x if transposed is None else transposed(x)
                return x - size * self.pullback(x)

            with forward_ad._set_fwd_grad_enabled(False):
                solved = gmres(apply, right, _exact(right), settings.restart, limit)
                solved = _expect_solved(solved, "transposed linear system of a step", limit)
                return solved if transposed is None else transposed(solved)

        def push(right: Tensor) -> Tensor:
            solved = found(right, _exact(right), limit)
            return _expect_solved(solved, "linear system of a step", limit)

        def solve(right: Tensor) -> Tensor:
            recorded = torch.is_grad_enabled() and right.requires_grad
            if recorded or (self.recorded and moves(right)):
                held: Tensor = _Held.apply(right, torch.zeros_like, pull, push)  # type: ignore[no-untyped-call]
                return held
            with torch.no_grad():
                solved = found(right, settings.rtol, settings.max_iterations)
            return torch.full_like(right, math.nan) if solved is None else solved

        limit = 4 * settings.max_iterations
        return solve

    @override
    def bound(self) -> float:
        """The largest eigenvalue by a few powers, from where the field leads."""
        vector, size = self.value.detach(), 0.0
        for _ in range(_POWERS):
            length = float(torch.linalg.vector_norm(vector))
            if not 0 < length < math.inf:
                return size
            vector = self.product(vector / length)
            size = float(torch.linalg.vector_norm(vector))
        return size


class _Held(torch.autograd.Function):
    """A value whose derivative is a linear function that is held constant, as its transpose is.

    The correction of a stage that has been found is zero, with the derivative of a solve. Each of
    the two corrections gives one derivative of the stage, though its system is not differentiated.
    """

    @staticmethod
    @override
    def forward(x: Tensor, value: Apply, pull: Apply | None, push: Apply | None) -> Tensor:
        return value(x)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, value, *ctx.derivatives = inputs
        # A linear function is its own derivative; a correction, which is zero, has that of a solve.
        ctx.push = value if inputs[3] is None else inputs[3]
        ctx.set_materialize_grads(False)

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (cotangent,), (pull, push) = cotangents, ctx.derivatives
        if cotangent is None:
            return (None,) * 4
        if pull is None:
            raise RuntimeError(
                "a third derivative of steps that GMRES solves was asked for, and they have two.\n"
                "  Leave linsolve out, for states of up to 500 entries, or use Rodas5P()."
            )
        return _Held.apply(cotangent, pull, push, None), None, None, None  # type: ignore[no-untyped-call]

    @staticmethod
    @override
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return ctx.push(tangents[0])


def _exact(right: Tensor) -> float:
    """What is left of the right-hand side of a system for a derivative."""
    return float(torch.finfo(right.dtype).eps ** 0.7)


def _expect_solved(solved: Tensor | None, system: str, limit: int) -> Tensor:
    if solved is None:
        raise RuntimeError(
            f"GMRES could not solve the {system}, for its gradient, by {limit} products.\n"
            "  Give GMRES a preconditioner, a larger restart or more max_iterations."
        )
    return solved


def _transposed(nearly: Apply, like: Tensor) -> Apply:
    """The transpose of a linear function, by autograd."""
    with torch.enable_grad():
        place = torch.zeros_like(like, requires_grad=True)
        value = nearly(place)
    if not value.requires_grad:
        raise TypeError(
            "what precondition returns must be a function of torch operations on its argument, "
            "so that gradients can transpose it.\n  Do not detach the residual in it."
        )
    return lambda x: torch.autograd.grad(value, place, x, retain_graph=True)[0]


class MatrixFree:
    """Linearizes a field for GMRES.

    Args:
        settings: of the iteration.
        field: knows the structure of states, for the preconditioner.
    """

    def __init__(self, settings: GMRES, field: FlatField) -> None:
        self.settings, self.spec = settings, field.spec

    def __call__(
        self,
        field: FlatFunction,
        t: Tensor,
        u: Tensor,
        *,
        with_time: bool,
        recorded: bool,
        differentiable: bool,
    ) -> KrylovLinearization:
        """The field at `(t, u)` with products of its Jacobian there."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "steps that GMRES solves were taken inside a transform of torch.func, which does "
                "not go through its products.\n  Take the derivative by backward(), "
                "torch.autograd.grad or torch.autograd.forward_ad, or use Rodas5P()."
            )
        value = field(t, u) if recorded else None
        with torch.inference_mode(False), torch.enable_grad():
            state = u.detach().clone().requires_grad_()
            rate = field(t.detach(), state)
            dummy = torch.zeros_like(rate, requires_grad=True)
            pulled = None
            if rate.requires_grad:
                (pulled,) = torch.autograd.grad(
                    rate, state, dummy, create_graph=True, materialize_grads=True
                )

        def pullback(x: Tensor) -> Tensor:
            return _pulled(rate, state, x)

        def product(x: Tensor) -> Tensor:
            # The pullback is linear in its cotangent: its own pullback is the product.
            return torch.zeros_like(x) if pulled is None else _pulled(pulled, dummy, x)

        return KrylovLinearization(
            rate.detach() if value is None else value,
            None,
            product,
            pullback,
            self.settings,
            self._preconditioner(t, u),
            recorded,
        )

    def _preconditioner(self, t: Tensor, u: Tensor) -> Callable[[float], Apply] | None:
        make, spec = self.settings.precondition, self.spec
        if make is None:
            return None

        def preconditioner(scale: float) -> Apply:
            nearly = make(t.detach(), spec.unflatten(u.detach()), scale)
            return lambda r: spec.flatten(nearly(spec.unflatten(r)))

        return preconditioner


def _pulled(value: Tensor, source: Tensor, cotangent: Tensor) -> Tensor:
    """`(d value / d source)^T x`, the graph being kept."""
    if not value.requires_grad:
        return torch.zeros_like(cotangent)
    (found,) = torch.autograd.grad(
        value, source, cotangent, retain_graph=True, materialize_grads=True
    )
    return found
