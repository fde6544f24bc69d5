"""Algorithms that change their method where a problem turns stiff."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import pysciml_node as psn

SWITCHING = (
    psn.AutoTsit5(),
    psn.AutoVern7(),
    psn.AutoTsit5(psn.Rosenbrock23()),
    psn.AutoVern7(psn.KenCarp4()),
)


def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Fast decay onto a curve that turns slowly, beside something that is not stiff."""
    slow = torch.stack((torch.cos(p[1] * t), torch.sin(t)))
    return -p[0] * torch.stack((u[0] - slow[0], (u[1] - u[0] * slow[1]) * 1e-3))


def methods(solution: psn.Solution) -> list[int]:
    """Which method took each step: 0 for the explicit one, 1 for the stiff one."""
    return solution.trajectory.record.methods


def solve(algorithm: Any, tolerance: float = 1e-5, **options: Any) -> psn.Solution:
    u0 = torch.tensor([2.0, 0.5], dtype=torch.float64)
    p = torch.tensor([1000.0, 1.3], dtype=torch.float64)
    problem = psn.ODEProblem(decay, options.pop("u0", u0), (0.0, 1.0), p=options.pop("p", p))
    return psn.solve(problem, algorithm, rtol=tolerance, atol=tolerance, engine="torch", **options)


def changes(solution: psn.Solution) -> int:
    taken = methods(solution)
    return sum(a != b for a, b in pairwise(taken))


def test_van_der_pol_needs_both_methods_in_turn() -> None:
    """Slow, fast, slow: the stiff method from the start, the explicit one for the jump near 807."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0]))

    u0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    problem = psn.ODEProblem(f, u0, (0.0, 900.0))
    with torch.no_grad():
        solution = psn.solve(problem, psn.AutoTsit5(), rtol=1e-5, atol=1e-7, engine="torch")
        alone = psn.solve(problem, psn.Rodas5P(), rtol=1e-8, atol=1e-10, engine="torch")
    taken = methods(solution)
    assert taken[0] == 0
    assert changes(solution) >= 3
    ends = solution.t[1:]
    stiff = torch.tensor(taken, dtype=torch.bool)
    during = (ends > 806.5) & (ends < 807.5)
    assert stiff[(ends > 10) & (ends < 800)].all()
    assert not stiff[during].all()
    torch.testing.assert_close(solution.u1, alone.u1, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", SWITCHING, ids=lambda a: a.expression)
def test_dense_output_across_the_switch(algorithm: Any) -> None:
    tolerance = 1e-5
    times = torch.linspace(0, 1, 401, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(algorithm, tolerance)
        saved = solve(algorithm, tolerance, saveat=times)
        exact = solve(psn.Rodas5P(), 1e-11, saveat=times)
    assert set(methods(solution)) == {0, 1}
    torch.testing.assert_close(saved.u, solution(times), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(saved.u, exact.u, rtol=0, atol=200 * tolerance)


@pytest.mark.parametrize("algorithm", SWITCHING, ids=lambda a: a.expression)
def test_gradients_are_those_of_what_was_computed(algorithm: Any) -> None:
    """With fixed steps at the edge of stability: all of them stiff, and eleven still explicit."""
    radius = algorithm.explicit.tableau.stability_radius
    u0 = torch.tensor([1.1, 0.5], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([radius * 0.93 * 16, 1.3], dtype=torch.float64, requires_grad=True)
    ends = tuple(torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.0, 0.99))
    saveat = torch.tensor([0.3, 0.71, 0.9], dtype=torch.float64, requires_grad=True)

    def states(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        problem = psn.ODEProblem(decay, u0, (t0, t1), p=p)
        control = {"controller": psn.FixedStep(), "dt0": 1 / 16, "engine": "torch"}
        solution = psn.solve(problem, algorithm, saveat=saveat, **control)
        assert methods(solution) == [0] * 11 + [1] * 5
        return solution.u, solution.u1

    assert gradcheck(states, (u0, p, *ends, saveat), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("algorithm", SWITCHING[:2], ids=lambda a: a.expression)
def test_discrete_and_direct_gradients_of_adaptive_steps(algorithm: Any) -> None:
    gradients = []
    for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
        u0 = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
        p = torch.tensor([1000.0, 1.3], dtype=torch.float64, requires_grad=True)
        solution = solve(algorithm, u0=u0, p=p, adjoint=adjoint, saveat=[0.003, 0.4, 1.0])
        assert set(methods(solution)) == {0, 1}
        gradients.append(torch.autograd.grad(solution.u.square().sum(), (u0, p)))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_an_event_in_a_stiff_step() -> None:
    problem = psn.ODEProblem(
        lambda t, u: -500.0 * (u - torch.cos(t)), torch.full((1,), 2.0).double(), (0.0, 3.0)
    )
    event = psn.Event(lambda t, u: u[0])
    with torch.no_grad():
        solution = psn.solve(problem, psn.AutoTsit5(), rtol=1e-5, atol=1e-5, events=event)
        a, b = 500.0**2 / (1 + 500.0**2), 500.0 / (1 + 500.0**2)
        assert methods(solution)[-1] == 1
        angle = torch.pi - torch.atan(torch.tensor(a / b, dtype=torch.float64))
        assert float(solution.event_t) == pytest.approx(float(angle), abs=1e-4)


def test_pickled_solutions_keep_their_methods() -> None:
    with torch.no_grad():
        solution = solve(psn.AutoTsit5())
        again = pickle.loads(pickle.dumps(solution))
        times = torch.linspace(0, 1, 33, dtype=torch.float64)
        torch.testing.assert_close(again(times), solution(times), rtol=0, atol=0)


def test_explicit_steps_alone_where_nothing_is_stiff() -> None:
    turn = torch.tensor([1.0, -1.0])
    problem = psn.ODEProblem(lambda t, u: u.flip(-1) * turn, torch.ones(2), (0.0, 5.0))
    with torch.no_grad():
        switching = psn.solve(problem, psn.AutoTsit5())
        plain = psn.solve(problem, psn.Tsit5())
    assert set(methods(switching)) == {0}
    torch.testing.assert_close(switching.u, plain.u, rtol=0, atol=0)
    assert switching.stats.nfe == plain.stats.nfe


def test_stiffness_estimates_and_refusals() -> None:
    with torch.no_grad():
        solution = solve(psn.AutoTsit5())
    estimates = solution.step_stiffness
    explicit = ~torch.tensor(methods(solution), dtype=torch.bool)
    assert torch.isfinite(estimates[explicit]).all()
    assert torch.isnan(estimates[~explicit]).all()
    mass = torch.eye(2, dtype=torch.float64)
    p = torch.tensor([10.0, 1.0], dtype=torch.float64)
    heavy = psn.ODEProblem(decay, solution.u1, (0.0, 1.0), p=p, mass_matrix=mass)
    for engine in ("torch", "julia"):
        with pytest.raises(psn.EngineUnavailable, match="no mass matrix"):
            psn.solve(heavy, psn.AutoTsit5(), engine=engine)
    with pytest.raises(psn.EngineUnavailable, match="FBDF"):
        solve(psn.AutoTsit5(psn.FBDF()))
    with pytest.raises(ValueError, match="stiffness estimate"):
        psn.GlobalStiffness()(solve(psn.AutoTsit5()))


@pytest.mark.parametrize("algorithm", SWITCHING, ids=repr)
def test_fixed_steps_keep_the_graph_of_the_stages_that_stiffness_is_measured_by(
    algorithm: Any,
) -> None:
    """`u1 = exp(-rate)`. The last stage, which the next step begins with, is one of them."""
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    u0 = torch.ones(1, dtype=torch.float64)
    problem = psn.ODEProblem(lambda t, u: -rate * u, u0, (0.0, 1.0))
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint()):
        u1 = psn.solve(problem, algorithm, dt0=0.1, controller=psn.FixedStep(), adjoint=adjoint).u1
        (slope,) = torch.autograd.grad(u1.sum(), rate)
        torch.testing.assert_close(slope, -torch.exp(-rate).detach(), rtol=1e-7, atol=0)
