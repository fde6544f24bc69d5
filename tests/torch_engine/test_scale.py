"""Gradients scale with the loss: a loss times any number has that number times the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint_adjoint

ADJOINTS = {
    "discrete": psn.DiscreteAdjoint(),
    "direct": psn.DirectAdjoint(),
    "interpolating": psn.InterpolatingAdjoint(),
    "gauss": psn.GaussAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS.keys())
SAVED = (1.0, 2.0, 3.0)


def slope() -> float:
    """`d/dw sum_i exp(-w sin(4 t_i) / 4)` at `w = 3`."""
    s = [math.sin(4 * t) / 4 for t in SAVED]
    return sum(-x * math.exp(-3 * x) for x in s)


def gradients(adjoint: psn.DiscreteAdjoint, weights: Tensor, saveat: Any = SAVED) -> list[Tensor]:
    """Of a weighted sum of saved states, with respect to the rate, `u0` and the ends."""
    w = torch.tensor(3.0, dtype=weights.dtype, requires_grad=True)
    u0 = torch.ones(1, 1, dtype=weights.dtype, requires_grad=True)
    t0 = torch.tensor(0.0, dtype=weights.dtype, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -w * u * torch.cos(4 * t), u0, (t0, 3.0))
    solution = psn.solve(problem, rtol=1e-4, atol=1e-4, adjoint=adjoint, saveat=saveat)
    return list(torch.autograd.grad((solution.u[:, 0, 0] * weights).sum(), (w, u0, t0)))


@every_adjoint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-12, -6, -1, 6, 12])
def test_a_scaled_loss(adjoint: psn.DiscreteAdjoint, dtype: torch.dtype, power: int) -> None:
    ones = torch.ones(3, dtype=dtype)
    unit, scaled = gradients(adjoint, ones), gradients(adjoint, ones * 10.0**power)
    rounding = 1e-4 if dtype is torch.float32 else 1e-10
    for one, other in zip(unit, scaled, strict=True):
        torch.testing.assert_close(other / 10.0**power, one, rtol=rounding, atol=0)
    assert unit[0].item() == pytest.approx(slope(), rel=3e-3)


@every_adjoint
def test_losses_of_very_different_size_at_different_times(adjoint: psn.DiscreteAdjoint) -> None:
    """A cotangent that enters late in the sweep counts as much as one that enters early."""
    weights = torch.tensor([1.0, 0.0, 1e-9], dtype=torch.float64)
    s = math.sin(4.0) / 4
    assert gradients(adjoint, weights)[0].item() == pytest.approx(-s * math.exp(-3 * s), rel=3e-3)
    assert gradients(adjoint, weights.flip(0))[0].item() == pytest.approx(
        -math.sin(12.0) / 4 * math.exp(-3 * math.sin(12.0) / 4), rel=3e-3
    )


@every_adjoint
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_such_a_gradient(
    adjoint: psn.DiscreteAdjoint, bad: float
) -> None:
    """As through any other operation: a gradient scaler looks for it and skips the step."""
    for gradient in gradients(adjoint, torch.tensor([1.0, bad, 1.0])):
        assert not torch.isfinite(gradient).all()


@every_adjoint
def test_a_zero_loss_has_a_zero_gradient(adjoint: psn.DiscreteAdjoint) -> None:
    assert all(gradient.item() == 0 for gradient in gradients(adjoint, torch.zeros(3)))


@every_adjoint
def test_a_loss_on_the_start_alone(adjoint: psn.DiscreteAdjoint) -> None:
    rate, u0, _ = gradients(adjoint, torch.tensor([2.0, 0.0]), saveat=[0.0, 1.0])
    assert (rate.item(), u0.item()) == (0.0, 2.0)


def test_the_mean_over_a_batch() -> None:
    """A mean over 10,240 entries, at tolerances from loose to tight, beside the exact gradient."""
    generator = torch.Generator().manual_seed(0)
    y0 = torch.randn(512, 20, generator=generator, dtype=torch.float64)
    target = torch.randn(512, 20, generator=generator, dtype=torch.float64)
    end = torch.exp(torch.tensor(-1.5, dtype=torch.float64) * math.sin(1.0))
    exact = (2 * (y0 * end - target) * y0 * end * -math.sin(1.0)).mean().item()
    for tolerance in (1e-3, 1e-5, 1e-7):
        w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        y = odeint_adjoint(
            lambda t, y, w=w: -w * torch.cos(t) * y,
            y0,
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
        )
        torch.nn.functional.mse_loss(y[-1], target).backward()
        assert w.grad is not None
        assert w.grad.item() == pytest.approx(exact, rel=10 * tolerance)


def test_the_stochastic_adjoint_equation() -> None:
    def gradient(scale: float) -> Tensor:
        a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        problem = psn.SDEProblem(
            lambda t, u: -a * u,
            lambda t, u: 0.3 * u,
            torch.ones(4, 2, dtype=torch.float64),
            (0.0, 1.0),
            interpretation="stratonovich",
        )
        solution = psn.solve(
            problem,
            psn.EulerHeun(),
            adjoint=psn.BacksolveAdjoint(),
            controller=psn.FixedStep(),
            dt0=0.05,
            generator=torch.Generator().manual_seed(0),
        )
        (solution.u1.sum() * scale).backward()
        assert a.grad is not None
        return a.grad

    torch.testing.assert_close(gradient(1e-12) * 1e12, gradient(1.0), rtol=1e-12, atol=0)
