"""The kernels of the neural ODE itself: two-time integral equations with error control.

On rescaled times `t, s` in [0, 1], with `c = (T sigma_w)^2`,

    Sigma(t, s) = Sigma_0 + c int_0^t int_0^s E[phi(u_t) phi(u'_s)]
    Gamma(t, s) = Gamma_1 + c int_t^1 int_s^1 E[phi'(u_t) phi'(u'_s)] Gamma

are solved by Picard iteration (both are of Volterra type: it converges factorially) on collocation
schemes of growing degree, until two degrees agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pysciml_node.kernels.blocks import map_blocks
from pysciml_node.kernels.collocation import Scheme, lagrange, nodes, split, square
from pysciml_node.kernels.errors import KernelConvergenceError
from pysciml_node.kernels.expectations import Features, PairMoments
from pysciml_node.kernels.inputs import Model, Pairs, Values

_DEGREES = (5, 7, 10, 14, 20, 28, 40)
_SPLIT_DEGREES = (7, 10, 14, 20, 28, 36)
_SWITCH_DEGREE = 14  # a pair whose kink the tensor grid has not resolved by now gets the split one
_PICARD_LIMIT = 300
_PICARD_RTOL = 1e-12
_CHUNK_NUMBERS = 1 << 20  # 8 MB of float64: what a block of pairs may keep


@dataclass(frozen=True)
class _Level:
    """One collocation scheme of the ladder."""

    kind: Callable[[int], Scheme]
    degree: int

    def scheme(self, device: torch.device) -> Scheme:
        return self.kind(self.degree).to(device)


def _ladders(analytic: bool) -> tuple[list[_Level], list[_Level]]:
    """Schemes to try for an input with itself, and for two inputs."""
    tensor = [_Level(square, n) for n in _DEGREES]
    if analytic:
        return tensor, tensor
    triangles = [_Level(split, n) for n in _SPLIT_DEGREES]
    smooth = [level for level in tensor[1:] if level.degree <= _SWITCH_DEGREE]
    return triangles, smooth + triangles[1:]


def _fixed_point(update: Callable[[Tensor], Tensor], start: Tensor, scale: Tensor) -> Tensor:
    """Picard iteration from `start`; `scale` (P, 1) is what changes are measured against."""
    value = start
    for _ in range(_PICARD_LIMIT):
        following = update(value)
        change = (following - value).abs()
        if not bool(torch.isfinite(change).all()):
            break
        value = following
        if bool((change <= _PICARD_RTOL * torch.maximum(scale, value.abs().amax(1, True))).all()):
            return value
    raise KernelConvergenceError(
        "the two-time equations have no finite solution on the horizon, or none that Picard "
        "iteration reaches. The variance of the state grows too fast: an activation that is not "
        "Lipschitz (a polynomial, exp) can blow up in finite time.\n"
        "  Reduce T * sigma_w or sigma_u."
    )


def _finish(
    model: Model,
    scheme: Scheme,
    sigma: Tensor,  # (P, M)
    pair: PairMoments,
    initial: Tensor,  # (P,)
) -> Values:
    """NNGP and NTK from the forward covariance on the nodes."""
    value, slope = pair.value(sigma), pair.slope(sigma)
    last, first = scheme.corner, scheme.origin
    nngp = model.output(sigma[:, last], value[:, last])
    terminal = model.cotangent(slope[:, last])

    def backward(gamma: Tensor) -> Tensor:
        return terminal + model.coupling * (slope * gamma) @ scheme.backward.T

    gamma = _fixed_point(backward, terminal.expand_as(slope), torch.zeros_like(terminal))
    weights = model.coupling * (value * gamma) @ scheme.weights
    ntk = nngp[:, 0] + weights + initial * gamma[:, first][:, 0]
    return Values(nngp[:, 0], ntk)


@dataclass(frozen=True)
class _Selves:
    """Inputs with themselves: variance along time at the nodes of `level`, and kernels."""

    level: _Level
    variance: Tensor
    values: Values

    def at(self, scheme: Scheme) -> Tensor:
        """Variances `(n, N)` at the times of a scheme."""
        matrix = lagrange(nodes(self.level.degree), scheme.times.cpu().numpy())
        return self.variance @ torch.as_tensor(matrix.T).to(self.variance)


def _moments(model: Model, scheme: Scheme, features: Features, i: Tensor, j: Tensor) -> PairMoments:
    """Moments at the nodes of the pairs `(i, j)`, from features at the times of the scheme.

    Features are smooth in time, so they are evaluated at few times and interpolated to the rest.
    """
    return model.expectation.pair(
        tuple(part[:, i] @ scheme.to_t.T for part in features),
        tuple(part[:, j] @ scheme.to_s.T for part in features),
    )


def _solve_selves(
    model: Model,
    initial: Tensor,  # (n,)
    level: _Level,
) -> _Selves:
    """Inputs with themselves on one scheme."""
    scheme = level.scheme(initial.device)
    everyone = torch.arange(len(initial), device=initial.device)

    def variance(sigma: Tensor) -> Tensor:
        return (sigma @ scheme.diagonal.T).clamp_min(0.0)

    def moments(sigma: Tensor) -> PairMoments:
        features = model.expectation.features(variance(sigma))
        return _moments(model, scheme, features, everyone, everyone)

    def forward(sigma: Tensor) -> Tensor:
        value = moments(sigma).value(sigma)
        return initial[:, None] + model.coupling * value @ scheme.forward.T

    start = initial[:, None].expand(-1, len(scheme.weights))
    sigma = _fixed_point(forward, start, torch.zeros_like(initial)[:, None])
    pair = moments(sigma)
    return _Selves(level, variance(sigma), _finish(model, scheme, sigma, pair, initial))


def _solve_pairs(
    model: Model,
    pairs: Pairs,
    level: _Level,
    variances: Tensor,  # (n, N)
    which: Tensor,  # (P,)
) -> Values:
    """Kernels of the pairs `which` on one scheme, in blocks that fit in memory."""
    scheme = level.scheme(pairs.variance.device)
    features = model.expectation.features(variances)
    numbers = len(scheme.weights) * (4 + sum(len(part) for part in features))
    bound = torch.sqrt(variances.amax(1))

    def solve(block: Tensor) -> Tensor:
        i, j, initial = pairs.i[block], pairs.j[block], pairs.covariance[block]
        pair = _moments(model, scheme, features, i, j)
        sigma = _fixed_point(
            lambda sigma: initial[:, None] + model.coupling * pair.value(sigma) @ scheme.forward.T,
            initial[:, None].expand(-1, len(scheme.weights)),
            (bound[i] * bound[j])[:, None],
        )
        return _finish(model, scheme, sigma, pair, initial).stacked()

    return Values(*map_blocks(solve, torch.split(which, max(1, _CHUNK_NUMBERS // numbers))))


def _relative_change(new: Tensor, old: Tensor, scale: Tensor) -> Tensor:
    """Largest change over both kernels, `(P,)`, of stacked values `(2, P)`."""
    return ((new - old).abs() / scale.clamp_min(torch.finfo(new.dtype).tiny)).amax(0)


def _converged_selves(model: Model, initial: Tensor, ladder: list[_Level]) -> _Selves:
    previous: _Selves | None = None
    failure = _not_reached(model, math.inf)
    for level in ladder:
        try:
            current = _solve_selves(model, initial, level)
        except KernelConvergenceError as error:  # a finer scheme may yet converge
            previous, failure = None, error
            continue
        if previous is not None:
            values = current.values.stacked()
            change = float(_relative_change(values, previous.values.stacked(), values.abs()).max())
            if change <= model.rtol:
                return current
            failure = _not_reached(model, change)
        previous = current
    raise failure


def _not_reached(model: Model, change: float) -> KernelConvergenceError:
    return KernelConvergenceError(
        f"the collocation schemes of highest degree still differ by {change:.1e} of the kernel, "
        f"where rtol={model.rtol:.1e} was asked for.\n  Reduce T * sigma_w, or pass a larger rtol, "
        "or a number of steps for the kernel of the Euler network."
    )


def continuous_kernels(model: Model, pairs: Pairs) -> Values:
    """NNGP and NTK of every pair, for the neural ODE.

    Raises:
        KernelConvergenceError: if the accuracy `model.rtol` is not reached.
    """
    analytic = model.expectation.analytic
    self_ladder, ladder = _ladders(analytic)
    distinct, who = torch.unique(pairs.variance, return_inverse=True)
    selves = _converged_selves(model, distinct, self_ladder)
    scale = torch.sqrt(selves.values.stacked().clamp_min(0.0))[:, who]
    result = torch.empty(2, len(pairs.i), dtype=torch.float64, device=pairs.variance.device)
    same = pairs.i == pairs.j
    waiting = torch.nonzero(~same).flatten()
    previous: Tensor | None = None
    failure = _not_reached(model, math.inf)
    for level in _from_before(ladder, selves.level.degree if analytic else 0):
        try:
            current = selves
            if analytic and level.degree != selves.level.degree:
                current = _solve_selves(model, distinct, level)
            variances = current.at(level.scheme(distinct.device))[who]
            values = _solve_pairs(model, pairs, level, variances, waiting).stacked()
        except KernelConvergenceError as error:
            previous, failure = None, error
            continue
        if analytic:
            result[:, same] = current.values.stacked()[:, who[pairs.i[same]]]
        if previous is None:
            previous = values
            continue
        bound = scale[:, pairs.i[waiting]] * scale[:, pairs.j[waiting]]
        change = _relative_change(values, previous, bound)
        done = change <= model.rtol
        if analytic:  # one scheme for every pair keeps the matrix positive semidefinite
            done = done.all().expand_as(done)
        result[:, waiting[done]] = values[:, done]
        waiting, previous = waiting[~done], values[:, ~done]
        if len(waiting) == 0:
            break
        failure = _not_reached(model, float(change.max()))
    if len(waiting):
        raise failure
    if not analytic:
        result[:, same] = selves.values.stacked()[:, who[pairs.i[same]]]
    return Values(*result)


def _from_before(ladder: list[_Level], degree: int) -> Iterator[_Level]:
    """The ladder from the level before the one of a degree on."""
    start = next((k for k, level in enumerate(ladder) if level.degree >= degree), len(ladder) - 1)
    return iter(ladder[max(0, start - 1) :])
