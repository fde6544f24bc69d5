"""Ensembles are the single solves, each with its own steps: states, gradients, failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

SAVEAT = [0.0, 0.4, 0.9, 1.5]
SPAN = (0.0, 1.5)
OPTIONS: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7, "saveat": SAVEAT}


class Swirl(nn.Module):
    """A module, which the Julia engine translates."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.weight) * (1 + t)


def starts(members: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(members, 2, generator=generator, dtype=torch.float64).requires_grad_()


def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p * u


def explode(t: Tensor, u: Tensor) -> Tensor:
    """`u0 / (1 - u0 t)`: the end is out of reach for `u0 >= 1 / t1`."""
    return u**2


def same(ensemble: psn.EnsembleSolution, single: list[psn.Solution], inputs: list[Tensor]) -> None:
    """States, steps and gradients are those of the single solves, but for rounding in batches."""
    near: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ensemble.u1, torch.stack([s.u1 for s in single]), **near)
    torch.testing.assert_close(ensemble.u, torch.stack([s.u for s in single]), **near)
    for member, alone in zip(ensemble, single, strict=True):
        # Sizes follow from error estimates, which are differences.
        torch.testing.assert_close(member.step_times, alone.step_times, rtol=1e-6, atol=0)
        assert (member.retcode, member.stats) == (alone.retcode, alone.stats)
    losses = (
        (ensemble.u**2).sum() + ensemble.u1.sum(),
        sum((s.u**2).sum() + s.u1.sum() for s in single),
    )
    found, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
    torch.testing.assert_close(found, expected, **near)


@pytest.mark.parametrize("translated", [True, False])
def test_members_are_the_single_solves(translated: bool, engine: str) -> None:
    field, u0 = Swirl(), starts()
    f = field if translated else lambda t, u: field(t, u)
    problem = psn.ODEProblem(f, torch.zeros(2).double(), SPAN)
    ensemble = psn.solve(psn.EnsembleProblem(problem, u0), engine=engine, **OPTIONS)
    single = [
        psn.solve(psn.ODEProblem(f, row, SPAN), engine=engine, **OPTIONS) for row in u0.unbind()
    ]
    assert {s.engine for s in ensemble} == {engine}
    assert len({len(s.step_times) for s in ensemble}) > 1
    same(ensemble, single, [u0, field.weight])


def test_parameters_of_each_member(engine: str) -> None:
    u0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[0.5], [1.0], [8.0]], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(decay, u0, SPAN)
    ensemble = psn.solve(psn.EnsembleProblem(problem, p=p), psn.Vern7(), engine=engine, **OPTIONS)
    exact = u0 * torch.exp(-p[:, None] * torch.tensor(SAVEAT).double()[:, None])
    torch.testing.assert_close(ensemble.u, exact, rtol=1e-6, atol=1e-6)
    found, expected = (torch.autograd.grad(x.sum(), (u0, p)) for x in (ensemble.u, exact))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_states_and_parameters_of_several_parts(engine: str) -> None:
    def f(t: Tensor, u: dict[str, Tensor], p: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"x": p[0] * u["y"].sum(), "y": -p[1] * u["y"]}

    u0 = {"x": torch.zeros(3).double(), "y": torch.rand(3, 2).double()}
    p = (torch.rand(3).double(), torch.rand(3, 1).double())
    shared = psn.ODEProblem(f, {"x": u0["x"][0], "y": u0["y"][0]}, SPAN, p=(p[0][0], p[1][0]))
    ensemble = psn.solve(psn.EnsembleProblem(shared, u0, p), engine=engine, **OPTIONS)
    assert ensemble.u1["y"].shape == (3, 2)
    assert ensemble.u["x"].shape == (3, len(SAVEAT))
    for m in range(3):
        alone = psn.ODEProblem(f, {k: x[m] for k, x in u0.items()}, SPAN, p=(p[0][m], p[1][m]))
        expected = psn.solve(alone, engine=engine, **OPTIONS)
        torch.testing.assert_close(ensemble.u["y"][m], expected.u["y"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ensemble.u1["x"][m], expected.u1["x"], rtol=1e-12, atol=1e-12)


def test_stats_are_summed(engine: str) -> None:
    problem = psn.ODEProblem(Swirl(), torch.zeros(2).double(), SPAN)
    ensemble = psn.solve(psn.EnsembleProblem(problem, starts(3)), engine=engine, **OPTIONS)
    before = ensemble.stats
    assert before.nfe == sum(s.nfe for s in ensemble.member_stats) > 0
    assert before.naccept == sum(len(s.step_times) - 1 for s in ensemble)
    ensemble.u1.sum().backward()
    assert before.nvjp == 0
    assert ensemble.stats.nvjp == sum(s.stats.nvjp for s in ensemble) > 0


def test_without_gradients_and_without_times(engine: str) -> None:
    problem = psn.ODEProblem(Swirl(), torch.zeros(2).double(), SPAN)
    with torch.no_grad():
        ensemble = psn.solve(psn.EnsembleProblem(problem, starts(2)), engine=engine)
    assert not ensemble.u1.requires_grad
    assert torch.equal(ensemble[1](1.5), ensemble.u1[1])
    with pytest.raises(ValueError, match="u needs saveat"):
        _ = ensemble.u


def test_failed_members_are_named_and_the_others_kept(engine: str) -> None:
    u0 = torch.tensor([[0.1], [2.0], [0.2], [1.0]], dtype=torch.float64)
    ensemble = psn.EnsembleProblem(psn.ODEProblem(explode, u0[0], SPAN), u0)
    options: dict[str, Any] = {**OPTIONS, "engine": engine, "dtmin": 1e-6}
    with pytest.raises(psn.SolverFailure, match=r"2 of 4 members failed: 1, 3\. Member 1: ") as e:
        psn.solve(ensemble, **options)
    assert isinstance(e.value, psn.EnsembleFailure)
    assert e.value.members == (1, 3)
    assert e.value.solution is e.value.ensemble[1]
    assert e.value.ensemble[0].success
    solution = psn.solve(ensemble, throw=False, **options)
    assert [code.successful for code in solution.retcodes] == [True, False, True, False]
    assert not solution.success
    good = u0[::2] / (1 - u0[::2] * 1.5)
    torch.testing.assert_close(solution.u1[::2], good, rtol=1e-6, atol=1e-6)
    # The second member reaches infinity at 0.5.
    assert solution.u[1, :, 0].isnan().tolist() == [False, False, True, True]


def test_each_member_has_its_own_event(engine: str) -> None:
    rates = torch.tensor([[1.0], [2.0], [0.1]], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(decay, torch.ones(1).double(), SPAN)
    half = psn.Event(lambda t, u: u[0] - 0.5)
    ensemble = psn.solve(
        psn.EnsembleProblem(problem, p=rates), events=half, engine=engine, rtol=1e-9, atol=1e-9
    )
    codes = psn.ReturnCode
    assert ensemble.retcodes == (codes.Terminated, codes.Terminated, codes.Success)
    for m in range(2):
        assert ensemble[m].event_t is not None
        exact = torch.log(torch.tensor(2.0).double()) / rates[m, 0]
        torch.testing.assert_close(ensemble[m].event_t, exact, rtol=1e-7, atol=1e-7)


def test_stochastic_members_draw_in_turn() -> None:
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: torch.ones_like(u), torch.zeros(4, 2).double(), SPAN
    )
    u0 = torch.zeros(3, 4, 2).double()
    ensemble = psn.solve(
        psn.EnsembleProblem(problem, u0), generator=torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    single = [psn.solve(problem, generator=generator) for _ in range(3)]
    # On the same paths with the same steps, whose sizes are aligned to a grid. Sums over stages are
    # taken in another order in a batch, so a step rounds by a few units of the state in another
    # way, and `-u` does not amplify that: the bound is four units for each step.
    assert ensemble.member_stats == tuple(s.stats for s in single)
    for together, alone in zip(ensemble.u1, single, strict=True):
        bound = 4 * alone.stats.naccept * torch.finfo(torch.float64).eps
        bound *= float(alone.u.abs().max())
        torch.testing.assert_close(together, alone.u1, rtol=0, atol=bound)
    assert not torch.equal(ensemble.u1[0], ensemble.u1[1])


@pytest.mark.parametrize(
    ("u0", "p", "words"),
    [
        (None, None, "none of them"),
        (torch.zeros(3).double(), None, r"\(M, 2\), but has \(3,\)"),
        (torch.zeros(3, 2), None, "float64"),
        (torch.zeros(3, 2).double(), torch.zeros(4, 1).double(), r"\[3, 4\]"),
        (torch.zeros(0, 2).double(), None, "at least 1"),
    ],
)
def test_what_is_wrong_is_said(u0: Tensor | None, p: Tensor | None, words: str) -> None:
    problem = psn.ODEProblem(decay, torch.zeros(2).double(), SPAN)
    with pytest.raises((TypeError, ValueError), match=words):
        psn.EnsembleProblem(problem, u0, p)


THREADED = """
import os, signal, sys, threading, time
sys.path.insert(0, {here!r})
import pytest, torch
torch.set_num_threads(1)
import pysciml_node as psn
from pysciml_node.julia_engine.process import runtime
import test_ensembles as t

t.test_members_are_the_single_solves(True, "julia")
assert runtime._runtime.module.Threads.nthreads() == 2
field = psn.JuliaField("(u, p, t) -> [p[1] * u[2], -p[2] * u[1]]")
p = torch.rand(40, 2, dtype=torch.float64, requires_grad=True)
u0 = torch.rand(40, 2, dtype=torch.float64, requires_grad=True)
ensemble = psn.EnsembleProblem(psn.ODEProblem(field, u0[0], t.SPAN, p=p[0]), u0, p)
for _ in range(5):
    many = psn.solve(ensemble, engine="julia", **t.OPTIONS)
    single = [
        psn.solve(psn.ODEProblem(field, a, t.SPAN, p=b), engine="julia", **t.OPTIONS)
        for a, b in zip(u0.unbind(), p.unbind())
    ]
    t.same(many, single, [u0, p])
by_tsit5 = many.u
with torch.no_grad():
    many = psn.solve(ensemble, psn.Rodas5P(), engine="julia", **t.OPTIONS)
torch.testing.assert_close(many.u, torch.stack([s.u for s in single]), rtol=1e-5, atol=1e-5)
bad = psn.JuliaField('(u, p, t) -> u[1] > 0.9 ? error("too large") : [0.0, 0.0]')
held = runtime.call("held")
with pytest.raises(psn.JuliaError, match="too large"):
    psn.solve(psn.EnsembleProblem(psn.ODEProblem(bad, u0[0], t.SPAN), u0 + 0.5), engine="julia")
assert runtime.call("held") <= held + 2  # the plan and the field
endless = psn.ODEProblem(field, u0[0], (0.0, 1e9), p=p[0])
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.perf_counter()
with pytest.raises(KeyboardInterrupt):
    psn.solve(psn.EnsembleProblem(endless, u0, p), engine="julia", max_steps=10**9)
assert time.perf_counter() - begin < 2.5
assert torch.equal(psn.solve(ensemble, engine="julia", **t.OPTIONS).u, by_tsit5)
"""


@pytest.mark.julia
@pytest.mark.slow
def test_members_over_two_threads_are_the_single_solves() -> None:
    here = str(Path(__file__).parent)
    # What this process has set for its own Julia, of one thread, is not for the other; which Julia
    # it is, is.
    named = ("PYTHON_JULIACALL_EXE", "PYTHON_JULIACALL_PROJECT")
    kept = {
        name: x
        for name, x in os.environ.items()
        if name in named or not name.startswith("PYTHON_JULIACALL")
    }
    done = subprocess.run(
        [sys.executable, "-c", THREADED.format(here=here)],
        env={**kept, "PYTHON_JULIACALL_THREADS": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
