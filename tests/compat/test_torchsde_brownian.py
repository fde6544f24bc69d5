"""torchsde's Brownian classes, and what samplers of diffusion models do with them."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from pysciml_node.compat.torchsde import (
    BrownianInterval,
    BrownianPath,
    BrownianTree,
    ReverseBrownian,
    brownian_interval_like,
    settings,
)

LEVELS = list(settings.LEVY_AREA_APPROXIMATIONS)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(4, 3), (4,), (), (2, 3, 5)])
def test_shapes(level: str, shape: tuple[int, ...]) -> None:
    bm = BrownianInterval(0.0, 1.0, shape, levy_area_approximation=level)
    areas = (*shape, shape[-1]) if len(shape) > 1 else shape
    for start, end in ((0.2, 0.7), (0.3, 0.3)):
        w, u, a = bm(start, end, return_U=True, return_A=True)
        assert w.shape == bm(start, end).shape == shape
        assert (u is None) == (level == "none")
        assert (a is None) == (level in ("none", "space-time"))
        assert u is None or u.shape == shape
        assert a is None or a.shape == areas
    assert bm.size() == bm.shape == shape


def test_time_integrals_add_up() -> None:
    """`U(s, u) = U(s, t) + U(t, u) + (u - t) W(s, t)`."""
    bm = BrownianInterval(
        0.0, 1.0, (50, 2), torch.float64, levy_area_approximation="space-time", entropy=1
    )
    (w, u), (w1, u1) = bm(0.1, 0.9, return_U=True), bm(0.1, 0.35, return_U=True)
    w2, u2 = bm(0.35, 0.9, return_U=True)
    torch.testing.assert_close(w1 + w2, w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u1 + u2 + 0.55 * w1, u, rtol=1e-12, atol=1e-12)


def test_the_motion_is_a_function_of_its_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    intervals = torch.rand(60, 2, generator=generator).sort(1).values.tolist()
    forms: list[dict[str, object]] = [
        {"levy_area_approximation": "foster"},
        {"tol": 1e-6, "halfway_tree": True},
        {"dt": 1 / 7},
        {"cache_size": 0},
    ]
    for form in forms:
        one = BrownianInterval(0.0, 1.0, (3, 2), entropy=56789, **form)  # type: ignore[arg-type]
        other = BrownianInterval(0.0, 1.0, (3, 2), entropy=56789, **form)  # type: ignore[arg-type]
        found = [one(*i, return_A=True) for i in intervals]
        turned = [other(*i, return_A=True) for i in reversed(intervals)][::-1]
        for (w, a), (w2, a2) in zip(found, turned, strict=True):
            assert torch.equal(w, w2)
            assert a is None or torch.equal(a, a2)
    assert not torch.equal(one(0, 1), BrownianInterval(0.0, 1.0, (3, 2), entropy=1)(0, 1))


def test_a_time_is_the_same_as_a_number_and_as_a_tensor() -> None:
    bm = BrownianInterval(0.0, 1.0, (3,), entropy=2)
    for kind in (torch.float32, torch.float64):
        start, end = torch.tensor([0.1, 0.7], dtype=kind)
        assert torch.equal(bm(start, end), bm(0.1, 0.7))


def test_what_is_returned_belongs_to_the_caller() -> None:
    bm = BrownianInterval(0.0, 1.0, (3,), entropy=2)
    for interval in ((0.0, 1.0), (0.0, 0.5), (0.2, 0.6)):
        before = bm(*interval).clone()
        bm(*interval).zero_()
        assert torch.equal(bm(*interval), before)
    with torch.inference_mode():
        bm(0.25, 0.75)
    weight = torch.ones(3, requires_grad=True)
    (bm(0.25, 0.75) * weight).sum().backward()
    assert weight.grad is not None


def test_a_given_end_is_reached() -> None:
    w0, w1 = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tree = BrownianTree(0.0, w0, 2.0, w1, entropy=4)
    torch.testing.assert_close(tree(0.0, 2.0), w1 - w0, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="intervals"):
        torch.testing.assert_close(tree.interval(1.5) + w0, tree(1.5), rtol=1e-12, atol=1e-12)
    rest = tree(0.5) - (0.75 * w0 + 0.25 * w1)
    assert abs(rest.square().mean().item() / (0.5 * 1.5 / 2) - 1) < 5 * math.sqrt(2 / 1000)


def test_half_precision_is_rounded_last() -> None:
    x = torch.zeros(2000, dtype=torch.float16)
    rounded, exact = (BrownianTree(0.0, x.to(d), 1.0, entropy=3) for d in (x.dtype, torch.float32))
    assert torch.equal(rounded(0.3, 0.4), exact(0.3, 0.4).half())


def test_times_outside_are_moved_with_a_warning() -> None:
    bm = BrownianInterval(0.0, 1.0, (3,))
    with pytest.warns(UserWarning, match=r"tb should lie in \[0.0, 1.0\], but is 1.5"):
        assert torch.equal(bm(0.5, 1.5), bm(0.5, 1.0))
    with pytest.raises(RuntimeError, match=r"ta must not be later than tb"):
        bm(0.6, 0.5)


def test_reversed_time() -> None:
    bm = BrownianInterval(0.0, 1.0, (3, 2), levy_area_approximation="davie", entropy=1)
    for one, other in zip(
        ReverseBrownian(bm)(-0.7, -0.2, return_U=True, return_A=True),
        bm(0.2, 0.7, return_U=True, return_A=True),
        strict=True,
    ):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="asked for intervals"):
        ReverseBrownian(bm)(-0.7)


def test_paths_start_at_their_value() -> None:
    w0 = torch.ones(4, 1)
    bm = BrownianPath(t0=0.0, w0=w0)
    assert torch.equal(bm(0.0), w0)
    torch.testing.assert_close(bm(0.25) + bm(0.25, 0.75), bm(0.75))
    like = brownian_interval_like(w0.double(), t1=3.0, size=(4, 2), entropy=1)
    assert (like.shape, like.dtype, like.t1) == ((4, 2), torch.float64, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t0": 1.0, "t1": 0.0, "size": (1,)}, "t0 must not be later than t1"),
        ({}, "size must be given"),
        ({"size": (2,), "W": torch.zeros(3)}, "must agree in size"),
        ({"size": (2,), "levy_area_approximation": "fosters"}, "Did you mean 'foster'"),
        ({"size": (2,), "halfway_tree": True}, "halfway_tree=True needs a positive tol"),
        ({"size": (2,), "tol": -1.0}, "tol must be"),
        ({"size": (2,), "dt": 0.0}, "dt must be"),
        ({"size": (2,), "entropy": 1.5}, "entropy must be a whole number"),
        ({"size": (2,), "entropy": [1, -1]}, r"entropy\[1\] must be a whole number, at least 0"),
        ({"size": (2,), "entropy": "7"}, "entropy must be a whole number, or a list of them"),
        ({"size": (2,), "dtype": "float32"}, "dtype must be a floating-point one"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        BrownianInterval(**arguments)  # type: ignore[arg-type]


def test_a_whole_number_of_any_kind_chooses_the_same_motion() -> None:
    plain = BrownianInterval(size=(3,), entropy=7)(0, 1)
    for kind in (torch.tensor(7), np.int64(7)):
        assert torch.equal(BrownianInterval(size=(3,), entropy=kind)(0, 1), plain)  # type: ignore[arg-type]


class _Sampler:
    """Noise between two levels, as samplers of diffusion models draw it: unit variance."""

    def __init__(self, x: Tensor, low: float, high: float, seed: int | list[int]) -> None:
        seeds = seed if isinstance(seed, list) else [seed]
        shape = x[0] if isinstance(seed, list) else x
        ends = torch.tensor(low), torch.tensor(high)
        self.batched = isinstance(seed, list)
        self.trees = [
            BrownianTree(ends[0], torch.zeros_like(shape), ends[1], entropy=s) for s in seeds
        ]

    def __call__(self, level: Tensor, following: Tensor) -> Tensor:
        low, high = sorted((level, following))
        sign = 1 if level < following else -1
        w = torch.stack([tree(low, high) for tree in self.trees]) * sign
        return (w if self.batched else w[0]) / (high - low).abs().sqrt()


def test_samplers_get_independent_standard_noise_on_falling_levels() -> None:
    x = torch.zeros(2, 4, 32, 32)
    levels = torch.exp(torch.linspace(math.log(14.6), math.log(0.03), 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = _Sampler(x, 0.03, 14.6, 2**63 - 2)
        noises = [single(a, b) for a, b in itertools.pairwise(levels[1:-1])]
        batched = _Sampler(x, 0.03, 14.6, [5, 6])
        several = [batched(a, b) for a, b in itertools.pairwise(levels[1:-1])]
        alone = _Sampler(x[:1], 0.03, 14.6, [6])
        assert torch.equal(alone(levels[3], levels[4])[0], several[2][1])
    for drawn in (noises, several):
        rows = torch.stack([n.flatten() for n in drawn]).double()
        count = rows.shape[1]
        products = rows @ rows.T / count
        expected = torch.eye(len(rows), dtype=torch.float64)
        assert bool(((products - expected).abs() < 5 * ((1 + expected) / count).sqrt()).all())
    # A run with twice the levels sees the same motion.
    halves = single(levels[2], levels[4]) * (levels[2] - levels[4]).sqrt()
    parts = sum(
        single(levels[n], levels[n + 1]) * (levels[n] - levels[n + 1]).sqrt() for n in (2, 3)
    )
    torch.testing.assert_close(parts, halves, rtol=1e-5, atol=1e-5)
