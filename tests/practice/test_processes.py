"""Native solves in processes that fork while other threads are solving."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

D = torch.float64


def child(rate: float) -> None:
    """A field that nobody has translated yet; torch may have no derivatives in such a process."""
    problem = psn.ODEProblem(lambda t, u: -rate * u, torch.ones(1, dtype=D), (0.0, 1.0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for compiled in ("auto", False):
            u1 = psn.solve(problem, rtol=1e-9, atol=1e-9, compile=compiled).u1
            assert abs(float(u1) - math.e**-rate) < 1e-7


def translating(begun: threading.Event) -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        if not begun.is_set():
            begun.set()
            time.sleep(0.5)
        return -u

    psn.solve(psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0)), compile="auto")


def sweeping(begun: threading.Event) -> None:
    going_back = threading.Event()

    def f(t: Tensor, u: Tensor) -> Tensor:
        if going_back.is_set() and not begun.is_set():
            begun.set()
            time.sleep(0.5)
        return -u

    u0 = torch.ones(1, dtype=D, requires_grad=True)
    adjoint = psn.GaussAdjoint()
    u1 = psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), adjoint=adjoint, compile=False).u1
    going_back.set()
    u1.backward()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.parametrize("busy", [translating, sweeping])
def test_a_process_that_forks_meanwhile(busy: Callable[[threading.Event], None]) -> None:
    begun = threading.Event()
    thread = threading.Thread(target=busy, args=(begun,))
    thread.start()
    assert begun.wait(60)
    process = multiprocessing.get_context("fork").Process(target=child, args=(1.5,))
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    thread.join()
    assert ended == 0


def test_a_sweep_translates_while_a_translation_waits_for_sweeps() -> None:
    """A thread's sweep reaches a native solve that is new while another thread translates."""
    begun, going_back, waited = threading.Event(), threading.Event(), threading.Event()

    def inside(t: Tensor, u: Tensor) -> Tensor:
        return -u

    def f(t: Tensor, u: Tensor) -> Tensor:
        if going_back.is_set() and not waited.is_set():
            begun.wait(1)  # in vain, where a translation waits for sweeps
            waited.set()
            problem = psn.ODEProblem(inside, torch.ones(1, dtype=D), (0.0, 1.0))
            psn.solve(problem, compile="auto")
        return -u

    def other(t: Tensor, u: Tensor) -> Tensor:
        if going_back.is_set() and not begun.is_set():
            begun.set()
            time.sleep(0.5)
        return -u

    def sweep() -> None:
        u0 = torch.ones(1, dtype=D, requires_grad=True)
        adjoint = psn.GaussAdjoint()
        u1 = psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), adjoint=adjoint, compile=False).u1
        going_back.set()
        u1.backward()

    def translate() -> None:
        going_back.wait(60)
        psn.solve(psn.ODEProblem(other, torch.ones(1, dtype=D), (0.0, 1.0)), compile="auto")

    threads = [threading.Thread(target=x, daemon=True) for x in (sweep, translate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
