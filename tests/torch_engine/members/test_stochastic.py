"""Stochastic members in one batch: each on the path, and with the steps, that it has alone."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.stochastic.brownian import BrownianPath
from pysciml_node.stochastic.members.paths import BrownianPaths
from pysciml_node.stochastic.members.stacked import StackedPaths
from pysciml_node.stochastic.normals import PlacedNormals

D = torch.float64
# Batched kernels round differently. Sizes follow from error estimates, which are differences.
NEAR: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1}
SIGMA = torch.tensor(0.5, dtype=D, requires_grad=True)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p * u + torch.sin(t)


DIFFUSIONS: dict[str, Any] = {
    "diagonal": lambda t, u, p: SIGMA * torch.sin(u),
    "scalar": lambda t, u, p: SIGMA * torch.sin(u),
    "additive": lambda t, u, p: SIGMA * (1 + t) * torch.ones_like(u),
    "general": lambda t, u, p: SIGMA * torch.stack((torch.cos(u), 0.3 * u), -1),
}


def many(noise: Any, interpretation: Any = "ito", count: int = 3) -> psn.EnsembleProblem:
    u0 = (1 + torch.rand(count, 3, generator=generator(1), dtype=D)).requires_grad_()
    p = (1 + torch.rand(count, 1, generator=generator(2), dtype=D)).requires_grad_()
    ends = torch.stack((torch.zeros(count), torch.linspace(0.5, 1, count)), 1).to(D)
    problem = psn.SDEProblem(
        drift,
        DIFFUSIONS[noise],
        torch.zeros(3, dtype=D),
        (0.0, 1.0),
        noise,
        interpretation,
        p=torch.ones(1, dtype=D),
    )
    return psn.EnsembleProblem(problem, u0, p, tspan=ends)


def compare(ensemble: psn.EnsembleProblem, algorithm: psn.Algorithm, **options: Any) -> None:
    """States, gradients and counts of a batch are those of single solves."""
    together = psn.solve(ensemble, algorithm, generator=generator(), **options)
    assert isinstance(together.members, StackedPaths)
    draws = generator()
    alone = [psn.solve(m, algorithm, generator=draws, **options) for m in ensemble.members()]
    losses = [(together.u1**3).sum(), sum((s.u1**3).sum() for s in alone)]
    torch.testing.assert_close(together.u1, torch.stack([s.u1 for s in alone]), **NEAR)
    if "saveat" in options:
        torch.testing.assert_close(together.u, torch.stack([s.u for s in alone]), **NEAR)
        losses[0] = losses[0] + (together.u**2).sum()
        losses[1] = losses[1] + sum((s.u**2).sum() for s in alone)
    inputs = [ensemble.u0, ensemble.p, SIGMA]
    found, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if not isinstance(options.get("adjoint"), psn.DirectAdjoint):
        assert together.member_stats == tuple(s.stats for s in alone)
    one = together[1]
    times = torch.tensor([0.0, 0.2, 0.33, 0.5], dtype=D)
    torch.testing.assert_close(one(times), alone[1](times), **NEAR)
    torch.testing.assert_close(one.brownian(0.1, 0.4), alone[1].brownian(0.1, 0.4))


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_adaptive_members_go_as_alone(adjoint: psn.Adjoint) -> None:
    saveat = [0.0, 0.1, 0.125, 0.5]
    tolerances = {"rtol": 0.05, "atol": 0.05}
    compare(many("diagonal"), psn.SOSRI(), adjoint=adjoint, saveat=saveat, **tolerances)


@pytest.mark.parametrize(
    ("noise", "interpretation", "algorithm", "options"),
    [
        ("additive", "ito", psn.SOSRA(), {"tstops": [0.3], "rtol": 0.1, "atol": 0.1}),
        ("diagonal", "stratonovich", psn.EulerHeun(), {"rtol": 0.1, "atol": 0.1}),
        ("diagonal", "ito", psn.SOSRI(), FIXED),
        ("scalar", "ito", psn.RKMil(), FIXED),
        ("general", "ito", psn.LambaEM(), {**FIXED, "saveat": [0.0, 0.07, 0.4]}),
        ("general", "stratonovich", psn.ReversibleHeun(), {**FIXED, "saveat": [0.25, 0.4]}),
    ],
)
def test_noises_and_methods(
    noise: str, interpretation: str, algorithm: psn.Algorithm, options: dict[str, Any]
) -> None:
    compare(many(noise, interpretation), algorithm, **options)


def test_moments_of_many() -> None:
    """Geometric Brownian motion: its mean and the mean of its square are known."""
    count, mu, sigma = 4000, 0.3, 0.4
    u0 = torch.ones(count, 1, dtype=D, requires_grad=True)
    problem = psn.SDEProblem(
        lambda t, u: mu * u, lambda t, u: sigma * u, torch.ones(1, dtype=D), (0.0, 1.0)
    )
    solution = psn.solve(
        psn.EnsembleProblem(problem, u0), psn.SOSRI(), generator=generator(), **FIXED
    )
    mean, square = np.exp(mu), np.exp(2 * mu + sigma**2)
    deviation = (square - mean**2) ** 0.5
    assert abs(float(solution.u1.detach().mean()) - mean) < 4 * deviation / count**0.5
    (gradient,) = torch.autograd.grad(solution.u1.sum(), u0)
    torch.testing.assert_close(gradient, solution.u1.detach(), rtol=1e-10, atol=0)


def test_parts_single_solutions_and_copies() -> None:
    def f(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": u["y"], "y": -u["x"]}

    u0 = {"x": torch.rand(3, dtype=D), "y": torch.rand(3, dtype=D)}
    problem = psn.SDEProblem(
        f,
        lambda t, u: {"x": 0.1 * u["x"], "y": 0.2 * u["y"]},
        {key: x[0] for key, x in u0.items()},
        (0.0, 0.5),
    )
    solution = psn.solve(psn.EnsembleProblem(problem, u0), generator=generator(), **FIXED)
    assert isinstance(solution.members, StackedPaths)
    assert solution.u1["x"].shape == (3,)
    assert torch.equal(solution[2].u1["y"], solution.u1["y"][2])
    copy = pickle.loads(pickle.dumps(solution))
    assert torch.equal(copy.u1["x"], solution.u1["x"])


def test_a_member_that_fails_leaves_its_neighbours_alone() -> None:
    u0 = torch.tensor([[0.1], [5.0], [0.2]], dtype=D)
    problem = psn.SDEProblem(
        lambda t, u: u**3, lambda t, u: 0.1 * torch.ones_like(u), u0[0], (0.0, 1.0), "additive"
    )
    ensemble = psn.EnsembleProblem(problem, u0)
    options: dict[str, Any] = {"throw": False, "max_steps": 300, "rtol": 0.2, "atol": 0.2}
    solution = psn.solve(ensemble, generator=generator(), **options)
    assert [code.successful for code in solution.retcodes] == [True, False, True]
    draws = generator()
    for m, single in enumerate(ensemble.members()):
        alone = psn.solve(single, generator=draws, **options)
        if m != 1:
            torch.testing.assert_close(solution.u1[m], alone.u1, **NEAR)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 30])
def test_paths_are_those_of_single_trees(dtype: torch.dtype, size: int) -> None:
    """Whatever was asked for before, and in which order."""
    draws = np.random.default_rng(0)
    count = 6
    seeds = tuple(int(x) for x in draws.integers(0, 2**63 - 1, count))
    t0, length = draws.random(count), 0.5 + draws.random(count)
    paths = BrownianPaths(seeds, size, (t0, t0 + length), length, dtype)
    cpu = torch.device("cpu")
    trees = [
        BrownianPath(PlacedNormals(seed, dtype, cpu), size, t0[m], length[m])
        for m, seed in enumerate(seeds)
    ]
    near = 1e-12 if dtype == D else 1e-5
    for trial in range(24):
        rows = np.sort(draws.permutation(count)[: draws.integers(1, count + 1)])
        first = draws.random(len(rows)) if trial % 2 else draws.integers(0, 8, len(rows)) / 8
        width = [1.0, 1e-5, 1 / 8, 2.0**-12][trial % 4]
        last = np.minimum(first + width, 1.0)
        start, end = (t0[rows] + x * length[rows] for x in (first, last))
        motions = paths.increments(rows, start, end)
        for i, m in enumerate(rows.tolist()):
            alone = trees[m].increment(float(start[i]), float(end[i]))
            assert alone.h == pytest.approx(motions.h[i], rel=1e-12)
            bound = near * alone.h**0.5
            torch.testing.assert_close(motions.w[i], alone.w, rtol=near, atol=bound)
            torch.testing.assert_close(motions.area[i], alone.area, rtol=near, atol=bound)
