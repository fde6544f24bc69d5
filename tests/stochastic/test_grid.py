"""Brownian motions on a grid: those of a virtual tree in law, and a function of the seed alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pysciml_node.stochastic.grid import GridPath


def path(size: int, steps: int, area: bool = True, seed: int = 3, t0: float = 0.7) -> GridPath:
    like = torch.zeros((), dtype=torch.float64)
    return GridPath(seed, size, like, t0, 0.1, 0.1 * steps, area=area)


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.25, 1.0), (0.4, 0.7), (0.5, 2.3), (0.0, 2.0)])
def test_increments_and_areas_have_the_law_of_brownian_motion(part: tuple[float, float]) -> None:
    """Means and variances of 40,000 motions, within five standard deviations."""
    count = 40_000
    motion = path(count, 3).increment(*(0.7 + 0.1 * x for x in part))
    h = 0.1 * (part[1] - part[0])
    assert motion.area is not None
    assert math.isclose(motion.h, h, rel_tol=1e-9)
    w, area = motion.w / math.sqrt(h), motion.area / math.sqrt(h / 12)
    for x in (w, area, w * area):
        assert abs(x.mean().item()) < 5 / math.sqrt(count)
        assert abs(x.var().item() - 1) < 5 * math.sqrt(8 / count)


@pytest.mark.parametrize("size", [3, 9_000])
@pytest.mark.parametrize("area", [False, True])
def test_it_is_the_same_in_any_order_and_adds_up(size: int, area: bool) -> None:
    """Also where a step is drawn alone, and from inside of inference mode."""
    forward, backward = path(size, 12, area), path(size, 12, area)
    ends = [0.7 + 0.1 * n for n in range(13)]
    pairs = list(itertools.pairwise(ends))
    steps = [forward.increment(*pair) for pair in pairs]
    with torch.inference_mode():
        again = [backward.increment(*pair) for pair in reversed(pairs)]
    for one, other in zip(steps, reversed(again), strict=True):
        assert torch.equal(one.w, other.w)
        assert (one.area is None) == (not area)
        assert one.area is None or torch.equal(one.area, other.area)
    whole, total = forward.increment(0.7, 1.9), steps[0]
    for step in steps[1:]:
        total = total.then(step)
    torch.testing.assert_close(whole.w, total.w, rtol=1e-12, atol=1e-12)
    left, right = forward.increment(0.7, 0.73), backward.increment(0.73, 0.8)
    both = left.then(right)
    torch.testing.assert_close(both.w, steps[0].w, rtol=1e-9, atol=1e-12)
    if area:
        assert both.area is not None
        torch.testing.assert_close(both.area, steps[0].area, rtol=1e-9, atol=1e-12)
    assert not torch.equal(path(size, 12, area, seed=4).increment(0.7, 0.8).w, steps[0].w)


def test_steps_are_independent_of_each_other() -> None:
    one = path(3_000, 20)
    steps = [one.increment(0.7 + 0.1 * n, 0.7 + 0.1 * (n + 1)).w for n in range(20)]
    correlations = torch.corrcoef(torch.stack(steps)) - torch.eye(20, dtype=torch.float64)
    assert correlations.abs().max() < 5.5 / math.sqrt(3_000)


def test_an_empty_interval_has_no_motion() -> None:
    motion = path(3, 5).increment(0.83, 0.83)
    assert motion.h == 0
    assert not motion.w.any()
