"""Paths through data: the controls of neural controlled differential equations.

Observations are `(..., n, channels)` at `n` increasing times; missing ones are NaN, each channel by
itself. Before the first observation of a channel a path stays at its value, and behind the last
likewise; a channel without any is zero.

References: P. Kidger, J. Morrill, J. Foster, T. Lyons, arXiv 2005.08926 (natural cubic splines); J.
Morrill, P. Kidger, L. Yang, T. Lyons, arXiv 2106.11028 (Hermite cubics with backward differences,
rectilinear paths).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node import checks

__all__ = ["PiecewisePolynomial", "hermite_cubic", "linear", "natural_cubic", "rectilinear"]

Times = Tensor | Sequence[float] | None


class PiecewisePolynomial(nn.Module):
    """A path of several channels that is a polynomial between each two knots.

    On piece `i` it is `sum_k coefficients[..., i, k, :] (t - knots[i])^k`; the first and the last
    piece go on beyond the ends.

    Args:
        coefficients: `(..., n - 1, degree + 1, channels)`; may require gradients.
        knots: times, `(n,)`, increasing.

    Raises:
        TypeError: no tensors of real numbers.
        ValueError: shapes that do not go together.

    Examples:
        >>> import torch
        >>> from pysciml_node import interpolate
        >>> path = interpolate.linear(torch.tensor([[0.0], [1.0], [3.0]]))
        >>> path(1.5), path.derivative(1.5)
        (tensor([2.]), tensor([2.]))
    """

    coefficients: Tensor
    knots: Tensor

    def __init__(self, coefficients: Tensor, knots: Tensor) -> None:
        super().__init__()
        checks.tensor("coefficients", coefficients, precise=True)
        checks.tensor("knots", knots, axes=1, floating=True)
        if knots.dtype != coefficients.dtype:
            raise TypeError(
                f"knots must have the dtype of the coefficients, {coefficients.dtype}, but have "
                f"{knots.dtype}.\n  Convert them: knots.to(coefficients.dtype)."
            )
        if coefficients.ndim < 3 or coefficients.shape[-3] != len(knots) - 1:
            raise ValueError(
                f"coefficients must have shape (..., {len(knots) - 1}, degree + 1, channels) for "
                f"{len(knots)} knots, but have {tuple(coefficients.shape)}.\n"
                "  Make them by linear, natural_cubic or hermite_cubic."
            )
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("knots", knots.detach())

    @property
    def degree(self) -> int:
        """Of the polynomials."""
        return self.coefficients.shape[-2] - 1

    @property
    def channels(self) -> int:
        """How many values the path has at a time."""
        return self.coefficients.shape[-1]

    @property
    def times(self) -> list[float]:
        """The knots as numbers."""
        times: list[float] = self.knots.tolist()
        return times

    @property
    def interval(self) -> tuple[float, float]:
        """The first and the last knot."""
        first, last = self.knots[[0, -1]].tolist()
        return first, last

    def forward(self, t: Tensor | float) -> Tensor:
        """The values at a time, `(..., channels)`, or at times `(m,)`, `(..., m, channels)`."""
        return evaluate(self.coefficients, self.knots, t, 0)

    def derivative(self, t: Tensor | float) -> Tensor:
        """The derivatives in time, likewise; at a knot those of the piece that begins there."""
        return evaluate(self.coefficients, self.knots, t, 1)

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"degree={self.degree}, channels={self.channels}, interval={self.interval}"


def evaluate(coefficients: Tensor, knots: Tensor, t: Tensor | float, order: int) -> Tensor:
    """A piecewise polynomial or its first derivative; see `PiecewisePolynomial`.

    Args:
        coefficients: `(..., n - 1, degree + 1, channels)`.
        knots: `(n,)`.
        t: a time, or times `(m,)`.
        order: of the derivative, 0 or 1.
    """
    time = torch.as_tensor(t, dtype=knots.dtype, device=knots.device)
    piece = torch.bucketize(time.detach(), knots, right=True).sub(1).clamp(0, len(knots) - 2)
    local = coefficients[..., piece, :, :]
    offset = (time - knots[piece]).unsqueeze(-1)
    total = torch.zeros_like(local[..., 0, :])
    for power in reversed(range(order, local.shape[-2])):
        factor = power if order else 1
        total = total * offset + factor * local[..., power, :]
    return total


def linear(x: Tensor, t: Times = None) -> PiecewisePolynomial:
    """Straight lines between the observations; missing ones lie on the lines of the others.

    Args:
        x: observations, `(..., n, channels)`.
        t: their times, `(n,)`; default `0, 1, ..., n - 1`.

    Raises:
        TypeError: `x` is no tensor of real numbers.
        ValueError: less than two observations, or times that do not increase.

    Examples:
        >>> import torch
        >>> from pysciml_node import interpolate
        >>> interpolate.linear(torch.rand(8, 20, 3))(0.5).shape
        torch.Size([8, 3])
    """
    x, knots = _observations(x, t)
    x = _filled(x, knots)
    slope = x.diff(dim=-2) / knots.diff().unsqueeze(-1)
    return PiecewisePolynomial(torch.stack((x[..., :-1, :], slope), dim=-2), knots)


def rectilinear(x: Tensor, time_channel: int = 0) -> PiecewisePolynomial:
    """Steps along one axis at a time: first the time goes on, then the other channels follow.

    The path does not depend on later observations. Its parameter counts the observations and the
    corners between them, `0, 1, ..., 2 n - 2`; time itself is one of its channels.

    Args:
        x: observations, `(..., n, channels)`. A missing one is the one before it.
        time_channel: which channel is the time.

    Raises:
        TypeError: `x` is no tensor of real numbers.
        ValueError: a missing time or first observation, or no such channel.
    """
    x, _ = _observations(x, None)
    channel = checks.whole("time_channel", time_channel, at_least=0, at_most=x.shape[-1] - 1)
    if bool(x[..., channel].isnan().any()):
        raise ValueError(
            f"times must be there, but channel {channel} of x has NaN.\n"
            "  Repeat the last time where a series has ended."
        )
    if bool(x[..., 0, :].isnan().any()):
        raise ValueError(
            "the first observations must be there, but x has NaN at its first time.\n"
            "  Fill them in, for example by the mean of the channel."
        )
    last = _last_seen(~x.isnan())
    doubled = x.gather(-2, last).repeat_interleave(2, dim=-2)
    corners = doubled[..., :-1, :].clone()
    corners[..., channel] = doubled[..., 1:, channel]
    return linear(corners)


def hermite_cubic(x: Tensor, t: Times = None) -> PiecewisePolynomial:
    """Cubic pieces whose slope at an observation is that of the line that leads to it.

    Smooth once, and independent of all observations behind the next one. Missing ones lie on the
    lines of the others.

    Args:
        x: as in `linear`.
        t: as in `linear`.

    Raises:
        TypeError: as in `linear`.
        ValueError: as in `linear`.
    """
    x, knots = _observations(x, t)
    x = _filled(x, knots)
    gap = knots.diff().unsqueeze(-1)
    slope = x.diff(dim=-2) / gap
    before = torch.cat((slope[..., :1, :], slope[..., :-1, :]), dim=-2)
    bend = (slope - before) / gap
    parts = (x[..., :-1, :], before, 2 * bend, -bend / gap)
    return PiecewisePolynomial(torch.stack(parts, dim=-2), knots)


def natural_cubic(x: Tensor, t: Times = None) -> PiecewisePolynomial:
    """The natural cubic spline through the observations of each channel.

    Smooth twice; every piece depends on all observations. Missing ones are no knots of their
    channel's spline.

    Args:
        x: as in `linear`.
        t: as in `linear`.

    Raises:
        TypeError: as in `linear`.
        ValueError: as in `linear`.
    """
    x, knots = _observations(x, t)
    seen = ~x.isnan()
    # In front of the first and behind the last observation the path is constant.
    last, following = _last_seen(seen), _next_seen(seen)
    known = seen | (last < 0) | (following >= x.shape[-2])
    x = torch.where(known, _held(x, last, following), torch.zeros_like(x))
    knots_of = knots.unsqueeze(-1).expand(x.shape)
    # Those that are known first, in their order, for each channel by itself.
    order = (~known).to(torch.int8).sort(dim=-2, stable=True).indices
    values, times = x.gather(-2, order), knots_of.gather(-2, order)
    count = known.sum(-2, keepdim=True)
    index = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
    inside = (index < count - 1)[..., :-1, :]
    gap = torch.where(inside, times.diff(dim=-2), torch.ones_like(values[..., 1:, :]))
    slope = torch.where(inside, values.diff(dim=-2), torch.zeros_like(gap)) / gap
    at = _spline_slopes(torch.where(inside, 1 / gap, torch.zeros_like(gap)), slope)
    left, right = at[..., :-1, :], at[..., 1:, :]
    third = (left + right - 2 * slope) / gap.square()
    second = (3 * slope - 2 * left - right) / gap
    # The piece of the spline that each interval between times lies in.
    piece = (known.cumsum(-2) - 1).clamp(max=x.shape[-2] - 2)
    piece = torch.minimum(piece, count - 2)[..., :-1, :]
    a, b, c, d = (part.gather(-2, piece) for part in (values[..., :-1, :], left, second, third))
    shift = knots_of[..., :-1, :] - times.gather(-2, piece)
    parts = (
        a + shift * (b + shift * (c + shift * d)),
        b + shift * (2 * c + 3 * shift * d),
        c + 3 * shift * d,
        d,
    )
    return PiecewisePolynomial(torch.stack(parts, dim=-2), knots)


def _spline_slopes(rate: Tensor, slope: Tensor) -> Tensor:
    """The slopes of natural cubic splines at their knots, by elimination along axis -2.

    Args:
        rate: one over the gaps, `(..., n - 1, c)`; 0 behind the last knot.
        slope: of the lines between the knots, likewise.
    """
    none = torch.zeros_like(rate[..., :1, :])
    before, after = torch.cat((none, rate), -2), torch.cat((rate, none), -2)
    pull = rate * slope
    wanted = 3 * (torch.cat((none, pull), -2) + torch.cat((pull, none), -2))
    diagonal = 2 * (before + after)
    diagonal = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal)
    pivots, reduced = [diagonal[..., 0, :]], [wanted[..., 0, :]]
    for i in range(1, diagonal.shape[-2]):
        factor = before[..., i, :] / pivots[-1]
        pivots.append(diagonal[..., i, :] - factor * after[..., i - 1, :])
        reduced.append(wanted[..., i, :] - factor * reduced[-1])
    solved = [reduced[-1] / pivots[-1]]
    for i in reversed(range(diagonal.shape[-2] - 1)):
        solved.append((reduced[i] - after[..., i, :] * solved[-1]) / pivots[i])
    return torch.stack(solved[::-1], dim=-2)


def _observations(x: Any, t: Times) -> tuple[Tensor, Tensor]:
    """Observations and their times, checked."""
    x = checks.tensor("x", x, precise=True)
    if x.ndim == 1 and isinstance(t, Tensor) and t.ndim > 1 and t.shape[-2] == len(x):
        raise ValueError(
            f"observations come first and their times second, but x has shape {tuple(x.shape)} and "
            f"t {tuple(t.shape)}.\n  Exchange them."
        )
    if x.ndim < 2 or x.shape[-2] < 2:
        raise ValueError(
            f"x must have shape (..., n, channels) with n of at least 2, but has "
            f"{tuple(x.shape)}.\n  The axis before the last is time."
        )
    n = x.shape[-2]
    if t is None:
        return x, torch.arange(n, dtype=x.dtype, device=x.device)
    given = t if isinstance(t, Tensor) else torch.tensor(checks.numbers("t", t), dtype=x.dtype)
    # In the dtype of the states: the field is told times in it.
    knots = checks.tensor("t", given, axes=1, real=True, finite=True).to(x.device, x.dtype)
    if len(knots) != n or not bool((knots.diff() > 0).all()):
        raise ValueError(
            f"t must have {n} increasing times, one for each observation, but has {len(knots)}"
            f"{'' if len(knots) != n else ' that do not increase'}.\n"
            "  Sort the observations by time, and merge those of one time."
        )
    return x, knots.detach()


def _last_seen(seen: Tensor) -> Tensor:
    """The index of the last observation up to each time, `-1` where there is none."""
    index = torch.arange(seen.shape[-2], device=seen.device).unsqueeze(-1)
    return torch.where(seen, index, -1).cummax(dim=-2).values


def _next_seen(seen: Tensor) -> Tensor:
    """The index of the next observation from each time on, `n` where there is none."""
    n = seen.shape[-2]
    return n - 1 - _last_seen(seen.flip(-2)).flip(-2)


def _held(x: Tensor, last: Tensor, following: Tensor) -> Tensor:
    """The observations, those at the ends repeated outward; 0 for a channel without any."""
    n = x.shape[-2]
    nearest = torch.where(last < 0, following, last)
    nearest = torch.where((following >= n) & (last >= 0), last, nearest).clamp(max=n - 1)
    none = (last < 0) & (following >= n)
    return torch.where(none, torch.zeros_like(x), x.gather(-2, nearest))


def _filled(x: Tensor, knots: Tensor) -> Tensor:
    """The observations, missing ones on the line between their neighbours in time."""
    seen = ~x.isnan()
    if bool(seen.all()):
        return x
    n, time = x.shape[-2], knots.unsqueeze(-1).expand(x.shape)
    last, following = _last_seen(seen), _next_seen(seen)
    low, high = last.clamp(min=0), following.clamp(max=n - 1)
    held = _held(x, last, following)
    between = ~seen & (last >= 0) & (following < n)
    # Only where both are there: what is masked must not be NaN, or gradients would be.
    low = torch.where(between, low, torch.zeros_like(low))
    high = torch.where(between, high, torch.ones_like(high))
    safe = torch.where(seen, x, torch.zeros_like(x))
    start, end = safe.gather(-2, low), safe.gather(-2, high)
    begin, stop = time.gather(-2, low), time.gather(-2, high)
    on_line = start + (end - start) * ((time - begin) / (stop - begin))
    return torch.where(seen, x, torch.where(between, on_line, held))
