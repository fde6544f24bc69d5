"""Brownian motion as a function of its seed: its law, its consistency, what it costs.

Bounds of statistics are at five standard deviations (a false alarm in 1.7 million), with fixed
seeds.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pysciml_node.stochastic.levy import levy_area
from pysciml_node.stochastic.normals import PlacedNormals
from pysciml_node.stochastic.ticks import Ticks
from pysciml_node.stochastic.virtual_tree import Increment, VirtualTree

SIZE = 20_000


def tree(
    *, area: bool = True, size: int = SIZE, dtype: torch.dtype = torch.float64, depth: int = 45
) -> VirtualTree:
    ticks = Ticks.for_span(2.0)
    normals = PlacedNormals(3, dtype, torch.device("cpu"))
    return VirtualTree(normals, size, (ticks.at(0.0), ticks.at(2.0)), ticks, area=area, depth=depth)


def motion(source: VirtualTree, start: float, end: float) -> Increment:
    return source.motion(source.ticks.at(start), source.ticks.at(end))


def close(found: Tensor, expected: float, deviation: float) -> None:
    """A mean over samples of the given standard deviation, within five of its own."""
    assert abs(found.mean().item() - expected) < 5 * deviation / math.sqrt(len(found))


TIMES = [0.0, 0.1, 1 / 3, 0.5, 0.51, 1.0, math.pi / 2, 2.0]


def test_increments_and_areas_are_normal_and_independent() -> None:
    """`W ~ N(0, h)` and `H ~ N(0, h / 12)`, of one interval and of disjoint ones."""
    source = tree()
    rows: list[Tensor] = []
    for start, end in itertools.pairwise(TIMES):
        found = motion(source, start, end)
        assert found.area is not None
        rows += [found.w / math.sqrt(end - start), found.area / math.sqrt((end - start) / 12)]
    for row in rows:
        close(row, 0.0, 1.0)
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-6
    products = torch.stack(rows) @ torch.stack(rows).T / SIZE
    expected = torch.eye(len(rows), dtype=torch.float64)
    assert bool(((products - expected).abs() < 5 * ((1 + expected) / SIZE).sqrt()).all())


@pytest.mark.parametrize("area", [True, False])
@pytest.mark.parametrize("ends", [(0.0, 2.0), (0.5, 0.7), (0.1, math.e / 2)])
def test_values_between_known_ones_are_bridges(area: bool, ends: tuple[float, float]) -> None:
    """Given `W(s, u)`, `W(s, t)` has mean `(t - s)/(u - s) W` and the bridge's variance."""
    source, (s, u) = tree(area=area), ends
    for share in (0.2, 0.5, 1 / math.sqrt(2)):
        t = s + share * (u - s)
        whole, part = motion(source, s, u).w, motion(source, s, t).w
        rest = part - share * whole
        variance = share * (1 - share) * (u - s)
        close(rest, 0.0, math.sqrt(variance))
        close(rest.square() / variance, 1.0, math.sqrt(2))
        close(rest * whole / math.sqrt((u - s) * variance), 0.0, 1.0)


@pytest.mark.parametrize("area", [True, False])
def test_parts_make_up_the_whole(area: bool) -> None:
    source = tree(area=area, size=50)
    whole = motion(source, 0.1, 1.9)
    for cut in (0.2, 0.7001, 1.0, math.pi / 2):
        joined = motion(source, 0.1, cut).then(motion(source, cut, 1.9))
        torch.testing.assert_close(joined.w, whole.w, rtol=1e-12, atol=1e-12)
        if area:
            torch.testing.assert_close(joined.area, whole.area, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [3, 20_000])
@pytest.mark.parametrize("depth", [0, 45])
def test_neither_the_order_nor_what_is_kept_matters(size: int, depth: int) -> None:
    intervals = [(0.0, 0.3), (0.3, 0.31), (1 / 3, 0.5), (1.0, 2.0), (0.0, 2.0), (1.4, 1.6)]
    one, other = tree(size=size), tree(size=size, depth=depth)
    forward = [motion(one, *i) for i in intervals]
    backward = [motion(other, *i) for i in reversed(intervals)][::-1]
    again = [motion(one, *i) for i in reversed(intervals)][::-1]
    for first, second, third in zip(forward, backward, again, strict=True):
        assert torch.equal(first.w, second.w)
        assert torch.equal(first.w, third.w)
        assert first.area is not None
        assert second.area is not None
        assert torch.equal(first.area, second.area)


def test_memory_is_one_branch() -> None:
    source = tree(size=2)
    for n in range(300):
        motion(source, n / 150.5, (n + 1) / 150.5)
    assert len(source._branch) <= 45
    assert not source._drawn


def test_a_given_whole_is_kept() -> None:
    source = tree(size=4)
    w = torch.arange(4.0, dtype=torch.float64)
    source.given(w, None)
    assert torch.equal(motion(source, 0.0, 2.0).w, w)
    total = motion(source, 0.0, 0.6).then(motion(source, 0.6, 2.0)).w
    torch.testing.assert_close(total, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [100, 256, 1000])
def test_round_times_cost_few_splits(steps: int) -> None:
    """Queries one after the other on a round grid draw less than two vectors each."""
    normals = PlacedNormals(1, torch.float64, torch.device("cpu"))
    ticks, drawn = Ticks.for_span(1.0), []
    draw = normals.at
    normals.at = lambda places, size: (drawn.extend(places), draw(places, size))[1]  # type: ignore[method-assign]
    source = VirtualTree(normals, 1, (ticks.at(0.0), ticks.at(1.0)), ticks, area=False, depth=45)
    for direction in (1, -1):
        drawn.clear()
        for n in range(steps)[::direction]:
            motion(source, n / steps, (n + 1) / steps)
        assert len(drawn) < 2 * steps


@pytest.mark.parametrize("span", [1e-6, 0.3, 1.0, 14.6, 1e4, 1e12])
def test_ticks_resolve_eight_digits_in_few_splits(span: float) -> None:
    ticks = Ticks.for_span(span)
    assert ticks.length < 2e-8 * span
    generator = torch.Generator().manual_seed(0)
    for share in torch.rand(50, generator=generator, dtype=torch.float64).tolist():
        start, stop, sought, splits = ticks.at(0.0), ticks.at(span), ticks.at(share * span), 0
        while start < sought < stop:
            middle = ticks.split(start, stop)
            assert start < middle < stop
            start, stop = (start, middle) if sought <= middle else (middle, stop)
            splits += 1
        assert splits <= 48


def test_single_precision_keeps_short_increments() -> None:
    """Increments are sums of increments, never differences of values."""
    source = tree(size=1000, dtype=torch.float32)
    found = motion(source, 1.0, 1.0 + 2**-14)
    assert found.area is not None
    ratio = found.area.double().square().mean() / (found.h / 12)
    assert abs(ratio.item() - 1) < 5 * math.sqrt(2 / 1000)


@pytest.mark.parametrize("foster", [True, False])
def test_levy_areas_have_the_law_of_brownian_motion(foster: bool) -> None:
    """`E A = 0`, `E A^2 = h^2 / 4`, mean `H_i W_j - W_i H_j` given `W` and `H`.

    With Foster's variance the square of what is left varies with `H^2`: covariance `h^3 / 360`.
    """
    h, generator = 0.7, torch.Generator().manual_seed(2)
    normal = torch.randn(100_000, 8, generator=generator, dtype=torch.float64)
    w, area = normal[:, :2] * math.sqrt(h), normal[:, 2:4] * math.sqrt(h / 12)
    found = levy_area(h, w, area, normal[:, 4:].view(-1, 2, 2), foster=foster)
    assert torch.equal(found, -found.mT)
    a = found[:, 0, 1]
    close(a, 0.0, h / 2)
    close(a.square() / (h**2 / 4), 1.0, a.square().std().item() / (h**2 / 4))
    rest = a - (area[:, 0] * w[:, 1] - w[:, 0] * area[:, 1])
    close(rest.square() / (h**2 / 12), 1.0, rest.square().std().item() / (h**2 / 12))
    product = rest.square() * (area[:, 0].square() - h / 12)
    # Var(H^2) = 2 (h/12)^2 = h^2 / 72, times h / 5.
    close(product, h**3 / 360 if foster else 0.0, product.std().item())


def test_levy_areas_agree_with_finely_sampled_paths() -> None:
    """Moments of `A` given `W` and `H`, from paths of 400 steps."""
    steps, generator = 400, torch.Generator().manual_seed(4)
    dw = torch.randn(10_000, steps, 2, generator=generator, dtype=torch.float64) / math.sqrt(steps)
    value = dw.cumsum(1) - dw
    w = dw.sum(1)
    a = (value[..., 0] * dw[..., 1] - value[..., 1] * dw[..., 0]).sum(1) / 2
    area = (value + dw / 2).mean(1) - w / 2
    rest = a - (area[:, 0] * w[:, 1] - w[:, 0] * area[:, 1])
    close(rest, 0.0, rest.std().item())
    variance = 1 / 20 + area.square().sum(-1) / 5
    close(rest.square() - variance, 0.0, rest.square().std().item())
    product = (rest.square() - variance) * area.square().sum(-1)
    close(product, 0.0, product.std().item())
