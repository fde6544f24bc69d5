"""The elementary functions of native code against values of forty digits."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from pysciml_node.torch_engine.native.compiler import available, build
from pysciml_node.torch_engine.native.library import header

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

LOOPS = """
#define LOOP(name) void loop_##name(int n, const REAL *x, REAL *y) { \\
  _Pragma("omp simd") for (int i = 0; i < n; i++) y[i] = psn_##name(x[i]); }
LOOP(exp) LOOP(expm1) LOOP(tanh) LOOP(sigmoid) LOOP(log) LOOP(log1p)
void loop_sin(int n, const REAL *x, REAL *y) { psn_sines(n, x, y, 0); }
void loop_cos(int n, const REAL *x, REAL *y) { psn_sines(n, x, y, 1); }
"""

# The function, its exact values, and the ends of where it is tried.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "exp": (mpmath.exp, -80.0, 80.0),
    "expm1": (mpmath.expm1, -3.0, 30.0),
    "tanh": (mpmath.tanh, -10.0, 10.0),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), -60.0, 60.0),
    "log": (mpmath.log, 1e-6, 4.0),
    "log1p": (mpmath.log1p, -0.999, 4.0),
    "sin": (mpmath.sin, -900.0, 900.0),
    "cos": (mpmath.cos, -900.0, 900.0),
}


def evaluate(name: str, x: Tensor) -> Tensor:
    library = build(header(x.dtype) + LOOPS)
    y = torch.empty_like(x)
    function = getattr(library, f"loop_{name}")
    function(x.numel(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_small(name: str, dtype: torch.dtype) -> None:
    exact, low, high = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(3000, generator=generator, dtype=torch.float64) * (high - low) + low
    # Where functions vanish, or their parts cancel.
    near = (torch.rand(3000, generator=generator, dtype=torch.float64) - 0.5) * 1.5
    x = torch.cat([wide, near + (1.0 if name == "log" else 0.0)]).to(dtype)
    y = evaluate(name, x)
    units = (torch.nextafter(y.abs(), torch.full_like(y, math.inf)) - y.abs()).double()
    with mpmath.workdps(40):
        errors = [
            abs(float((mpmath.mpf(found) - exact(mpmath.mpf(at))) / unit))
            for at, found, unit in zip(x.tolist(), y.tolist(), units.tolist(), strict=True)
        ]
    # Two units; the hyperbolic tangent in double precision comes to a tenth more at its worst.
    assert max(errors) < (2.2 if name == "tanh" and dtype is torch.float64 else 2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ends_of_the_range_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, info.tiny, -info.tiny, 1e30]
    x = torch.tensor([*values, -1e30, 88.0, -88.0, info.max, info.tiny / 8], dtype=dtype)
    found, expected = evaluate(name, x), getattr(torch, name)(x)
    torch.testing.assert_close(found, expected, rtol=4 * info.eps, atol=0, equal_nan=True)
    zeros = expected == 0
    assert torch.equal(torch.signbit(found[zeros]), torch.signbit(expected[zeros]))
