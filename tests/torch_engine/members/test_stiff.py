"""Stiff members in one batch: Rosenbrock steps with Jacobians and linear systems of all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.replay.members.stacked import StackedMembers
from pysciml_node.solutions.members import ListedMembers

D = torch.float64
RATES = torch.tensor([0.04, 3e7, 1e4], dtype=D)


def robertson(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Three species whose reactions differ by nine orders of magnitude."""
    a, b, c = u.unbind()
    slow, fast, back = p[0] * a, p[1] * b * b, p[2] * b * c
    return torch.stack((back - slow, slow - fast - back, fast))


def chasing(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Prothero and Robinson's: a fast decay toward a curve that moves."""
    return -p * (u - torch.cos(t)) - torch.sin(t)


def reactions(count: int, end: float = 100.0) -> psn.EnsembleProblem:
    shares = torch.rand(count, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    u0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)
    problem = psn.ODEProblem(robertson, u0, (0.0, end), p=RATES)
    return psn.EnsembleProblem(problem, p=(RATES * (0.5 + shares)).requires_grad_())


def followers() -> psn.EnsembleProblem:
    p = torch.tensor([[1.0], [1e3], [1e6]], dtype=D, requires_grad=True)
    u0 = torch.tensor([[0.0, 2.0]], dtype=D).repeat(3, 1).requires_grad_()
    ends = torch.tensor([[0.0, 2.0], [0.0, 1.0], [2.0, 2.5]], dtype=D)
    problem = psn.ODEProblem(chasing, u0[0].detach(), (0.0, 1.0), p=p[0].detach())
    return psn.EnsembleProblem(problem, u0, p, tspan=ends)


def compare(ensemble: psn.EnsembleProblem, algorithm: psn.Algorithm, **options: Any) -> None:
    """States, steps and gradients of a batch are those of single solves."""
    together = psn.solve(ensemble, algorithm, engine="torch", **options)
    assert isinstance(together.members, StackedMembers)
    alone = [psn.solve(m, algorithm, engine="torch", **options) for m in ensemble.members()]
    near: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(together.u1, torch.stack([s.u1 for s in alone]), **near)
    losses = [(together.u1**2).sum(), sum((s.u1**2).sum() for s in alone)]
    if "saveat" in options:
        torch.testing.assert_close(together.u, torch.stack([s.u for s in alone]), **near)
        losses = [losses[0] + together.u.sum(), losses[1] + sum(s.u.sum() for s in alone)]
    given = (ensemble.u0, ensemble.p, ensemble.tspan)
    inputs = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    found, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()))
    for member, single in zip(together, alone, strict=True):
        assert member.stats.naccept == single.stats.naccept
        assert member.stats.nreject == single.stats.nreject
        middle = (single.problem.t0 + single.problem.t1) / 2
        # Step sizes follow from error estimates, which are differences.
        torch.testing.assert_close(member(middle), single(middle), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
@pytest.mark.parametrize(
    ("algorithm", "tolerance"),
    [
        (psn.Rosenbrock23(), 1e-2),
        (psn.Rodas5P(), 1e-5),
        (psn.TRBDF2(), 1e-2),
        (psn.KenCarp4(), 1e-3),
    ],
)
def test_members_go_as_alone(
    algorithm: psn.Algorithm, tolerance: float, adjoint: psn.Adjoint
) -> None:
    tolerances = {"rtol": tolerance, "atol": 1e-3 * tolerance}
    compare(reactions(2, 10.0), algorithm, adjoint=adjoint, saveat=[0.0, 1.0, 7.0], **tolerances)
    # Adaptive sizes of these follow from estimates that are mostly rounding.
    fixed: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}
    compare(followers(), algorithm, adjoint=adjoint, **fixed)


@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.TRBDF2()])
@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_ends_that_receive_gradients(algorithm: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    ends = torch.tensor([[0.0, 2.0], [0.1, 1.0]], dtype=D, requires_grad=True)
    p = torch.tensor([[1.0], [30.0]], dtype=D, requires_grad=True)
    u0 = torch.tensor([0.0, 2.0], dtype=D)
    problem = psn.ODEProblem(chasing, u0, (0.0, 1.0), p=p[0].detach())
    ensemble = psn.EnsembleProblem(problem, p=p, tspan=ends)
    compare(ensemble, algorithm, adjoint=adjoint, rtol=1e-3, atol=1e-3, saveat=[0.5, 0.9])


def jacobian(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """That of `robertson`."""
    _, b, c = u.unbind()
    slow, fast, back = p.unbind()
    zero = torch.zeros_like(b)
    first = torch.stack((-slow, back * c, back * b))
    last = torch.stack((zero, 2 * fast * b, zero))
    return torch.stack((first, -first - last, last))


@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.KenCarp4()])
def test_jacobians_that_are_given(algorithm: psn.Algorithm) -> None:
    """A Rosenbrock method needs it exactly, Newton's iteration does not."""
    ensemble = reactions(2, 10.0)
    exact, near = (
        dataclasses.replace(
            ensemble,
            problem=dataclasses.replace(
                ensemble.problem, jac=lambda t, u, p, by=by: by * jacobian(t, u, p)
            ),
        )
        for by in (1.0, 1.1)
    )
    compare(exact, algorithm, rtol=1e-3, atol=1e-6)
    if isinstance(algorithm, psn.KenCarp4):
        compare(near, algorithm, rtol=1e-3, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="jac does not fit"):
            psn.solve(near, algorithm, engine="torch")


@pytest.mark.parametrize("third", [1.0, 0.0], ids=["mass", "algebraic"])
def test_mass_matrices(third: float) -> None:
    """Robertson's third equation as the conservation of mass, or all three times a matrix."""
    mass = torch.tensor([[1.0, 0.0, 0.0], [0.3, 2.0, 0.0], [0.0, 0.0, third]], dtype=D)

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        first, second, last = robertson(t, u, p).unbind()
        if not third:
            last = u.sum() - 1
        return torch.stack((first, 0.3 * first + 2 * second, last))

    ensemble = reactions(3, 10.0)
    problem = psn.ODEProblem(f, ensemble.problem.u0, (0.0, 10.0), p=RATES, mass_matrix=mass)
    weighted = dataclasses.replace(ensemble, problem=problem)
    compare(weighted, psn.Rodas5P(), rtol=1e-5, atol=1e-8, saveat=[1.0, 10.0])
    tight: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-11, "engine": "torch"}
    plain, found = (psn.solve(x, psn.Rodas5P(), **tight) for x in (ensemble, weighted))
    # Both are within ten tolerances of the solution.
    torch.testing.assert_close(found.u1, plain.u1, rtol=2e-7, atol=2e-10)


def test_iterations_that_do_not_converge() -> None:
    """A member's failing Newton iteration leaves no NaN in the gradients of the others."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p * torch.sqrt(u) - u**3

    p = torch.tensor([[1.0], [2.0]], dtype=D, requires_grad=True)
    u0 = torch.tensor([0.5], dtype=D)
    problem = psn.ODEProblem(f, u0, (0.0, 3.0), p=p[0].detach())
    options: dict[str, Any] = {"dt0": 3.0, "rtol": 1e-4, "atol": 1e-4}
    for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
        compare(psn.EnsembleProblem(problem, p=p), psn.TRBDF2(), adjoint=adjoint, **options)


def test_stops_of_some() -> None:
    solution = psn.solve(followers(), psn.Rodas5P(), engine="torch", tstops=[0.7])
    assert [int((member.step_times == 0.7).sum()) for member in solution] == [1, 1, 0]


def test_a_thousand_with_gradients() -> None:
    """Mass is conserved; the gradient is that of finite differences."""
    ensemble = reactions(1000, 40.0)
    options: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-10, "engine": "torch"}
    solution = psn.solve(ensemble, psn.Rodas5P(), **options)
    assert isinstance(solution.members, StackedMembers)
    ones = torch.ones(1000, dtype=D)
    torch.testing.assert_close(solution.u1.sum(1), ones, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(solution.u1[:, 0].sum(), ensemble.p)
    assert isinstance(ensemble.p, Tensor)
    p = ensemble.p.detach()[:4]
    with torch.no_grad():
        for i in range(3):
            by = 1e-4 * p[:, i]
            ends = []
            for sign in (1, -1):
                moved = p.clone()
                moved[:, i] += sign * by
                changed = psn.EnsembleProblem(ensemble.problem, p=moved)
                ends.append(psn.solve(changed, psn.Rodas5P(), **options).u1[:, 0])
            slope = (ends[0] - ends[1]) / (2 * by)
            torch.testing.assert_close(gradient[:4, i], slope, rtol=1e-3, atol=0)


def test_what_goes_one_by_one() -> None:
    ensemble = followers()
    sparse = dataclasses.replace(ensemble.problem, jac_sparsity=torch.eye(2))
    for problem, algorithm in (
        (ensemble.problem, psn.AutoTsit5()),
        (ensemble.problem, psn.KenCarp4(linsolve=psn.GMRES())),
        (sparse, psn.Rodas5P()),
    ):
        changed = dataclasses.replace(ensemble, problem=problem)
        solution = psn.solve(changed, algorithm, engine="torch", rtol=1e-3, atol=1e-3)
        assert isinstance(solution.members, ListedMembers)
