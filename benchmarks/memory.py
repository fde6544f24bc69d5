"""Peak memory of a gradient under each adjoint, at a fixed number of steps.

    python benchmarks/memory.py --steps 200

Every measurement is a process of its own. It takes a warm-up gradient over two steps, notes the
peak resident size so far, takes the gradient, and reports by how much the peak has risen.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from timing import pin, table

ADJOINTS = ("DirectAdjoint", "DiscreteAdjoint")


def peak() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(adjoint: str, steps: int, batch: int) -> float:
    """Rise of the peak in MiB, in this process."""
    import torch
    from workloads import mnist

    import pysciml_node as psn

    torch.set_num_threads(1)
    workload = mnist(batch)
    u0 = workload.u0.clone().requires_grad_()

    def gradient(count: int) -> None:
        solution = psn.solve(
            psn.ODEProblem(workload.field, u0, (0.0, 1.0)),
            psn.DP5(),
            saveat=[1.0],
            dt0=1 / count,
            controller=psn.FixedStep(),
            adjoint=getattr(psn, adjoint)(),
            engine="torch",
        )
        torch.autograd.grad((solution.u * workload.cotangent).sum(), [u0, *workload.parameters])

    gradient(2)
    before = peak()
    gradient(steps)
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--adjoint", choices=ADJOINTS, help="measure one, in this process")
    arguments = parser.parse_args()
    pin(None)
    if arguments.adjoint:
        print(measure(arguments.adjoint, arguments.steps, arguments.batch))
        return
    size = ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    found = {}
    for adjoint in ADJOINTS:
        command = [sys.executable, __file__, *size, "--adjoint", adjoint]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[adjoint] = float(run.stdout.split()[-1])
    direct = found["DirectAdjoint"]
    rows = [[name, f"{value:.0f}", f"{direct / value:.1f}"] for name, value in found.items()]
    print(f"784-100-784 field, batch {arguments.batch}, {arguments.steps} fixed steps of DP5:\n")
    print(table(["adjoint", "peak above the warm-up, MiB", "times less than direct"], rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = {"steps": arguments.steps, "batch": arguments.batch, "peak_mib": found}
    (arguments.out / "memory.json").write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
