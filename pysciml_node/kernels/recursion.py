"""The kernels of the depth-L residual network: the exact recursion over all pairs of layers.

With `k = T/L` and shared weights,

    Sigma[i+1, j+1] = Sigma[i+1, j] + Sigma[i, j+1] - Sigma[i, j] + k^2 sigma_w^2 C[i, j]
    Gamma[i, j] = Gamma[i+1, j] + Gamma[i, j+1] - Gamma[i+1, j+1] + k^2 sigma_w^2 D Gamma[i+1, j+1]

Row `i + 1` of Sigma follows from row `i` by one cumulative sum, so a row is one vector
operation over layers and pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pysciml_node.kernels.blocks import map_blocks
from pysciml_node.kernels.errors import KernelConvergenceError
from pysciml_node.kernels.expectations import Features
from pysciml_node.kernels.inputs import Model, Pairs, Values, take

_CHUNK_NUMBERS = 1 << 23  # 64 MB of float64 for the two tables of a block of pairs


def _append(features: Features, column: Features) -> Features:
    """Features with one layer more; series of unequal length are padded with zeros."""
    joined = []
    for old, new in zip(features, column, strict=True):
        rows = max(len(old), len(new))
        padded = [F.pad(part, (0, 0, 0, 0, 0, rows - len(part))) for part in (old, new)]
        joined.append(torch.cat(padded, -1))
    return tuple(joined)


def _layers(
    model: Model,
    initial: Tensor,  # (n,)
    steps: int,
) -> Features:
    """Features of every input at every layer, from `Sigma[i, i]` of inputs with themselves.

    Only layers `j <= i` are visited: their variances are known when row `i` needs them.
    """
    gain = model.coupling / steps**2
    row = initial[:, None].repeat(1, steps + 1)
    features = model.expectation.features(initial[:, None])
    for i in range(steps):
        current: Features = tuple(part[..., i : i + 1] for part in features)
        moment = model.expectation.pair(current, features).value(row[:, : i + 1])
        growth = gain * torch.cumsum(moment, 1)
        row[:, 1 : i + 1] += growth[:, :i]
        # Sigma[i, i+1] is Sigma[i+1, i], which the line above has just computed
        row[:, i + 1] = row[:, i] + growth[:, i]
        variance = row[:, i + 1 : i + 2]
        if not bool(torch.isfinite(variance).all()):
            raise KernelConvergenceError(
                f"the variance of the state overflows at layer {i + 1} of {steps}.\n"
                "  Reduce T * sigma_w or sigma_u."
            )
        features = _append(features, model.expectation.features(variance))
    return features


def _block(
    model: Model,
    initial: Tensor,  # (P,)
    f1: Features,  # each (F, P, steps + 1)
    f2: Features,
    steps: int,
) -> Values:
    """Kernels of a block of pairs."""
    gain = model.coupling / steps**2
    row = initial[:, None].repeat(1, steps + 1)
    values, slopes = [], []
    for i in range(steps + 1):
        pair = model.expectation.pair(tuple(part[..., i : i + 1] for part in f1), f2)
        value, slope = pair.value(row), pair.slope(row)
        values.append(value)
        slopes.append(slope)
        if i < steps:
            grown = row[:, 1:] + gain * torch.cumsum(value[:, :-1], 1)
            row = torch.cat([initial[:, None], grown], 1)
    nngp = model.output(row[:, -1], values[-1][:, -1])
    terminal = model.cotangent(slopes[-1][:, -1])
    gamma = terminal[:, None].repeat(1, steps + 1)
    total = torch.zeros_like(nngp)
    for i in range(steps - 1, -1, -1):
        total += gain * (values[i][:, :-1] * gamma[:, 1:]).sum(1)
        grown = gain * (slopes[i][:, :-1] * gamma[:, 1:]).flip(1).cumsum(1).flip(1)
        gamma = torch.cat([gamma[:, :-1] + grown, terminal[:, None]], 1)
    return Values(nngp, nngp + total + initial * gamma[:, 0])


def euler_kernels(model: Model, pairs: Pairs, steps: int) -> Values:
    """NNGP and NTK of every pair, for the network of `steps` residual layers."""
    distinct, who = torch.unique(pairs.variance, return_inverse=True)
    features = take(_layers(model, distinct, steps), who)
    numbers = (steps + 1) * (2 * (steps + 1) + sum(len(part) for part in features))

    def solve(block: Tensor) -> Tensor:
        first, second = take(features, pairs.i[block]), take(features, pairs.j[block])
        return _block(model, pairs.covariance[block], first, second, steps).stacked()

    everyone = torch.arange(len(pairs.i), device=pairs.i.device)
    return Values(*map_blocks(solve, torch.split(everyone, max(1, _CHUNK_NUMBERS // numbers))))
