"""Pictures of training runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pysciml_node._optional import require
from pysciml_node.experiments.reporting.results import RunResult
from pysciml_node.experiments.trainer.settings import VARIANTS, Variant
from pysciml_node.experiments.trainer.trainable import METRICS

_COLORS: dict[Variant, str] = {
    "vanilla": "#444444",
    "local-unbiased": "#0072b2",
    "local-biased": "#d55e00",
    "global-error": "#009e73",
    "global-stiffness": "#cc79a7",
    "steer": "#e69f00",
    "taylor": "#56b4e9",
    "local-stiffness": "#f0e442",
    "kinetic": "#8c564b",
    "jacobian": "#7f7fff",
    "rnode": "#b00020",
    "budget-0.6": "#117733",
}


def new_figure(columns: int) -> tuple[Any, Any]:
    """A figure with axes side by side; no window and no global state of matplotlib is involved.

    Args:
        columns: number of axes.

    Returns:
        The figure and its axes: one, or an array of them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure((5.2 * columns, 3.8))
    return figure, figure.subplots(1, columns)


def new_grid(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure of small panels.

    Args:
        rows: of panels, which share their vertical axis.
        columns: of panels, which share their horizontal axis.

    Returns:
        The figure and its axes, an array of shape `(rows, columns)`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure((3.6 * columns, 1.7 * rows + 0.4))
    return figure, figure.subplots(rows, columns, sharex="col", sharey="row", squeeze=False)


def _figure(size: tuple[float, float]) -> Any:
    figures = require("matplotlib.figure", extra="plots", purpose="draw the picture")
    return figures.Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file whose folder is made when absent.

    Args:
        figure: what to write.
        path: the file; its ending names the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def plot_training(runs: Sequence[RunResult], path: Path) -> None:
    """Draw field evaluations and the metric over training, mean and range over the seeds.

    Args:
        runs: finished runs of one experiment.
        path: file to write; its ending names the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (nfe_axes, score_axes) = new_figure(2)
    part, metric = runs[0].history["monitor"], METRICS[runs[0].metric]
    for variant in VARIANTS:
        histories = [run.history for run in runs if run.variant == variant]
        if not histories:
            continue
        for axes, key, scale in (
            (nfe_axes, "evaluation_nfe", 1.0),
            (score_axes, "score", metric.scale),
        ):
            values = [
                [scale * value for value in column]
                for column in zip(*(history[key] for history in histories), strict=True)
            ]
            steps = histories[0]["evaluated_at"]
            color = _COLORS[variant]
            axes.plot(steps, [statistics.fmean(v) for v in values], color=color, label=variant)
            axes.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2
            )
    nfe_axes.set(xlabel="optimizer step", ylabel=f"NFE a batch ({part})", ylim=(0, None))
    score_axes.set(xlabel="optimizer step", ylabel=f"{metric.title}, {part}")
    nfe_axes.legend(loc="lower right")
    save_figure(figure, path)


def plot_trade_off(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy lost against evaluations saved, one curve a variant, one point a weight.

    Args:
        points: as `pysciml_node.experiments.reporting.trade_off.trade_off` returns them.
        path: file to write; its ending names the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(1)
    for variant in VARIANTS:
        curve = [point for point in points if point["variant"] == variant]
        if not curve:
            continue
        ratios = [point["nfe_ratio"]["mean"] for point in curve]
        accuracies = [100 * point["accuracy"]["mean"] for point in curve]
        axes.errorbar(
            ratios,
            accuracies,
            xerr=[point["nfe_ratio"]["std"] for point in curve],
            yerr=[100 * point["accuracy"]["std"] for point in curve],
            color=_COLORS[variant],
            marker="o",
            capsize=2,
            linewidth=1,
            label=variant,
        )
        for point, ratio, accuracy in zip(curve, ratios, accuracies, strict=True):
            if point["weight"] is not None:
                text = " → ".join(f"{weight:g}" for weight in point["weight"])
                axes.annotate(
                    text, (ratio, accuracy), fontsize=7, xytext=(4, 4), textcoords="offset points"
                )
    axes.set(xlabel="NFE, ratio to vanilla (validation)", ylabel="accuracy, % (validation)")
    axes.legend()
    save_figure(figure, path)
