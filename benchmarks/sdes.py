"""Orders, moments, gradients and speed of the stochastic methods.

    python benchmarks/sdes.py --paths 20000
    python benchmarks/sdes.py --engine julia

Strong and weak orders are slopes over steps of 1/16 to 1/256 (strong, weak orders: 1/4 to 1/32), on
the same paths as the exact solution: geometric Brownian motion, and for additive noise
`du = u / (1 + t) dt + (1 + t) / 2 dW` (weak; error of the mean square) and `du = -2 sin(3 u) dt +
(1 + t) dW` against 1,024 steps (strong). Moments are those of 100,000 paths in units of their Monte
Carlo error. Speed: `DiscreteAdjoint` on a batch of 512 states of 32 entries in float32, with the
networks of arXiv:2303.02262's SDE on MNIST, in CPU seconds of one core, the best of five runs; and
in float64 the relative distance of its gradient from torch's `DirectAdjoint`'s on the same path.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from timing import pin, table
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.algorithms.stochastic import StochasticRungeKutta

ITO = (psn.EM(), psn.LambaEM(), psn.RKMil(), psn.SRIW1(), psn.SOSRI(), psn.SOSRI2())
STRATONOVICH = (psn.RKMil(), psn.EulerHeun(), psn.StratonovichMidpoint(), psn.ReversibleHeun())
ADDITIVE = (psn.EM(), psn.SRA1(), psn.SOSRA(), psn.SOSRA2())
Exact = Callable[[psn.Solution], Tensor]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def fixed(problem: psn.SDEProblem, method: StochasticRungeKutta, dt: float) -> psn.Solution:
    with torch.no_grad():
        control = psn.FixedStep()
        return psn.solve(problem, method, dt0=dt, controller=control, generator=seeded())


def geometric(paths: int, reading: str, mu: float, sigma: float) -> tuple[psn.SDEProblem, Exact]:
    drift = mu if reading == "ito" else mu - sigma**2 / 2
    problem = psn.SDEProblem(
        lambda t, u: drift * u,
        lambda t, u: sigma * u,
        torch.ones(paths, dtype=torch.float64),
        (0.0, 1.0),
        interpretation=reading,
    )
    return problem, lambda s: torch.exp(mu - sigma**2 / 2 + sigma * s.brownian(0.0, 1.0))


def additive(paths: int) -> tuple[psn.SDEProblem, Exact]:
    problem = psn.SDEProblem(
        lambda t, u: u / (1 + t),
        lambda t, u: (1 + t) / 2 * torch.ones_like(u),
        torch.ones(paths, dtype=torch.float64),
        (0.0, 1.0),
        noise="additive",
    )
    return problem, lambda s: 2 + s.brownian(0.0, 1.0)


def pendulum(paths: int) -> tuple[psn.SDEProblem, Exact]:
    problem = psn.SDEProblem(
        lambda t, u: -2 * torch.sin(3 * u),
        lambda t, u: (1 + t) * torch.ones_like(u),
        torch.ones(paths, dtype=torch.float64),
        (0.0, 1.0),
        noise="additive",
    )
    end = fixed(problem, psn.SOSRA(), 2.0**-10).u1
    return problem, lambda s: end


def slope(sizes: list[float], errors: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def strong(problem: psn.SDEProblem, exact: Exact, method: StochasticRungeKutta) -> float:
    sizes = [2.0**-k for k in range(4, 9)]
    solutions = [fixed(problem, method, h) for h in sizes]
    return slope(sizes, [(s.u1 - exact(s)).square().mean().sqrt().item() for s in solutions])


def weak(problem: psn.SDEProblem, exact: Exact, method: StochasticRungeKutta, moment: int) -> float:
    sizes = [2.0**-k for k in range(2, 6)]
    solutions = [fixed(problem, method, h) for h in sizes]
    means = [(s.u1**moment - exact(s) ** moment).mean().item() for s in solutions]
    return slope(sizes, [abs(mean) for mean in means])


def deviations(samples: Tensor, expected: float) -> float:
    error = samples.std().item() / math.sqrt(samples.numel())
    return (samples.mean().item() - expected) / error


def order_rows(paths: int) -> list[list[str]]:
    rows = []
    small = max(paths // 5, 1000)
    for reading, methods in (("ito", ITO), ("stratonovich", STRATONOVICH)):
        noisy = geometric(small, reading, 0.1, 0.8)
        calm = geometric(paths, reading, 1.0, 0.5)
        many, _ = geometric(100_000, reading, 0.4, 0.5)
        for method in methods:
            missing = isinstance(method, psn.ReversibleHeun | psn.StratonovichMidpoint)
            if missing and psn.get_engine() == "julia":
                continue  # SciML does not have them
            u1 = fixed(many, method, 1 / 512 if method.tableau.strong_order < 1.5 else 1 / 64).u1
            rows.append(
                [
                    type(method).__name__,
                    f"diagonal, {reading}",
                    f"{strong(*noisy, method):.2f}",
                    f"{weak(*calm, method, 1):.2f}",
                    f"{deviations(u1, math.exp(0.4)):+.1f}",
                    f"{deviations(u1.square(), math.exp(1.05)):+.1f}",
                ]
            )
    swing, linear = pendulum(small), additive(paths)
    many = psn.SDEProblem(
        lambda t, u: 2 * (0.5 - u),
        lambda t, u: 0.7 * torch.ones_like(u),
        torch.ones(100_000, dtype=torch.float64),
        (0.0, 1.0),
        noise="additive",
    )
    mean, variance = 0.5 + 0.5 * math.exp(-2), 0.49 * (1 - math.exp(-4)) / 4
    for method in ADDITIVE:
        u1 = fixed(many, method, 1 / 512 if isinstance(method, psn.EM) else 1 / 64).u1
        rows.append(
            [
                type(method).__name__,
                "additive",
                f"{strong(*swing, method):.2f}",
                f"{weak(*linear, method, 2):.2f}",
                f"{deviations(u1, mean):+.1f}",
                f"{deviations((u1 - mean).square(), variance):+.1f}",
            ]
        )
    return rows


class Net(nn.Module):
    """Layers on the state."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The value."""
        out: Tensor = self.layers(u)
        return out


@functools.cache
def networks(dtype: torch.dtype) -> tuple[Net, Net]:
    torch.manual_seed(0)
    drift = Net(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).to(dtype)
    return drift, Net(nn.Linear(32, 32)).to(dtype)


def gradient(
    method: StochasticRungeKutta,
    adjoint: psn.DirectAdjoint | psn.DiscreteAdjoint,
    dtype: torch.dtype,
) -> tuple[float, float, Tensor]:
    """CPU seconds forward and backward of 64 steps, and the gradient as one vector."""
    drift, diffusion = networks(dtype)
    u0 = torch.ones(512, 32, dtype=dtype, requires_grad=True)
    problem = psn.SDEProblem(drift, diffusion, u0, (0.0, 1.0))
    started, control = time.process_time(), psn.FixedStep()
    solution = psn.solve(
        problem,
        method,
        dt0=1 / 64,
        controller=control,
        adjoint=adjoint,
        generator=seeded(),
        engine="torch" if isinstance(adjoint, psn.DirectAdjoint) else None,
    )
    middle = time.process_time()
    inputs = (u0, *drift.parameters(), *diffusion.parameters())
    found = torch.autograd.grad(solution.u1.square().mean(), inputs)
    ended = time.process_time()
    return middle - started, ended - middle, torch.cat([g.reshape(-1) for g in found])


def speed_rows() -> list[list[str]]:
    rows = []
    for method in (psn.EM(), psn.RKMil(), psn.SRIW1(), psn.SOSRI()):
        exact = gradient(method, psn.DirectAdjoint(), torch.float64)[2]
        found = gradient(method, psn.DiscreteAdjoint(), torch.float64)[2]
        gradient(method, psn.DiscreteAdjoint(), torch.float32)  # Julia compiles
        runs = [gradient(method, psn.DiscreteAdjoint(), torch.float32) for _ in range(5)]
        rows.append(
            [
                type(method).__name__,
                f"{64 / min(run[0] for run in runs):.0f}",
                f"{64 / min(run[1] for run in runs):.0f}",
                f"{((found - exact).norm() / exact.norm()).item():.1e}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--paths", type=int, default=20_000, help="for the weak orders")
    parser.add_argument("--engine", choices=("torch", "julia"), default="torch")
    arguments = parser.parse_args()
    pin(1)
    psn.set_engine(arguments.engine)
    heads = ["method", "noise", "strong", "weak", "mean", "2nd moment"]
    print(table(heads, order_rows(arguments.paths)))
    heads = ["method", "steps/s forward", "steps/s backward", "discrete - direct"]
    print(table(heads, speed_rows()))


if __name__ == "__main__":
    main()
