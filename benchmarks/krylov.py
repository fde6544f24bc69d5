"""Dense factors beside GMRES: implicit steps of a Brusselator with diffusion, by its size.

    python benchmarks/krylov.py

The problem is that of Hairer and Wanner, Solving Ordinary Differential Equations II, IV.10, on a
square grid with periodic sides. Each row: entries of the state, and seconds of a forward solve and
of one with its gradient, by dense factors and by GMRES.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import pysciml_node as psn


def brusselator(alpha: float = 0.1) -> Callable[[Tensor, Tensor], Tensor]:
    """The field on states `(2, n, n)`."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        n = u.shape[-1]
        spread = -4 * u
        for axis in (-1, -2):
            spread = spread + u.roll(1, axis) + u.roll(-1, axis)
        x, y = u
        grid = torch.arange(n, dtype=u.dtype, device=u.device) / n
        inside = (grid[:, None] - 0.3) ** 2 + (grid - 0.6) ** 2 <= 0.1**2
        source = 5.0 * inside * (t >= 1.1)
        rates = torch.stack((1 + x**2 * y - 4.4 * x + source, 3.4 * x - x**2 * y))
        return rates + alpha * n**2 * spread

    return f


def start(n: int) -> Tensor:
    """The state at the start, `(2, n, n)`."""
    grid = torch.arange(n, dtype=torch.float64) / n
    x = 22 * grid[:, None] * (1 - grid[:, None]) ** 1.5 + 0 * grid
    y = 27 * grid * (1 - grid) ** 1.5 + 0 * grid[:, None]
    return torch.stack((x, y))


def seconds(n: int, algorithm: psn.KenCarp4, gradient: bool) -> float:
    """Of one solve, with its gradient or without."""
    u0 = start(n).requires_grad_(gradient)
    problem = psn.ODEProblem(brusselator(), u0, (0.0, 0.5))
    begin = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        solution = psn.solve(problem, algorithm, rtol=1e-4, atol=1e-6, engine="torch")
    if gradient:
        solution.u1.square().mean().backward()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| entries | dense | dense, gradient | GMRES | GMRES, gradient |\n|---|---|---|---|---|")
    for n in (4, 8, 12, 16, 22):
        row = []
        for large in (n**2 * 2 + 1, 0):
            psn.algorithms.switching.LARGEST_DENSE = large
            row += [seconds(n, psn.KenCarp4(), gradient) for gradient in (False, True)]
        print(f"| {2 * n**2} | " + " | ".join(f"{x:.2f}" for x in row) + " |", flush=True)


if __name__ == "__main__":
    main()
