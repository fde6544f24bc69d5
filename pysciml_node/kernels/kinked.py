"""Activations with a kink at zero (ELU, SELU, ...): the kink in closed form, the rest by series.

Split `phi = g + s` with `s(u) = sum_n j_n u_+^n / n!`, n = 1, 2, 3, where `j_n` is the jump
of the n-th derivative at zero. The Hermite coefficients of `u_+^n` fall slowly, but their moments
`E[u_+^n v_+^n]` are the arc-cosine kernels; only products with the smooth `g` are left to the
series, so a hundred terms do what thousands could not.

Reference: Cho and Saul, Kernel Methods for Deep Learning (NIPS 2009), equations 4 to 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pysciml_node.kernels.expectations import (
    Correlation,
    Features,
    GaussianExpectation,
    PairMoments,
)
from pysciml_node.kernels.hermite import HermiteSeries, SeriesPair, derivative, hermite_basis

_ORDERS = 3
_OFFSET = 2e-3  # spacing of the points on either side of zero, from which jumps are extrapolated
_SERIES_MARGIN = 1e-2  # the series multiplies the kink's slow tail: see KinkedSeries


def jumps_at_zero(fn: Callable[[Tensor], Tensor]) -> tuple[float, ...]:
    """Jumps of the first three derivatives at zero (0 where there is none), to about `1e-6`.

    The polynomials through five values of `phi'` on either side are compared at zero.
    """
    steps = np.arange(1, 6) * _OFFSET
    slopes = derivative(fn, torch.as_tensor(np.concatenate([steps, -steps]))).numpy()
    right = np.linalg.solve(np.vander(steps, increasing=True), slopes[:5])[:_ORDERS]
    left = np.linalg.solve(np.vander(-steps, increasing=True), slopes[5:])[:_ORDERS]
    factorials = np.array([1.0, 1.0, 2.0])
    scale = max(float(np.abs(right).max()), float(np.abs(left).max()), 1e-3)
    jumps = (right - left) * factorials
    return tuple(float(jump) if abs(jump) > 1e-4 * scale else 0.0 for jump in jumps)


@lru_cache(maxsize=1)
@torch.inference_mode(False)
@torch.no_grad()
def _half_powers() -> Tensor:
    """Hermite coefficients of `z_+^n / n!`, n = 0 to 3: `(4, 1280)`."""
    z, _, functions = hermite_basis(208, 1280)
    positive = (z > 0).to(z.dtype)
    rows = [functions @ (positive * z**n) / math.factorial(n) for n in range(_ORDERS + 1)]
    return torch.stack(rows)


def _arc_cosines(r: Tensor, scale: Tensor, weights: Sequence[float]) -> Tensor:
    """`sum_n weights[n] E[u_+^n v_+^n] / n!^2` at correlation `r`, `scale = sqrt(q1 q2)`."""
    angle = torch.asin(r).add_(math.pi / 2)  # pi - theta
    sine = torch.sqrt((1 - r) * (1 + r))
    square = r * r
    shapes: tuple[Callable[[], Tensor], ...] = (
        lambda: angle,
        lambda: sine + angle * r,
        lambda: 3 * sine * r + angle * (1 + 2 * square),
        lambda: sine * (4 + 11 * square) + angle * r * (9 + 6 * square),
    )
    total = torch.zeros_like(r)
    for n, weight in enumerate(weights):
        if weight != 0:
            part = shapes[n]() * scale**n
            total.add_(part, alpha=weight / (2 * math.pi * math.factorial(n) ** 2))
    return total


@dataclass(frozen=True)
class KinkedSeries(GaussianExpectation):
    """An elementwise activation with a kink at zero.

    The series of `g` is cut where it leaves out `rtol / 100`; what is lost with it is the
    product with what the series of the kink leaves out there, and by Cauchy-Schwarz below `rtol`.

    Args:
        smooth: the Gaussian expectations of `g = phi - s`.
        jumps: `(j_1, j_2, j_3)`.
    """

    smooth: HermiteSeries
    jumps: tuple[float, ...]
    analytic: ClassVar[bool] = False

    @classmethod
    def of(
        cls, fn: Callable[[Tensor], Tensor], jumps: tuple[float, ...], rtol: float, name: str
    ) -> KinkedSeries:
        """Split a function with given jumps at zero."""

        def remainder(u: Tensor) -> Tensor:
            positive = torch.relu(u)
            rest = fn(u)
            for n, jump in enumerate(jumps, start=1):
                rest = rest - jump / math.factorial(n) * positive**n
            return rest

        return cls(HermiteSeries(remainder, _SERIES_MARGIN * rtol, name), jumps)

    def _kinks(self, lowered: int, like: Tensor, terms: int) -> list[tuple[int, Tensor]]:
        """Powers and coefficients of `s` at unit variance, of `s'` when `lowered` is 1."""
        table = _half_powers().to(like)[:, :terms].reshape(_ORDERS + 1, terms, *([1] * like.ndim))
        return [
            (n - lowered, jump * table[n - lowered])
            for n, jump in enumerate(self.jumps, start=1)
            if jump != 0
        ]

    def features(self, q: Tensor) -> Features:
        """`sqrt(q)` and the coefficients of `phi` and `phi'`, as far as those of `g`."""
        root, value, slope = self.smooth.features(q)
        for power, kink in self._kinks(0, root[0], len(value)):
            value = value + kink * root**power
        for power, kink in self._kinks(1, root[0], len(slope)):
            slope = slope + kink * root**power
        return root, value, slope

    def pair(self, f1: Features, f2: Features) -> PairMoments:
        """Series of the products that involve `g`, and closed forms of those that do not."""
        root1, root2 = f1[0][0], f2[0][0]
        both = root1 * root2
        products = []
        for lowered, a1, a2 in ((0, f1[1], f2[1]), (1, f1[2], f2[2])):
            product = a1 * a2
            for power, kink in self._kinks(lowered, both, len(a1)):
                product.addcmul_(kink**2, both**power, value=-1)
            products.append(product)
        correlation = Correlation(both)
        return _KinkedPair(SeriesPair(correlation, *products), correlation, self.jumps)


@dataclass(frozen=True)
class _KinkedPair(PairMoments):
    series: SeriesPair
    correlation: Correlation
    jumps: tuple[float, ...]

    def _closed(self, c: Tensor, lowered: int) -> Tensor:
        weights = [0.0] * (1 - lowered) + [jump**2 for jump in self.jumps]
        return _arc_cosines(self.correlation.snapped(c), self.correlation.scale, weights)

    def value(self, c: Tensor) -> Tensor:
        return self.series.value(c) + self._closed(c, lowered=0)

    def slope(self, c: Tensor) -> Tensor:
        return self.series.slope(c) + self._closed(c, lowered=1)
