"""Implicit steps without matrices: GMRES inside Newton's iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import pysciml_node as psn
from pysciml_node.replay import krylov
from pysciml_node.replay.krylov import gmres

ALGORITHMS = (psn.KenCarp4(linsolve=psn.GMRES()), psn.TRBDF2(linsolve=psn.GMRES()))


def name(algorithm: Any) -> str:
    return type(algorithm).__name__


def brusselator(t: Tensor, u: Tensor, alpha: Tensor) -> Tensor:
    """With diffusion on a periodic square; states `(2, n, n)`. Hairer and Wanner, II, IV.10."""
    spread = -4 * u
    for axis in (-1, -2):
        spread = spread + u.roll(1, axis) + u.roll(-1, axis)
    x, y = u
    rates = torch.stack((1 + x**2 * y - 4.4 * x, 3.4 * x - x**2 * y))
    return rates + alpha * u.shape[-1] ** 2 * spread


def waves(n: int) -> Tensor:
    grid = torch.arange(n, dtype=torch.float64) * (2 * torch.pi / n)
    x = 1 + 0.5 * grid.cos()[:, None] + 0 * grid
    return torch.stack((x, 3 + 0.5 * grid.sin() + 0 * grid[:, None]))


def solve(algorithm: Any, n: int, tolerance: float, **options: Any) -> tuple[Tensor, ...]:
    u0 = waves(n).requires_grad_()
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(brusselator, u0, (0.0, 0.2), p=alpha)
    options = {"rtol": tolerance, "atol": tolerance, "engine": "torch", **options}
    solution = psn.solve(problem, algorithm, **options)
    weights = torch.linspace(0, 1, 2 * n * n, dtype=torch.float64).view_as(u0)
    return solution.u1, *torch.autograd.grad((solution.u1 * weights).sum(), (u0, alpha))


def test_gmres_is_exact_in_as_many_steps_as_rows() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 12, dtype=torch.float64)
    right = torch.randn(12, dtype=torch.float64)
    for restart in (12, 5):
        shifted = matrix + (0 if restart == 12 else 8) * torch.eye(12, dtype=torch.float64)
        found = gmres(lambda x, a=shifted: a @ x, right, 1e-12, restart, 100)
        assert found is not None
        torch.testing.assert_close(found, torch.linalg.solve(shifted, right), rtol=1e-8, atol=1e-9)
    assert gmres(lambda x: matrix @ x, right, 1e-12, 2, 6) is None
    assert gmres(lambda x: x * 0, right, 1e-12, 5, 20) is None
    assert torch.equal(gmres(lambda x: x, 0 * right, 1e-12, 5, 20), 0 * right)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name)
def test_the_same_steps_and_gradients_as_by_dense_factors(algorithm: Any) -> None:
    found = solve(algorithm, 4, 1e-4)
    expected = solve(type(algorithm)(), 4, 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("algorithm", "adjoint"),
    [
        (ALGORITHMS[0], psn.DiscreteAdjoint()),
        (ALGORITHMS[1], psn.DiscreteAdjoint()),
        (ALGORITHMS[1], psn.DirectAdjoint()),
    ],
    ids=name,
)
def test_gradients_by_finite_differences(algorithm: Any, adjoint: Any) -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -p[0] * (u - torch.sin(p[1] * t + u.flip(0)))

    u0 = torch.tensor([0.4, 1.0, -0.7], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([9.0, 1.3], dtype=torch.float64, requires_grad=True)
    t0, t1 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.1, 0.9))

    def states(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor) -> Any:
        problem = psn.ODEProblem(f, u0, (t0, t1), p=p)
        control = {"controller": psn.FixedStep(), "dt0": 0.3, "adjoint": adjoint}
        solution = psn.solve(problem, algorithm, saveat=[0.8], **control)
        return solution.u, solution.u1

    assert gradcheck(states, (u0, p, t0, t1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name)
def test_second_derivatives_by_finite_differences(algorithm: Any) -> None:
    """Of a loss that is linear in the state too, whose cotangents are constants."""

    def first(k: Tensor, power: int) -> Tensor:
        u0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
        problem = psn.ODEProblem(lambda t, u: -k * u * (1 + u * u.flip(0)), u0, (0.0, 1.0))
        control = {"controller": psn.FixedStep(), "dt0": 0.25, "adjoint": psn.DirectAdjoint()}
        loss = psn.solve(problem, algorithm, **control).u1.pow(power).sum()
        return torch.autograd.grad(loss, k, create_graph=True)[0]

    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for power in (1, 2):
        (second,) = torch.autograd.grad(first(k, power), k, create_graph=True)
        difference = (first(k + 1e-4, power) - first(k - 1e-4, power)) / 2e-4
        torch.testing.assert_close(second, difference, rtol=1e-6, atol=1e-7)
        with pytest.raises(RuntimeError, match="a third derivative of steps that GMRES solves"):
            torch.autograd.grad(second, k)


def test_brusselator_of_two_thousand_entries() -> None:
    """GMRES is chosen by the size. Rosenbrock methods have no such way, and say so."""
    found = solve(psn.KenCarp4(), 32, 1e-5)
    # Well inside the explicit method's stability: at its edge the gradient of its steps explodes.
    expected = solve(psn.Tsit5(), 32, 1e-6, dtmax=2e-3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    large = psn.ODEProblem(brusselator, waves(40), (0.0, 0.1), p=torch.tensor(0.1).double())
    with pytest.raises(psn.EngineUnavailable, match="KenCarp4"):
        psn.solve(large, psn.Rodas5P(), engine="torch")
    with pytest.raises(psn.EngineUnavailable, match="adjoint=DiscreteAdjoint"):
        psn.solve(large, psn.KenCarp4(), adjoint=psn.GaussAdjoint(), engine="torch")


def by_frequencies(alpha: float, calls: list[float]) -> Callable[..., Any]:
    """Nearly solves the diffusion alone, by Fourier's transform."""

    def precondition(t: Tensor, u: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
        calls.append(scale)
        n = u.shape[-1]
        waves = 2 * torch.cos(torch.arange(n, dtype=u.dtype) * (2 * torch.pi / n)) - 2
        symbol = 1 - scale * alpha * n**2 * (waves[:, None] + waves)
        return lambda r: torch.fft.ifft2(torch.fft.fft2(r) / symbol).real

    return precondition


def test_a_preconditioner_saves_products(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"plain": 0, "nearly": 0}
    pulled, now = krylov._pulled, "plain"

    def counted(*arguments: Tensor) -> Tensor:
        counts[now] += 1
        return pulled(*arguments)

    monkeypatch.setattr(krylov, "_pulled", counted)
    problem = psn.ODEProblem(brusselator, waves(16), (0.0, 0.2), p=torch.tensor(1.0).double())
    ends = {}
    for now, how in (("plain", None), ("nearly", by_frequencies(1.0, []))):
        algorithm = psn.KenCarp4(linsolve=psn.GMRES(precondition=how))
        with torch.no_grad():
            ends[now] = psn.solve(problem, algorithm, rtol=1e-5, atol=1e-5).u1
    assert counts["nearly"] < 0.5 * counts["plain"]
    torch.testing.assert_close(ends["plain"], ends["nearly"], rtol=1e-6, atol=1e-8)
    gradients = [
        solve(psn.KenCarp4(linsolve=psn.GMRES(precondition=how)), 4, 1e-4)
        for how in (None, by_frequencies(0.1, []))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


def test_switching_with_a_partner_without_matrices() -> None:
    problem = psn.ODEProblem(
        lambda t, u: -1e3 * (u - torch.cos(t)), torch.full((3,), 2.0).double(), (0.0, 1.0)
    )
    with torch.no_grad():
        solution = psn.solve(
            problem, psn.AutoTsit5(psn.KenCarp4(linsolve=psn.GMRES())), rtol=1e-5, atol=1e-5
        )
    assert set(solution.trajectory.record.methods) == {0, 1}
    exact = torch.full((3,), 1.0).double().cos()
    torch.testing.assert_close(solution.u1, exact, rtol=0, atol=2e-3)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="linsolve"):
        psn.KenCarp4(linsolve="gmres")
    with pytest.raises(ValueError, match="restart"):
        psn.GMRES(restart=0)
    with pytest.raises(TypeError, match="precondition"):
        psn.GMRES(precondition=lambda t: t)
    u0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    lost = psn.GMRES(precondition=lambda t, u, scale: lambda r: r.detach())
    problem = psn.ODEProblem(lambda t, u: -u * u, u0, (0.0, 0.1))
    solution = psn.solve(problem, psn.TRBDF2(linsolve=lost), rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="torch operations"):
        solution.u1.sum().backward()
