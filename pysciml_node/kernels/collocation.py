"""Spectral collocation on the square of time pairs `[0, 1]^2`.

A scheme holds nodes `(t_m, s_m)` and dense matrices that take nodal values `f_m` to

    (forward f)_m  = int_0^{t_m} int_0^{s_m} f,      (backward f)_m = int_{t_m}^1 int_{s_m}^1 f.

Two kinds of nodes: the tensor grid, for smooth `f`, and the grid split along `t = s`, for `f`
with a kink there (the kernel of an input with itself under ReLU): each triangle has coordinates
`(a, r)` with `t, s = a, r a` or `r a, a`, in which `f` is smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Interpolator = Callable[[Array, Array], Array]


def nodes(n: int) -> Array:
    """The `n + 1` Chebyshev-Lobatto points of [0, 1], both ends included."""
    return np.asarray((1 - np.cos(np.pi * np.arange(n + 1) / n)) / 2)


def lagrange(x: Array, y: Array) -> Array:
    """Values at `y` of the Lagrange polynomials of the nodes `x`, `(len(y), len(x))`."""
    degree = len(x) - 1
    at_nodes = legendre.legvander(2 * x - 1, degree)
    return np.asarray(np.linalg.solve(at_nodes.T, legendre.legvander(2 * y - 1, degree).T).T)


def _gauss(n: int) -> tuple[Array, Array]:
    x, w = legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def _moments(x: Array, ends: Array, power: int) -> Array:
    """`int_0^end a^power l_j(a) da` for every end and Lagrange polynomial."""
    z, w = _gauss(len(x) + 1)
    points = ends[:, None] * z
    basis = lagrange(x, points.ravel()).reshape(*points.shape, len(x))
    return np.asarray(np.einsum("eq,eqj->ej", ends[:, None] * w * points**power, basis))


@dataclass(frozen=True)
class Scheme:
    """Nodes and integration matrices.

    Attributes:
        times: one-dimensional Chebyshev-Lobatto nodes, `(N,)`, from 0 to 1.
        to_t, to_s: interpolation from `times` to `t_m` and to `s_m`, `(M, N)`.
        forward, backward: integration matrices, `(M, M)`.
        weights: `int int f` over the whole square, `(M,)`.
        diagonal: values on the diagonal `(t, t)` at `times`, `(N, M)`.
        corner, origin: positions of the nodes (1, 1) and (0, 0), `(1,)`.
    """

    times: Tensor
    to_t: Tensor
    to_s: Tensor
    forward: Tensor
    backward: Tensor
    weights: Tensor
    diagonal: Tensor
    corner: Tensor
    origin: Tensor

    def to(self, device: torch.device) -> Scheme:
        """The same scheme on another device."""
        if device.type == "cpu":
            return self
        return Scheme(*(getattr(self, field.name).to(device) for field in fields(self)))


def _assemble(x: Array, t: Array, s: Array, forward: Array, interpolate: Interpolator) -> Scheme:
    ones = np.ones_like(t)
    corner = int(np.argmax(t + s))
    weights = forward[corner]
    # inclusion and exclusion: the far rectangle is the whole, less two strips, plus the near one
    strips = (interpolate(ones, s) + interpolate(t, ones)) @ forward
    return Scheme(
        times=torch.as_tensor(x),
        to_t=torch.as_tensor(lagrange(x, t)),
        to_s=torch.as_tensor(lagrange(x, s)),
        forward=torch.as_tensor(forward),
        backward=torch.as_tensor(weights - strips + forward),
        weights=torch.as_tensor(weights),
        diagonal=torch.as_tensor(interpolate(x, x)),
        corner=torch.tensor([corner]),
        origin=torch.tensor([int(np.argmin(t + s))]),
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def square(n: int) -> Scheme:
    """The tensor grid of `(n + 1)^2` Chebyshev-Lobatto nodes."""
    x = nodes(n)
    integrate = _moments(x, x, power=0)

    def interpolate(t: Array, s: Array) -> Array:
        rows = lagrange(x, t)[:, :, None] * lagrange(x, s)[:, None, :]
        return np.asarray(rows.reshape(len(t), -1))

    t, s = np.repeat(x, n + 1), np.tile(x, n + 1)
    return _assemble(x, t, s, np.asarray(np.kron(integrate, integrate)), interpolate)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def split(n: int) -> Scheme:
    """Two triangles of `(n + 1)^2` nodes each, with the diagonal as their common edge."""
    x = nodes(n)
    count = (n + 1) ** 2
    a, r = np.repeat(x, n + 1), np.tile(x, n + 1)
    t, s = np.concatenate([a, r * a]), np.concatenate([r * a, a])
    triangle = _moments(x, r * a, power=1)[:, :, None] * _moments(x, np.ones(1), power=0)[0]
    triangle = triangle.reshape(count, count)
    rectangle = _rectangles(x).reshape(count, count)
    forward = np.block([[triangle + rectangle, triangle], [triangle, triangle + rectangle]])

    def interpolate(t: Array, s: Array) -> Array:
        longer, shorter = np.maximum(t, s), np.minimum(t, s)
        ratio = np.divide(shorter, longer, out=np.ones_like(t), where=longer > 0)
        rows = lagrange(x, longer)[:, :, None] * lagrange(x, ratio)[:, None, :]
        rows = rows.reshape(len(t), count)
        below = (t >= s)[:, None]
        return np.concatenate([np.where(below, rows, 0.0), np.where(below, 0.0, rows)], axis=1)

    return _assemble(x, t, s, forward, interpolate)


def _rectangles(x: Array) -> Array:
    """Integrals over `s < a < t, 0 < b < s` of the basis `l_i(a) l_j(b/a)`.

    With `s = r t`, `a = t r^(1-y)` and `b = s z` for y, z in [0, 1], the integrand is entire
    in y, whatever the ratio of the sides. Shape `(t, r, i, j)`.
    """
    y, w = _gauss(2 * len(x) + 24)
    z, v = _gauss(len(x) + 1)
    result = np.zeros((len(x),) * 4)
    for j, r in enumerate(x):
        if r == 0:
            continue
        inner = lagrange(x, np.outer(r**y, z).ravel()).reshape(len(y), len(z), len(x))
        inner = np.einsum("z,yzj->yj", v, inner)
        for i, t in enumerate(x):
            jacobian = w * t * t * r * r ** (1 - y) * -np.log(r)
            outer = lagrange(x, t * r ** (1 - y))
            result[i, j] = np.einsum("y,yi,yj->ij", jacobian, outer, inner)
    return result
