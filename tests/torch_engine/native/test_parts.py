"""Large batches in parts, which threads take: the same bits for any number of these."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from row_fields import ALONE, TOGETHER, D, Field, context, net, outcome, parts, start
from torch import Tensor, nn
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.problems.state import StateSpec
from pysciml_node.torch_engine.native import at_once, emit, library
from pysciml_node.torch_engine.native import parts as splitting
from pysciml_node.torch_engine.native.compiler import available, build
from pysciml_node.torch_engine.native.library import source
from pysciml_node.torch_engine.native.parts import Parts, split
from pysciml_node.translation.export import translate

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

STAGES = 7
# Rows that are taken at once, and parts at most: three parts that come out even, three that do not,
# parts of several turns, and both.
SPLITS = {"even": (4, 3), "uneven": (5, 3), "in turns": (2, 3), "uneven turns": (5, 2)}


@pytest.fixture(autouse=True)
def in_parts(request: Any) -> Iterator[None]:
    """Twelve rows in parts, however small the field is."""
    turn, most = SPLITS[getattr(request, "param", "uneven turns")]
    rows = {"_NEAR": 0, "_FEWEST_ROWS": turn, "_MOST_ROWS": turn}
    library._library.cache_clear()
    with (
        mock.patch.multiple(emit, **rows),
        mock.patch.multiple(splitting, _LEAST_WORK=1, _MOST_PARTS=most),
    ):
        yield
    library._library.cache_clear()


def parts_of(field: nn.Module, u0: Any) -> Parts | None:
    program = translate(field, StateSpec.of(u0)).program
    return emit.whole_or_by_rows(program, D, STAGES).parts


def assert_same_bits(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The results, which are the same for any number of threads."""
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def assert_as_in_python(function: Any) -> None:
    field, u0 = Field(function), start(function)
    assert parts_of(field, u0) is not None
    found = assert_same_bits(lambda: outcome(field, u0, True))
    for native, eager in zip(found, outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", ALONE)
def test_fields_of_rows(function: Any) -> None:
    assert_as_in_python(function)


@pytest.mark.parametrize(
    ("in_parts", "function"), [("even", net), ("uneven", context), ("in turns", parts)],
    indirect=["in_parts"],
)  # fmt: skip
def test_parts_of_every_kind(function: Any) -> None:
    assert_as_in_python(function)


@pytest.mark.parametrize("function", TOGETHER)
def test_rows_that_depend_on_each_other_stay_together(function: Any) -> None:
    assert parts_of(Field(function), start(function)) is None


def test_what_is_of_no_row_and_long_is_not_done_again_for_each_part() -> None:
    def timed(m: Any, t: Tensor, u: Tensor) -> Tensor:
        """Weights that depend on the time."""
        weight = torch.sin(m.w.reshape(21, 1) * t) @ m.b[None]
        return torch.tanh(u @ (weight @ (weight.T @ weight))[:3, :3])

    assert parts_of(Field(timed), start(timed)) is None


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D) if len(values) > 1 else torch.tensor(values[0], dtype=D)


SAVED = tensor(0.1, 0.11, 0.4, 0.5, 0.77, 1.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "steps": {},
    "saved times": {"saveat": SAVED.clone().requires_grad_()},
    "two estimates": {"algorithm": psn.DP8(), "saveat": SAVED},
    "stages for output": {"algorithm": psn.Vern7(), "saveat": SAVED},
    "fixed steps": {"controller": psn.FixedStep(), "dt0": 0.13, "saveat": SAVED, "tstops": [0.5]},
    "no error estimate": {"algorithm": psn.RK4(), "controller": psn.FixedStep(), "dt0": 0.1},
    "tolerances by entries": {
        "rtol": torch.linspace(1e-4, 1e-3, 36, dtype=D).reshape(12, 3),
        "atol": torch.linspace(1e-6, 1e-5, 36, dtype=D).reshape(12, 3),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_solves_of_every_kind(options: str) -> None:
    chosen = {"algorithm": psn.Tsit5(), "rtol": 1e-5, "atol": 1e-7} | OPTIONS[options]
    field, stats = Field(net), []

    def run(compile: bool) -> list[Tensor]:
        u0, span = start(net).requires_grad_(), [tensor(x).requires_grad_() for x in (0.0, 1.0)]
        solution = psn.solve(
            psn.ODEProblem(field, u0, tuple(span)), compile=compile, engine="torch",
            adjoint=psn.DiscreteAdjoint(memory=0), **chosen,
        )  # fmt: skip
        inputs = [u0, *span, field.w, field.v, field.b]
        if isinstance(chosen.get("saveat"), Tensor) and chosen["saveat"].requires_grad:
            inputs.append(chosen["saveat"])
        loss = (solution.u * torch.linspace(-1, 2, 36, dtype=D).reshape(12, 3)).sum()
        stats.append(solution.stats)
        bars = torch.autograd.grad(loss + solution.u1.sin().sum(), inputs)
        return [solution.u.detach(), solution.u1.detach(), *bars]

    found = assert_same_bits(lambda: run(True))
    for native, eager in zip(found, run(False), strict=True):
        # Rounding errors show in the estimates, and so in the sizes of the steps.
        bound = 1e-12 if "controller" in chosen else 1e-7
        torch.testing.assert_close(native, eager, rtol=bound, atol=bound)
    assert all(one == stats[-1] for one in stats)


def test_extra_states_drive_no_steps() -> None:
    field = Field(net)
    node = psn.NeuralODE(field, rtol=1e-5, atol=1e-7, regularizers=[psn.KineticEnergy(weight=0.1)])

    def run(compile: bool, **options: Any) -> list[Tensor]:
        node.compile = compile
        solution = node(start(net), **options)
        return [solution.u1.detach(), solution.penalty.detach(), tensor(float(solution.stats.nfe))]

    for one, other in zip(assert_same_bits(lambda: run(True)), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_failure_names_the_worst_entry_of_the_whole_state() -> None:
    def steep(m: Any, t: Tensor, u: Tensor) -> Tensor:
        return u * u * torch.linspace(1, 3, 3, dtype=D) * 50

    u0 = torch.linspace(0.1, 0.2, 36, dtype=D).reshape(12, 3)
    reasons = []
    for compile in (True, False):
        problem = psn.ODEProblem(Field(steep), u0, (0.0, 1.0))
        with threads(3), pytest.raises(psn.SolverFailure) as failure:
            psn.solve(problem, compile=compile, engine="torch", max_steps=15)
        reasons.append(str(failure.value))
    assert reasons[0] == reasons[1]


def net_solve(u0: Tensor | None = None, **options: Any) -> Any:
    problem = psn.ODEProblem(Field(net), start(net) if u0 is None else u0, (0.0, 1.0))
    return psn.solve(problem, compile=True, rtol=1e-5, atol=1e-7, **options)


def test_events_are_looked_for_in_the_whole_state() -> None:
    u0 = start(net).requires_grad_()
    event = psn.Event(lambda t, u: u[7, 1] - u[0, 0] * t - 1.5 * u0.detach()[7, 1])
    found = []
    for compile in (True, False):
        with threads(2):
            problem = psn.ODEProblem(Field(net), u0, (0.0, 3.0))
            solution = psn.solve(problem, events=event, compile=compile, engine="torch")
        bars = torch.autograd.grad(solution.u1.sum() + solution.t[-1], u0)
        found.append([solution.t[-1], solution.u1, *bars])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("saveat", [None, SAVED])
def test_solves_that_were_before_are_one_call_of_c(saveat: Any) -> None:
    field = Field(net)

    def run() -> list[Tensor]:
        u0 = start(net).requires_grad_()
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        solution = psn.solve(problem, compile=True, engine="torch", saveat=saveat)
        states = solution.u if saveat is not None else solution.u1
        bars = torch.autograd.grad(states.square().sum(), [u0, field.w, field.v, field.b])
        with torch.no_grad():
            assert torch.equal(psn.solve(problem, compile=True, engine="torch").u1, solution.u1)
        return [states.detach(), *bars]

    _, expected = run(), run()
    # Which would take the steps otherwise.
    with mock.patch.object(at_once, "NativeSolve", side_effect=AssertionError):
        found = assert_same_bits(run)
    assert all(map(torch.equal, found, expected))


def test_solves_within_solves() -> None:
    def affect(t: Tensor, u: Tensor) -> Tensor:
        return net_solve(u).u1

    jump = psn.Event(at=[0.4], affect=affect)
    with threads(3):
        nested = net_solve(events=jump).u1
    with threads(1):
        torch.testing.assert_close(nested, net_solve(events=jump).u1, rtol=0, atol=0)


def test_solves_in_several_threads_of_python() -> None:
    expected, found = net_solve(), []

    def work() -> None:
        torch.set_num_threads(3)
        for _ in range(20):
            u0 = start(net).requires_grad_()
            solution = net_solve(u0)
            solution.u1.sum().backward()
            found.append(torch.equal(solution.u1, expected.u1))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 80


def test_a_process_that_forks_after_a_solve_solves() -> None:
    with threads(3):
        expected = net_solve().u1
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(net_solve().u1, expected) else 1)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
        assert ended == (child, 0)


def test_an_interrupt_ends_a_solve_in_threads() -> None:
    problem = psn.ODEProblem(lambda t, u: torch.sin(u) * 1e-3, start(net), (0.0, 1e9))
    fixed = {"controller": psn.FixedStep(), "compile": True}
    psn.solve(problem, dt0=1e8, **fixed)  # compiled
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    begun = time.monotonic()
    timer.start()
    with threads(2), pytest.raises(KeyboardInterrupt):
        psn.solve(problem, dt0=1.0, max_steps=10**10, saveat=[1e9], **fixed)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("total", [12, 97, 100, 509, 512, 1009])
@pytest.mark.parametrize("turns", [(), range(6, 17)])
def test_parts_are_alike_and_hold_every_row_once(total: int, turns: Any) -> None:
    split_up = split((2, 1), total, 10**9, turns, total // 4)
    assert split_up is not None
    rows, repeated, count = split_up.rows, split_up.repeated, split_up.count
    assert rows % split_up.turn == 0
    assert 0 <= repeated < rows <= total
    assert count * rows == total + repeated
    state = torch.arange(3 * total)
    first, second = state[: 2 * total].reshape(-1, 2), state[2 * total :]
    starts = [min(i * rows, total - rows) for i in range(count)]
    blocks = [torch.cat([first[i : i + rows].reshape(-1), second[i : i + rows]]) for i in starts]
    assert torch.equal(split_up.joined(torch.stack(blocks)), state)


TEAM = """
#include <stdint.h>
#include <time.h>
#include <math.h>
%s
typedef struct { int64_t sums[PARTS], modes; } Job;
static void add(void *x, int part) {
  Job *job = x;
  for (int i = 0; i < part * 20 %% 91; i++) psn_pause();
  job->sums[part] += part + 1;
  if (fegetround() != FE_UPWARD) SHOW(job->modes, 1);
}
int64_t work(int64_t jobs, int64_t threads, int64_t pause) {
  Team team;
  Job job = {{0}, 0};
  int before = fegetround();
  fesetround(FE_UPWARD);
  psn_open(&team, PARTS, threads);
  for (int64_t i = 0; i < jobs; i++) {
    psn_do(&team, add, &job);
    for (double until = psn_seconds() + (i %% 50 ? 0 : pause * 1e-6); psn_seconds() < until;) {}
    for (int part = 0; part < PARTS; part++)
      if (job.sums[part] != (i + 1) * (part + 1)) return -1;
  }
  psn_close(&team);
  fesetround(before);
  return job.modes ? -2 : team.made;
}
"""


@pytest.mark.parametrize("refused", [False, True])
def test_a_team_does_every_part_of_every_job_once(refused: bool) -> None:
    text = source("codes.h")
    team = source("team.h")
    if refused:  # as a system does that has no more threads
        team = team.replace("pthread_create(", "refuse(", 1)
        team = team.replace("static void psn_pause", "#define refuse(...) 1\nstatic void psn_pause")
    code = build("enum { PARTS = 7 };\n" + TEAM % f"{text}\n{team}")
    code.work.restype = ctypes.c_int64
    code.work.argtypes = [ctypes.c_int64] * 3
    for count, made in ((1, 0), (2, 1), (3, 2), (50, 6)):
        assert code.work(2000, count, 200) == (0 if refused else made)


def test_a_state_that_is_not_finite_ends_a_solve() -> None:
    u0 = start(net)
    u0[11, 2] = math.nan
    with threads(2):
        assert net_solve(u0, throw=False).retcode is psn.ReturnCode.Unstable
