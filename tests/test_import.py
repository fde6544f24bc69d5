"""Importing the package is quick and starts nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys, threading, time
import torch

def tasks():
    # Threads that Python knows nothing of, where the system lists them.
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

threads, before = threading.active_count(), tasks()
loaded = set(sys.modules)
start = time.perf_counter()
cpu = time.process_time()
import pysciml_node
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({
    "seconds": seconds,
    "cpu": cpu,
    "threads": threading.active_count() - threads,
    "tasks": tasks() - before,
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}),
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """What an import in a process of its own has done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # As an installed package, which has its bytecode: the first of the two leaves it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
    assert run.stderr == ""
    found: dict[str, object] = json.loads(run.stdout)
    return found


def test_the_import_takes_under_a_second_beyond_torch(imported: dict[str, float]) -> None:
    """By the processor's time, which other programs do not change."""
    assert imported["cpu"] < 1.0


def test_the_import_starts_no_threads(imported: dict[str, int]) -> None:
    assert imported["threads"] == 0
    assert imported["tasks"] == 0


@pytest.mark.parametrize(
    "name",
    [
        *("juliacall", "juliapkg", "matplotlib", "sklearn", "scipy", "tqdm", "pandas"),
        *("pysciml_node.compat.torchdiffeq", "pysciml_node.compat.torchsde"),
    ],
)
def test_the_import_leaves_alone(imported: dict[str, list[str]], name: str) -> None:
    assert name not in imported["modules"]


def test_a_solve_starts_nothing_either() -> None:
    script = (
        "import sys, threading, torch, pysciml_node as psn\n"
        "before = threading.active_count()\n"
        "psn.solve(psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0)))\n"
        "assert threading.active_count() == before\n"
        "assert 'juliacall' not in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
