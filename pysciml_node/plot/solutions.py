"""Pictures of a solution: its states and steps along time, and its path in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.plot.canvas import array, axes_or_current, columns, grid, pyplot


class Solved(Protocol):
    """The part of a `Solution` that is drawn."""

    @property
    def problem(self) -> Any:
        """The problem that was solved."""

    @property
    def algorithm(self) -> Any:
        """The algorithm that solved it."""

    @property
    def step_times(self) -> Tensor:
        """Ends of the accepted steps, `t0` first, `(n + 1,)`."""

    @property
    def step_errors(self) -> Tensor:
        """Scaled error estimate of each step, `(n,)`."""

    @property
    def step_stiffness(self) -> Tensor:
        """Estimate of the dominant eigenvalue on each step, `(n,)`."""

    def __call__(self, t: Tensor) -> Any:
        """Dense output."""


def solution(
    solved: Solved,
    *,
    entries: int = 10,
    resolution: int = 400,
    steps: bool = True,
    axes: Any = None,
) -> Any:
    """Draw the entries of the state along time, with a mark at each accepted step.

    Args:
        solved: a `Solution`.
        entries: how many entries of the state are drawn at most (of complex ones the modulus).
        resolution: number of times at which the dense output is read.
        steps: whether the steps are marked.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
        >>> axes = psn.plot.solution(psn.solve(problem))  # doctest: +SKIP
    """
    entries = checks.whole("entries", entries, at_least=1)
    resolution = checks.whole("resolution", resolution, at_least=2)
    axes = axes_or_current(axes)
    ends = solved.step_times
    with torch.no_grad():
        times = torch.linspace(float(ends[0]), float(ends[-1]), resolution, dtype=ends.dtype)
        curves = columns(solved(times), entries)
        marks = columns(solved(ends), entries) if steps else curves
    for (label, curve), (_, marked) in zip(curves, marks, strict=True):
        (line,) = axes.plot(array(times), curve, label=label)
        if steps:
            axes.plot(array(ends), marked, ".", color=line.get_color(), markersize=4)
    axes.set(xlabel="t")
    axes.legend()
    return axes


def steps(solved: Solved, *, axes: Sequence[Any] | None = None) -> Any:
    """Draw, along time, the sizes of the steps, their scaled errors and the stiffness estimate.

    A scaled error of 1 is what the tolerances allow. The third panel is `|dt lambda|` for the
    estimate `lambda` of the dominant eigenvalue: steps that meet the dashed line, the end of the
    method's stability region, are small because the equation is stiff.

    Args:
        solved: a `Solution`.
        axes: three of matplotlib's; by default those of a new figure, below each other.

    Returns:
        The three axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: other than three axes.
    """
    if axes is None:
        figure = pyplot().figure(figsize=(6.4, 6.0), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True)
    if len(axes) != 3:
        raise ValueError(
            f"steps draws into three axes, but got {len(axes)}.\n"
            "  Make them: figure.subplots(3, 1, sharex=True)."
        )
    ends = array(solved.step_times)
    sizes = abs(ends[1:] - ends[:-1])
    middles = (ends[1:] + ends[:-1]) / 2
    radius = getattr(getattr(solved.algorithm, "tableau", None), "stability_radius", None)
    with torch.no_grad():
        stiffness = sizes * array(solved.step_stiffness)
    rows = (
        ("step size", sizes, None),
        ("scaled error", array(solved.step_errors), 1.0),
        (r"$|\Delta t\,\lambda|$", stiffness, radius),
    )
    for panel, (label, values, limit) in zip(axes, rows, strict=True):
        panel.semilogy(middles, values, ".-")
        panel.set(ylabel=label)
        if limit is not None:
            panel.axhline(limit, linestyle="--", color="gray", linewidth=1)
    axes[-1].set(xlabel="t")
    return axes


def phase(
    solved: Solved,
    *,
    field: bool = True,
    bounds: Sequence[float] | None = None,
    resolution: int = 20,
    axes: Any = None,
) -> Any:
    """Draw the paths of a system of the plane, over the field at the start time.

    Args:
        solved: a `Solution` whose state is one tensor of shape `(2,)` or `(B, 2)`.
        field: whether arrows show the vector field.
        bounds: `(x0, x1, y0, y1)` of the arrows; by default what the paths cover.
        resolution: number of arrows a side.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a state of another shape.
    """
    resolution = checks.whole("resolution", resolution, at_least=2)
    ends = solved.step_times
    times = torch.linspace(float(ends[0]), float(ends[-1]), 400, dtype=ends.dtype)
    with torch.no_grad():
        u = solved(times)
    if not isinstance(u, Tensor) or u.ndim not in (2, 3) or u.shape[-1] != 2:
        given = tuple(u.shape[1:]) if isinstance(u, Tensor) else "several tensors"
        raise ValueError(
            f"phase draws states of shape (2,) or (B, 2), but the state is {given}.\n"
            "  Draw entries along time with plot.solution."
        )
    axes = axes_or_current(axes)
    paths = u.reshape(len(u), -1, 2)  # (T, B, 2)
    axes.plot(array(paths[..., 0]), array(paths[..., 1]))
    if field:
        if bounds is None:
            low, high = paths.amin((0, 1)).tolist(), paths.amax((0, 1)).tolist()
            bounds = (low[0], high[0], low[1], high[1])
        points, _ = grid(bounds, resolution)
        arrows = _field_at(solved, points.to(u), batched=u.ndim == 3)
        axes.quiver(*array(points).T, *array(arrows).T, color="gray", alpha=0.6, angles="xy")
    axes.set(xlabel="$u_0$", ylabel="$u_1$")
    return axes


def _field_at(solved: Solved, points: Tensor, *, batched: bool) -> Tensor:
    """The field at points `(n, 2)` and the start time."""
    problem = solved.problem
    extra = () if problem.p is None else (problem.p,)
    t0 = problem.time_tensor([problem.t0])[0]
    with torch.no_grad():
        if batched:
            arrows: Tensor = problem.f(t0, points, *extra)
            return arrows
        return torch.stack([problem.f(t0, point, *extra) for point in points])
