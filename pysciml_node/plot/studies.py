"""Pictures of measurements: a training, methods against each other, costs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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


class Spending(Protocol):
    """What a budget's history has for a picture, one number a training step each."""

    unit: str
    cost: list[float]
    smooth: list[float]
    target: list[float]
    weight: list[float]


def budget(history: Spending, *, axes: Any = None) -> Any:
    """Draw what solves cost while a budget was held, and the weight that held it on a second axis.

    Args:
        history: `budget.history` of a `Budget`.
        axes: matplotlib's; the current ones by default.

    Returns:
        The axes of the cost.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = axes_or_current(axes)
    steps = range(1, len(history.cost) + 1)
    axes.plot(steps, history.cost, ".", color="#999999", markersize=3, label="measured")
    axes.plot(steps, history.smooth, color="#0072b2", linewidth=1, label="smooth")
    axes.plot(steps, history.target, "--", color="#d55e00", label="budget")
    axes.set(xlabel="training step", ylabel=history.unit, ylim=(0, None))
    axes.legend(loc="lower left")
    right = axes.twinx()
    # A weight of 0 has no place on a logarithmic axis.
    right.semilogy(steps, [w or math.nan for w in history.weight], color="#009e73", linewidth=1)
    right.set(ylabel="weight")
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
