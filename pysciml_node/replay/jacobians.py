"""Jacobians that a problem brings, or of which it says which entries are zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pysciml_node.algorithms.krylov import GMRES
from pysciml_node.replay.krylov import MatrixFree
from pysciml_node.replay.linearization import (
    DenseLinearization,
    JacobianOf,
    Linearizer,
    dense_jacobian,
    linearize,
    pulled_rows,
)
from pysciml_node.replay.stages import FlatFunction
from pysciml_node.steps.field import FlatField


def linearizer_of(field: FlatFunction, linsolve: GMRES | None) -> Linearizer:
    """How implicit steps get the derivatives of a field.

    Args:
        field: the field.
        linsolve: solves their linear systems without a matrix; `None` for dense factors.
    """
    if linsolve is not None:
        assert isinstance(field, FlatField)
        return MatrixFree(linsolve, field)
    if isinstance(field, FlatField) and field.has_jacobian:
        return GivenJacobian(field)
    return partial(linearize, jacobian_of=jacobian_of(field))


def jacobian_of(field: FlatFunction) -> JacobianOf:
    """How the Jacobian of an evaluation of a field is taken."""
    # A transform of torch.func takes the Jacobian itself, and hides what is in a pattern.
    transformed = torch._C._are_functorch_transforms_active()
    if isinstance(field, FlatField) and field.sparsity is not None and not transformed:
        return _Colored(Coloring.of(field.sparsity))
    return dense_jacobian


class _Colored:
    """A sparse Jacobian, compared with a product: entries that are missing would mix.

    One that is differentiated is taken by rows: products from the right are second derivatives, and
    torch has third ones wrong for layer and batch normalization.
    """

    def __init__(self, coloring: Coloring) -> None:
        self.coloring = coloring
        self.expect_exact = Expectation(
            "jac_sparsity", "Mark all entries that can differ from zero, or leave it out."
        )

    def __call__(self, value: Tensor, state: Tensor, differentiable: bool) -> Tensor:
        """`d value / d state`, `(N, N)`."""
        coloring = self.coloring
        if differentiable and not coloring.rows:
            coloring = Coloring.of(coloring.pattern, by_rows=True)
        matrix = coloring(value, state, differentiable)
        self.expect_exact(matrix, value, state)
        return matrix


@dataclass(frozen=True)
class Coloring:
    """Takes a sparse Jacobian by few products: rows that share no column at once, or columns.

    Attributes:
        pattern: where entries may be, `(N, N)` of bool.
        rows: whether rows are taken together, or columns.
        colors: the group of each, `(N,)`.
        count: of groups.

    Reference: A. R. Curtis, M. J. D. Powell, J. K. Reid, IMA J. Appl. Math. 13 (1974) 117-119.
    """

    pattern: Tensor
    rows: bool
    colors: Tensor
    count: int

    @classmethod
    def of(cls, pattern: Tensor, by_rows: bool = False) -> Coloring:
        """The better of the two, or that of rows, made once for a pattern."""
        known: dict[bool, Coloring] = _KNOWN.setdefault(pattern, {})  # type: ignore[no-untyped-call]
        if by_rows not in known:
            table = pattern.cpu().numpy()
            by_row, by_column = _colors(table), _colors(table.T)
            rows = by_rows or bool(by_row.max() <= by_column.max())
            colors = torch.from_numpy(by_row if rows else by_column).to(pattern.device)
            known[by_rows] = cls(pattern, rows, colors, int(colors.max()) + 1)
        return known[by_rows]

    def __call__(self, value: Tensor, state: Tensor, differentiable: bool) -> Tensor:
        """`d value / d state`, `(N, N)`."""
        groups = torch.nn.functional.one_hot(self.colors, self.count).T.to(state)
        if self.rows:
            taken = pulled_rows(value, state, groups, differentiable)
            return torch.where(self.pattern, taken[self.colors], torch.zeros_like(taken[:1]))
        # The pullback is linear in the cotangent: its own pullback is the product from the right.
        cotangent = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(
            value, state, cotangent, create_graph=True, materialize_grads=True
        )
        if not pulled.requires_grad:
            return torch.zeros_like(self.pattern, dtype=state.dtype)
        taken = pulled_rows(pulled, cotangent, groups, differentiable)
        return torch.where(self.pattern, taken[self.colors].T, torch.zeros_like(taken[0, 0]))


_KNOWN = WeakTensorKeyDictionary()


def _colors(pattern: np.ndarray) -> np.ndarray:
    """Groups of rows that share no column: each goes into the first where it fits."""
    used = np.zeros((0, len(pattern)), dtype=bool)
    colors = np.zeros(len(pattern), dtype=np.int64)
    for i, row in enumerate(pattern):
        free = np.flatnonzero(~(used & row).any(1))
        if not len(free):
            used = np.concatenate((used, np.zeros((1, len(pattern)), dtype=bool)))
            free = np.array([len(used) - 1])
        colors[i] = free[0]
        used[free[0]] |= row
    return colors


class GivenJacobian:
    """The Jacobian that a problem brings; what is recorded takes autograd's, which is the same.

    Rosenbrock methods need it exactly, and so it is compared with a product by autograd.

    Args:
        field: evaluates it.
    """

    def __init__(self, field: FlatField) -> None:
        self.field = field
        self.expect_exact = Expectation("jac", "Leave it out, or correct it.")

    def __call__(
        self,
        field: FlatFunction,
        t: Tensor,
        u: Tensor,
        *,
        with_time: bool,
        recorded: bool,
        differentiable: bool,
    ) -> DenseLinearization:
        """The field with its derivatives at `(t, u)`."""
        take = partial(linearize, recorded=recorded, differentiable=differentiable)
        if recorded:
            return take(field, t, u, with_time=with_time)
        matrix = self.field.jacobian(t, u)
        if not with_time:
            return DenseLinearization(field(t, u).detach(), None, matrix)

        def given(value: Tensor, state: Tensor, differentiable: bool) -> Tensor:
            self.expect_exact(matrix, value, state)
            return matrix

        local = take(field, t, u, with_time=True, jacobian_of=given)
        return replace(local, jacobian=matrix)


class Expectation:
    """Compares a Jacobian with one vector-Jacobian product, wherever it is taken.

    What fits the first state need not fit the later ones, and would cost Rosenbrock methods their
    order without a word.

    Args:
        name: of the argument that it rests on.
        remedy: what to do where it is wrong.
    """

    def __init__(self, name: str, remedy: str) -> None:
        self.name, self.remedy = name, remedy

    def __call__(self, matrix: Tensor, value: Tensor, state: Tensor) -> None:
        """Expect a matrix to be the derivative of a value.

        Raises:
            ValueError: it is not.
        """
        # Weights of no pattern, so that errors do not cancel.
        weights = 1 + torch.arange(value.shape[-1], device=value.device).to(value) * 0.618034 % 1
        exact = pulled_rows(value, state, weights.expand_as(value)[None], False)[0].detach()
        matrix = matrix.detach()
        largest = weights @ matrix.abs() + exact.abs()
        gap = (weights @ matrix - exact).abs()
        # Products that cancel leave rounding errors, of the size of the whole.
        bound = torch.finfo(value.dtype).eps ** 0.5
        wrong = gap > bound * (largest + bound * largest.amax(-1, keepdim=True))
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{self.name} does not fit the derivative of f: column {place[-1]} of df/du "
                f"differs by {float((gap / largest)[place]):.2g} of its size, at one of the "
                f"states of the solve.\n  {self.remedy}"
            )
