"""Stiff problems on every engine, against published reference solutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.stiff_problems import (
    HIRES_AT_321,
    HIRES_START,
    OREGO_AT_360,
    OREGO_START,
    POLLU_AT_60,
    POLLU_START,
    ROBERTSON_AT_40,
    ROBERTSON_START,
    StiffNetwork,
    hires,
    orego,
    pollu,
    robertson,
)
from torch import Tensor

import pysciml_node as psn

IMPLICIT = (psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2())


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=lambda a: type(a).__name__)
def test_robertson(algorithm: Any, engine: str) -> None:
    tolerance = 1e-6 if algorithm.order == 2 else 1e-8
    problem = psn.ODEProblem(robertson, ROBERTSON_START, (0.0, 40.0))
    with torch.no_grad():
        solution = psn.solve(
            problem, algorithm, rtol=tolerance, atol=tolerance * 1e-4, engine=engine
        )
    torch.testing.assert_close(solution.u1, ROBERTSON_AT_40, rtol=100 * tolerance, atol=0)
    assert solution.stats.naccept < 1000


def test_robertson_as_a_differential_algebraic_equation(engine: str) -> None:
    """The third rate replaced by the conservation of mass, with a singular mass matrix."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        rates = robertson(t, y)
        return torch.cat((rates[:2], (y.sum() - 1).reshape(1)))

    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    problem = psn.ODEProblem(f, ROBERTSON_START, (0.0, 40.0), mass_matrix=mass)
    with torch.no_grad():
        solution = psn.solve(problem, psn.Rodas5P(), rtol=1e-8, atol=1e-12, engine=engine)
    torch.testing.assert_close(solution.u1, ROBERTSON_AT_40, rtol=1e-6, atol=0)


def test_van_der_pol(engine: str) -> None:
    """`mu = 1000` on its slow time scale: the test set for initial value problems, VDPOL."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], ((1 - y[0] ** 2) * y[1] - y[0]) * 1e6))

    u0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        solution = psn.solve(
            psn.ODEProblem(f, u0, (0.0, 2.0)), psn.Rodas5P(), rtol=1e-9, atol=1e-9, engine=engine
        )
    expected = torch.tensor([0.1706167732170483e1, -0.8928097010247975], dtype=torch.float64)
    torch.testing.assert_close(solution.u1, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "algorithm", [psn.AutoTsit5(), psn.AutoVern7()], ids=lambda a: a.expression
)
def test_van_der_pol_by_switching(algorithm: Any, engine: str) -> None:
    """On its fast time scale, where the explicit method takes the jumps."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0]))

    u0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    problem = psn.ODEProblem(f, u0, (0.0, 2000.0))
    with torch.no_grad():
        solution = psn.solve(problem, algorithm, rtol=1e-6, atol=1e-8, engine=engine)
    expected = torch.tensor([0.1706167732170483e1, -0.8928097010247975e-3], dtype=torch.float64)
    torch.testing.assert_close(solution.u1, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("f", "start", "end", "expected", "rtol", "atol"),
    [
        pytest.param(hires, HIRES_START, 321.8122, HIRES_AT_321, 1e-9, 1e-11, id="hires"),
        pytest.param(orego, OREGO_START, 360.0, OREGO_AT_360, 1e-6, 1e-6, id="orego"),
        pytest.param(pollu, POLLU_START, 60.0, POLLU_AT_60, 1e-8, 1e-13, id="pollu"),
    ],
)
def test_the_test_set(
    f: Any, start: Tensor, end: float, expected: Tensor, rtol: float, atol: float, engine: str
) -> None:
    problem = psn.ODEProblem(f, start, (0.0, end))
    with torch.no_grad():
        solution = psn.solve(problem, psn.Rodas5P(), rtol=rtol, atol=atol, engine=engine)
    torch.testing.assert_close(solution.u1, expected, rtol=1000 * rtol, atol=0)


def test_training_a_stiff_neural_ode(engine: str) -> None:
    """The loss falls, at a cost that stability does not set."""
    torch.manual_seed(0)
    field = StiffNetwork().double()
    u0 = torch.tensor([[1.0, 1.0], [-0.5, 0.3]], dtype=torch.float64)
    target = torch.tensor([[0.5, 1e-4], [-0.1, 2e-4]], dtype=torch.float64)
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    losses: list[float] = []
    for _ in range(15):
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        solution = psn.solve(problem, psn.Rodas5P(), rtol=1e-6, atol=1e-8, engine=engine)
        loss = (solution.u1 - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert solution.stats.naccept < 200  # explicit steps would be shorter than 2 / 2000


def gradient(algorithm: Any, engine: str, adjoint: Any = None) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    field = StiffNetwork().double()
    u0 = torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    solution = psn.solve(
        psn.ODEProblem(field, u0, (0.0, 0.5)),
        algorithm,
        rtol=1e-9,
        atol=1e-10,
        engine=engine,
        saveat=[0.2, 0.5],
        adjoint=adjoint,
    )
    return torch.autograd.grad(solution.u.square().sum(), (u0, *field.parameters()))


@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.KenCarp4()], ids=lambda a: a.expression)
def test_discrete_gradients_through_implicit_steps(algorithm: Any) -> None:
    """Those of explicit steps, which here are many."""
    torch.testing.assert_close(
        gradient(algorithm, "torch"), gradient(psn.Tsit5(), "torch"), rtol=1e-5, atol=1e-7
    )


def test_gradients_through_rosenbrock_steps(engine: str) -> None:
    """By each engine's own default adjoint."""
    torch.testing.assert_close(
        gradient(psn.Rodas5P(), engine), gradient(psn.Tsit5(), "torch"), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "adjoint", [psn.GaussAdjoint(), psn.InterpolatingAdjoint()], ids=lambda a: type(a).__name__
)
def test_the_adjoint_equation_by_stiff_steps(adjoint: Any, engine: str) -> None:
    torch.testing.assert_close(
        gradient(psn.Rodas5P(), engine, adjoint),
        gradient(psn.Tsit5(), "torch"),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("adjoint", [None, psn.GaussAdjoint()], ids=["default", "GaussAdjoint"])
def test_a_mass_matrix_enters_the_gradient(adjoint: Any, engine: str) -> None:
    """Of `u0`, the end and the parameters, against the same equation divided by the matrix."""
    mass = torch.tensor([[2.0, 1.0], [0.5, 1.0]], dtype=torch.float64)
    matrix = torch.tensor([[-3.0, 1.0], [0.5, -40.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def gradients(algorithm: Any, mass_matrix: Tensor | None) -> tuple[Tensor, ...]:
        u0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
        k = torch.tensor([1.0, 0.7], dtype=torch.float64, requires_grad=True)
        t1 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

        def f(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
            rate = (matrix @ y) * k + torch.sin(y * t)
            return rate if mass_matrix is not None else torch.linalg.solve(mass, rate)

        problem = psn.ODEProblem(f, u0, (0.0, t1), p=k, mass_matrix=mass_matrix)
        chosen = engine if mass_matrix is not None else "torch"
        common = {"rtol": 1e-9, "atol": 1e-9, "adjoint": adjoint}
        solution = psn.solve(problem, algorithm, **common, engine=chosen)
        return torch.autograd.grad((solution.u1 * weights).sum(), (u0, k, t1))

    found, expected = gradients(psn.Rodas5P(), mass), gradients(psn.Tsit5(), None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        found[0], torch.tensor([0.3178, 0.1696], dtype=torch.float64), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["explicit", "none", "regular", "singular"])
def test_times_saved_at_the_ends_move_along_the_solution(kind: str, engine: str) -> None:
    """`x' = -a x` and `y = x**2`, as a rate or as an algebraic equation that knows the time."""
    a = 0.7
    matrices = {"regular": [[2.0, 0.0], [1.0, 1.0]], "singular": [[1.0, 0.0], [0.0, 0.0]]}
    mass = torch.tensor(matrices[kind], dtype=torch.float64) if kind in matrices else None
    algorithm = psn.Tsit5() if kind == "explicit" else psn.Rodas5P()

    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y = u
        if kind == "singular":
            return torch.stack((-a * x, 1e3 * (y - torch.exp(-a * t) * x)))
        rate = torch.stack((-a * x, -2 * a * x**2))
        return rate if mass is None else mass @ rate

    u0 = torch.ones(2, dtype=torch.float64)
    saveat = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(f, u0, (0.0, 1.0), mass_matrix=mass)
    solution = psn.solve(problem, algorithm, rtol=1e-9, atol=1e-9, saveat=saveat, engine=engine)
    expected = -2 * a * torch.exp(-2 * a * saveat.detach())
    (found,) = torch.autograd.grad(solution.u[:, 1].sum(), saveat, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found,) = torch.autograd.grad(solution(saveat)[:, 1].sum(), saveat)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_dense_output_of_implicit_methods_is_differentiable(engine: str) -> None:
    u0 = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.9, 0.2], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u, p: -p * u, u0, (0.0, 1.0), p=p)
    solution = psn.solve(problem, psn.Rodas5P(), rtol=1e-9, atol=1e-11, engine=engine)
    exact = u0 * torch.exp(-p * t)[:, None]
    torch.testing.assert_close(solution(t), exact, rtol=1e-6, atol=1e-8)
    found = torch.autograd.grad(solution(t).square().sum(), (u0, p, t))
    expected = torch.autograd.grad(exact.square().sum(), (u0, p, t))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
