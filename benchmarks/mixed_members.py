"""Ensembles of which some members are stiff: van der Pol oscillators, on one core.

    python benchmarks/mixed_members.py [--sizes 10 100 1000] [--repeats 5]

The stiffness of the members goes from 0.1 to 1,000, in equal ratios; each starts at (2, 0) and goes
over [0, 100] at rtol 1e-5 and atol 1e-7 in float64, all by native code. The gradient is that of the
sum of all states at the end, to all stiffnesses. Explicit steps are many where a member is stiff,
implicit ones are dear where it is not; methods that switch take the ones or the others, each member
for itself.

A row gives the accepted steps of all members and milliseconds of CPU time for all of them: the
fastest, without compilation, all rows taken in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from timing import pin, processor, versions

CORE = pin(None)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pysciml_node as psn  # noqa: E402

D = torch.float64
OPTIONS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7, "engine": "torch", "compile": True}
SPAN = (0.0, 100.0)


def van_der_pol(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """The oscillator of a stiffness."""
    return torch.stack((u[1], p * (1 - u[0] ** 2) * u[1] - u[0]))


def together(p: Tensor, algorithm: Any) -> tuple[Tensor, int]:
    """Ends of all members, solved at once, and their steps."""
    one = psn.ODEProblem(van_der_pol, torch.tensor([2.0, 0.0], dtype=D), SPAN, p=p[0].detach())
    solution = psn.solve(psn.EnsembleProblem(one, p=p), algorithm, **OPTIONS)
    return solution.u1, solution.stats.naccept


def one_by_one(p: Tensor, algorithm: Any) -> tuple[Tensor, int]:
    """The same, one after the other."""
    u0 = torch.tensor([2.0, 0.0], dtype=D)
    every = [
        psn.solve(psn.ODEProblem(van_der_pol, u0, SPAN, p=own), algorithm, **OPTIONS)
        for own in p.unbind()
    ]
    return torch.stack([x.u1 for x in every]), sum(x.stats.naccept for x in every)


Solve = Callable[[Tensor, Any], tuple[Tensor, int]]
CANDIDATES: dict[str, tuple[Solve, Any]] = {
    "AutoTsit5()": (together, psn.AutoTsit5()),
    "AutoTsit5(KenCarp4())": (together, psn.AutoTsit5(psn.KenCarp4())),
    "Rodas5P()": (together, psn.Rodas5P()),
    "KenCarp4()": (together, psn.KenCarp4()),
    "Tsit5()": (together, psn.Tsit5()),
    "AutoTsit5(), one by one": (one_by_one, psn.AutoTsit5()),
}


def calls(size: int) -> dict[tuple[str, str], Callable[[], int]]:
    """What is timed: forward, and with the gradient."""
    p = torch.logspace(-1, 3, size, dtype=D)

    def forward(solve: Solve, algorithm: Any) -> int:
        with torch.no_grad():
            return solve(p, algorithm)[1]

    def gradient(solve: Solve, algorithm: Any) -> int:
        leaf = p.clone().requires_grad_()
        ends, steps = solve(leaf, algorithm)
        torch.autograd.grad(ends.sum(), leaf)
        return steps

    return {
        (name, kind.__name__): lambda kind=kind, how=how: kind(*how)  # type: ignore[misc]
        for name, how in CANDIDATES.items()
        for kind in (forward, gradient)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| members | method | steps | forward, ms | with gradient, ms |\n|---:|---|---:|---:|---:|"
    )
    for size in arguments.sizes:
        timed = calls(size)
        steps = {key: call() for key, call in timed.items()}  # which compile
        best = dict.fromkeys(timed, float("inf"))
        for _ in range(arguments.repeats):
            for key, call in timed.items():
                before = time.process_time()
                call()
                best[key] = min(best[key], 1e3 * (time.process_time() - before))
        for name in CANDIDATES:
            numbers = " | ".join(f"{best[name, x]:.1f}" for x in ("forward", "gradient"))
            print(f"| {size} | {name} | {steps[name, 'forward']} | {numbers} |")
    print(f"{processor()}, core {CORE}; {versions(('torch', 'pysciml_node'))}")


if __name__ == "__main__":
    main()
