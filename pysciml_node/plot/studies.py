"""Pictures of measurements: a training, methods against each other, costs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pysciml_node import checks
from pysciml_node.plot.canvas import array, axes_or_current


def training(
    history: Mapping[str, Sequence[float]],
    *,
    nfe: str = "nfe",
    label: str | None = None,
    axes: Any = None,
) -> Any:
    """Draw evaluations of the field over training, and the other columns on a second axis.

    Args:
        history: what was measured at each step, by name: numbers or a 1-d tensor each.
        nfe: the name of the evaluations.
        label: of this run, where several are drawn.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes of the evaluations.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the evaluations are not in the history.
    """
    if nfe not in history:
        raise ValueError(
            f"history must hold {nfe!r}, but holds {', '.join(history) or 'nothing'}.\n"
            "  Name the column of evaluations: nfe=..."
        )
    axes = axes_or_current(axes)
    axes.plot(array(history[nfe]), label=label or nfe)
    axes.set(xlabel="training step", ylabel="NFE", ylim=(0, None))
    others = [name for name in history if name != nfe]
    if others:
        right = axes.twinx()
        for name in others:
            right.plot(array(history[name]), "--", linewidth=1, label=name)
        right.set(ylabel=", ".join(others))
    if label is not None:
        axes.legend()
    return axes


def work_precision(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    work: str = "NFE",
    axes: Any = None,
) -> Any:
    """Draw error against work on logarithmic axes, one curve a method.

    Args:
        curves: for each method its points `(work, error)`, in the order in which they are joined.
        work: what the first number of a point counts.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = axes_or_current(axes)
    for name, points in curves.items():
        axes.loglog(*array(points).T, "o-", markersize=4, label=name)
    axes.set(xlabel=work, ylabel="error")
    axes.legend()
    return axes


def bars(costs: Mapping[str, float], *, unit: str = "", axes: Any = None) -> Any:
    """Draw one cost of several methods as bars, such as the memory of the adjoints.

    Args:
        costs: by method.
        unit: of the costs.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = axes_or_current(axes)
    values = [checks.number(f"costs[{name!r}]", cost) for name, cost in costs.items()]
    drawn = axes.barh(list(costs), values)
    axes.bar_label(drawn, fmt=" {:.3g}")
    axes.invert_yaxis()
    axes.set(xlabel=unit)
    return axes
