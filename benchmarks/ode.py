"""Adaptive solves side by side with torchdiffeq, torchode and diffrax, on one core.

    python benchmarks/ode.py                        # everything, written to runs/benchmarks
    python benchmarks/ode.py --workload mnist --repeats 40 --only pysciml_node diffrax

Same method (Dormand-Prince 5(4)), integral controller, tolerances, weights and outputs for all; on
stiff equations implicit methods beside it.
"Floor" is the number of evaluations times the bare right-hand side; for gradients, evaluations
times (right-hand side + right-hand side with its pullback).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import interleave, pin, processor, table, versions

if TYPE_CHECKING:
    from peers import Candidate
    from torch import Tensor
    from workloads import Workload

FIELD, FIELD_PULLBACK, FIELD_FRESH = "field", "field and pullback", "field, fresh input"
# The candidates that others are compared with, first.
YARDSTICKS = ("torchdiffeq", "diffrax")
NAMES = ("spiral", "spiral-fitted", "lotka-volterra", "robertson", "moons", "latent", "mnist")


def prime_allocator() -> None:
    """Free one large block, so that the C library keeps the memory of all that follow.

    Until a process has done so, glibc hands the pages of every large temporary back and has them
    faulted in again, which costs an evaluation of a large field up to half its time, in all
    packages alike; a training process gets there by itself.
    """
    import torch

    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)


def field_calls(workload: Workload) -> dict[str, Callable[[], object]]:
    """The bare right-hand side: alone, with its pullback, and on inputs that are not in cache."""
    import torch

    t, u = torch.tensor(workload.times[0], dtype=workload.u0.dtype), workload.u0
    cotangent = workload.cotangent[0]
    leaf = u.clone().requires_grad_()
    states = [u.clone() for _ in range(8)]
    turn = 0

    def field() -> None:
        with torch.no_grad():
            workload.field(t, u)

    def fresh() -> None:
        nonlocal turn
        turn = (turn + 1) % len(states)
        with torch.no_grad():
            workload.field(t, states[turn])

    def pullback() -> None:
        out = workload.field(t, leaf)
        torch.autograd.grad(out, [leaf, *workload.parameters], cotangent)

    return {FIELD: field, FIELD_FRESH: fresh, FIELD_PULLBACK: pullback}


def prepare(workload: Workload, only: list[str]) -> dict[str, Candidate]:
    """The candidates that can run here; the others are named with the reason."""
    from peers import CANDIDATES, Unavailable

    ready = {}
    for name, make in CANDIDATES.items():
        if only and name not in only:
            continue
        try:
            ready[name] = make(workload)
        except Unavailable as reason:
            print(f"skipped {name}: {reason}")
    return ready


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """`|found - expected| / |expected|` over all tensors together, Euclidean."""
    top = sum(float((x.double() - y).square().sum()) for x, y in zip(found, expected, strict=True))
    return math.sqrt(top / sum(float(y.square().sum()) for y in expected))


def measure(workload: Workload, repeats: int, only: list[str]) -> dict[str, Any]:
    """Run one workload; returns what is written as JSON."""
    from workloads import reference

    outputs, gradients = reference(workload)
    candidates = prepare(workload, only)
    prime_allocator()
    fields = field_calls(workload)
    forward = interleave({**fields, **{name: c.forward for name, c in candidates.items()}}, repeats)
    gradient = interleave(
        {**fields, **{name: c.gradient for name, c in candidates.items()}}, repeats
    )
    rows = {
        name: {
            "nfe": candidate.nfe,
            "nfe_backward": candidate.nfe_backward,
            "forward": forward[name].as_dict(),
            "gradient": gradient[name].as_dict(),
            "error": float((candidate.outputs.double() - outputs).abs().max()),
            "gradient_error": relative_difference(candidate.gradients, gradients),
        }
        for name, candidate in candidates.items()
    }
    found = [c.outputs.double() for c in candidates.values()]
    return {
        "description": workload.description,
        "fields": {
            "forward": {name: forward[name].as_dict() for name in fields},
            "gradient": {name: gradient[name].as_dict() for name in fields},
        },
        "rows": rows,
        "largest_difference": max(
            (float((x - y).abs().max()) for x, y in combinations(found, 2)), default=0.0
        ),
    }


def floor(result: dict[str, Any], row: dict[str, Any], kind: str, clock: str) -> float:
    """Milliseconds that the row's evaluations of the bare right-hand side alone would take."""
    fields = result["fields"][kind]
    per_evaluation: float = fields[FIELD][clock]
    if kind == "gradient":
        per_evaluation += fields[FIELD_PULLBACK][clock]
    evaluations: int = row["nfe"]
    return evaluations * per_evaluation


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} [{spread['low']:.3g}, {spread['high']:.3g}]"


def report(name: str, result: dict[str, Any], clock: str) -> str:
    """The tables of one workload in Markdown."""
    rows = result["rows"]
    lines = [f"## {name}", "", result["description"] + ".", ""]
    fields = ", ".join(
        f"{key} {_times(value)} ms" for key, value in result["fields"]["forward"].items()
    )
    lines += [f"Bare right-hand side: {fields}.", ""]
    yardsticks = [name for name in YARDSTICKS if name in rows]
    for kind in ("forward", "gradient"):
        header = [f"{kind}, ms", "median [quartiles]", "CPU", "NFE", "floor", "/ floor"]
        body = []
        for row_name, row in rows.items():
            spread, least = row[kind], floor(result, row, kind, clock)
            value = spread[clock]
            nfe = str(row["nfe"])
            if kind == "gradient" and row["nfe_backward"]:
                nfe += f" + {row['nfe_backward']}"
            cells = [row_name, _times(spread), f"{spread['cpu']:.3g}", nfe, f"{least:.3g}"]
            cells.append(f"{value / least:.2f}")
            cells += [f"{value / rows[other][kind][clock]:.2f}" for other in yardsticks]
            body.append(cells)
        lines += [table(header + [f"/ {other}" for other in yardsticks], body), ""]
    body = [
        [row_name, f"{row['error']:.1e}", f"{row['gradient_error']:.1e}"]
        for row_name, row in rows.items()
    ]
    lines += [
        table(["accuracy", "largest error of the outputs", "relative error of the gradient"], body),
        "",
        f"Largest difference between two of them: {result['largest_difference']:.1e}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", choices=NAMES)
    parser.add_argument("--only", nargs="+", default=[], help="names of the rows to run")
    parser.add_argument("--repeats", type=int, default=20, help="samples of each row, at least 20")
    parser.add_argument("--core", type=int, help="core to run on; default the last one allowed")
    parser.add_argument(
        "--clock",
        choices=("median", "cpu"),
        default="median",
        help="what ratios are taken of: wall time, or CPU time on a machine that is shared",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    core = pin(arguments.core)

    import torch
    from peers import PACKAGES
    from workloads import WORKLOADS

    torch.set_num_threads(1)
    machine = {"processor": processor(), "core": core, "versions": versions(PACKAGES)}
    text = [
        "# Adaptive solves, side by side",
        "",
        f"{machine['processor']}, pinned to core {core}, {arguments.repeats} interleaved samples; "
        + ", ".join(f"{key} {value}" for key, value in versions(PACKAGES).items())
        + ".",
        "",
    ]
    print("\n".join(text))
    results = {}
    for name in arguments.workload or WORKLOADS:
        results[name] = measure(WORKLOADS[name](), arguments.repeats, arguments.only)
        text.append(report(name, results[name], arguments.clock))
        print(text[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ode.md").write_text("\n".join(text))
    data = {"machine": machine, "workloads": results}
    (arguments.out / "ode.json").write_text(json.dumps(data, indent=2) + "\n")
    print(f"written: {arguments.out}/ode.md, {arguments.out}/ode.json")


if __name__ == "__main__":
    main()
