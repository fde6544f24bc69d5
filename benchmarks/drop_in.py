"""`compat.torchdiffeq` beside torchdiffeq: the same calls in one run, on one core.

    python benchmarks/drop_in.py

A row is a function, a method and a size; time is CPU time of a forward solve with its gradient, and
evaluations are those of both. The last column is the error of the gradient beside that of
torchdiffeq's, both against a solve with tolerances of 1e-11 (adaptive methods only).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timing

SIZES = ((20, 2, 50), (128, 8, 64))
ADAPTIVE = ("dopri5", "tsit5", "bosh3", "dopri8")
FIXED = ("euler", "midpoint", "rk4", "explicit_adams", "implicit_adams")
IMPLICIT = ("implicit_euler", "gl4", "radauIIA5", "trbdf2")


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--core", type=int, default=None)
    arguments.add_argument("--repeats", type=int, default=5)
    chosen = arguments.parse_args()
    timing.pin(chosen.core)
    import torch
    import torchdiffeq

    from pysciml_node.compat import torchdiffeq as ours

    torch.set_num_threads(1)
    packages = {"ours": ours, "theirs": torchdiffeq}
    known = torchdiffeq._impl.odeint.__globals__["SOLVERS"]
    print("function method size | time (ours, theirs, ratio) | evaluations | gradient error")
    for batch, width, hidden in SIZES:
        generator = torch.Generator().manual_seed(0)
        y0 = torch.randn(batch, width, generator=generator).double()
        field = _field(torch, width, hidden)
        for function in ("odeint", "odeint_adjoint"):
            for method in (*ADAPTIVE, *FIXED, *IMPLICIT):
                if method not in known or (method in IMPLICIT and batch * width > 64):
                    continue
                options = None if method in ADAPTIVE else {"step_size": 0.05}
                t = torch.tensor([0.0, 1.0], dtype=torch.float64)
                arguments_ = {"method": method, "options": options, "rtol": 1e-6, "atol": 1e-6}
                runs = {
                    name: _run(getattr(package, function), field, y0, t, arguments_)
                    for name, package in packages.items()
                }
                row = timing.interleave(
                    {name: run[0] for name, run in runs.items()}, chosen.repeats
                )
                errors = _errors(runs, ours, field, y0, t) if method in ADAPTIVE else ""
                a, b = row["ours"].cpu, row["theirs"].cpu
                print(
                    f"{function} {method} {batch}x{width} | {a:.2f} ms, {b:.2f} ms, {a / b:.2f} | "
                    f"{runs['ours'][1]}, {runs['theirs'][1]} | {errors}",
                    flush=True,
                )


def _field(torch: Any, width: int, hidden: int) -> Any:
    class Field(torch.nn.Module):
        """A tanh MLP that counts its evaluations."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = (
                torch.nn.Linear(width, hidden),
                torch.nn.Tanh(),
                torch.nn.Linear(hidden, width),
            )
            self.net = torch.nn.Sequential(*layers).double()
            self.nfe = 0

        def forward(self, t: Any, y: Any) -> Any:
            self.nfe += 1
            return self.net(y)

    return Field()


def _run(
    solve: Callable[..., Any], field: Any, y0: Any, t: Any, arguments: dict[str, Any]
) -> tuple[Callable[[], object], int, Callable[[], Any]]:
    """A call that solves and differentiates, its evaluations, and what gives the gradient."""

    def call() -> Any:
        field.zero_grad()
        solve(field, y0, t, **arguments)[-1].square().mean().backward()
        return field.net[0].weight.grad

    field.nfe = 0
    call()
    return call, field.nfe, call


def _errors(runs: Any, ours: Any, field: Any, y0: Any, t: Any) -> str:
    exact = _run(ours.odeint, field, y0, t, {"rtol": 1e-11, "atol": 1e-11})[2]().clone()
    errors = [float((run[2]() - exact).norm() / exact.norm()) for run in runs.values()]
    return ", ".join(f"{error:.1e}" for error in errors)


if __name__ == "__main__":
    main()
