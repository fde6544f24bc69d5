"""Relative entropies of diffusions that are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

SIGMA = 0.5


def constant(t: Tensor, z: Tensor) -> Tensor:
    return SIGMA * torch.ones_like(z)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_shift_by_the_noise_has_a_constant_rate(fixed: bool) -> None:
    """`f - h = g c`: `|c|^2 / 2` a unit of time, whatever the diffusion is; its gradient is `c`."""
    shift = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)

    def g(t: Tensor, z: Tensor) -> Tensor:
        return 0.3 + torch.cos(z).square()

    control: dict[str, Any] = {"dt0": 0.1, "controller": psn.FixedStep()} if fixed else {}
    latent = psn.LatentSDE(
        lambda t, z: -z + g(t, z) * shift, lambda t, z: -z, g, tspan=(0.0, 3.0), **control
    )
    paths = latent(torch.ones(5, 2, dtype=torch.float64), saveat=[0.0, 1.0, 3.0])
    assert paths.u.shape == (3, 5, 2)
    expected = (1.5 * shift.square().sum()).expand(5)
    torch.testing.assert_close(paths.kl, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(paths.kl.mean(), shift)
    torch.testing.assert_close(gradient, 3 * shift.detach(), rtol=1e-9, atol=1e-12)


def test_two_ornstein_uhlenbeck_processes() -> None:
    """`f = -a z`, `h = -b z`: the mean of `(a - b)^2 z^2 / (2 s^2)`, integrated."""
    a, b, paths, end = 1.0, 0.4, 4000, 2.0
    latent = psn.LatentSDE(
        lambda t, z: -a * z,
        lambda t, z: -b * z,
        constant,
        tspan=(0.0, end),
        dt0=0.02,
        controller=psn.FixedStep(),
        generator=seeded(),
    )
    z0 = 0.8
    found = latent(torch.full((paths, 1), z0, dtype=torch.float64)).kl.detach()
    still = SIGMA**2 / (2 * a)
    square = (z0**2 - still) * (1 - math.exp(-2 * a * end)) / (2 * a) + still * end
    exact = (a - b) ** 2 / (2 * SIGMA**2) * square
    assert abs(found.mean().item() - exact) < 5 * found.std().item() / math.sqrt(paths)
    assert bool((found >= 0).all())


def test_the_prior_is_at_no_distance_and_can_be_sampled() -> None:
    drift = nn.Linear(3, 3).double()
    latent = psn.LatentSDE(drift, drift, constant, rtol=0.1, atol=0.1)
    assert len(list(latent.parameters())) == 2
    z0 = torch.ones(4, 3, dtype=torch.float64)
    paths = latent(z0, generator=seeded())
    assert torch.equal(paths.kl, torch.zeros(4, dtype=torch.float64))
    prior = latent.sample(z0, saveat=[0.0, 1.0])
    assert prior.u.shape == (2, 4, 3)


def test_the_entropy_does_not_drive_the_steps() -> None:
    def steps(factor: float) -> int:
        latent = psn.LatentSDE(
            lambda t, z: torch.sin(3 * z), lambda t, z: factor * torch.cos(z), constant
        )
        z0 = torch.ones(4, 3, dtype=torch.float64)
        return latent(z0, generator=seeded()).solution.stats.naccept

    assert steps(0.0) == steps(1e4)
