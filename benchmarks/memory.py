"""Peak memory of a gradient under each adjoint, with and without regularization.

    python benchmarks/memory.py --steps 200

Every measurement is a process of its own. It takes a warm-up gradient over two steps, notes the
peak resident size so far, takes the gradient, and reports by how much the peak has risen. The last
columns give it in states, beside what arXiv:2303.02262 (section 3) counts for `t` steps of a method
with `k` stages: what an adjoint keeps, and what local regularization adds to it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from timing import pin, table

STAGES = 7  # of DP5
# States that the paper counts for t steps, without and with local regularization. It knows no
# discrete adjoint by replay, whose tape is the accepted states, and none by Gauss quadrature.
PUBLISHED = {
    "BacksolveAdjoint": lambda t: (1, 1 + STAGES),
    "InterpolatingAdjoint": lambda t: (t, t + STAGES),
    "GaussAdjoint": None,
    "DiscreteAdjoint": None,
    "DirectAdjoint": lambda t: (t * STAGES, (t + 1) * STAGES),
}
PENALTIES = ("none", "local", "global")
# Differentiated through the steps, which a continuous adjoint does not know.
WITH_GLOBAL = ("DiscreteAdjoint", "DirectAdjoint")
FEATURES = 784


def peak() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(adjoint: str, penalty: str, steps: int, batch: int) -> float:
    """Rise of the peak in MiB, in this process."""
    import torch
    from workloads import mnist

    import pysciml_node as psn

    torch.set_num_threads(1)
    workload = mnist(batch)
    u0 = workload.u0.clone().requires_grad_()
    kinds = {"none": [], "local": [psn.LocalError], "global": [psn.GlobalError]}

    def gradient(count: int) -> None:
        node = psn.NeuralODE(
            workload.field,
            psn.DP5(),
            saveat=[1.0],
            dt0=1 / count,
            controller=psn.FixedStep(),
            # The discrete adjoint's graphs would be what is measured.
            adjoint=psn.DiscreteAdjoint(memory=0)
            if adjoint == "DiscreteAdjoint"
            else getattr(psn, adjoint)(),
            engine="torch",
            regularizers=[kind(weight=1.0) for kind in kinds[penalty]],
        )
        solution = node(u0)
        loss = (solution.u * workload.cotangent).sum() + solution.penalty
        torch.autograd.grad(loss, [u0, *workload.parameters])

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
    parser.add_argument("--adjoint", choices=list(PUBLISHED), help="measure one, in this process")
    parser.add_argument("--penalty", choices=PENALTIES, default="none")
    arguments = parser.parse_args()
    pin(None)
    if arguments.adjoint:
        print(measure(arguments.adjoint, arguments.penalty, arguments.steps, arguments.batch))
        return
    size = ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    found: dict[str, dict[str, float]] = {}
    for adjoint in PUBLISHED:
        for penalty in PENALTIES:
            if penalty == "global" and adjoint not in WITH_GLOBAL:
                continue
            choice = ["--adjoint", adjoint, "--penalty", penalty]
            command = [sys.executable, __file__, *size, *choice]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.setdefault(adjoint, {})[penalty] = float(run.stdout.split()[-1])
    state = arguments.batch * FEATURES * 4 / 2**20
    print(
        f"784-100-784 field, batch {arguments.batch}, {arguments.steps} fixed steps of DP5; "
        f"a state is {state:.2f} MiB.\nPeak above the warm-up, MiB:\n"
    )
    print(table(HEADING, [row(name, found[name], state, arguments.steps) for name in found]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = {"steps": arguments.steps, "batch": arguments.batch, "peak_mib": found}
    (arguments.out / "memory.json").write_text(json.dumps(data, indent=2) + "\n")


HEADING = ["adjoint", *PENALTIES, "in states", "local adds", "paper", "local adds (paper)"]


def row(adjoint: str, peaks: dict[str, float], state: float, steps: int) -> list[str]:
    """A line of the table."""
    cells = [f"{peaks[name]:.0f}" if name in peaks else "refused" for name in PENALTIES]
    counted = PUBLISHED[adjoint]
    plain, local = (None, None) if counted is None else counted(steps)
    return [
        adjoint,
        *cells,
        f"{peaks['none'] / state:.0f}",
        f"{(peaks['local'] - peaks['none']) / state:+.0f}",
        "-" if plain is None else str(plain),
        "-" if plain is None else f"+{local - plain}",
    ]


if __name__ == "__main__":
    main()
