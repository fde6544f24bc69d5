"""Stochastic problems whose solution is known as a function of the path, for the torch engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.algorithms.stochastic import StochasticRungeKutta

SEED = 1


@dataclass(frozen=True)
class Known:
    """A problem and, for a solution of it, the exact end state on the same path."""

    make: Callable[[int], psn.SDEProblem]
    exact: Callable[[psn.Solution], Tensor]


def _ones(paths: int, *shape: int) -> Tensor:
    return torch.ones(paths, *shape, dtype=torch.float64)


def _geometric(noise: str, interpretation: str, mu: float = 1.0, sigma: float = 0.5) -> Known:
    """`du = mu u dt + sigma u dW`, in either reading the process `exp((mu - s^2/2) t + s W)`."""
    drift = mu if interpretation == "ito" else mu - sigma**2 / 2
    shape = (1,) if noise == "diagonal" else (2,)

    def make(paths: int) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: drift * u,
            lambda t, u: sigma * u,
            _ones(paths, *shape),
            (0.0, 1.0),
            noise=noise,
            interpretation=interpretation,
        )

    def exact(solution: psn.Solution) -> Tensor:
        w = solution.brownian(0.0, 1.0).reshape(solution.u1.shape[0], -1)
        return torch.exp(mu - sigma**2 / 2 + sigma * w).expand_as(solution.u1)

    return Known(make, exact)


def _hyperbolic(interpretation: str) -> Known:
    """`u = sinh(t + W)`: noise that is not linear.

    In Stratonovich's reading `d sinh(x) = cosh(x) o (dt + dW)` and `cosh = sqrt(1 + u^2)`; Ito adds
    `u / 2`.
    """
    extra = 0.5 if interpretation == "ito" else 0.0

    def make(paths: int) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: torch.sqrt(1 + u**2) + extra * u,
            lambda t, u: torch.sqrt(1 + u**2),
            0 * _ones(paths, 1),
            (0.0, 1.0),
            interpretation=interpretation,
        )

    def exact(solution: psn.Solution) -> Tensor:
        return torch.sinh(1 + solution.brownian(0.0, 1.0))

    return Known(make, exact)


def _additive(matrix: bool) -> Known:
    """`du = u / (1 + t) dt + (1 + t) B dW`, `u = (1 + t) (u0 + B W)`."""
    mixing = torch.tensor([[0.5, 0.2, 0.0], [-0.1, 0.3, 0.4]], dtype=torch.float64)

    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        if matrix:
            return ((1 + t) * mixing).expand(u.shape[0], 2, 3)
        return 0.5 * (1 + t) * torch.ones_like(u)

    def make(paths: int) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: u / (1 + t), diffusion, _ones(paths, 2), (0.0, 1.0), noise="additive"
        )

    def exact(solution: psn.Solution) -> Tensor:
        w = solution.brownian(0.0, 1.0)
        return 2 * (1 + (w @ mixing.T if matrix else 0.5 * w))

    return Known(make, exact)


def _pendulum() -> Known:
    """`du = -2 sin(3 u) dt + (1 + t) dW`: against many small steps on the same path."""

    def make(paths: int) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: -2 * torch.sin(3 * u),
            lambda t, u: (1 + t) * torch.ones_like(u),
            _ones(paths, 1),
            (0.0, 1.0),
            noise="additive",
        )

    return Known(make, _finely(psn.SOSRA(), 10))


def _finely(algorithm: StochasticRungeKutta, halvings: int) -> Callable[[psn.Solution], Tensor]:
    """The end of a solve with `2**halvings` steps, by the same seed; kept for each shape."""

    found: dict[torch.Size, Tensor] = {}

    def exact(solution: psn.Solution) -> Tensor:
        shape = solution.u1.shape
        if shape not in found:
            generator = torch.Generator().manual_seed(SEED)
            options = {"dt0": 2.0**-halvings, "controller": psn.FixedStep()}
            found[shape] = psn.solve(
                solution.problem, algorithm, generator=generator, **options
            ).u1.detach()
        return found[shape]

    return exact


def _heisenberg() -> Known:
    """Noise that does not commute: `x = W1`, `y = W2`, `z = int x dW2 - y dW1`."""

    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        x, y, _ = u.unbind(-1)
        one, none = torch.ones_like(x), torch.zeros_like(x)
        return torch.stack((one, none, none, one, -y, x), -1).view(-1, 3, 2)

    def make(paths: int) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: torch.zeros_like(u),
            diffusion,
            0 * _ones(paths, 3),
            (0.0, 1.0),
            noise="general",
            interpretation="stratonovich",
        )

    return Known(make, _finely(psn.EulerHeun(), 11))


def _rotation(interpretation: str) -> Known:
    """Two motions, a rotation and a scaling: matrices that commute, general noise.

    `du = a J u o dW1 + b u o dW2`, `u = exp(b W2) R(a W1) u0`; Ito adds `(b^2 - a^2) u / 2`.
    """
    a, b = 0.8, 0.4
    extra = (b**2 - a**2) / 2 if interpretation == "ito" else 0.0

    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        turned = torch.stack((-u[:, 1], u[:, 0]), -1)
        return torch.stack((a * turned, b * u), -1)

    def make(paths: int) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: extra * u,
            diffusion,
            _ones(paths, 2),
            (0.0, 1.0),
            noise="general",
            interpretation=interpretation,
        )

    def exact(solution: psn.Solution) -> Tensor:
        turn, grow = solution.brownian(0.0, 1.0).unbind(-1)
        turn, grow = a * turn, torch.exp(b * grow)
        x, y = torch.cos(turn) - torch.sin(turn), torch.cos(turn) + torch.sin(turn)
        return torch.stack((grow * x, grow * y), -1)

    return Known(make, exact)


KNOWN: dict[str, Known] = {
    "geometric": _geometric("diagonal", "ito"),
    "geometric stratonovich": _geometric("diagonal", "stratonovich"),
    "noisy": _geometric("diagonal", "ito", mu=0.1, sigma=0.8),
    "noisy stratonovich": _geometric("diagonal", "stratonovich", mu=0.1, sigma=0.8),
    "scalar": _geometric("scalar", "ito"),
    "scalar stratonovich": _geometric("scalar", "stratonovich"),
    "sinh": _hyperbolic("ito"),
    "sinh stratonovich": _hyperbolic("stratonovich"),
    "additive": _additive(matrix=False),
    "additive matrix": _additive(matrix=True),
    "pendulum": _pendulum(),
    "heisenberg": _heisenberg(),
    "rotation": _rotation("ito"),
    "rotation stratonovich": _rotation("stratonovich"),
}


def errors(
    name: str, algorithm: StochasticRungeKutta, dt: float, paths: int
) -> tuple[Tensor, psn.Solution]:
    """End states minus the exact ones on the same paths, with fixed steps."""
    known = KNOWN[name]
    with torch.no_grad():
        solution = psn.solve(
            known.make(paths),
            algorithm,
            dt0=dt,
            controller=psn.FixedStep(),
            generator=torch.Generator().manual_seed(SEED),
        )
        return solution.u1 - known.exact(solution), solution
