"""Gaussian expectations of an activation: the one ingredient of every kernel in this folder.

For centred jointly Gaussian `u, v` with variances `q1, q2` and covariance `c`,

    C(q1, q2, c) = E[phi(u) phi(v)],        D(q1, q2, c) = E[phi'(u) phi'(v)] = dC/dc.

The part that depends on one input alone, its *features*, is computed once for each input and
shared by all of its pairs. A pair then needs a closed form, or a short power series in the
correlation.

All functions of a pair work entry by entry: `q1`, `q2` and `c` broadcast against each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from pysciml_node import checks

Features: TypeAlias = tuple[Tensor, ...]
"""Tensors of shape `(F, *q.shape)`, one row a feature."""


class Correlation:
    """Correlations of a block of pairs, as functions of their covariance.

    Args:
        scale: `sqrt(q1 q2)`; where it vanishes the correlation is taken to be zero.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self._inverse = torch.where(scale > 0, 1 / scale, 0.0)

    def __call__(self, c: Tensor) -> Tensor:
        """`c / sqrt(q1 q2)` in [-1, 1]."""
        return (c * self._inverse).clamp_(-1, 1)

    def snapped(self, c: Tensor) -> Tensor:
        """The correlation, exactly 1 or -1 within rounding of it.

        The arc sine turns a rounding error `e` at 1 into `sqrt(2 e)`, 1e-8; a state and itself
        are perfectly correlated, and this keeps them so.
        """
        r = self(c)
        return torch.where(1 - r.abs() < 64 * torch.finfo(r.dtype).eps, r.sign(), r)


class PairMoments(ABC):
    """The moments of a block of pairs, as functions of their covariance."""

    @abstractmethod
    def value(self, c: Tensor) -> Tensor:
        """`C`, of the shape of `c`."""

    @abstractmethod
    def slope(self, c: Tensor) -> Tensor:
        """`D`, of the shape of `c`."""


class GaussianExpectation(ABC):
    """The expectations `C` and `D` of one activation.

    Attributes:
        analytic: whether `C` is analytic on `|c| <= sqrt(q1 q2)`. Where it is not (ReLU at
            `c = sqrt(q1 q2)`), the two-time equations need a scheme that respects the diagonal.
    """

    analytic: ClassVar[bool] = True

    @abstractmethod
    def features(self, q: Tensor) -> Features:
        """The contribution of inputs of variance `q`, `(F, *q.shape)` each."""

    @abstractmethod
    def pair(self, f1: Features, f2: Features) -> PairMoments:
        """The moments of pairs whose features broadcast against each other."""


class ClosedForm(GaussianExpectation):
    """An activation whose two moments are elementary functions of `(q1, q2, c)`."""

    @abstractmethod
    def value(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`C`."""

    @abstractmethod
    def slope(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`D`."""

    def features(self, q: Tensor) -> Features:
        """The variance itself."""
        return (q.unsqueeze(0),)

    def pair(self, f1: Features, f2: Features) -> PairMoments:
        """The closed form with the variances filled in."""
        return _ClosedPair(self, f1[0][0], f2[0][0])


@dataclass(frozen=True)
class _ClosedPair(PairMoments):
    form: ClosedForm
    q1: Tensor
    q2: Tensor

    def value(self, c: Tensor) -> Tensor:
        return self.form.value(self.q1, self.q2, c)

    def slope(self, c: Tensor) -> Tensor:
        return self.form.slope(self.q1, self.q2, c)


@dataclass(frozen=True)
class LeakyReLU(ClosedForm):
    """`max(u, 0) + a min(u, 0)`: ReLU for `a = 0`, the absolute value for `a = -1`.

    With `phi(u) = m u + g |u|`, `m = (1 + a)/2`, `g = (1 - a)/2`, and `r` the correlation,
    `E|u||v| = (2/pi) sqrt(q1 q2) (sqrt(1 - r^2) + r asin r)`: the arc-cosine kernel of order one.

    Reference: Cho and Saul, Kernel Methods for Deep Learning (NIPS 2009), equation 6.
    """

    negative_slope: float = 0.0
    analytic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        slope = checks.number("negative_slope", self.negative_slope, at_least=-1e6, at_most=1e6)
        checks.settle(self, negative_slope=slope)

    @property
    def _weights(self) -> tuple[float, float]:
        return ((1 + self.negative_slope) / 2) ** 2, ((1 - self.negative_slope) / 2) ** 2

    def value(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`m^2 c + g^2 E|u||v|`."""
        odd, even = self._weights
        scale = torch.sqrt(q1 * q2)
        r = Correlation(scale).snapped(c)
        absolute = torch.sqrt((1 - r) * (1 + r)) + r * torch.asin(r)
        return odd * c + even * (2 / math.pi) * scale * absolute

    def slope(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`m^2 + g^2 (2/pi) asin r`."""
        odd, even = self._weights
        return odd + even * (2 / math.pi) * torch.asin(Correlation(torch.sqrt(q1 * q2)).snapped(c))


class Identity(ClosedForm):
    """`u`."""

    def value(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`c`."""
        return c.clone()

    def slope(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(c)


class Erf(ClosedForm):
    """`erf(u)`.

    Reference: Williams, Computing with Infinite Networks (NIPS 1996), equation 11.
    """

    def value(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`(2/pi) asin(2c / sqrt((1 + 2 q1)(1 + 2 q2)))`."""
        return (2 / math.pi) * torch.asin(2 * c / torch.sqrt((1 + 2 * q1) * (1 + 2 * q2)))

    def slope(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`(4/pi) / sqrt((1 + 2 q1)(1 + 2 q2) - 4 c^2)`."""
        return (4 / math.pi) / torch.sqrt((1 + 2 * q1) * (1 + 2 * q2) - 4 * c * c)


@dataclass(frozen=True)
class Sinusoid(ClosedForm):
    """`sin(w u + b)`: sine for `b = 0`, cosine for `b = pi/2`."""

    frequency: float = 1.0
    phase: float = 0.0

    def __post_init__(self) -> None:
        for name in ("frequency", "phase"):
            value = checks.number(name, getattr(self, name), at_least=-1e6, at_most=1e6)
            checks.settle(self, **{name: value})

    def _parts(self, q1: Tensor, q2: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        half = self.frequency**2 / 2
        difference = torch.exp(-half * (q1 + q2 - 2 * c))
        return difference, math.cos(2 * self.phase) * torch.exp(-half * (q1 + q2 + 2 * c))

    def value(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`(E cos(w(u - v)) - cos(2b) E cos(w(u + v))) / 2`."""
        difference, total = self._parts(q1, q2, c)
        return (difference - total) / 2

    def slope(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`w^2 (E cos(w(u - v)) + cos(2b) E cos(w(u + v))) / 2`."""
        difference, total = self._parts(q1, q2, c)
        return self.frequency**2 * (difference + total) / 2


class Exponential(ClosedForm):
    """`exp(u)`."""

    def value(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """`exp((q1 + q2 + 2c) / 2)`."""
        return torch.exp((q1 + q2) / 2 + c)

    def slope(self, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
        """Equal to the value."""
        return self.value(q1, q2, c)
