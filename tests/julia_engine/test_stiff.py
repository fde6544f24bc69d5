"""Problems that explicit methods cannot do, against published reference solutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.julia

STIFF = [
    *(psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2(), psn.FBDF(), psn.QNDF()),
    *(psn.AutoTsit5(psn.Rosenbrock23()), psn.AutoVern7(psn.Rodas5P())),
]


def robertson(t: Tensor, y: Tensor) -> Tensor:
    """Robertson (1966): rates that differ by nine orders."""
    a, b, c = y
    return torch.stack((-0.04 * a + 1e4 * b * c, 0.04 * a - 1e4 * b * c - 3e7 * b**2, 3e7 * b**2))


# Hairer and Wanner, Solving Ordinary Differential Equations II, IV.1.
ROBERTSON_START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
ROBERTSON_AT_40 = [0.7158270688, 0.9185534765e-5, 0.2841637457]


@pytest.mark.parametrize("algorithm", STIFF, ids=lambda a: a.expression)
def test_robertson(algorithm: psn.SciMLAlgorithm) -> None:
    second_order = "Rosenbrock23" in algorithm.expression or algorithm == psn.TRBDF2()
    tolerance = 1e-6 if second_order else 1e-8
    problem = psn.ODEProblem(robertson, ROBERTSON_START, (0.0, 40.0))
    with torch.no_grad():
        solution = psn.solve(
            problem, algorithm, rtol=tolerance, atol=tolerance * 1e-4, engine="julia"
        )
    expected = torch.tensor(ROBERTSON_AT_40, dtype=torch.float64)
    torch.testing.assert_close(solution.u1, expected, rtol=100 * tolerance, atol=0)
    assert solution.stats.naccept < 1000


def test_robertson_as_a_differential_algebraic_equation() -> None:
    """The third rate replaced by the conservation of mass, with a singular mass matrix."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        rates = robertson(t, y)
        return torch.cat((rates[:2], (y.sum() - 1).reshape(1)))

    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    problem = psn.ODEProblem(f, ROBERTSON_START, (0.0, 40.0), mass_matrix=mass)
    with torch.no_grad():
        solution = psn.solve(problem, psn.Rodas5P(), rtol=1e-8, atol=1e-12)
    expected = torch.tensor(ROBERTSON_AT_40, dtype=torch.float64)
    assert solution.engine == "julia"
    torch.testing.assert_close(solution.u1, expected, rtol=1e-6, atol=0)


def test_van_der_pol() -> None:
    """`mu = 1000` on its slow time scale: the test set for initial value problems, VDPOL."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], ((1 - y[0] ** 2) * y[1] - y[0]) * 1e6))

    u0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        solution = psn.solve(
            psn.ODEProblem(f, u0, (0.0, 2.0)), psn.Rodas5P(), rtol=1e-9, atol=1e-9, engine="julia"
        )
    expected = torch.tensor([0.1706167732170483e1, -0.8928097010247975], dtype=torch.float64)
    torch.testing.assert_close(solution.u1, expected, rtol=1e-5, atol=0)


def hires(t: Tensor, y: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h = y
    return torch.stack(
        (
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            280 * f * h - 1.81 * g,
            -280 * f * h + 1.81 * g,
        )
    )


def test_hires() -> None:
    """High irradiance responses of photomorphogenesis; the test set's reference solution."""
    u0 = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.0057], dtype=torch.float64)
    with torch.no_grad():
        solution = psn.solve(
            psn.ODEProblem(hires, u0, (0.0, 321.8122)), psn.Rodas5P(), rtol=1e-9, atol=1e-11
        )
    expected = torch.tensor(
        [
            *(0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4),
            *(0.1175651343283149e-2, 0.2386356198831331e-2, 0.6238968252742796e-2),
            *(0.2849998395185769e-2, 0.2850001604814231e-2),
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(solution.u1, expected, rtol=1e-6, atol=0)


class StiffNetwork(nn.Module):
    """A learned field behind a fast linear decay."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("rates", torch.tensor([-1.0, -2000.0]))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return u * self.rates + self.net(u)


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


def test_dense_output_of_implicit_methods_is_differentiable() -> None:
    u0 = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.9, 0.2], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u, p: -p * u, u0, (0.0, 1.0), p=p)
    solution = psn.solve(problem, psn.Rodas5P(), rtol=1e-9, atol=1e-11, engine="julia")
    exact = u0 * torch.exp(-p * t)[:, None]
    torch.testing.assert_close(solution(t), exact, rtol=1e-6, atol=1e-8)
    found = torch.autograd.grad(solution(t).square().sum(), (u0, p, t))
    expected = torch.autograd.grad(exact.square().sum(), (u0, p, t))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


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
