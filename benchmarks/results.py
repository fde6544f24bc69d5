"""Every comparison with other packages, one after the other, written to benchmarks/RESULTS.md.

    python benchmarks/results.py            # what `make bench` does: ten to twelve minutes
    python benchmarks/results.py --quick    # a few samples of each row, to see that all of them run

Each comparison is a script of its own, with a process of its own; their rows say what is compared,
and how far the results are from a tight reference. Peers that are not installed are left out. A
full run of all of them is added to benchmarks/history.jsonl.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import history
from timing import processor, versions

HERE = Path(__file__).parent
PACKAGES = (
    *("pysciml_node", "torch", "numpy", "torchdiffeq", "torchode", "torchsde"),
    *("diffrax", "jax", "jaxlib", "gradsolve"),
)


@dataclass(frozen=True)
class Comparison:
    """A script, what it compares, and its arguments in full and in short."""

    title: str
    script: str
    full: tuple[str, ...]
    quick: tuple[str, ...]


MEMBERS = ("native", "eager, batched=True", "diffrax", "gradsolve", "gradsolve, Warp", "torchode")
COMPARISONS = (
    Comparison("Adaptive solves", "ode.py", ("--repeats", "20"), ("--repeats", "2")),
    Comparison("Native code beside the loop in Python", "native.py", (), ()),
    Comparison(
        "Ensembles",
        "members.py",
        # One by one in Python, a thousand members would take minutes.
        ("--sizes", "200", "1000", "--only", *MEMBERS),
        ("--sizes", "20"),
    ),
    Comparison("Stochastic solves", "against_torchsde.py", ("--repeats", "3"), ("--repeats", "2")),
)


def run(comparison: Comparison, quick: bool) -> tuple[str, str]:
    """The command of a comparison, and the Markdown that it prints."""
    arguments = comparison.quick if quick else comparison.full
    command = [sys.executable, str(HERE / comparison.script), *arguments]
    shown = " ".join(("python", f"benchmarks/{comparison.script}", *arguments))
    print(f"{shown} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        return shown, f"It has failed with code {done.returncode}."
    # Headings of a script become those below its own.
    lines = [f"#{line}" if line.startswith("#") else line for line in done.stdout.splitlines()]
    return shown, "\n".join(line for line in lines if not line.startswith("written: ")).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few samples of each row")
    parser.add_argument("--only", nargs="+", default=[], help="names of scripts, such as ode.py")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "versions": versions(PACKAGES),
    }
    found = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = ["# Results", "", f"{about['processor']}, {about['date']}; {found}.", ""]
    for comparison in COMPARISONS:
        if arguments.only and comparison.script not in arguments.only:
            continue
        command, printed = run(comparison, arguments.quick)
        text += [f"## {comparison.title}", "", f"`{command}`", "", printed, ""]
        arguments.out.write_text("\n".join(text), encoding="utf-8")
    if not (arguments.quick or arguments.only):
        history.add("\n".join(text), about)
    print(f"written: {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
