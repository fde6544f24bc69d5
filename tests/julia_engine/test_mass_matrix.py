"""Gradients of `M u' = f(t, u, p)`, for matrices that are singular and matrices that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

pytestmark = pytest.mark.julia

D = torch.float64
ADJOINTS = [
    psn.GaussAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.BacksolveAdjoint(),
    psn.QuadratureAdjoint(),
]
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


def tensor(*values: Any, **options: Any) -> Tensor:
    return torch.tensor(*values, dtype=D, **options)


M = tensor([[2.0, 1.0], [0.5, 1.0]])
A = tensor([[-3.0, 1.0], [0.5, -40.0]])


def regular(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return (A @ u) * p + torch.sin(u * t)


def solve(
    f: Callable[..., Tensor],
    mass: Tensor | None,
    u0: Tensor,
    p: Tensor,
    tspan: Any,
    adjoint: Any,
    **options: Any,
) -> psn.Solution:
    problem = psn.ODEProblem(f, u0, tspan, p, mass_matrix=mass)
    return psn.solve(
        problem,
        psn.Rodas5P(),
        rtol=1e-9,
        atol=1e-9,
        engine="julia",
        adjoint=adjoint,
        **options,
    )


def inputs(u0: list[float], p: list[float]) -> tuple[Tensor, ...]:
    """State, parameters and both ends, all of which receive gradients."""
    values = (tensor(u0), tensor(p), tensor(0.0), tensor(1.0))
    return tuple(x.requires_grad_() for x in values)


@each_adjoint
def test_a_regular_matrix_is_the_equation_that_is_solved_for_the_derivative(adjoint: Any) -> None:
    """Without the matrix, `u' = M^-1 f`; the gradient of u0 is (0.3178, 0.1696)."""
    found = []
    for mass in (M, None):
        u0, p, t0, t1 = inputs([1.0, 0.5], [1.0, 0.7])

        def f(t: Tensor, u: Tensor, p: Tensor, mass: Tensor | None = mass) -> Tensor:
            rate = regular(t, u, p)
            return rate if mass is not None else torch.linalg.solve(M, rate)

        solution = solve(f, mass, u0, p, (t0, t1), adjoint, saveat=[0.3, 0.8])
        at_end = torch.autograd.grad(
            (solution.u1 * tensor([1.0, 3.0])).sum(), (u0, p, t0, t1), retain_graph=True
        )
        inside = torch.autograd.grad(solution.u.square().sum(), (u0, p, t0, t1), allow_unused=True)
        found.append([*at_end, *(x if x is not None else tensor(0.0) for x in inside)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0][0], tensor([0.3178, 0.1696]), rtol=0, atol=1e-4)


SINGULAR = tensor([[1.0, 0.0], [0.0, 0.0]])


def constrained(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """`x' = -p0 x + y`, `0 = y - p1 x^2 - t`: so `x' = -p0 x + p1 x^2 + t`."""
    x, y = u
    return torch.stack((-p[0] * x + y, y - p[1] * x**2 - t))


def reduced(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p[0] * u + p[1] * u**2 + t


@each_adjoint
@pytest.mark.parametrize("turned", [False, True], ids=["semi-explicit", "turned"])
def test_a_singular_matrix_is_the_equation_of_the_differential_part(
    adjoint: Any, turned: bool
) -> None:
    """Losses of differential and algebraic entries, at the end and before, against the reduced ODE.

    Turned: rows and unknowns mixed, so that no entry of the matrix is zero.
    """
    left = tensor([[1.0, 0.5], [2.0, -1.0]]) if turned else torch.eye(2, dtype=D)
    right = tensor([[1.0, -0.7], [0.4, 1.0]]) if turned else torch.eye(2, dtype=D)
    weights = tensor([[1.0, 2.0], [-0.5, 3.0], [0.7, -1.0]])

    x0, p, t0, t1 = inputs([0.8], [1.3, 0.4])
    start = torch.stack((x0[0], p.detach()[1] * x0.detach()[0] ** 2 + t0.detach()))
    u0 = torch.linalg.solve(right, start)  # v = right u: the unknowns of the equation below

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return left @ constrained(t, right @ u, p)

    solution = solve(f, left @ SINGULAR @ right, u0, p, (t0, t1), adjoint, saveat=[0.4, 0.7])
    states = torch.cat((solution.u, solution.u1[None])) @ right.T
    found = torch.autograd.grad((states * weights).sum(), (x0, p, t1))

    y0, q, s0, s1 = inputs([0.8], [1.3, 0.4])
    plain = solve(reduced, None, y0, q, (s0, s1), psn.GaussAdjoint(), saveat=[0.4, 0.7])
    x = torch.cat((plain.u, plain.u1[None]))
    times = torch.stack((tensor(0.4), tensor(0.7), s1))[:, None]
    expected_states = torch.cat((x, q[1] * x**2 + times), 1)
    expected = torch.autograd.grad((expected_states * weights).sum(), (y0, q, s1))
    torch.testing.assert_close(states, expected_states, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_algebraic_equations_that_determine_nothing_are_refused() -> None:
    """Index 2: `x' = y`, `0 = x - sin t`."""
    p = tensor([1.0]).requires_grad_()
    problem = psn.ODEProblem(
        lambda t, u, p: torch.stack((p[0] * u[1], u[0] - torch.sin(t))),
        tensor([0.0, 1.0]),
        (0.0, 0.1),
        p,
        mass_matrix=SINGULAR,
    )

    def gradient() -> None:
        solution = psn.solve(problem, psn.Rodas5P(), engine="julia", adjoint=psn.GaussAdjoint())
        solution.u1.sum().backward()

    with pytest.raises((psn.JuliaError, psn.SolverFailure)):
        gradient()
