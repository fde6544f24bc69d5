"""Pictures of models: the density of a flow of the plane, the bands of a stochastic equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.plot.canvas import array, axes_or_current, columns, grid


class Density(Protocol):
    """A distribution over points, such as a `CNF`."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of the density at points `(n, 2)`, shape `(n,)`."""


def density(
    flow: Density,
    *,
    bounds: Sequence[float] = (-3.0, 3.0, -3.0, 3.0),
    resolution: int = 100,
    samples: Tensor | None = None,
    axes: Any = None,
) -> Any:
    """Draw the density of a distribution over the plane.

    Args:
        flow: whatever has `log_prob`, such as a `CNF` with `event_shape=2`.
        bounds: `(x0, x1, y0, y1)` of the picture.
        resolution: number of pixels a side; the density is evaluated at their square.
        samples: points to mark, `(n, 2)`.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    resolution = checks.whole("resolution", resolution, at_least=2)
    axes = axes_or_current(axes)
    points, extent = grid(bounds, resolution)
    with torch.no_grad():
        values = flow.log_prob(points).exp().reshape(resolution, resolution)
    axes.imshow(array(values), origin="lower", extent=extent, cmap="viridis")
    if samples is not None:
        axes.plot(*array(samples).T, ".", color="white", markersize=1.5, alpha=0.6)
    return axes


def bands(
    times: Tensor,
    paths: Tensor,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    entries: int = 4,
    axes: Any = None,
) -> Any:
    """Draw the median of many paths, and the bands that hold given shares of them.

    Args:
        times: `(T,)`.
        paths: `(T, M, ...)`: `M` paths of a state, as `solution.u` of a batch has them.
        levels: share of the paths in each band.
        entries: how many entries of the state are drawn at most.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: shapes that do not fit.
    """
    times, paths = checks.tensor("times", times, real=True), checks.tensor("paths", paths)
    if paths.ndim < 2 or times.shape != paths.shape[:1]:
        raise ValueError(
            f"paths must be (T, M, ...) with the T of times, but have shapes {tuple(paths.shape)} "
            f"and {tuple(times.shape)}.\n  Give solution.t and solution.u of a batch."
        )
    shares = sorted(checks.numbers("levels", levels), reverse=True)
    paths = paths.detach()
    edges = [(columns(_quantile(paths, (1 - s) / 2), entries), s) for s in shares]
    upper = [columns(_quantile(paths, (1 + s) / 2), entries) for s in shares]
    axes = axes_or_current(axes)
    for i, (label, median) in enumerate(columns(_quantile(paths, 0.5), entries)):
        (line,) = axes.plot(array(times), median, label=label)
        for (low, share), high in zip(edges, upper, strict=True):
            axes.fill_between(
                array(times),
                low[i][1],
                high[i][1],
                color=line.get_color(),
                alpha=0.25 * (2 - share),
            )
    axes.set(xlabel="t")
    axes.legend()
    return axes


def _quantile(paths: Tensor, share: float) -> Tensor:
    """A quantile over paths `(T, M, ...)`, `(T, ...)`; `(T, 1)` for paths of numbers."""
    values = paths.quantile(share, dim=1)
    return values if values.ndim > 1 else values[:, None]
