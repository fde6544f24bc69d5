"""The start of every computation of a kernel: the pairs of inputs, and the model's scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.kernels.expectations import Features, GaussianExpectation

Readout: TypeAlias = Literal["activation", "linear"]

# Far beyond any network that can be trained; kernels take powers of the scales.
_LARGEST = 1e6


@dataclass(frozen=True)
class Model:
    """The weight-tied network `h' = (sigma_w / sqrt n) W phi(h)` on `[0, T]`.

    Attributes:
        expectation: Gaussian expectations of `phi`.
        coupling: `(T sigma_w)^2`; the kernels depend on `T` and `sigma_w` through it alone.
        readout_variance: `sigma_v^2`.
        linear_readout: whether the output is `v.h` instead of `v.phi(h)`.
        rtol: accuracy, relative to `sqrt(K(x, x) K(x', x'))`.
    """

    expectation: GaussianExpectation
    coupling: float
    readout_variance: float
    linear_readout: bool
    rtol: float

    def output(self, covariance: Tensor, moment: Tensor) -> Tensor:
        """The kernel of the network's output at initialisation."""
        return self.readout_variance * (covariance if self.linear_readout else moment)

    def cotangent(self, slope: Tensor) -> Tensor:
        """Covariance of the output's gradient with respect to the last state."""
        factor = torch.ones_like(slope) if self.linear_readout else slope
        return self.readout_variance * factor


@dataclass(frozen=True)
class Pairs:
    """Pairs of inputs, by position in one list of inputs.

    Attributes:
        variance: initial variances `sigma_u^2 |x|^2 / d` of the inputs, `(n,)`.
        i, j: the two members of each pair, `(P,)`.
        covariance: initial covariances `sigma_u^2 x.x' / d`, `(P,)`.
    """

    variance: Tensor
    i: Tensor
    j: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Values:
    """Kernel values of pairs, each `(P,)`."""

    nngp: Tensor
    ntk: Tensor

    def stacked(self) -> Tensor:
        """Both, `(2, P)`."""
        return torch.stack((self.nngp, self.ntk))


def take(features: Features, who: Tensor) -> Features:
    """The features `(F, P, ...)` of the inputs whose places are `who`, `(P,)`."""
    return tuple(part[:, who] for part in features)


@dataclass(frozen=True)
class Layout:
    """The places of the pairs' kernel values in the matrix that is returned."""

    shape: tuple[int, int]
    symmetric: bool
    dtype: torch.dtype

    def matrix(self, values: Tensor) -> Tensor:
        """The `(n1, n2)` matrix of the pairs' values."""
        if not self.symmetric:
            return values.reshape(self.shape).to(self.dtype)
        n = self.shape[0]
        full = values.new_zeros(n, n)
        rows, columns = torch.triu_indices(n, n, device=values.device)
        full[rows, columns] = values
        full[columns, rows] = values
        return full.to(self.dtype)


def pair_inputs(x1: Tensor, x2: Tensor | None, sigma_u: float) -> tuple[Pairs, Layout]:
    """Every pair of rows of `x1`, `(n1, d)`, and `x2`, `(n2, d)`; or the upper triangle of `x1`."""
    x1, x2 = _checked_inputs(x1, x2)
    first = x1.detach().to(torch.float64)
    scale = sigma_u**2 / x1.shape[1]
    if x2 is None:
        n = len(first)
        gram = scale * first @ first.T
        i, j = torch.triu_indices(n, n, device=x1.device)
        # the diagonal of the product, so that an input is perfectly correlated with itself
        return Pairs(gram.diagonal().clone(), i, j, gram[i, j]), Layout((n, n), True, x1.dtype)
    second = x2.detach().to(torch.float64)
    n1, n2 = len(first), len(second)
    variance = scale * torch.cat([(first * first).sum(1), (second * second).sum(1)])
    i = torch.arange(n1, device=x1.device).repeat_interleave(n2)
    j = n1 + torch.arange(n2, device=x1.device).repeat(n1)
    covariance = scale * (first @ second.T).reshape(-1)
    return Pairs(variance, i, j, covariance), Layout((n1, n2), False, x1.dtype)


def _checked_inputs(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x1 = checks.tensor("x1", x1, floating=True, filled=True)
    x2 = None if x2 is None else checks.tensor("x2", x2, floating=True, filled=True)
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (n, d), but has shape {tuple(x.shape)}.\n"
                f"  Flatten each sample: {name}.flatten(1)."
            )
        checks.tensor(name, x, finite=True)
    if x2 is not None and (x1.shape[1], x1.dtype, x1.device) != (x2.shape[1], x2.dtype, x2.device):
        raise ValueError(
            f"x1 and x2 must agree in features, dtype and device, but are {tuple(x1.shape)} "
            f"{x1.dtype} {x1.device} and {tuple(x2.shape)} {x2.dtype} {x2.device}.\n"
            "  Convert it: x2.to(x1); both need the same columns."
        )
    return x1, x2


def check_scale(name: str, value: float) -> float:
    """A scale of the network, or its horizon.

    Raises:
        TypeError: `value` is no number.
        ValueError: it is negative or infinite, or its powers would be.
    """
    return checks.number(name, checks.number(name, value, at_least=0), at_most=_LARGEST)
