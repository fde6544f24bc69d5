"""Integral regularizers against closed forms, quadrature of the dense solution, and autograd."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH = 3


class LinearField(nn.Module):
    """`u' = A u`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator) / 2
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return u @ self.a.T


class CurvedField(nn.Module):
    """A nonlinear field that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.a.T) * torch.cos(t)


def states(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, WIDTH, dtype=torch.float64, generator=generator)


def node(field: nn.Module, *regularizers: psn.Regularizer, **options: object) -> psn.NeuralODE:
    return psn.NeuralODE(field, psn.Vern7(), regularizers=regularizers, **{**TIGHT, **options})


def quadrature(solution: psn.Solution, integrand: object) -> float:
    """`int integrand(t, u) dt`, mean over samples, by Gauss-Legendre on the dense solution."""
    t0, t1 = solution.problem.t0, solution.problem.t1
    nodes, weights = np.polynomial.legendre.leggauss(24)
    with torch.no_grad():
        times = torch.tensor(t0 + (t1 - t0) * (nodes + 1) / 2)
        u = solution(times)
        values = torch.stack([integrand(t, x).mean() for t, x in zip(times, u, strict=True)])
    return float((values * torch.tensor(weights)).sum() * abs(t1 - t0) / 2)


def jacobian_norm(field: nn.Module, t: Tensor, u: Tensor) -> Tensor:
    rows = [torch.func.jacrev(lambda x: field(t, x[None])[0])(x) for x in u]
    return torch.stack([row.square().sum() / WIDTH for row in rows])


@pytest.mark.parametrize("tspan", [(0.0, 1.0), (0.5, -0.5)])
def test_kinetic_energy_is_the_integral_of_the_squared_field(tspan: tuple[float, float]) -> None:
    field = CurvedField()
    solution = node(field, psn.KineticEnergy(), tspan=tspan)(states())
    expected = quadrature(solution, lambda t, u: field(t, u).square().mean(1))
    assert math.isclose(solution.penalties["KineticEnergy"].item(), expected, rel_tol=1e-8)


def test_exact_jacobian_norm_is_its_integral() -> None:
    field = CurvedField()
    solution = node(field, psn.JacobianFrobenius(exact=True))(states())
    expected = quadrature(solution, lambda t, u: jacobian_norm(field, t, u))
    assert math.isclose(solution.penalties["JacobianFrobenius"].item(), expected, rel_tol=1e-8)


def test_probed_jacobian_norm_is_unbiased_and_exact_for_rotations() -> None:
    """`||e^T J||^2 = ||e||^2` for orthogonal `J`: Rademacher probes have no variance there."""
    generator = torch.Generator().manual_seed(0)
    regularizer = psn.JacobianFrobenius(exact=False, generator=generator)
    field = LinearField()
    with torch.no_grad():
        field.a.copy_(torch.linalg.qr(field.a).Q)
    value = node(field, regularizer)(states()).penalties["JacobianFrobenius"]
    assert math.isclose(value.item(), 1.0, rel_tol=1e-9)
    # In general: the mean over many independent probes, within four standard errors.
    probes = psn.JacobianFrobenius(exact=False, distribution="gaussian", generator=generator)
    field = LinearField()
    solution = node(field, probes)(states(4000))
    samples = solution.integrals["JacobianFrobenius"].detach()
    expected = field.a.square().sum().item() / WIDTH
    error = samples.std().item() / math.sqrt(len(samples))
    assert abs(samples.mean().item() - expected) < 4 * error


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_taylor_derivative_of_a_linear_field_is_a_power(order: int) -> None:
    field = LinearField()
    solution = node(field, psn.TaylorDerivative(order))(states())
    power = torch.linalg.matrix_power(field.a.detach(), order)
    expected = quadrature(solution, lambda t, u: (u @ power.T).square().mean(1))
    assert math.isclose(solution.penalties["TaylorDerivative"].item(), expected, rel_tol=1e-8)


def test_taylor_derivative_sees_explicit_time() -> None:
    """`u' = sin(t)` has `u'' = cos(t)`, whatever the state."""
    field = lambda t, u: torch.sin(t) + 0 * u  # noqa: E731
    solution = node(field, psn.TaylorDerivative(2), tspan=(0.0, 2.0))(states())
    expected = 1 + math.sin(4.0) / 4
    assert math.isclose(solution.penalties["TaylorDerivative"].item(), expected, rel_tol=1e-9)


def test_any_integrand() -> None:
    """`u' = -u`: the path's length from `u0` is `u0 (1 - e^-1)`."""
    length = psn.Integral(lambda t, u, f: f.abs().sum(1), "length")
    u0 = torch.tensor([[2.0]], dtype=torch.float64)
    solution = node(lambda t, u: -u, length)(u0)
    expected = 2 * (1 - math.exp(-1))
    assert math.isclose(solution.penalties["length"].item(), expected, rel_tol=1e-9)


def all_integrals() -> list[psn.Regularizer]:
    return [
        psn.KineticEnergy(0.7),
        psn.JacobianFrobenius(0.3, exact=True),
        psn.TaylorDerivative(2, 0.2),
        psn.Integral(lambda t, u, f: (t * u * f).sum(1), "work", 0.5),
    ]


@pytest.mark.parametrize(
    "adjoint",
    [
        psn.DiscreteAdjoint(),
        psn.InterpolatingAdjoint(),
        psn.GaussAdjoint(),
        psn.BacksolveAdjoint(),
    ],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_gradients_agree_with_direct_differentiation(adjoint: psn.DiscreteAdjoint) -> None:
    def gradient(chosen: object) -> list[Tensor]:
        field, u0 = CurvedField(), states().requires_grad_()
        solution = node(field, *all_integrals(), adjoint=chosen)(u0)
        return list(torch.autograd.grad(solution.penalty, [u0, field.a]))

    for found, expected in zip(gradient(adjoint), gradient(psn.DirectAdjoint()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_integrals_never_drive_the_step_size() -> None:
    rough = psn.Integral(lambda t, u, f: 1e3 * torch.sin(500 * t) * torch.ones_like(u[:, 0]), "r")
    # Tolerances far above rounding, which enters the two solves' sums in another order.
    field, loose = CurvedField(), {"rtol": 1e-6, "atol": 1e-6}
    plain, regularized = (node(field, *extra, **loose)(states()) for extra in ((), (rough,)))
    times, expected = (torch.tensor(x.trajectory.times).double() for x in (regularized, plain))
    torch.testing.assert_close(times, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain.u1, regularized.u1, rtol=1e-12, atol=1e-12)


def test_integrals_do_not_depend_on_how_steps_are_split() -> None:
    field = CurvedField()
    whole = node(field, *all_integrals())(states())
    split = node(field, *all_integrals(), tstops=[0.123, 0.5, 0.77])(states())
    for name, value in whole.penalties.items():
        torch.testing.assert_close(split.penalties[name], value, rtol=1e-8, atol=1e-10)


def test_eval_mode_drops_the_integrals() -> None:
    model = node(CurvedField(), *all_integrals()).eval()
    solution = model(states())
    assert solution.penalty == 0
    assert not solution.penalties
    assert not solution.integrals


def test_the_solution_is_that_of_the_problem_itself() -> None:
    field = CurvedField()
    solution = node(field, psn.KineticEnergy(), saveat=[0.0, 0.3, 1.0])(states())
    assert solution.u.shape == (3, 4, WIDTH)
    torch.testing.assert_close(solution(0.3), solution.u[1])
    local = psn.LocalError(generator=torch.Generator().manual_seed(0))
    alone = psn.LocalError(generator=torch.Generator().manual_seed(0))
    together = node(field, psn.KineticEnergy(), local)(states()).penalties["LocalError"]
    torch.testing.assert_close(together, node(field, alone)(states()).penalties["LocalError"])


def test_tuple_states_have_kinetic_energy() -> None:
    def field(t: Tensor, u: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return u[1], -u[0]

    halves = states().split([1, 2], dim=1)
    u0 = (halves[0], halves[1][:, :1])
    solution = node(field, psn.KineticEnergy())(u0)
    expected = (u0[0].square() + u0[1].square()).mean() / 2  # a rotation keeps its speed
    torch.testing.assert_close(solution.penalty, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: psn.KineticEnergy(reduction="median"), "reduction must be"),
        (lambda: psn.JacobianFrobenius(distribution="uniform"), "distribution must be"),
        (lambda: psn.TaylorDerivative(0), "order must be a positive whole number"),
        (lambda: psn.RandomEndTime(0.0), "b must be positive"),
        (lambda: psn.GlobalError(aggregate="median"), "aggregate must be"),
        (lambda: node(CurvedField(), psn.KineticEnergy(), psn.KineticEnergy()), "two regularizers"),
    ],
)
def test_wrong_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
