"""Solves that are stopped, that fail, and that are forgotten: Julia stays whole, and small."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import pysciml_node as psn
from pysciml_node.julia_engine.process import runtime

pytestmark = pytest.mark.julia


class Turn(torch.nn.Module):
    """A rotation, which never ends and which a network can be exported as."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Linear(2, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.matrix.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.matrix(u)


FIELDS = {"module": Turn(), "callback": lambda t, u: torch.stack([u[..., 1], -u[..., 0]], -1)}


def solve(field: object, t1: float, **options: object) -> psn.Solution:
    u0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    problem = psn.ODEProblem(field, u0, (0.0, t1))
    return psn.solve(problem, psn.Tsit5(), engine="julia", **options)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is not passed on to Julia there")
@pytest.mark.parametrize("field", FIELDS)
def test_ctrl_c_stops_a_solve_within_a_second(field):
    with torch.no_grad():
        solve(FIELDS[field], 1.0)  # compiled
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        start = time.perf_counter()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            solve(FIELDS[field], 1e6, max_steps=100_000_000, saveat=[1e6])
        assert time.perf_counter() - start < 1.3
        timer.join()
        assert solve(FIELDS[field], 1.0).retcode is psn.ReturnCode.Success


def resident() -> int:
    """Kilobytes of memory this process occupies."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def held() -> int:
    """Objects that Julia keeps for Python."""
    gc.collect()
    runtime.free_pending()
    return int(runtime.call("held"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_flat_over_a_thousand_good_and_a_thousand_failing_solves():
    field = FIELDS["module"]

    def iterate(count: int) -> None:
        for _ in range(count):
            solution = solve(field, 1.0)
            solution.u1.sum().backward()
            field.zero_grad()
            with pytest.raises(psn.SolverFailure):
                solve(field, 1.0, max_steps=1, rtol=1e-10, atol=1e-10)

    iterate(200)  # until allocators have what they keep
    objects, memory = held(), resident()
    iterate(1000)
    assert held() <= objects
    assert resident() - memory < 30_000


def test_a_solution_that_is_never_differentiated_is_freed_with_it():
    field = FIELDS["module"]
    before = held()
    solutions = [solve(field, 1.0, adjoint=psn.GaussAdjoint()) for _ in range(5)]
    during = held()
    del solutions
    assert before + 5 <= during
    assert held() <= before + 2  # the plan and the field, which the next solve uses again
