"""Relative entropy of two diffusions with the same noise, by Girsanov's theorem."""

from __future__ import annotations

import torch
from torch import Tensor

# Diffusions smaller than this are taken to be of this size: their quotient must stay finite.
_SMALLEST = 1e-7


def entropy_rate(difference: Tensor, g: Tensor, *, matrix: bool) -> Tensor:
    """The rate `|g^-1 (f - h)|^2 / 2` of the relative entropy of two diffusions.

    Its expected integral is the relative entropy `KL(Q | P)` of the law `Q` of `du = f dt + g dW`
    with respect to the law `P` of `du = h dt + g dW`, both from one initial state.

    Args:
        difference: `f - h`, `(B, d)`.
        g: the diffusion, `(B, d)`; with `matrix` `(B, d, m)`, of which the pseudoinverse is taken.
        matrix: which of them.

    Returns:
        The rates, `(B,)`.

    Reference: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, arXiv 2001.01328, section 5.
    """
    if matrix:
        quotient = (torch.linalg.pinv(g) @ difference.unsqueeze(-1)).squeeze(-1)
    else:
        small = g.detach().abs() < _SMALLEST
        quotient = difference / torch.where(small, _SMALLEST, g)  # whose sign does not matter
    rate: Tensor = quotient.square().sum(-1) / 2
    return rate
