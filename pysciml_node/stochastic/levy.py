"""Levy's area of several Brownian motions, approximated from increments and space-time areas."""

from __future__ import annotations

import math

from torch import Tensor


def levy_area(h: float, w: Tensor, area: Tensor, noise: Tensor, *, foster: bool) -> Tensor:
    """`A_ij = (1/2) int (W_i dW_j - W_j dW_i)` over an interval of length `h`, approximately.

    Given `W` and `H` the area has mean `H_i W_j - W_i H_j`. What is left is replaced by a normal
    number: of its mean variance `h^2 / 12` (Davie), or of the variance that it has given `H`,
    `h^2 / 20 + (h / 5) (H_i^2 + H_j^2)` (Foster).

    Args:
        h: length of the interval.
        w: increments, `(..., m)`.
        area: space-time Levy areas `H`, `(..., m)`.
        noise: independent standard normal numbers, `(..., m, m)`.
        foster: which variance.

    Returns:
        Skew-symmetric matrices, `(..., m, m)`.

    References: A. M. Davie, in Stochastic Analysis and Applications 2014, Springer, 125-143; J.
    Foster, Numerical approximations for stochastic differential equations, thesis, Oxford 2020,
    chapter 7.
    """
    products = area.unsqueeze(-1) * w.unsqueeze(-2)
    mean = products - products.transpose(-1, -2)
    # Skew-symmetric, of variance two.
    rest = noise - noise.transpose(-1, -2)
    if not foster:
        return mean + rest * (h / math.sqrt(24))
    squares = area.square()
    variance = h / 10 * (squares.unsqueeze(-1) + squares.unsqueeze(-2) + h / 4)
    return mean + rest * variance.sqrt()
