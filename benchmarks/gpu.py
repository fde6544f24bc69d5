"""Solves on a GPU, beside torchdiffeq where it is installed, and what the host waits for.

    python benchmarks/gpu.py                  # on the first GPU, written to runs/benchmarks
    python benchmarks/gpu.py --device cpu     # the same rows on the processor: to try the script

Times are medians with quartiles, the device waited for. A forward solve can take no less than its
evaluations times the bare right-hand side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import interleave, table, versions
from torch import Tensor
from workloads import Workload, mnist, spiral

import pysciml_node as psn

Call = Callable[[], object]
ADJOINTS = (psn.DiscreteAdjoint(), psn.InterpolatingAdjoint(), psn.GaussAdjoint())


def waited(call: Call, device: torch.device) -> Call:
    """The call, ended when the device is done."""

    def wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def solve(work: Workload, u0: Tensor, adjoint: psn.Adjoint) -> psn.Solution:
    """The workload with the method and the controller that torchdiffeq has."""
    problem = psn.ODEProblem(work.field, u0, (work.times[0], work.times[-1]))
    options: dict[str, Any] = {"rtol": work.tolerance, "atol": work.tolerance}
    return psn.solve(
        problem,
        psn.DP5(),
        saveat=work.times[1:],
        adjoint=adjoint,
        controller=psn.IController(),
        engine="torch",
        **options,
    )


def gradient(work: Workload, u0: Tensor, outputs: Callable[[Tensor], Tensor]) -> Call:
    """Outputs, and the gradient of their product with the workload's cotangent."""
    weights = work.cotangent.to(u0.device)

    def call() -> None:
        leaf = u0.clone().requires_grad_()
        torch.autograd.grad((outputs(leaf) * weights).sum(), [leaf, *work.parameters])

    return call


def ode_calls(work: Workload, device: torch.device) -> tuple[dict[str, Call], int]:
    """What to time of a workload, and the evaluations of a forward solve."""
    work.field.to(device)
    u0 = work.u0.to(device)
    time = torch.tensor(work.times[0], device=device)
    default = psn.DiscreteAdjoint()

    def field() -> None:
        with torch.no_grad():
            work.field(time, u0)

    def forward() -> None:
        with torch.no_grad():
            solve(work, u0, default)

    calls: dict[str, Call] = {"field": field, "forward": forward}
    for adjoint in ADJOINTS:
        ours = gradient(work, u0, lambda leaf, adjoint=adjoint: solve(work, leaf, adjoint).u)
        calls[f"gradient, {type(adjoint).__name__}"] = ours
    try:
        from torchdiffeq import odeint
    except ImportError:
        print("torchdiffeq is not installed: its rows are left out.")
    else:
        times = torch.tensor(work.times, device=device)

        def theirs(leaf: Tensor) -> Tensor:
            return odeint(work.field, leaf, times, rtol=work.tolerance, atol=work.tolerance)[1:]

        def theirs_forward() -> None:
            with torch.no_grad():
                theirs(u0)

        calls["forward, torchdiffeq"] = theirs_forward
        calls["gradient, torchdiffeq"] = gradient(work, u0, theirs)
    with torch.no_grad():
        nfe = solve(work, u0, default).stats.nfe
    return calls, nfe


def lorenz_calls(members: int, device: torch.device) -> dict[str, Call]:
    """An ensemble of Lorenz systems, each with steps and a parameter of its own."""

    def field(t: Tensor, u: Tensor, rho: Tensor) -> Tensor:
        x, y, z = u.unbind(-1)
        return torch.stack((10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z), -1)

    rho = torch.linspace(20, 30, members, dtype=torch.float64, device=device)
    start = torch.ones(3, dtype=torch.float64, device=device)
    one = psn.ODEProblem(field, start, (0.0, 1.0), p=rho[0])

    def end(p: Tensor) -> Tensor:
        problem = psn.EnsembleProblem(one, p=p)
        return psn.solve(problem, psn.Tsit5(), rtol=1e-6, atol=1e-6, engine="torch").u1

    def forward() -> None:
        with torch.no_grad():
            end(rho)

    def both() -> None:
        leaf = rho.clone().requires_grad_()
        torch.autograd.grad(end(leaf).sum(), leaf)

    return {"forward": forward, "gradient": both}


def peak(call: Call, device: torch.device) -> float | None:
    """Largest memory of the device during a call, above what was there, in MiB."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    waited(call, device)()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def main() -> None:
    """Time everything, print tables, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--members", type=int, nargs="+", default=[200, 10_000])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/gpu.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use: try --device cpu.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows: list[dict[str, Any]] = []

    def keep(workload: str, calls: dict[str, Call], nfe: int | None) -> None:
        timed = interleave(
            {k: waited(call, device) for k, call in calls.items()}, arguments.repeats
        )
        for what, spread in timed.items():
            memory = peak(calls[what], device)
            rows.append(
                {"workload": workload, "what": what, "nfe": nfe, "MiB": memory} | spread.as_dict()
            )

    for work in (spiral(fitted=True), mnist()):
        keep(work.name, *ode_calls(work, device))
    for members in arguments.members:
        keep(f"Lorenz, {members:,} members", lorenz_calls(members, device), None)
    shown = [
        [
            f"{row['workload']}: {row['what']}",
            "-" if row["nfe"] is None else str(row["nfe"]),
            f"{row['median']:.3g}",
            f"{row['low']:.3g} to {row['high']:.3g}",
            "-" if row["MiB"] is None else f"{row['MiB']:.1f}",
        ]
        for row in rows
    ]
    print(f"\n{name}\n\n" + table(["", "evaluations", "ms", "quartiles", "MiB"], shown))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = versions(["torch", "torchdiffeq", "pysciml_node"])
    arguments.out.write_text(
        json.dumps({"device": name, "versions": found, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
