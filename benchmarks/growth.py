"""How costs grow: with evaluations, output times, members and steps.

    python benchmarks/growth.py

* evaluations: fixed steps of DP5 on torchdiffeq's spiral field (2-50-2, batch 20), twice as many in
  every column. Time should double.
* output times: one adaptive solve of the same field at 1e-6, with more and more saved times. Time
  should not double, since an output is only read off the dense output.
* members: Lorenz systems with steps of their own (`benchmarks/members.py`).
* steps: peak memory of a gradient, from processes of their own (`benchmarks/memory.py`).

Times are medians of CPU time in milliseconds, forward and with gradient; memory is in MiB. The
last column is the exponent between the last two entries: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

from timing import interleave, pin, table

CORE = pin(None)

import torch  # noqa: E402
from members import CANDIDATES, sample  # noqa: E402
from workloads import spiral  # noqa: E402

import pysciml_node as psn  # noqa: E402

EVALUATIONS = (192, 384, 768, 1536)
OUTPUTS = (10, 100, 1000, 10_000)
MEMBERS = (100, 1000, 10_000)
STEPS = (50, 100, 200, 400)
WAYS = {"eager": False, "native": True}


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Of the growth between the last two sizes."""
    return log(costs[-1] / costs[-2]) / log(sizes[-1] / sizes[-2])


def show(title: str, sizes: Sequence[int], rows: dict[str, list[float]]) -> None:
    """Print a study as a table."""
    body = [
        [name, *(f"{cost:.3g}" for cost in costs), f"{exponent(sizes, costs):.2f}"]
        for name, costs in rows.items()
    ]
    print(f"\n{table([title, *map(str, sizes), 'exponent'], body)}", flush=True)


def spirals(
    options: Callable[[int], dict[str, object]], sizes: Sequence[int]
) -> dict[str, list[float]]:
    """Times of the spiral, forward and with gradient, for every size and way."""
    rows: dict[str, list[float]] = {}
    for size in sizes:
        calls: dict[str, Callable[[], object]] = {}
        for way, compiled in WAYS.items():
            workload = spiral(fitted=False)
            node = psn.NeuralODE(
                workload.field, psn.DP5(), engine="torch", compile=compiled, **options(size)
            )

            def forward(node: psn.NeuralODE = node, u0: torch.Tensor = workload.u0) -> object:
                with torch.no_grad():
                    return node(u0).u

            def gradient(node: psn.NeuralODE = node, u0: torch.Tensor = workload.u0) -> object:
                return torch.autograd.grad(node(u0).u.sum(), list(node.parameters()))

            calls[way], calls[f"{way}, with gradient"] = forward, gradient
        for name, spread in interleave(calls, 5).items():
            rows.setdefault(name, []).append(spread.cpu)
    return rows


def fixed(evaluations: int) -> dict[str, object]:
    """Options of a solve with so many evaluations."""
    step = 6.0 / evaluations  # DP5 takes six a step, the last stage being the next step's first
    return {"controller": psn.FixedStep(), "dt0": step, "saveat": [1.0]}


def saved(outputs: int) -> dict[str, object]:
    """Options of an adaptive solve with so many outputs."""
    times = torch.linspace(0, 1, outputs + 1)[1:]
    return {"tspan": (0.0, 1.0), "saveat": times, "rtol": 1e-6, "atol": 1e-6}


def members() -> dict[str, list[float]]:
    """Times of Lorenz systems."""
    rows: dict[str, list[float]] = {}
    for name in ("eager, batched=True", "native"):
        for size in MEMBERS:
            candidate = CANDIDATES[name](size)
            rows.setdefault(name, []).append(sample(candidate.forward)[0])
            rows.setdefault(f"{name}, with gradient", []).append(sample(candidate.gradient)[0])
    return rows


def memory() -> dict[str, list[float]]:
    """Peaks of memory."""
    script = str(Path(__file__).with_name("memory.py"))
    rows: dict[str, list[float]] = {}
    for adjoint in ("DiscreteAdjoint", "GaussAdjoint", "BacksolveAdjoint", "DirectAdjoint"):
        for steps in STEPS:
            command = [sys.executable, script, "--adjoint", adjoint, "--steps", str(steps)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.setdefault(adjoint, []).append(float(run.stdout.split()[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    show("ms for evaluations", EVALUATIONS, spirals(fixed, EVALUATIONS))
    show("ms for output times", OUTPUTS, spirals(saved, OUTPUTS))
    show("ms for members", MEMBERS, members())
    show("MiB for steps", STEPS, memory())


if __name__ == "__main__":
    main()
