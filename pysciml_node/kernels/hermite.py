"""Gaussian expectations by Hermite series, with the error known.

Mehler's formula turns the two-dimensional integral into one-dimensional ones,

    E[phi(u) phi(v)] = sum_k a_k(q1) a_k(q2) r^k,   a_k(q) = E[phi(sqrt(q) z) h_k(z)],

with `h_k` the normalised Hermite polynomials and `r` the correlation. Since
`sum_k a_k(q)^2 = E[phi(sqrt(q) z)^2]`, what a truncated series leaves out is known, not guessed;
and every truncation is itself positive semidefinite. For activations analytic in a strip (softplus,
tanh, GELU) the `a_k` fall like `exp(-const sqrt(k))`; a kink makes them fall like a power.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.kernels.errors import KernelConvergenceError
from pysciml_node.kernels.expectations import (
    Correlation,
    Features,
    GaussianExpectation,
    PairMoments,
)

_HALF_WIDTH = 13.0  # exp(-z^2/4) is below 1e-18 beyond, and it bounds every integrand's envelope
_LEGENDRE_NODES = 16
_NEGLIGIBLE = 1e-28  # mean squares below are rounding errors of the activation
_LEVELS = ((26, 48), (52, 160), (104, 640), (208, 1280))  # (panels, terms), tried in this order


@lru_cache(maxsize=8)
@torch.inference_mode(False)
@torch.no_grad()
def hermite_basis(panels: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes `z`, Gaussian weights, and `h_k(z)` times the weights, `(terms, nodes)`.

    Composite Gauss-Legendre with an edge at zero, where activations have their kinks: the kink
    then costs nothing, at any variance, whereas Gauss-Hermite nodes straddle it.
    """
    x, w = np.polynomial.legendre.leggauss(_LEGENDRE_NODES)
    edges = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, panels + 1)
    half = (edges[1] - edges[0]) / 2
    z = torch.as_tensor((edges[:-1, None] + half * (x + 1)).ravel())
    weight = torch.as_tensor(np.tile(half * w, panels)) / math.sqrt(2 * math.pi)
    envelope = torch.exp(-z * z / 4)  # split in two, so that no h_k overflows
    functions = torch.empty(terms, len(z), dtype=torch.float64)
    functions[0] = envelope
    functions[1] = z * envelope
    for k in range(1, terms - 1):
        previous = math.sqrt(k) * functions[k - 1]
        functions[k + 1] = (z * functions[k] - previous) / math.sqrt(k + 1)
    return z, weight * envelope * envelope, functions * (weight * envelope)


def derivative(fn: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """`phi'(u)` of an elementwise function, by autograd."""
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        value = fn(leaf)
        if not value.requires_grad:
            return torch.zeros_like(u)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return slope.detach()


@dataclass(frozen=True)
class HermiteSeries(GaussianExpectation):
    """Any elementwise activation, by a truncated Hermite series of known error.

    Args:
        fn: the activation; it must accept float64 tensors of any shape.
        rtol: largest part of `E[phi^2]` and `E[phi'^2]` that truncation may leave out.
        name: what to call it in messages.
    """

    fn: Callable[[Tensor], Tensor]
    rtol: float
    name: str

    def features(self, q: Tensor) -> Features:
        """`sqrt(q)` and the coefficients of `phi` and `phi'` at every variance.

        Raises:
            KernelConvergenceError: if the longest series leaves out more than `rtol`.
        """
        root = torch.sqrt(q.clamp_min(0.0)).reshape(-1)
        widest = root.max().reshape(1)
        left_out = math.inf
        for level, (panels, terms) in enumerate(_LEVELS):
            finer, _ = _LEVELS[min(level + 1, len(_LEVELS) - 1)]
            probe = self._coefficients(widest, panels, terms)
            reference = self._coefficients(widest, 2 * finer, 2)
            left_out = max(
                self._quadrature_error(mine, theirs)
                for mine, theirs in zip(probe, reference, strict=True)
            )
            if not math.isfinite(left_out) or left_out > self.rtol:
                continue
            series = self._coefficients(root, panels, terms)
            kept = [self._truncate(coefficients, power) for coefficients, power in series]
            left_out = max(error for _, error in kept)
            if left_out <= self.rtol:
                tensors = [coefficients.reshape(-1, *q.shape) for coefficients, _ in kept]
                return (root.reshape(1, *q.shape), *tensors)
        raise KernelConvergenceError(
            f"the Hermite series of {self.name} leaves out {left_out:.1e} of E[phi'^2] after "
            f"{_LEVELS[-1][1]} terms, where {self.rtol:.1e} was asked for (variance up to "
            f"{float(widest) ** 2:.3g}). Its derivative jumps or it varies too fast.\n"
            "  Pass a larger rtol, a smaller sigma_w or T, or use an activation with a closed form."
        )

    def _coefficients(self, root: Tensor, panels: int, terms: int) -> list[tuple[Tensor, Tensor]]:
        """For `phi` and `phi'`: coefficients `(terms, n)` and the mean square `(n,)`."""
        z, weight, functions = (part.to(root) for part in hermite_basis(panels, terms))
        u = root[:, None] * z
        out = []
        for values in (self.fn(u).detach(), derivative(self.fn, u)):
            out.append((functions @ values.T, (values * values) @ weight))
        return out

    @staticmethod
    def _quadrature_error(mine: tuple[Tensor, Tensor], finer: tuple[Tensor, Tensor]) -> float:
        power = finer[1].clamp_min(_NEGLIGIBLE)
        gap = (mine[0][:2] - finer[0][:2]).abs() / torch.sqrt(power)
        return max(float(gap.max()), float(((mine[1] - finer[1]).abs() / power).max()))

    def _truncate(self, coefficients: Tensor, power: Tensor) -> tuple[Tensor, float]:
        """The shortest series that is accurate enough, and the part it leaves out."""
        kept = torch.cumsum(coefficients**2, 0)
        left_out = ((power - kept) / power.clamp_min(_NEGLIGIBLE)).amax(1).clamp_min(0.0)
        enough = torch.nonzero(left_out <= max(0.1 * self.rtol, 1e-14))
        terms = int(enough[0]) + 1 if len(enough) else len(coefficients)
        return coefficients[:terms].contiguous(), float(left_out[terms - 1])

    def pair(self, f1: Features, f2: Features) -> PairMoments:
        """The power series with the products of coefficients filled in."""
        return SeriesPair(Correlation(f1[0][0] * f2[0][0]), f1[1] * f2[1], f1[2] * f2[2])


@dataclass(frozen=True)
class SeriesPair(PairMoments):
    """`sum_k p_k r^k`, by Horner's rule."""

    correlation: Correlation
    value_products: Tensor
    slope_products: Tensor

    def _evaluate(self, products: Tensor, c: Tensor) -> Tensor:
        r = self.correlation(c)
        total = products[-1].expand_as(c).clone()
        for k in range(len(products) - 2, -1, -1):
            total.mul_(r).add_(products[k])
        return total

    def value(self, c: Tensor) -> Tensor:
        """`C`."""
        return self._evaluate(self.value_products, c)

    def slope(self, c: Tensor) -> Tensor:
        """`D`."""
        return self._evaluate(self.slope_products, c)


@dataclass(frozen=True)
class Polynomial(GaussianExpectation):
    """`phi(u) = sum_m c_m u^m`: the Hermite series ends, so the moments are exact.

    Args:
        coefficients: `(c_0, c_1, ...)`, lowest power first.

    Examples:
        >>> half_square = Polynomial((0.0, 0.0, 0.5))
        >>> half_square(torch.tensor([3.0]))
        tensor([4.5000])
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what are no numbers, and the empty polynomial."""
        numbers = tuple(
            checks.number(f"coefficients[{i}]", x)
            for i, x in enumerate(checks.numbers("coefficients", self.coefficients))
        )
        checks.settle(self, coefficients=numbers)
        if len(self.coefficients) == 0:
            raise ValueError(
                "Polynomial needs at least one coefficient, but coefficients is ().\n"
                "  Pass them lowest power first, e.g. Polynomial((0, 1, 0.5))."
            )

    def __call__(self, u: Tensor) -> Tensor:
        """`phi(u)`."""
        total = torch.full_like(u, self.coefficients[-1])
        for coefficient in reversed(self.coefficients[:-1]):
            total = total * u + coefficient
        return total

    @staticmethod
    def _series(coefficients: tuple[float, ...], root: Tensor) -> Tensor:
        """`a_k(q)` from `E[z^m h_k(z)] = m! / (((m-k)/2)! 2^((m-k)/2) sqrt(k!))`."""
        rows = [torch.zeros_like(root) for _ in coefficients]
        for m, coefficient in enumerate(coefficients):
            for k in range(m % 2, m + 1, 2):
                half = (m - k) // 2
                denominator = math.factorial(half) * 2**half * math.sqrt(math.factorial(k))
                rows[k] = rows[k] + coefficient * math.factorial(m) / denominator * root**m
        return torch.stack(rows)

    def features(self, q: Tensor) -> Features:
        """`sqrt(q)` and the finitely many coefficients of `phi` and `phi'`."""
        root = torch.sqrt(q.clamp_min(0.0))
        slopes = tuple(m * c for m, c in enumerate(self.coefficients))[1:] or (0.0,)
        return root[None], self._series(self.coefficients, root), self._series(slopes, root)

    def pair(self, f1: Features, f2: Features) -> PairMoments:
        """The power series with the products of coefficients filled in."""
        return SeriesPair(Correlation(f1[0][0] * f2[0][0]), f1[1] * f2[1], f1[2] * f2[2])
