"""Stochastic equations on both engines: one path, so equal steps, states and gradients."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.julia_engine.process import runtime

pytestmark = pytest.mark.julia

ENGINES = ("julia", "torch")
FIXED: dict[str, Any] = {"dt0": 0.1, "controller": psn.FixedStep()}
ITO = [psn.EM(), psn.LambaEM(), psn.RKMil(), psn.SRIW1(), psn.SOSRI(), psn.SOSRI2()]
CASES = [
    *((algorithm, "diagonal", "ito") for algorithm in ITO),
    *((algorithm, "scalar", "ito") for algorithm in (psn.EM(), psn.SOSRI())),
    *((psn.SRA1(), noise, "ito") for noise in ("additive", "additive matrix")),
    *((psn.SOSRA(), noise, "ito") for noise in ("additive", "additive matrix")),
    (psn.SOSRA2(), "additive", "ito"),
    *((algorithm, "general", "ito") for algorithm in (psn.EM(), psn.LambaEM())),
    (psn.RKMil(), "diagonal", "stratonovich"),
    *((psn.EulerHeun(), noise, "stratonovich") for noise in ("diagonal", "general")),
]


def case_name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


class Drift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.net(u) * (1 + t)


class Diffusion(nn.Module):
    def __init__(self, noise: str) -> None:
        super().__init__()
        self.noise = noise
        self.layer = nn.Linear(3, 3)
        self.levels = nn.Parameter(torch.tensor([0.3, -0.2, 0.4]))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        constant = (self.levels * (1 + t)).expand_as(u)
        if self.noise == "additive":
            return constant
        if self.noise == "additive matrix":
            return torch.stack((constant, constant.square()), -1)
        values = 0.3 * torch.cos(self.layer(u)) * (1 + t)
        return torch.stack((values, constant), -1) if self.noise == "general" else values


def solve(
    engine: str, algorithm: Any, noise: str, interpretation: Any, u0: Tensor, **options: Any
) -> tuple[psn.Solution, list[Tensor]]:
    torch.manual_seed(0)
    drift, diffusion = Drift().to(u0.dtype), Diffusion(noise).to(u0.dtype)
    kind: Any = noise.split()[0]
    start = u0.clone().requires_grad_()
    problem = psn.SDEProblem(drift, diffusion, start, (0.0, 1.0), kind, interpretation)
    solution = psn.solve(
        problem, algorithm, generator=torch.Generator().manual_seed(5), saveat=[0.0, 0.33, 1.0],
        engine=engine, **options,
    )  # fmt: skip
    loss = solution.u.square().sum() + solution(0.61).prod()
    parameters = (start, *drift.parameters(), *diffusion.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return solution, list(gradients)


def states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("algorithm", "noise", "interpretation"), CASES, ids=case_name)
def test_fixed_steps_and_their_gradients_agree(
    algorithm: Any, noise: str, interpretation: str
) -> None:
    """Modules are translated, and a diffusion that gives matrices is called back."""
    # Julia's steps are taken again in the sweep: torch's are, too, where no graphs are kept.
    again = psn.DiscreteAdjoint(memory=0)
    (found, gradients), (expected, others) = (
        solve(engine, algorithm, noise, interpretation, states(), adjoint=again, **FIXED)
        for engine in ENGINES
    )
    assert (found.engine, expected.engine) == ENGINES
    torch.testing.assert_close(found.u, expected.u, rtol=1e-13, atol=1e-13)
    # Julia does not know the values at the start, which are what the inputs were found from.
    assert found.stats.nfe - expected.stats.nfe in (0, 1)
    assert found.stats.nfe_diffusion - expected.stats.nfe_diffusion in (0, 1)
    assert found.stats.nfe_backward == expected.stats.nfe_backward
    torch.testing.assert_close(gradients, others, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", [psn.SRIW1(), psn.SOSRI(), psn.SOSRI2()], ids=case_name)
def test_adaptive_solves_take_the_same_steps(algorithm: Any) -> None:
    """The estimates, the controller, the first step and the grid of times are the same."""
    (found, gradients), (expected, others) = (
        solve(engine, algorithm, "diagonal", "ito", states(), rtol=0.1, atol=0.1)
        for engine in ENGINES
    )
    assert found.stats.naccept == expected.stats.naccept
    assert found.stats.nreject == expected.stats.nreject
    torch.testing.assert_close(
        found.trajectory.record.times, expected.trajectory.record.times, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(found.u, expected.u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, others, rtol=1e-9, atol=1e-9)


def test_single_precision() -> None:
    (found, gradients), (expected, others) = (
        solve(engine, psn.SOSRI(), "diagonal", "ito", states(torch.float32), **FIXED)
        for engine in ENGINES
    )
    torch.testing.assert_close(found.u, expected.u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-4)


def test_modules_of_one_architecture() -> None:
    """They are one program in Julia, evaluated with parameters and memory of their own."""

    class Layer(nn.Linear):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(super().forward(u))

    torch.manual_seed(0)
    drift, diffusion = Layer(3, 3).double(), Layer(3, 3).double()
    found: list[list[Tensor]] = []
    for engine in ENGINES:
        problem = psn.SDEProblem(drift, diffusion, states(), (0.0, 1.0))
        solution = psn.solve(
            problem, psn.SOSRI(), generator=torch.Generator().manual_seed(2), engine=engine, **FIXED
        )
        parameters = (*drift.parameters(), *diffusion.parameters())
        found.append([solution.u1, *torch.autograd.grad(solution.u1.square().sum(), parameters)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_one_module_as_drift_and_diffusion() -> None:
    """Its gradient is the sum of both."""
    drift = Drift().double()
    found: list[list[Tensor]] = []
    for engine in ENGINES:
        problem = psn.SDEProblem(drift, drift, states(), (0.0, 1.0))
        solution = psn.solve(
            problem, psn.SOSRI(), generator=torch.Generator().manual_seed(2), engine=engine, **FIXED
        )
        total = solution.u1.square().sum()
        found.append([solution.u1, *torch.autograd.grad(total, list(drift.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_fields_written_in_julia() -> None:
    """`du = -p1 u dt + p2 u dW`, against the same in torch."""
    found = []
    fields: list[tuple[Any, Any]] = [
        (psn.JuliaField("(u, p, t) -> -p[1] .* u"), psn.JuliaField("(u, p, t) -> p[2] .* u")),
        (lambda t, u, p: -p[0] * u, lambda t, u, p: p[1] * u),
    ]
    for engine, (drift, diffusion) in zip(ENGINES, fields, strict=True):
        p = torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)
        problem = psn.SDEProblem(drift, diffusion, states(), (0.0, 1.0), p=p)
        solution = psn.solve(
            problem, psn.SOSRI(), generator=torch.Generator().manual_seed(2), engine=engine, **FIXED
        )
        found.append([solution.u1, *torch.autograd.grad(solution.u1.square().sum(), p)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_the_local_error_of_a_solve_in_julia() -> None:
    """`LocalError` trains through Julia's steps as through torch's."""
    penalties = []
    for engine in ENGINES:
        torch.manual_seed(0)
        layer = psn.NeuralSDE(
            Drift().double(), Diffusion("diagonal").double(), psn.SOSRI(), rtol=0.1, atol=0.1,
            regularizers=[psn.LocalError("biased")], engine=engine,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        solution = layer(states())
        loss = solution.u1.square().sum() + solution.penalty
        penalties.append(
            [solution.penalty, *torch.autograd.grad(loss, list(layer.drift.parameters()))]
        )
    torch.testing.assert_close(*penalties, rtol=1e-8, atol=1e-8)


def test_stops_end_steps() -> None:
    solution, _ = solve(
        "julia", psn.SOSRI(), "diagonal", "ito", states(), rtol=0.1, atol=0.1, tstops=[0.3, 0.7]
    )
    assert {0.3, 0.7, 1.0} <= set(solution.trajectory.record.times)


def test_an_ensemble_of_stochastic_equations() -> None:
    problem = psn.SDEProblem(Drift().double(), Diffusion("diagonal").double(), states(), (0.0, 1.0))
    starts = torch.stack([states(), 2 * states()])
    found, expected = (
        psn.solve(
            psn.EnsembleProblem(problem, u0=starts), psn.SOSRI(), engine=engine,
            generator=torch.Generator().manual_seed(2), **FIXED,
        )
        for engine in ENGINES
    )  # fmt: skip
    torch.testing.assert_close(found.u1, expected.u1, rtol=1e-12, atol=1e-12)


def held() -> int:
    """Objects that Julia keeps for Python."""
    gc.collect()
    runtime.free_pending()
    return int(runtime.call("held"))


def test_good_and_failing_solves_leave_nothing_in_julia() -> None:
    def iterate(count: int) -> None:
        for _ in range(count):
            solve("julia", psn.SOSRI(), "diagonal", "ito", states(), **FIXED)
            with pytest.raises(psn.SolverFailure):
                solve("julia", psn.SOSRI(), "diagonal", "ito", states(), max_steps=1)

    iterate(1)
    before = held()
    iterate(20)
    assert held() <= before


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is not passed on to Julia there")
@pytest.mark.parametrize("translated", [True, False], ids=["translated", "called back"])
def test_ctrl_c_stops_a_solve_within_a_second(translated: bool) -> None:
    drift: Any = Drift().double()
    if not translated:
        drift = lambda t, u: -u  # noqa: E731

    def run(**options: Any) -> psn.Solution:
        problem = psn.SDEProblem(drift, Diffusion("diagonal").double(), states(), (0.0, 1.0))
        return psn.solve(
            problem, psn.SOSRI(), controller=psn.FixedStep(), engine="julia", **options
        )

    with torch.no_grad():
        run(dt0=0.1)  # compiled
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        start = time.perf_counter()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run(dt0=1e-7, max_steps=100_000_000, saveat=[1.0])
        assert time.perf_counter() - start < 1.3
        timer.join()
        assert run(dt0=0.1).retcode is psn.ReturnCode.Success
