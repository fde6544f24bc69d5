"""A latent stochastic differential equation as a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.layers.autonomous import check_function, with_time
from pysciml_node.layers.neural_sde import NeuralSDE
from pysciml_node.layers.options import SolverOptions
from pysciml_node.problems.ode import Time
from pysciml_node.problems.sde import Interpretation
from pysciml_node.solutions.solution import Solution
from pysciml_node.stochastic.relative_entropy import entropy_rate


@dataclass(frozen=True)
class LatentPaths:
    """Paths of a `LatentSDE`'s posterior.

    Args:
        t: times, `(T,)`.
        u: latent states, `(T, B, d)`.
        kl: relative entropy of each sample's path to the prior, `(B,)`; its mean over paths is
            `KL(posterior | prior)` of the laws of paths from the same initial state.
        solution: of the equation of both, with `solution.penalty`.
    """

    t: Tensor
    u: Tensor
    kl: Tensor
    solution: Solution


class LatentSDE(nn.Module):
    """Paths of a posterior `dz = f dt + g dW`, and how far they are from a prior's.

    The prior `dz = h dt + g dW` has the same diffusion. The relative entropy of the paths,
    `int |(f - h) / g|^2 / 2 dt`, is solved for beside the state; it never drives the steps.

    Args:
        posterior: its drift `f(t, z)`, or `f(z)`; usually an `nn.Module`.
        prior: its drift `h`, likewise.
        diffusion: `g`, likewise, `(B, d)`: entry `i` may depend on entry `i` of `z` alone.
        algorithm: as in `NeuralSDE`.
        tspan: the interval.
        interpretation: `"ito"` or `"stratonovich"`.
        generator: draws the seeds of the Brownian paths.
        options: as in `NeuralSDE`; tolerances are numbers.

    Raises:
        TypeError: a drift or diffusion that is not callable, an unknown option.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> latent = psn.LatentSDE(torch.nn.Linear(4, 4), lambda t, z: -z,
        ...                        lambda t, z: 0.5 * torch.ones_like(z), rtol=0.1, atol=0.1)
        >>> paths = latent(torch.zeros(16, 4), saveat=[0.0, 0.5, 1.0])
        >>> loss = paths.u.square().mean() + paths.kl.mean()
        >>> paths.u.shape, paths.kl.shape
        (torch.Size([3, 16, 4]), torch.Size([16]))

    Reference: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, arXiv 2001.01328, section 5.
    """

    def __init__(
        self,
        posterior: Callable[..., Any],
        prior: Callable[..., Any],
        diffusion: Callable[..., Any],
        algorithm: Algorithm | None = None,
        tspan: tuple[Time, Time] = (0.0, 1.0),
        *,
        interpretation: Interpretation = "ito",
        generator: torch.Generator | None = None,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__()
        functions: dict[str, Any] = {
            "posterior": posterior,
            "prior": prior,
            "diffusion": diffusion,
        }
        for name, given in functions.items():
            check_function(name, given, "t", "z")
        self.posterior, self.prior, self.diffusion = posterior, prior, diffusion
        common: dict[str, Any] = {
            "interpretation": interpretation,
            "generator": generator,
            **options,
        }
        atol = checks.number("atol", options.get("atol", NeuralSDE.usual_tolerance), at_least=0)
        self.paths = NeuralSDE(
            _WithEntropy(posterior, prior, diffusion),
            _WithoutNoise(diffusion),
            algorithm,
            tspan,
            **{**common, "atol": (atol, math.inf)},
        )
        self.priors = NeuralSDE(prior, diffusion, algorithm, tspan, **common)

    def forward(
        self,
        z0: Tensor,
        saveat: Sequence[float] | Tensor | None = None,
        tspan: tuple[Time, Time] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LatentPaths:
        """Paths of the posterior from `z0` of shape `(B, d)`.

        Args:
            z0: initial states.
            saveat: times of `u`, for this call.
            tspan: another interval, for this call.
            generator: another source of the path's seed, for this call.
        """
        z0 = checks.tensor("z0", z0, axes=2, precise=True)
        start = (z0, torch.zeros_like(z0[:, 0]))
        solution = self.paths(start, tspan=tspan, saveat=saveat, generator=generator)
        u, _ = solution.u
        return LatentPaths(solution.t, u, solution.u1[1], solution)

    def sample(
        self,
        z0: Tensor,
        saveat: Sequence[float] | Tensor | None = None,
        tspan: tuple[Time, Time] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Solution:
        """Paths of the prior, as `forward` gives those of the posterior."""
        solution: Solution = self.priors(z0, tspan=tspan, saveat=saveat, generator=generator)
        return solution


class _WithEntropy(nn.Module):
    """The posterior's drift, and the rate of the relative entropy."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self.posterior, self.prior, self.diffusion = functions
        self._called = tuple(with_time(function) for function in functions)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both rates."""
        z, _ = state
        f, h, g = (function(t, z) for function in self._called)
        return f, entropy_rate(f - h, g, matrix=False)


class _WithoutNoise(nn.Module):
    """The diffusion, and none of the relative entropy."""

    def __init__(self, diffusion: Callable[..., Any]) -> None:
        super().__init__()
        self.diffusion = diffusion
        self._called = with_time(diffusion)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both."""
        z, entropy = state
        return self._called(t, z), torch.zeros_like(entropy)
