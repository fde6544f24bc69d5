"""Regularizers on states without a batch, complex ones, and ones of several parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
A = torch.tensor([[-0.3, 1.2, 0.1], [-0.9, -0.2, 0.4], [0.5, 0.3, -0.6]], dtype=torch.float64)
NORM = A.square().sum().item()
ADJOINTS = [psn.DiscreteAdjoint(), psn.DirectAdjoint(), psn.GaussAdjoint()]


def penalty(field: Any, regularizer: psn.Regularizer, u0: Any, **options: Any) -> Tensor:
    node = psn.NeuralODE(field, psn.Vern7(), regularizers=[regularizer], **TIGHT, **options)
    value = node(u0).penalty
    assert not value.is_complex()
    assert value.ndim == 0
    return value


@pytest.mark.parametrize(("reduction", "dimensions"), [("sum", 1), ("mean", 3)])
def test_jacobian_of_one_system_without_a_batch(reduction: Any, dimensions: int) -> None:
    """`u' = A u`: the Jacobian is `A`, whose entries couple all entries of the state."""
    u0 = torch.tensor([0.4, -1.0, 0.7], dtype=torch.float64)
    for exact in (None, True):
        regularizer = psn.JacobianFrobenius(exact=exact, reduction=reduction)
        value = penalty(lambda t, u: A @ u, regularizer, u0).item()
        assert value == pytest.approx(NORM / dimensions, rel=1e-9)
    alone = penalty(lambda t, u: u @ A.T, psn.JacobianFrobenius(reduction=reduction), u0[None])
    assert alone.item() == pytest.approx(NORM / dimensions, rel=1e-9)


@pytest.mark.parametrize("make", [psn.KineticEnergy, lambda **o: psn.TaylorDerivative(2, **o)])
def test_one_system_counts_as_a_batch_of_one(make: Any) -> None:
    u0 = torch.tensor([0.4, -1.0, 0.7], dtype=torch.float64)
    for reduction in ("sum", "mean"):
        alone = penalty(lambda t, u: u @ A.T, make(reduction=reduction), u0)
        batched = penalty(lambda t, u: u @ A.T, make(reduction=reduction), u0[None])
        torch.testing.assert_close(alone, batched, rtol=1e-12, atol=0)


def test_a_number_is_a_system_too() -> None:
    u0 = torch.tensor(2.0, dtype=torch.float64)
    value = penalty(lambda t, u: -u, psn.JacobianFrobenius(), u0)
    assert value.item() == pytest.approx(1.0, rel=1e-9)


def test_numbers_laid_side_by_side_have_the_mean_of_their_penalties() -> None:
    """A state `(B,)` of scalars: with the mean over entries nothing depends on how it is seen."""
    u0 = torch.tensor([1.0, 2.0, -3.0, 0.5, 0.1], dtype=torch.float64)
    for regularizer in (psn.JacobianFrobenius(exact=True), psn.JacobianFrobenius(exact=False)):
        value = penalty(lambda t, u: -2 * u, regularizer, u0)
        assert value.item() == pytest.approx(4.0, rel=1e-9)
    # int (2 u)^2 dt of u = u0 exp(-2 t).
    expected = (1 - math.exp(-4.0)) * u0.square().mean().item()
    assert penalty(lambda t, u: -2 * u, psn.KineticEnergy(), u0).item() == pytest.approx(expected)
    of_entries = psn.Integral(lambda t, u, f: f.square(), "energy")
    assert penalty(lambda t, u: -2 * u, of_entries, u0).item() == pytest.approx(expected)
    of_all = psn.Integral(lambda t, u, f: f.square().mean(), "energy")
    assert penalty(lambda t, u: -2 * u, of_all, u0).item() == pytest.approx(expected)


def complex_states(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, dtype=torch.complex128, generator=generator)


RATE = -0.3 + 1.1j


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_complex_states_have_real_penalties(adjoint: Any) -> None:
    """`u' = a u`: the Jacobian is `a`, and the `k`-th derivative `a^k u0 exp(a t)`."""
    u0 = complex_states()
    rate = torch.tensor(RATE, dtype=torch.complex128, requires_grad=True)
    field = lambda t, u: rate * u  # noqa: E731
    growth = math.expm1(2 * RATE.real) / (2 * RATE.real)  # int |exp(a t)|^2 dt
    size = u0.abs().square().mean().item()
    for regularizer, expected in (
        (psn.JacobianFrobenius(exact=True), abs(RATE) ** 2),
        (psn.JacobianFrobenius(exact=False), abs(RATE) ** 2),
        (psn.KineticEnergy(), abs(RATE) ** 2 * size * growth),
        (psn.TaylorDerivative(2), abs(RATE) ** 4 * size * growth),
        (psn.TaylorDerivative(3), abs(RATE) ** 6 * size * growth),
    ):
        value = penalty(field, regularizer, u0, adjoint=adjoint)
        assert value.item() == pytest.approx(expected, rel=1e-8)
        (gradient,) = torch.autograd.grad(value, rate)
        if isinstance(regularizer, psn.JacobianFrobenius):
            expected_gradient = 2 * rate.detach()
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


def test_fields_that_are_not_holomorphic() -> None:
    """`u' = a u + b u*` has `|du'/du|^2 + |du'/du*|^2 = |a|^2 + |b|^2`."""
    b = 0.7 - 0.2j
    field = lambda t, u: RATE * u + b * u.conj()  # noqa: E731
    expected = abs(RATE) ** 2 + abs(b) ** 2
    value = penalty(field, psn.JacobianFrobenius(exact=True), complex_states())
    assert value.item() == pytest.approx(expected, rel=1e-9)
    for distribution in ("rademacher", "gaussian"):
        probe = psn.JacobianFrobenius(
            exact=False,
            distribution=distribution,
            generator=torch.Generator().manual_seed(0),
        )
        node = psn.NeuralODE(field, regularizers=[probe])
        samples = node(complex_states(4000)).integrals["JacobianFrobenius"]
        error = samples.std().item() / math.sqrt(len(samples))
        assert abs(samples.mean().item() - expected) < 4 * error


def test_the_second_derivative_of_a_field_that_is_not_holomorphic() -> None:
    """`u' = i u*` has `u'' = i (i u*)* = u`."""
    u0 = torch.tensor([[1.0 + 1.0j]], dtype=torch.complex128)  # u = exp(t) u0: i u0* = u0
    value = penalty(lambda t, u: 1j * u.conj(), psn.TaylorDerivative(2), u0)
    assert value.item() == pytest.approx(math.expm1(2.0), rel=1e-9)


def test_parts_with_one_axis_beside_a_batch_hold_one_number_a_sample() -> None:
    """As of flows with a log-determinant: `x' = -x` and `l' = 2`."""
    u0 = (torch.ones(5, 2, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    field = lambda t, u: (-u[0], torch.full_like(u[1], 2.0))  # noqa: E731
    value = penalty(field, psn.KineticEnergy(reduction="sum"), u0)
    assert value.item() == pytest.approx(1 - math.exp(-2.0) + 4.0, rel=1e-9)


def test_parts_of_one_system_without_a_batch() -> None:
    """A rotation of `(x, v)` keeps its speed, `|x|^2 + |v|^2`."""
    u0 = {"x": torch.tensor([1.0, 2.0]).double(), "v": torch.tensor([0.5, 0.0]).double()}
    field = lambda t, u: {"x": u["v"], "v": -u["x"]}  # noqa: E731
    value = penalty(field, psn.KineticEnergy(reduction="sum"), u0)
    assert value.item() == pytest.approx(5.25, rel=1e-9)


def test_parts_of_different_batch_sizes_are_refused() -> None:
    u0 = (torch.ones(5, 2), torch.ones(2))
    with pytest.raises(ValueError, match="one batch size"):
        penalty(lambda t, u: u, psn.KineticEnergy(), u0)


@pytest.mark.parametrize("value", [lambda f: f, lambda f: f.sum(), lambda f: f.sum(1) * 1j])
def test_an_integrand_is_one_real_number_a_sample(value: Any) -> None:
    regularizer = psn.Integral(lambda t, u, f: value(f), "x")
    with pytest.raises(ValueError, match="one real number a sample"):
        penalty(lambda t, u: -u, regularizer, torch.ones(4, 2))


def test_a_flow_of_numbers_takes_its_batch_from_the_first_axis() -> None:
    """`u' = -u` of one number each: `log det = -1` for every sample."""
    zero = torch.tensor(0.0, dtype=torch.float64)
    base = torch.distributions.Normal(zero, zero.exp())
    flow = psn.CNF(lambda t, u: -u, event_shape=(), base=base, rtol=1e-10, atol=1e-10)
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    exact = torch.distributions.Normal(zero, zero + math.e).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), exact, rtol=1e-8, atol=1e-8)


def test_flows_of_complex_states_are_refused() -> None:
    flow = psn.CNF(lambda t, u: -u, event_shape=2)
    with pytest.raises(TypeError, match="view_as_real"):
        flow.log_prob(torch.ones(3, 2, dtype=torch.complex64))
