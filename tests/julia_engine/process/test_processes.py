"""Julia in processes of their own: import orders, several threads, spawned children."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest

from pysciml_node.julia_engine.process import launch, runtime

pytestmark = pytest.mark.julia

ORDERS = {
    "torch first": "import torch; from pysciml_node.julia_engine.process import runtime",
    "juliacall first": "import juliacall; from pysciml_node.julia_engine.process import runtime",
}

USE_BOTH = """
import torch
runtime.start()
product = runtime._runtime.module.seval("(a, n) -> sum(fill(a, n, n) * fill(a, n, n))")
for n in (2, 300):
    a = torch.full((n, n), 1.5, dtype=torch.float64)
    assert float((a @ a).sum()) == product(1.5, n)
torch.nn.functional.conv2d(torch.ones(8, 3, 32, 32), torch.ones(8, 3, 3, 3)).sum().item()
a = torch.ones(64, 64, requires_grad=True)
torch.linalg.matrix_exp(a / 64).sum().backward()
"""

INTERRUPT = """
import os, signal, threading, time
module = runtime._runtime.module
assert module.seval("() -> Threads.nthreads()")() == 2
loop = module.seval('''
    function (fd, seconds)
        start = time()
        while time() - start < seconds
            stop_when_interrupted(fd)
            Threads.@threads for i = 1:4
                sum(rand(100))
            end
            GC.gc(false)
        end
        return 1
    end''')
runtime._runtime.functions["loop"] = loop
runtime.call_released("loop", 0.01)  # compiled
for _ in range(2):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    try:
        runtime.call_released("loop", 60.0)
    except KeyboardInterrupt:
        assert time.perf_counter() - start < 1.5
    else:
        raise SystemExit("not interrupted")
    assert runtime.call_released("loop", 0.01) == 1
"""


def run(script: str, **variables: str) -> None:
    """Run a script where juliacall, imported alone, finds the same Julia as the engine."""
    found = launch.choose().installation
    if found is not None:
        variables = {
            "PYTHON_JULIACALL_EXE": found.julia.executable,
            "PYTHON_JULIACALL_PROJECT": found.project,
            "JULIA_DEPOT_PATH": os.pathsep.join(found.julia.depots),
            **variables,
        }
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON_JULIACALL")
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_both_work_in_either_order(order):
    run(ORDERS[order] + USE_BOTH)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is not passed on to Julia there")
def test_ctrl_c_stops_several_threads_too():
    """With several threads Julia handles signals itself, and must leave this one to Python."""
    start = "from pysciml_node.julia_engine.process import runtime\nruntime.start()"
    run(start + INTERRUPT, PYTHON_JULIACALL_THREADS="2")


def test_a_spawned_child_has_a_julia_of_its_own():
    before = runtime.call("held")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(runtime.call, ("held",)).get(timeout=300) == 0
    assert runtime.call("held") == before
