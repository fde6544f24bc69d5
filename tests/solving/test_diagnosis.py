"""Failures of implicit steps: what the message names as the cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

D = torch.float64
MASS = torch.diag(torch.tensor([1.0, 0.0], dtype=D))

COMPILED = pytest.mark.parametrize(
    "compile",
    [False, pytest.param(True, marks=pytest.mark.skipif(not available()[0], reason="no compiler"))],
)


def rooted(t: Tensor, u: Tensor) -> Tensor:
    """`x' = -x` and `0 = y^2 - x`."""
    return torch.stack((-u[0], u[1] ** 2 - u[0]))


@COMPILED
@pytest.mark.parametrize("algorithm", [psn.Rosenbrock23(), psn.Rodas5P()], ids=["23", "5P"])
def test_a_start_that_solves_no_algebraic_equation_is_named(algorithm: Any, compile: bool) -> None:
    def solve(y: float) -> psn.Solution:
        start = torch.tensor([1.0, y], dtype=D)
        problem = psn.ODEProblem(rooted, start, (0.0, 1.0), mass_matrix=MASS)
        return psn.solve(problem, algorithm, rtol=1e-4, atol=1e-4, compile=compile)

    torch.testing.assert_close(solve(1.0).u1[1] ** 2, solve(1.0).u1[0], rtol=1e-3, atol=0)
    words = r"(?s)without derivatives at t=0 .*f is 8 in component \(1,\)"
    with pytest.raises(psn.SolverFailure, match=words):
        solve(3.0)


def test_the_algebraic_equation_need_not_be_a_row() -> None:
    """Of `(x + y)' = -x` and `(x + y)' = y^3 - 2 x` half of the difference is left."""
    mass = torch.ones(2, 2, dtype=D)
    start = torch.tensor([1.0, 2.0], dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((-u[0], u[1] ** 3 - 2 * u[0]))

    problem = psn.ODEProblem(field, start, (0.0, 1.0), mass_matrix=mass)
    with pytest.raises(psn.SolverFailure, match=r"f is 3\.5 in component"):
        psn.solve(problem, psn.Rosenbrock23(), rtol=1e-4, atol=1e-4)


@COMPILED
@pytest.mark.parametrize("algorithm", [psn.TRBDF2(), psn.KenCarp4()], ids=["TRBDF2", "KenCarp4"])
def test_fixed_steps_across_a_jump_of_the_field_are_named(algorithm: Any, compile: bool) -> None:
    """`u` is held at 0.5 from both sides, and no implicit step ends there."""

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.where(u > 0.5, -50.0, 30.0) * torch.ones_like(u)

    options: Any = {"controller": psn.FixedStep(), "dt0": 0.02, "compile": compile}
    problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    with pytest.raises(psn.SolverFailure, match=r"(?s)implicit step were not solved.*f jumps"):
        psn.solve(problem, algorithm, **options)


def test_a_field_that_is_not_finite_is_not_said_to_jump() -> None:
    problem = psn.ODEProblem(lambda t, u: u / (u - 1), torch.ones(1, dtype=D), (0.0, 1.0))
    with pytest.raises(psn.SolverFailure, match="NaN or infinite"):
        psn.solve(problem, psn.TRBDF2(), controller=psn.FixedStep(), dt0=0.1)
