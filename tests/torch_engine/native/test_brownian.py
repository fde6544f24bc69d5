"""The Brownian path of native code beside that of Python."""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pysciml_node.stochastic.brownian import BrownianPath
from pysciml_node.stochastic.normals import PlacedNormals
from pysciml_node.stochastic.virtual_tree import Increment
from pysciml_node.torch_engine.native.brownian import Noise
from pysciml_node.torch_engine.native.compiler import available, build
from pysciml_node.torch_engine.native.library import header, source
from pysciml_node.torch_engine.native.text import padded

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

CALLED = """
int path_memory(void) { return PATH_MEMORY; }
double motion(Noise *n, double t, double end, REAL *w, REAL *area) {
  Motion m = psn_motion(n, t, end);
  memcpy(w, m.w, PATHS * sizeof(REAL));
  memcpy(area, m.area, PATHS * sizeof(REAL));
  return m.h;
}
double aligned(const Noise *n, double t, double h, int down) { return psn_aligned(n, t, h, down); }
"""


@functools.cache
def library(dtype: torch.dtype, size: int) -> ctypes.CDLL:
    sizes = f"enum {{ SEEDS = 1, PATHS = {size}, PATH_ROW = {padded(size)} }};\n"
    text = (header(dtype), sizes, source("codes.h"), source("brownian.h"), CALLED)
    made = build("\n".join(text))
    made.motion.restype = made.aligned.restype = ctypes.c_double
    number = ctypes.c_double
    made.motion.argtypes = (ctypes.c_void_p, number, number, ctypes.c_void_p, ctypes.c_void_p)
    made.aligned.argtypes = (ctypes.c_void_p, number, number, ctypes.c_int)
    return made


class NativePath:
    """The path of one seed, by native code."""

    def __init__(self, seed: int, size: int, dtype: torch.dtype, t0: float, length: float) -> None:
        self.library, self.size, self.dtype = library(dtype, size), size, dtype
        self._rows = torch.zeros(self.library.path_memory(), dtype=dtype)
        self.noise = Noise(t0=t0, length=length, seed=seed, rows=self._rows.data_ptr())

    def increment(self, start: float, end: float) -> Increment:
        w, area = torch.empty(2, self.size, dtype=self.dtype).unbind()
        address = ctypes.addressof(self.noise)
        h = self.library.motion(address, start, end, w.data_ptr(), area.data_ptr())
        return Increment(h, w, area)

    def aligned(self, t: float, h: float, down: bool) -> float:
        found: float = self.library.aligned(ctypes.addressof(self.noise), t, h, down)
        return found


def both(
    seed: int, size: int, dtype: torch.dtype, t0: float = 0.0, length: float = 1.0
) -> tuple[NativePath, BrownianPath]:
    normals = PlacedNormals(seed, dtype, torch.device("cpu"))
    return NativePath(seed, size, dtype, t0, length), BrownianPath(normals, size, t0, length)


def assert_same(found: Increment, expected: Increment) -> None:
    """To some units in the last place of numbers of the interval's size."""
    assert found.h == pytest.approx(expected.h, rel=1e-15)
    assert expected.area is not None
    for one, other in ((found.w, expected.w), (found.area, expected.area)):
        assert isinstance(one, Tensor)
        near = 64 * torch.finfo(one.dtype).eps * max(expected.h, 1e-12) ** 0.5
        torch.testing.assert_close(one, other, rtol=0, atol=near)


def grid(rng: random.Random) -> tuple[float, float]:
    """A step of a dyadic grid."""
    k = 2 ** rng.randrange(1, 20)
    n = rng.randrange(k)
    return n / k, (n + 1) / k


def anywhere(rng: random.Random) -> tuple[float, float]:
    a, b = sorted((rng.random(), rng.random()))
    return a, b


def short(rng: random.Random) -> tuple[float, float]:
    a = rng.random()
    return a, min(a + 2.0 ** -rng.randrange(5, 31), 1.0)


@pytest.mark.parametrize("intervals", [grid, anywhere, short])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 5), (torch.float32, 19)])
def test_numbers_are_those_of_the_path_in_python(
    intervals: Callable[[random.Random], tuple[float, float]], dtype: torch.dtype, size: int
) -> None:
    rng = random.Random(3)
    for _ in range(4):
        t0, length = rng.uniform(-3, 3), rng.uniform(0.1, 40)
        native, python = both(rng.randrange(2**63), size, dtype, t0, length)
        for _ in range(60):
            a, b = (t0 + x * length for x in intervals(rng))
            assert_same(native.increment(a, b), python.increment(a, b))


def test_the_whole_interval_and_none_of_it() -> None:
    native, python = both(2**63 - 1, 5, torch.float64, 1.0, 2.0)
    assert_same(native.increment(1.0, 3.0), python.increment(1.0, 3.0))
    nothing = native.increment(2.0, 2.0)
    assert nothing.h == 0.0
    assert not nothing.w.any()


def test_a_motion_is_the_same_to_the_last_bit_whenever_it_is_asked_for() -> None:
    rng = random.Random(5)
    asked = [anywhere(rng) for _ in range(40)] + [short(rng) for _ in range(40)]
    first, second = (both(7, 5, torch.float64)[0] for _ in range(2))
    found = {interval: first.increment(*interval) for interval in asked}
    for interval in reversed(asked):
        again, before = second.increment(*interval), found[interval]
        assert again.h == before.h
        assert torch.equal(again.w, before.w)
        assert again.area is not None
        assert before.area is not None
        assert torch.equal(again.area, before.area)


def test_steps_are_aligned_alike() -> None:
    rng = random.Random(9)
    native, python = both(1, 5, torch.float64, -0.3, 1.7)
    for _ in range(500):
        t, h = -0.3 + rng.random(), 2.0 ** rng.uniform(-25, 0)
        for down in (True, False):
            assert native.aligned(t, h, down) == python.aligned(t, h, down)


def test_increments_are_normal_and_independent() -> None:
    """Means, variances and correlations of 4,000 increments, in five standard deviations."""
    native = both(11, 5, torch.float64)[0]
    steps = [native.increment(n / 800, (n + 1) / 800) for n in range(800)]
    w = torch.stack([step.w for step in steps]) * 800**0.5
    area = torch.stack([step.area for step in steps if step.area is not None]) * (12 * 800) ** 0.5
    for x in (w, area):
        assert abs(float(x.mean())) < 5 / 4000**0.5
        assert abs(float(x.square().mean()) - 1) < 5 * (2 / 4000) ** 0.5
    for x, y in ((w, area), (w[1:], w[:-1]), (w[:, 1:], w[:, :-1])):
        assert abs(float((x * y).mean())) < 5 / x.numel() ** 0.5
