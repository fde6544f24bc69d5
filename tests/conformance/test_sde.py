"""Stochastic equations: moments, gradients and failures that every engine has to agree on.

Means over 100,000 paths are held to five standard deviations of themselves, with fixed seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

PATHS = 100_000


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def agrees(samples: Tensor, expected: float, bias: float = 0.0) -> None:
    """The mean of independent samples, within five deviations and the scheme's own error."""
    allowed = 5 * samples.std().item() / math.sqrt(samples.numel()) + bias
    assert abs(samples.mean().item() - expected) < allowed


MU, SIGMA = 0.4, 0.5
ITO = [psn.EM(), psn.LambaEM(), psn.RKMil(), psn.SRIW1(), psn.SOSRI(), psn.SOSRI2()]
STRATONOVICH = [
    psn.RKMil(),
    psn.EulerHeun(),
    psn.StratonovichMidpoint(),
    psn.ReversibleHeun(),
]
ADDITIVE = [psn.EM(), psn.LambaEM(), psn.SRA1(), psn.SOSRA(), psn.SOSRA2()]


def geometric(paths: int, interpretation: str = "ito") -> psn.SDEProblem:
    drift = MU if interpretation == "ito" else MU - SIGMA**2 / 2
    return psn.SDEProblem(
        lambda t, u: drift * u,
        lambda t, u: SIGMA * u,
        ones(paths),
        (0.0, 1.0),
        interpretation=interpretation,
    )


def ornstein_uhlenbeck(paths: int) -> psn.SDEProblem:
    return psn.SDEProblem(
        lambda t, u: 2 * (0.5 - u), lambda t, u: 0.7 * torch.ones_like(u), ones(paths), (0.0, 1.0),
        noise="additive",
    )  # fmt: skip


CASES = [*((a, "ito") for a in ITO), *((a, "stratonovich") for a in STRATONOVICH)]


def case_name(value: object) -> str:
    return str(value) if isinstance(value, str | bool) else type(value).__name__


@pytest.mark.parametrize(("algorithm", "interpretation"), CASES, ids=case_name)
def test_moments_of_geometric_brownian_motion(
    algorithm: Any, interpretation: str, engine: str
) -> None:
    """Mean `exp(mu)`, mean square `exp(2 mu + sigma^2)`; steps of 1/64, or first order's bias."""
    with torch.no_grad():
        solution = psn.solve(
            geometric(PATHS, interpretation),
            algorithm,
            dt0=1 / 64,
            controller=psn.FixedStep(),
            generator=seeded(),
            engine=engine,
        )
    first_order = 1 / 64 if type(algorithm).__name__[:2] != "SO" else 0.0
    agrees(solution.u1, math.exp(MU), 0.2 * first_order)
    agrees(solution.u1.square(), math.exp(2 * MU + SIGMA**2), 2 * first_order)


@pytest.mark.parametrize("algorithm", ADDITIVE, ids=case_name)
def test_moments_of_an_ornstein_uhlenbeck_process(algorithm: Any, engine: str) -> None:
    """Mean `m + (1 - m) exp(-2)`, variance `s^2 (1 - exp(-4)) / 4`."""
    with torch.no_grad():
        solution = psn.solve(
            ornstein_uhlenbeck(PATHS),
            algorithm,
            dt0=1 / 64,
            controller=psn.FixedStep(),
            generator=seeded(),
            engine=engine,
        )
    first_order = 1 / 64 if isinstance(algorithm, psn.EM) else 0.0
    mean = 0.5 + 0.5 * math.exp(-2)
    agrees(solution.u1, mean, 0.3 * first_order)
    variance = 0.49 * (1 - math.exp(-4)) / 4
    agrees((solution.u1 - mean).square(), variance, 0.3 * first_order)


@pytest.mark.parametrize("algorithm", [psn.SOSRI(), psn.SRIW1()], ids=case_name)
def test_moments_of_adaptive_solves(algorithm: Any, engine: str) -> None:
    with torch.no_grad():
        solution = psn.solve(
            geometric(PATHS), algorithm, rtol=0.1, atol=0.1, generator=seeded(),
            engine=engine,
        )  # fmt: skip
    agrees(solution.u1, math.exp(MU), 1e-3)
    agrees(solution.u1.square(), math.exp(2 * MU + SIGMA**2), 5e-3)


def test_rejected_steps_bias_nothing(engine: str) -> None:
    """Solves of single systems, which reject steps because of their own noise: exact moments.

    A solver that draws anew after a rejection favours small increments, and loses variance.
    """
    generator, ends, rejected, runs = seeded(5), [], 0, 300
    with torch.no_grad():
        for _ in range(runs):
            solution = psn.solve(
                geometric(1),
                psn.SRIW1(),
                rtol=0.0,
                atol=0.02,
                dt0=0.5,
                generator=generator,
                engine=engine,
            )
            ends.append(solution.u1.item())
            rejected += solution.stats.nreject
    assert rejected > runs
    found = torch.tensor(ends, dtype=torch.float64)
    agrees(found, math.exp(MU))
    agrees(found.square(), math.exp(2 * MU + SIGMA**2))
    # The logarithm is normal: its variance is what a biased rejection would shrink.
    log = torch.log(found)
    agrees((log - (MU - SIGMA**2 / 2)).square(), SIGMA**2)


class Drift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def forward(self, t: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        return self.net(u) * (1 + t) if p is None else self.net(u) * p


def diffusion(kind: str) -> Callable[..., Tensor]:
    weight = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)

    def value(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if kind == "additive":
            return p * weight.expand_as(u) * (1 + t)
        if kind == "general":
            return p * torch.stack((torch.sin(u), weight.expand_as(u)), -1)
        return p * torch.cos(u) * weight

    return value


GRADIENT_CASES = [
    *((algorithm, "diagonal", "ito") for algorithm in ITO),
    (psn.SOSRI(), "scalar", "ito"),
    (psn.EM(), "general", "ito"),
    (psn.LambaEM(), "general", "ito"),
    *((algorithm, "additive", "ito") for algorithm in ADDITIVE),
    *((algorithm, "diagonal", "stratonovich") for algorithm in STRATONOVICH),
    (psn.EulerHeun(), "general", "stratonovich"),
    (psn.ReversibleHeun(), "general", "stratonovich"),
]


# Euler-Maruyama adapts its steps to additive noise only.
MARCHES = [
    (*case, adaptive)
    for case in GRADIENT_CASES
    for adaptive in ([True, False] if case[1] in case[0].adapts_to else [False])
]


@pytest.mark.parametrize(
    ("algorithm", "noise", "interpretation", "adaptive"), MARCHES, ids=case_name
)
def test_the_discrete_adjoint_is_autograd_through_the_steps(
    algorithm: Any, noise: Any, interpretation: Any, adaptive: bool, engine: str
) -> None:
    """On the same noise, for the initial state, `p` and parameters; ends, steps and saved times.

    Autograd is torch's; it takes the steps that the engine has chosen as fixed ones.
    """
    torch.manual_seed(0)
    drift = Drift()
    u0 = torch.tensor([[0.3, -1.0, 0.7], [0.1, 0.2, -0.4]], dtype=torch.float64)

    def gradients(**how: Any) -> tuple[Tensor, list[Tensor]]:
        start = u0.clone().requires_grad_()
        p = torch.tensor([0.9, 1.1, 0.7], dtype=torch.float64, requires_grad=True)
        problem = psn.SDEProblem(
            drift, lambda t, u, p: diffusion(noise)(t, u, p if noise != "general" else p[0]),
            start, (0.0, 1.0), noise=noise, interpretation=interpretation, p=p,
        )  # fmt: skip
        solution = psn.solve(
            problem, algorithm, saveat=[0.0, 0.33, 0.5, 0.77, 1.0], rtol=0.3, atol=0.3,
            generator=seeded(), **how,
        )  # fmt: skip
        loss = solution.u.square().sum() + solution.u1.sum() + solution(0.61).prod()
        found = torch.autograd.grad(loss, (start, p, *drift.parameters()))
        return torch.tensor(solution.trajectory.record.times), list(found)

    fixed = {"dt0": 0.1, "controller": psn.FixedStep()}
    times, found = gradients(engine=engine, **({} if adaptive else fixed))
    if adaptive:
        fixed = {"dt0": 1.0, "controller": psn.FixedStep(), "tstops": times[1:-1].tolist()}
    _, expected = gradients(engine="torch", adjoint=psn.DirectAdjoint(), **fixed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_with_respect_to_what_is_captured(engine: str) -> None:
    """`u1 = exp((mu - s^2/2) + s W)`: pathwise derivatives for closures and their encoders."""
    mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    raw = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    sigma = torch.exp(raw)  # no leaf
    problem = psn.SDEProblem(lambda t, u: mu * u, lambda t, u: sigma * u, ones(50), (0.0, 1.0))
    solution = psn.solve(
        problem, psn.SOSRI(), dt0=1 / 128, controller=psn.FixedStep(), generator=seeded(),
        engine=engine,
    )  # fmt: skip
    w = solution.brownian(0.0, 1.0)
    exact = torch.exp(mu - sigma**2 / 2 + sigma * w)
    torch.testing.assert_close(solution.u1, exact, rtol=1e-2, atol=0)
    found = torch.autograd.grad(solution.u1.mean(), (mu, raw), retain_graph=True)
    expected = torch.autograd.grad(exact.mean(), (mu, raw))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_the_same_generator_gives_the_same_solution(engine: str) -> None:
    problem = geometric(5)
    one, other, third = (
        psn.solve(problem, psn.SOSRI(), generator=seeded(seed), engine=engine).u1
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_states_of_several_parts(engine: str) -> None:
    """Each part has noise of its own, and `saveat` gives every part."""
    start = {"x": ones(4, 2), "y": 2 * ones(4)}
    problem = psn.SDEProblem(
        lambda t, u: {"x": -u["x"], "y": u["x"].sum(-1)},
        lambda t, u: {"x": 0.1 * u["x"], "y": 0 * u["y"]},
        start,
        (0.0, 1.0),
    )
    solution = psn.solve(problem, saveat=[0.5, 1.0], generator=seeded(), engine=engine)
    assert solution.u["x"].shape == (2, 4, 2)
    assert solution.u["y"].shape == (2, 4)
    torch.testing.assert_close(solution.u["y"][-1], solution.u1["y"])
    assert solution.brownian(0.0, 1.0)["x"].shape == (4, 2)


def test_statistics_count_both_fields(engine: str) -> None:
    calls = {"drift": 0, "diffusion": 0}

    def counted(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def field(t: Tensor, u: Tensor) -> Tensor:
            calls[name] += 1
            return 0.3 * u

        return field

    problem = psn.SDEProblem(counted("drift"), counted("diffusion"), ones(3), (0.0, 1.0))
    solution = psn.solve(problem, psn.SRIW1(), generator=seeded(), engine=engine)
    stats = solution.stats
    assert (stats.nfe, stats.nfe_diffusion) == (calls["drift"], calls["diffusion"])
    assert stats.naccept == len(solution.t) - 1
    assert stats.nfe_diffusion > stats.nfe


def test_fields_that_explode_are_unstable(engine: str) -> None:
    problem = psn.SDEProblem(
        lambda t, u: torch.where(t > 0.5, torch.inf, 1.0) * u, lambda t, u: 0.1 * u, ones(2),
        (0.0, 1.0),
    )  # fmt: skip
    with pytest.raises(psn.SolverFailure) as caught:
        psn.solve(problem, psn.SOSRI(), generator=seeded(), engine=engine)
    assert caught.value.retcode is psn.ReturnCode.Unstable
    assert caught.value.solution.t[-1] < 0.6
    fixed = psn.solve(
        problem, psn.SOSRI(), dt0=0.1, controller=psn.FixedStep(), throw=False,
        generator=seeded(), engine=engine,
    )  # fmt: skip
    assert fixed.retcode is psn.ReturnCode.Unstable
    assert bool(torch.isfinite(fixed.u1).all())


def test_max_steps(engine: str) -> None:
    with pytest.raises(psn.SolverFailure, match="max_steps=3"):
        psn.solve(geometric(2), psn.SOSRI(), rtol=1e-4, atol=1e-4, max_steps=3, engine=engine)
