"""Implicit steps as native code beside the loop in Python, by the size of the state.

    python benchmarks/stiff_sizes.py [--sizes 3 20 64 100] [--algorithm KenCarp4]

A chain with diffusion, whose Jacobian has three diagonals, and a layer as wide as the state, which
costs far more. `Rodas5P`, or another method, over (0, 1) at tolerance 1e-6, without and with the
gradient of the state at the end. Times are the best of five: processor time, without compilation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from timing import pin, processor, table, versions

CORE = pin(None)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pysciml_node as psn  # noqa: E402

ALGORITHMS = ("Rosenbrock23", "Rodas5P", "TRBDF2", "KenCarp4")


def chain(t: Tensor, u: Tensor) -> Tensor:
    """Diffusion and decay."""
    return 50 * (u.roll(1) - 2 * u + u.roll(-1)) - u**3


def layer(size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer before a fast decay."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
    weight = (weight - 5 * torch.eye(size, dtype=torch.float64)).requires_grad_()
    return lambda t, u: torch.tanh(weight @ u) - 10 * u


def milliseconds(f: Any, algorithm: Any, size: int, compile: bool, gradient: bool) -> float:
    """Processor time of a solve."""
    u0 = torch.linspace(-1, 1.5, size, dtype=torch.float64).requires_grad_()
    best = float("inf")
    for _ in range(5):
        begin = time.process_time()
        with torch.set_grad_enabled(gradient):
            problem = psn.ODEProblem(f, u0, (0.0, 1.0))
            end = psn.solve(problem, algorithm, rtol=1e-6, atol=1e-6, compile=compile).u1
        if gradient:
            end.square().sum().backward()
        best = min(best, time.process_time() - begin)
    return 1e3 * best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[3, 20, 64, 100])
    parser.add_argument("--algorithm", default="Rodas5P", choices=ALGORITHMS)
    arguments = parser.parse_args()
    algorithm = getattr(psn, arguments.algorithm)()
    print(processor(), versions(("torch", "pysciml_node")))
    rows = []
    for size in arguments.sizes:
        for name, f in (("chain", chain), ("layer", layer(size))):
            cells = [
                f"{milliseconds(f, algorithm, size, compile, gradient):.3g}"
                for compile in (True, False)
                for gradient in (False, True)
            ]
            rows.append([str(size), name, *cells])
    header = ["entries", "field", "native", "native, gradient", "eager", "eager, gradient"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
