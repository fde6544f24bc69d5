"""The adjoint equation of stiff problems, by the method of the forward solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

CONTINUOUS = (psn.GaussAdjoint(), psn.InterpolatingAdjoint())
# Step control keeps `h^(q + 1)` at the tolerance, with `q` the order of the embedded solution. What
# stiffness leaves of a method's order (`test_order_that_stiffness_leaves`) is the power of `h` with
# which its errors fall. So a bound is the tolerance to the power of the one over the other; the
# constant is one, and two for the methods of order two, whose bounds were seen to need it.
ALGORITHMS = (
    pytest.param(psn.Rodas5P(), 4e-9, 4e-9 ** (3 / 5), id="Rodas5P"),
    pytest.param(psn.AutoTsit5(), 4e-9, 4e-9 ** (3 / 5), id="AutoTsit5"),
    pytest.param(psn.KenCarp4(), 1e-6, 1e-6 ** (2 / 4), id="KenCarp4"),
    pytest.param(psn.Rosenbrock23(), 1e-5, 2 * 1e-5 ** (2 / 3), id="Rosenbrock23"),
    pytest.param(psn.TRBDF2(), 1e-5, 2 * 1e-5 ** (2 / 3), id="TRBDF2"),
)
P = torch.tensor([1.2, 150.0, 0.8], dtype=torch.float64)
MASS = torch.tensor([[2.0, 0.4], [-0.3, 1.5]], dtype=torch.float64)


def name(x: Any) -> str:
    return getattr(x, "expression", type(x).__name__)


def field(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Nonlinear, coupled, driven in time, and fast in its second entry."""
    return torch.stack(
        (torch.sin(p[0] * t) * u[1] - u[0] ** 2, -p[1] * (u[1] - torch.cos(p[2] * t) * u[0]))
    )


def gradients(
    algorithm: Any, adjoint: Any, tolerance: float, mass: Tensor | None = None, factor: float = 1.0
) -> list[Tensor]:
    u0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    p = P.clone().requires_grad_()
    ends = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.1, 0.6)]
    saveat = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(field, u0, tuple(ends), p=p, mass_matrix=mass)
    solution = psn.solve(
        problem,
        algorithm,
        rtol=tolerance,
        atol=tolerance,
        saveat=saveat,
        adjoint=adjoint,
        engine="torch",
    )
    loss = factor * (solution.u.square().sum() + 2 * solution.u1[0] - solution.u1[1])
    return [x / factor for x in torch.autograd.grad(loss, (u0, p, *ends, saveat))]


@pytest.fixture(scope="module")
def exact() -> list[Tensor]:
    return gradients(psn.Rodas5P(), psn.DiscreteAdjoint(), 1e-9)


@pytest.mark.parametrize(("algorithm", "tolerance", "bound"), ALGORITHMS)
@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=name)
def test_states_parameters_and_times(
    algorithm: Any, tolerance: float, bound: float, adjoint: Any, exact: list[Tensor]
) -> None:
    found = gradients(algorithm, adjoint, tolerance)
    torch.testing.assert_close(found, exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=name)
@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.KenCarp4()], ids=name)
def test_complex_parameters_of_a_real_state(algorithm: Any, adjoint: Any) -> None:
    """With `du/dt = -|w|^2 u` the gradient of `u(1)` by `w` is `-2 w u(1)`."""
    w = torch.tensor([1.5 - 0.5j, 0.3j], dtype=torch.complex128, requires_grad=True)
    u0 = torch.ones(2, dtype=torch.float64)
    problem = psn.ODEProblem(lambda t, u: -(w.abs() ** 2) * u, u0, (0.0, 1.0))
    solution = psn.solve(problem, algorithm, rtol=1e-8, atol=1e-8, adjoint=adjoint)
    (found,) = torch.autograd.grad(solution.u1.sum(), w)
    exact = -2 * w * torch.exp(-(w.abs() ** 2))
    torch.testing.assert_close(found, exact.detach(), rtol=1e-6, atol=1e-6)


def test_beside_finite_differences() -> None:
    along = torch.tensor([0.3, 40.0, -0.2], dtype=torch.float64)
    width = 1e-3

    def loss(shift: float) -> float:
        u0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
        problem = psn.ODEProblem(field, u0, (0.1, 0.6), p=P + shift * along)
        with torch.no_grad():
            options = {"rtol": 1e-10, "atol": 1e-10, "saveat": [0.3, 0.5, 0.6]}
            u = psn.solve(problem, psn.Rodas5P(), **options).u
        return float(u[:2].square().sum() + 2 * u[2, 0] - u[2, 1])

    difference = (loss(width) - loss(-width)) / (2 * width)
    for adjoint in CONTINUOUS:
        found = gradients(psn.Rodas5P(), adjoint, 1e-7)[1]
        assert float(found @ along) == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=name)
def test_mass_matrices(adjoint: Any) -> None:
    """`M u' = f` is `u' = M^-1 f`."""
    found = gradients(psn.Rodas5P(), adjoint, 1e-7, MASS)
    expected = gradients(psn.Rodas5P(), psn.DiscreteAdjoint(), 1e-8, MASS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=name)
def test_gradients_scale_with_the_loss(adjoint: Any) -> None:
    plain = gradients(psn.Rodas5P(), adjoint, 1e-5)
    for factor in (2.0**-40, -(2.0**30)):
        scaled = gradients(psn.Rodas5P(), adjoint, 1e-5, factor=factor)
        torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-14)


def test_a_field_without_parameters_that_does_not_move() -> None:
    u0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for algorithm in (psn.Rodas5P(), psn.KenCarp4()):
        problem = psn.ODEProblem(lambda t, u: torch.zeros_like(u), u0, (0.0, 1.0))
        solution = psn.solve(problem, algorithm, adjoint=psn.GaussAdjoint(), engine="torch")
        (found,) = torch.autograd.grad(solution.u1.square().sum(), u0)
        torch.testing.assert_close(found, 2 * u0.detach())


def test_refusals() -> None:
    u0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    problem = psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0), mass_matrix=singular)
    with pytest.raises(psn.EngineUnavailable, match="singular mass matrix"):
        psn.solve(problem, psn.Rodas5P(), adjoint=psn.GaussAdjoint(), engine="torch")


@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.TRBDF2(), psn.AutoTsit5()], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_times_beside_states_in_single_precision(algorithm: Any, dtype: torch.dtype) -> None:
    """Of `exp(-t^2 / 2)`, whose derivative in time is `-t exp(-t^2 / 2)`."""
    saveat = torch.tensor([0.3, 0.5, 0.5, 0.7], dtype=dtype, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -t * u, torch.ones(3), (0.0, 1.0))
    solution = psn.solve(problem, algorithm, saveat=saveat, rtol=1e-5, atol=1e-5, engine="torch")
    (found,) = torch.autograd.grad(solution.u[..., 1].sum(), saveat)
    expected = (-saveat * torch.exp(-(saveat**2) / 2)).detach()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
