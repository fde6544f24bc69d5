"""Jacobians that are given, and sparse ones by groups of rows or columns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.replay.jacobians import Coloring

ALGORITHMS = (psn.Rodas5P(), psn.KenCarp4())


def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """A chain with diffusion, reaction and a drive in time."""
    spread = torch.cat((u[1:], u[:1])) - 2 * u + torch.cat((u[-1:], u[:-1]))
    return p[0] * spread - u**3 + p[1] * torch.sin(t)


def exact(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    eye = torch.eye(len(u), dtype=u.dtype)
    return p[0] * (eye.roll(1, 1) - 2 * eye + eye.roll(-1, 1)) - torch.diag(3 * u**2)


def solve(algorithm: Any, **given: Any) -> tuple[psn.Solution, Tensor, Tensor]:
    u0 = torch.linspace(-1, 1.5, 9, dtype=torch.float64).requires_grad_()
    p = torch.tensor([40.0, 0.7], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(decay, u0, (0.0, 0.3), p=p, **given)
    adjoint = given.pop("adjoint", None)
    return psn.solve(problem, algorithm, rtol=1e-5, atol=1e-5, adjoint=adjoint), u0, p


PATTERN = exact(torch.tensor(0.0), torch.ones(9), torch.ones(2)) != 0


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.expression)
@pytest.mark.parametrize("given", [{"jac": exact}, {"jac_sparsity": PATTERN}], ids=list)
def test_the_same_steps_and_gradients(algorithm: Any, given: dict[str, Any]) -> None:
    plain, *inputs = solve(algorithm)
    expected = torch.autograd.grad(plain.u1.square().sum(), inputs)
    found, *inputs = solve(algorithm, **given)
    torch.testing.assert_close(found.u, plain.u, rtol=1e-9, atol=1e-11)
    gradients = torch.autograd.grad(found.u1.square().sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


def test_gradients_where_columns_are_taken_together() -> None:
    """What is recorded is taken by rows: torch has third derivatives of normalizations wrong."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        normal = torch.nn.functional.layer_norm(u.sin().reshape(4, 2), (2,), eps=0.1)
        return normal.reshape(8) - 2 * u + u[0] ** 2

    pattern = torch.block_diag(*[torch.ones(2, 2)] * 4) != 0
    pattern[:, 0] = True
    assert not Coloring.of(pattern).rows

    def end(u0: Tensor) -> Tensor:
        problem = psn.ODEProblem(f, u0, (0.0, 0.5), jac_sparsity=pattern)
        return psn.solve(problem, psn.Rodas5P(), controller=psn.FixedStep(), dt0=0.25).u1

    u0 = torch.linspace(-1, 1.5, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(end, u0, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("full", "rows"), [("row", True), ("column", False), ("none", True)])
def test_rows_or_columns_are_taken_together(full: str, rows: bool) -> None:
    """Rows that share a full column go one by one, and its columns two together."""
    torch.manual_seed(0)
    state = torch.randn(7, dtype=torch.float64, requires_grad=True)
    matrix = torch.diag(torch.randn(7, dtype=torch.float64))
    matrix[2] = 1.0 if full == "row" else matrix[2]
    matrix[:, 2] = 1.0 if full == "column" else matrix[:, 2]
    coloring = Coloring.of(matrix != 0)
    assert coloring.rows == rows
    assert coloring.count == (1 if full == "none" else 2)
    value = matrix @ state.sin()
    expected = matrix * state.detach().cos()
    torch.testing.assert_close(coloring(value, state, False), expected)


def test_evaluations_of_a_sparse_jacobian() -> None:
    """A chain needs three or four groups, whatever its length."""
    size = 60
    eye = torch.eye(size)
    pattern = eye + eye.roll(1, 1) + eye.roll(-1, 1)
    assert Coloring.of(pattern != 0).count <= 4


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.expression)
def test_a_pattern_with_holes_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="jac_sparsity does not fit"):
        solve(algorithm, jac_sparsity=torch.eye(9))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_what_fits_the_start_alone_is_refused(recorded: bool, many: bool) -> None:
    """The couplings are zero at the start, and grow with time."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((20 * t * u[1] - 3 * u[0], 10 * t * u[0] - u[1]))

    u0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=recorded)
    jac = torch.diag(torch.tensor([-3.0, -1.0], dtype=torch.float64))
    cases: list[tuple[Any, dict[str, Any]]] = [
        *(
            (algorithm, {"jac": lambda t, u: jac})
            for algorithm in (psn.Rodas5P(), psn.Rosenbrock23())
        ),
        *((algorithm, {"jac_sparsity": torch.eye(2)}) for algorithm in ALGORITHMS),
    ]
    for algorithm, given in cases:
        problem: Any = psn.ODEProblem(f, u0, (0.0, 1.0), **given)
        if many:
            problem = psn.EnsembleProblem(problem, u0=torch.stack((u0, 2 * u0)))
        name = next(iter(given))
        with pytest.raises(ValueError, match=f"{name} does not fit the derivative of f"):
            psn.solve(problem, algorithm, compile=False)


def test_products_that_cancel_are_no_misfit() -> None:
    """A derivative that is zero but for rounding, beside one that is large."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        large = 1e6 * u[0]
        return torch.stack((-large, large * 0.3 - 3e5 * u[0] - u[1]))

    problem = psn.ODEProblem(
        f, torch.ones(2, dtype=torch.float64), (0.0, 1.0), jac_sparsity=torch.eye(2)
    )
    u1 = psn.solve(problem, psn.Rodas5P(), rtol=1e-8, atol=1e-10).u1
    assert u1[1].item() == pytest.approx(math.exp(-1), rel=1e-6)


def test_a_wrong_jacobian() -> None:
    """Rosenbrock methods need it exactly; Newton's iteration takes an approximation."""

    def rough(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return exact(t, 0 * u, p)

    with pytest.raises(ValueError, match="jac does not fit the derivative of f"):
        solve(psn.Rodas5P(), jac=rough)
    plain, *inputs = solve(psn.KenCarp4())
    expected = torch.autograd.grad(plain.u1.sum(), inputs)
    found, *inputs = solve(psn.KenCarp4(), jac=rough)
    torch.testing.assert_close(found.u1, plain.u1, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        torch.autograd.grad(found.u1.sum(), inputs), expected, rtol=1e-8, atol=1e-10
    )


def test_a_field_that_autograd_does_not_see() -> None:
    """With a Jacobian of its own it can be solved, though not differentiated."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.from_numpy(-100.0 * (u.detach().numpy() - 1.0))

    u0 = torch.zeros(2, dtype=torch.float64)
    jac = lambda t, u: -100.0 * torch.eye(2, dtype=torch.float64)  # noqa: E731
    for algorithm in ALGORITHMS:
        solution = psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0), jac=jac), algorithm)
        torch.testing.assert_close(solution.u1, torch.ones_like(u0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"jac": lambda t, u: u}, "p is given"),
        ({"jac": lambda t, u, p: u}, r"shape \(9, 9\)"),
        ({"jac": 3.0}, "jac"),
        ({"jac_sparsity": torch.eye(3)}, r"shape \(9, 9\)"),
        ({"jac": exact, "jac_sparsity": torch.eye(9)}, "must not both"),
    ],
)
def test_refusals(given: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        solve(psn.Rodas5P(), **given)
