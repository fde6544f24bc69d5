"""Problems that explicit methods cannot do, against published reference solutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.stiff_problems import ROBERTSON_AT_40, ROBERTSON_START, StiffNetwork, robertson
from torch import Tensor

import pysciml_node as psn

pytestmark = pytest.mark.julia

STIFF = [
    *(psn.FBDF(), psn.QNDF()),
    *(psn.AutoTsit5(psn.Rosenbrock23()), psn.AutoVern7(psn.Rodas5P())),
]


@pytest.mark.parametrize("algorithm", STIFF, ids=lambda a: a.expression)
def test_robertson(algorithm: psn.SciMLAlgorithm) -> None:
    tolerance = 1e-6 if "Rosenbrock23" in algorithm.expression else 1e-8
    problem = psn.ODEProblem(robertson, ROBERTSON_START, (0.0, 40.0))
    with torch.no_grad():
        solution = psn.solve(
            problem, algorithm, rtol=tolerance, atol=tolerance * 1e-4, engine="julia"
        )
    torch.testing.assert_close(solution.u1, ROBERTSON_AT_40, rtol=100 * tolerance, atol=0)
    assert solution.stats.naccept < 1000


def test_local_estimates_by_an_explicit_pair() -> None:
    """From a state that SciML has solved, they are those of the same step of any other solve."""
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -rate * u, torch.ones(3).double(), (0.0, 1.0))

    def estimate(algorithm: Any, engine: str) -> tuple[Tensor, Tensor, Tensor]:
        solution = psn.solve(problem, algorithm, engine=engine, rtol=1e-9, atol=1e-9)
        found = solution.local_estimate(0.3, psn.Tsit5(), dt=0.1, stop_gradient=False)
        (slope,) = torch.autograd.grad(found.error, rate)
        return found.dt, found.error.detach(), slope

    found, expected = estimate(psn.FBDF(), "julia"), estimate(psn.Tsit5(), "torch")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found[1] > 0


def test_local_estimates_are_those_of_the_solves_weights() -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -rate * u, torch.ones(3).double(), (0.0, 1.0))
    solution = psn.solve(problem, psn.FBDF(), engine="julia")
    before = solution.local_estimate(0.3, psn.Tsit5(), dt=0.1).error
    with torch.no_grad():
        rate.mul_(2)
    after = solution.local_estimate(0.3, psn.Tsit5(), dt=0.1).error
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


def test_training_a_stiff_neural_ode() -> None:
    """The loss falls, at a cost that stability does not set."""
    torch.manual_seed(0)
    field = StiffNetwork().double()
    u0 = torch.tensor([[1.0, 1.0], [-0.5, 0.3]], dtype=torch.float64)
    target = torch.tensor([[0.5, 1e-4], [-0.1, 2e-4]], dtype=torch.float64)
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    losses: list[float] = []
    for _ in range(15):
        solution = psn.solve(
            psn.ODEProblem(field, u0, (0.0, 1.0)),
            psn.Rodas5P(),
            rtol=1e-6,
            atol=1e-8,
            engine="julia",
            adjoint=psn.QuadratureAdjoint(),
        )
        loss = (solution.u1 - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert solution.stats.naccept < 200  # explicit steps would be shorter than 2 / 2000


def gradient(adjoint: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    field = StiffNetwork().double()
    u0 = torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    solution = psn.solve(
        psn.ODEProblem(field, u0, (0.0, 0.5)),
        psn.Rodas5P() if adjoint is not None else psn.Tsit5(),
        rtol=1e-9,
        atol=1e-10,
        engine="julia",
        adjoint=adjoint,
        saveat=[0.2, 0.5],
    )
    return torch.autograd.grad(solution.u.square().sum(), (u0, *field.parameters()))


@pytest.mark.parametrize(
    "adjoint", [psn.GaussAdjoint(), psn.QuadratureAdjoint()], ids=lambda a: type(a).__name__
)
def test_gradients_through_implicit_steps(adjoint: Any) -> None:
    """Those of explicit steps, which here are many."""
    torch.testing.assert_close(gradient(adjoint), gradient(None), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("algorithm", "adjoint", "words"),
    [
        (psn.Rodas5P(), psn.DiscreteAdjoint(), "explicit"),
        (psn.Tsit5(), psn.DirectAdjoint(), "DirectAdjoint"),
        (psn.Rodas5P(), psn.ForwardDiffSensitivity(), "explicit steps"),
    ],
)
def test_what_cannot_be_done_is_refused(algorithm: Any, adjoint: Any, words: str) -> None:
    problem = psn.ODEProblem(robertson, ROBERTSON_START, (0.0, 1.0))
    with pytest.raises(psn.EngineUnavailable, match=words):
        psn.solve(problem, algorithm, adjoint=adjoint, engine="julia")


@pytest.mark.parametrize(
    "adjoint",
    [
        psn.GaussAdjoint(),
        psn.InterpolatingAdjoint(),
        psn.BacksolveAdjoint(),
        psn.QuadratureAdjoint(),
    ],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_fields_without_parameters_have_gradients(adjoint: Any) -> None:
    u0 = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -t * u, u0, (0.0, 1.0))
    solution = psn.solve(problem, adjoint=adjoint, engine="julia", rtol=1e-9, atol=1e-9)
    (found,) = torch.autograd.grad(solution.u1.square().sum(), u0)
    exact = 2 * u0.detach() * torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def test_an_unknown_name_is_named() -> None:
    problem = psn.ODEProblem(robertson, ROBERTSON_START, (0.0, 1.0))
    with pytest.raises(psn.JuliaError, match="Nonesuch"):
        psn.solve(problem, psn.SciMLAlgorithm("Nonesuch()", ("OrdinaryDiffEqTsit5",)))
