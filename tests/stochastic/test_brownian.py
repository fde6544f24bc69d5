"""The Brownian tree: a function of its seed with the law of Brownian motion.

Bounds of statistics are at five standard deviations (a false alarm in 1.7 million), with fixed
seeds.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import pysciml_node as psn
from pysciml_node.stochastic.brownian import DEPTH, BrownianPath
from pysciml_node.stochastic.normals import PlacedNormals
from pysciml_node.stochastic.virtual_tree import Increment

SIZE = 40_000


def path(
    seed: int = 1, size: int = SIZE, dtype: torch.dtype = torch.float64, t0: float = 0.0
) -> BrownianPath:
    return BrownianPath(PlacedNormals(seed, dtype, torch.device("cpu")), size, t0, 2.0)


INTERVALS = [(0.0, 2.0), (0.0, 0.25), (0.5, 1.0), (0.3, 0.7), (1.0, 1.0 + 2**-20), (0.1, 1.9)]


def close(found: Tensor, expected: float, deviation: float) -> None:
    """A mean over `SIZE` samples of the given standard deviation, within five of its own."""
    assert abs(found.mean().item() - expected) < 5 * deviation / math.sqrt(SIZE)


@pytest.mark.parametrize("interval", INTERVALS)
def test_increments_are_normal_with_the_variance_of_time(interval: tuple[float, float]) -> None:
    h = interval[1] - interval[0]
    w = path().increment(*interval).w / math.sqrt(h)
    close(w, 0.0, 1.0)
    close(w.square(), 1.0, math.sqrt(2))
    assert stats.kstest(w.numpy(), "norm").pvalue > 1e-6


@pytest.mark.parametrize("interval", INTERVALS)
def test_areas_are_normal_and_independent_of_increments(interval: tuple[float, float]) -> None:
    """`H ~ N(0, h / 12)`; SciML's `dZ = 2 sqrt(3) H` has variance `h`."""
    motion = path().increment(*interval)
    h = interval[1] - interval[0]
    w, area = motion.w / math.sqrt(h), motion.area / math.sqrt(h / 12)
    close(area, 0.0, 1.0)
    close(area.square(), 1.0, math.sqrt(2))
    close(w * area, 0.0, 1.0)
    close(w.square() * area.square(), 1.0, math.sqrt(8))
    assert stats.kstest(area.numpy(), "norm").pvalue > 1e-6


def test_the_time_integral_has_the_covariance_of_brownian_motion() -> None:
    """`I = int W dt` over a step: variance `h^3 / 3`, covariance with `W` of `h^2 / 2`."""
    motion = path().increment(0.3, 0.7)
    h = motion.h
    integral = h * (motion.w / 2 + motion.area)
    close(integral.square() / (h**3 / 3), 1.0, math.sqrt(2))
    # The product of two normals of correlation r has variance 1 + r^2, here 1 + 3/4.
    scale = math.sqrt(h * h**3 / 3)
    close(integral * motion.w / scale, math.sqrt(3) / 2, math.sqrt(7 / 4))


@pytest.mark.parametrize("cut", [1.0, 0.5, 0.8125, 0.7, 1.999])
def test_parts_make_up_the_whole(cut: float) -> None:
    """`W(s,t) + W(t,u) = W(s,u)`, and the same for the time integrals."""
    tree = path(size=100)
    whole = tree.increment(0.0, 2.0)
    joined = tree.increment(0.0, cut).then(tree.increment(cut, 2.0))
    assert joined.h == pytest.approx(whole.h, rel=1e-15)
    torch.testing.assert_close(joined.w, whole.w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined.area, whole.area, rtol=1e-12, atol=1e-12)


def test_disjoint_increments_are_independent() -> None:
    tree = path()
    times = [0.0, 0.1, 0.5, 0.75, 1.0, 1.3, 2.0]
    rows: list[Tensor] = []
    for start, end in itertools.pairwise(times):
        motion = tree.increment(start, end)
        rows += [motion.w / math.sqrt(motion.h), motion.area / math.sqrt(motion.h / 12)]
    products = torch.stack(rows) @ torch.stack(rows).T / SIZE
    deviation = torch.ones_like(products) + torch.eye(len(rows), dtype=torch.float64)
    expected = torch.eye(len(rows), dtype=torch.float64)
    assert bool(((products - expected).abs() < 5 * (deviation / SIZE).sqrt()).all())


def test_a_point_between_two_known_ones_is_a_bridge() -> None:
    """Given `W(0, 2)`, `W(0, t)` has mean `t/2 W(0, 2)` and variance `t (2 - t) / 2`."""
    tree = path()
    whole, part = tree.increment(0.0, 2.0).w, tree.increment(0.0, 0.6).w
    rest = part - 0.3 * whole
    variance = 0.6 * 1.4 / 2
    close(rest, 0.0, math.sqrt(variance))
    close(rest.square() / variance, 1.0, math.sqrt(2))
    close(rest * whole / math.sqrt(2 * variance), 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_questions_does_not_matter(dtype: torch.dtype) -> None:
    intervals = [(0.0, 0.3), (0.3, 0.31), (0.25, 0.5), (1.0, 2.0), (0.0, 2.0), (1.4, 1.6)]
    first = path(size=7, dtype=dtype)
    forward = [first.increment(*i) for i in intervals]
    again = [first.increment(*i) for i in reversed(intervals)][::-1]
    fresh = path(size=7, dtype=dtype)
    backward = [fresh.increment(*i) for i in reversed(intervals)][::-1]
    for one, two, three in zip(forward, again, backward, strict=True):
        for other in (two, three):
            assert torch.equal(one.w, other.w)
            assert torch.equal(one.area, other.area)
        assert one.w.dtype == dtype


def test_seeds_give_different_paths() -> None:
    one, other = (path(seed).increment(0.0, 1.0).w for seed in (1, 2))
    close(one * other, 0.0, 1.0)
    assert torch.equal(one, path(1).increment(0.0, 1.0).w)


def test_paths_do_not_depend_on_where_time_starts() -> None:
    """The tree is relative to its start."""
    assert torch.equal(
        path(t0=0.0, size=5).increment(0.25, 0.5).w, path(t0=3.0, size=5).increment(3.25, 3.5).w
    )


def test_memory_is_two_increments_a_level() -> None:
    tree = path(size=3)
    for n in range(500):
        tree.increment(2 * n / 500, 2 * (n + 1) / 500)
    assert len(tree.tree._branch) <= DEPTH


def test_aligned_steps_cost_few_draws() -> None:
    """An adaptive step changes by an eighth at most and asks for a few places in the tree."""
    normals = PlacedNormals(1, torch.float64, torch.device("cpu"))
    tree, drawn = BrownianPath(normals, 3, 0.0, 1.0), []
    draw = normals.at
    normals.at = lambda places, size: (drawn.extend(places), draw(places, size))[1]  # type: ignore[method-assign]
    t, steps, sizes = 0.0, 0, torch.rand(400, generator=torch.Generator().manual_seed(0))
    while t < 0.9:
        h = 0.001 + 0.004 * sizes[steps].item()
        end = tree.aligned(t, h, down=False)
        assert abs(end - t - h) <= h / 8
        assert h * 3 / 4 <= tree.aligned(t, h, down=True) - t <= h
        tree.increment(t, end)
        t, steps = end, steps + 1
    assert len(drawn) < 6 * steps


def test_single_precision_keeps_short_increments() -> None:
    """Increments are sums of increments, never differences of values."""
    start, end = 1.0, 1.0 + 2**-18
    single = path(size=1000, dtype=torch.float32).increment(start, end)
    ratio = single.area.double().square().mean() / (single.h / 12)
    assert abs(ratio.item() - 1) < 5 * math.sqrt(2 / 1000)


def test_joining_agrees_with_the_definition_of_the_area() -> None:
    """For a path that is `a` then `b` steep, `H` of the whole from its integral."""
    one = Increment(1.0, torch.tensor([2.0]), torch.tensor([0.0]))
    two = Increment(3.0, torch.tensor([-1.0]), torch.tensor([0.0]))
    whole = one.then(two)
    # int W = 1 + (2 + 1) / 2 * 3 = 5.5; H = 5.5 / 4 - 1 / 2.
    assert whole.w.item() == 1.0
    assert whole.area.item() == pytest.approx(5.5 / 4 - 0.5)


@pytest.mark.parametrize("several", [False, True])
def test_increments_are_the_callers_own(several: bool) -> None:
    """The path keeps some of what it gives, and the backward pass goes along it."""
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    one = psn.SDEProblem(
        lambda t, u: -rate * u,
        lambda t, u: rate * u,
        torch.ones(3, dtype=torch.float64),
        (0.0, 1.0),
    )
    found = []
    for changed in (False, True):
        problem: Any = one
        if several:
            problem = psn.EnsembleProblem(one, u0=torch.ones(2, 3, dtype=torch.float64))
        solution: Any = psn.solve(
            problem, psn.SRIW1(), generator=torch.Generator().manual_seed(2),
            controller=psn.FixedStep(), dt0=1.0,
        )  # fmt: skip
        solution = solution[0] if several else solution
        whole = solution.brownian(0.0, 1.0)
        if changed:
            whole.zero_()
        (gradient,) = torch.autograd.grad(solution.u1.sum(), rate, retain_graph=True)
        found.append([solution.brownian(0.0, 1.0), solution(0.4), gradient])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_what_lies_between_the_steps_of_a_converted_solution(noise: Any) -> None:
    """It goes on along the same path, in the other precision."""

    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        return 0.4 * u if noise == "diagonal" else (0.4 * u).unsqueeze(-1).expand(3, 2, 2)

    problem = psn.SDEProblem(
        lambda t, u: -u, diffusion, torch.ones(3, 2, dtype=torch.float64), (0.0, 1.0), noise
    )
    algorithm = psn.SRIW1() if noise == "diagonal" else psn.EM()
    solution = psn.solve(
        problem, algorithm, generator=torch.Generator().manual_seed(2),
        controller=psn.FixedStep(), dt0=0.25,
    )  # fmt: skip
    single = solution.to(torch.float32)
    # Each look at an estimate draws noise of its own: the first is compared with the first.
    for look in (
        lambda s: s(0.33),
        lambda s: s.brownian(0.1, 0.6),
        lambda s: s.step_estimates()[1].error,
        lambda s: s.local_estimate(0.3).error,
    ):
        found, expected = look(single), look(solution)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
