"""The initial state of a native solve: a copy, in the graph, whatever becomes of what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

D = torch.float64


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -0.5 * u


def spread(t: Tensor, u: Tensor) -> Tensor:
    return 0.1 * u


def solved(u0: Any, algorithm: Any = None, f: Any = decay, **options: Any) -> psn.Solution:
    return psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), algorithm, compile=True, **options)


def stochastic(u0: Any) -> psn.Solution:
    problem = psn.SDEProblem(decay, spread, u0, (0.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    return psn.solve(problem, compile=True, generator=generator)


@pytest.mark.parametrize(
    "solve",
    [
        solved,
        lambda u0: solved(u0, psn.Rosenbrock23()),
        lambda u0: solved(u0, psn.KenCarp4()),
        stochastic,
    ],
    ids=["explicit", "rosenbrock", "newton", "stochastic"],
)
def test_the_gradient_of_the_first_state_is_the_cotangent_itself(solve: Any) -> None:
    u0 = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=D).T.requires_grad_()
    solution = solve(u0)
    assert torch.equal(solution.u[0], u0)
    cotangent = torch.arange(6.0, dtype=D).reshape(3, 2)
    (first,) = torch.autograd.grad((solution.u[0] * cotangent).sum(), u0, retain_graph=True)
    assert torch.equal(first, cotangent)
    (last,) = torch.autograd.grad((solution.u1 * cotangent).sum(), u0, retain_graph=True)
    (both,) = torch.autograd.grad(((solution.u[0] + solution.u1) * cotangent).sum(), u0)
    torch.testing.assert_close(both, first + last, rtol=1e-14, atol=1e-14)


def test_a_state_that_is_changed_after_the_solve() -> None:
    w = torch.tensor(0.5, dtype=D, requires_grad=True)
    u0 = torch.ones(2, 3, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -w * u

    solution = solved(u0, f=field, rtol=1e-10, atol=1e-10)
    u0.fill_(7.0)
    assert torch.equal(solution.u[0].detach(), torch.ones(2, 3, dtype=D))
    solution.u1.sum().backward()
    expected = torch.exp(torch.tensor(-0.5, dtype=D))
    torch.testing.assert_close(w.grad, -6 * expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(
        solution(0.5).detach(), torch.exp(torch.tensor(-0.25, dtype=D)).expand(2, 3)
    )


def test_a_leaf_that_an_optimizer_has_moved() -> None:
    u0 = torch.ones(3, dtype=D, requires_grad=True)
    solution = solved(u0, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        u0.mul_(9.0)
    (solution.u[0].sum() + solution.u1.sum()).backward()
    expected = (1 + torch.exp(torch.tensor(-0.5, dtype=D))).expand(3)
    torch.testing.assert_close(u0.grad, expected, rtol=1e-8, atol=0)


def test_a_solve_that_fails_at_its_first_step() -> None:
    u0 = torch.ones(3, dtype=D, requires_grad=True)
    solution = solved(u0, f=lambda t, u: u / 0.0, throw=False)
    assert solution.retcode is psn.ReturnCode.Unstable
    assert torch.equal(solution.u.detach(), torch.ones(1, 3, dtype=D))
    (solution.u.sum() + 2 * solution.u1.sum()).backward()
    assert torch.equal(u0.grad, torch.full((3,), 3.0, dtype=D))


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_the_start_of_a_field_without_a_derivative_in_time(shape: tuple[int, ...]) -> None:
    """`u' = 2 u`, in an operation that hides the time: the first state does not move with `t0`."""
    t0 = torch.tensor(0.1, dtype=D, requires_grad=True)
    u0 = torch.ones(shape, dtype=D, requires_grad=True)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return (torch.floor(0.5 * t) + 2.0) * u

    problem = psn.ODEProblem(field, u0, (t0, 0.9))
    solution = psn.solve(problem, rtol=1e-10, atol=1e-10, compile=True)
    loss = 3 * solution.u[0].sum() + solution.u1.sum()
    by_start, by_state = torch.autograd.grad(loss, (t0, u0))
    growth = torch.exp(torch.tensor(1.6, dtype=D))
    torch.testing.assert_close(by_start, -2 * 4 * growth, rtol=1e-7, atol=0)
    torch.testing.assert_close(by_state, (3 + growth).expand(shape), rtol=1e-7, atol=0)
