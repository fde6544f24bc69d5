"""Figures of finished runs: their summary over seeds, the file they are kept in and the table."""

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pysciml_node.doctor import environment
from pysciml_node.experiments.settings import VARIANTS, Variant

METRICS = ("test_accuracy", "train_accuracy", "nfe", "train_seconds", "predict_seconds")
UNITS = {
    "test_accuracy": "share of the test samples, 0 to 1",
    "train_accuracy": "share of the training samples, 0 to 1",
    "nfe": "evaluations of the field in a forward pass, mean over the test batches",
    "train_seconds": "wall-clock seconds of all optimizer steps, evaluations not counted",
    "predict_seconds": "wall-clock seconds of a prediction for one batch, median over batches",
    "mean, std": "over the seeds; std with n - 1 in the denominator, 0 for a single seed",
}
# What may differ between runs of one file: these describe a run, not the experiment.
_OF_A_RUN = ("variant", "seed", "weight")


@dataclass(frozen=True)
class RunResult:
    """Figures of one finished run; `UNITS` says what they measure.

    Args:
        variant: which penalty was used.
        seed: of the run.
        test_accuracy: in [0, 1].
        train_accuracy: in [0, 1].
        nfe: on the test data.
        train_seconds: of all optimizer steps.
        predict_seconds: of a batch.
        validation_accuracy: in [0, 1]; None without validation data.
        validation_nfe: on the validation data; None without.
        settings: everything that determined the run.
        history: of the run, as plain data.
    """

    variant: Variant
    seed: int
    test_accuracy: float
    train_accuracy: float
    nfe: float
    train_seconds: float
    predict_seconds: float
    validation_accuracy: float | None
    validation_nfe: float | None
    settings: dict[str, Any]
    history: dict[str, Any]


Summary = dict[str, dict[str, dict[str, float]]]


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value.

    Args:
        values: at least one.

    Returns:
        ``{"mean": ..., "std": ...}``.
    """
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def summarize(runs: Iterable[RunResult]) -> Summary:
    """Mean and spread over the seeds for each variant and metric.

    Args:
        runs: finished runs, in any order.

    Returns:
        ``{variant: {metric: {"mean": ..., "std": ...}}}`` for the variants that have runs.
    """
    runs = list(runs)
    return {
        variant: {
            metric: mean_and_std([getattr(run, metric) for run in of_variant]) for metric in METRICS
        }
        for variant in VARIANTS
        if (of_variant := [run for run in runs if run.variant == variant])
    }


def load_results(path: Path) -> list[RunResult]:
    """The runs kept in a results file.

    Args:
        path: the file.

    Returns:
        Its runs; none when there is no such file.

    Raises:
        ValueError: the file is not a results file.
    """
    if not path.exists():
        return []
    try:
        return [RunResult(**run) for run in json.loads(path.read_text())["runs"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of this version ({error!r}).") from error


def save_results(path: Path, runs: Sequence[RunResult]) -> None:
    """Write a results file: a summary for each variant, then units, settings, versions and runs.

    Args:
        path: the file; its folder is made when absent.
        runs: what to keep in it; all of one experiment.

    Raises:
        ValueError: the runs were made with different settings.
    """
    content = {
        **summarize(runs),
        "units": UNITS,
        "settings": _shared_settings([run.settings for run in runs]),
        "environment": environment(),
        "runs": [asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def merge_results(path: Path, new: Sequence[RunResult]) -> list[RunResult]:
    """Add runs to a results file; a run of the same variant and seed is replaced.

    Args:
        path: the file; made when absent.
        new: the runs to add.

    Returns:
        All runs that the file now holds.

    Raises:
        ValueError: the file holds runs with other settings.
    """
    replaced = {(run.variant, run.seed) for run in new}
    kept = [run for run in load_results(path) if (run.variant, run.seed) not in replaced]
    runs = sorted([*kept, *new], key=lambda run: (VARIANTS.index(run.variant), run.seed))
    save_results(path, runs)
    return runs


def check_mergeable(path: Path, settings: dict[str, Any]) -> None:
    """Find out before training whether a run will fit into a results file.

    Args:
        path: the file; it need not exist.
        settings: of the planned run, as `pysciml_node.experiments.settings.describe` gives them.

    Raises:
        ValueError: the file holds runs with other settings.
    """
    _shared_settings([*(run.settings for run in load_results(path)), settings])


def _shared_settings(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all runs have in common, or an error when they differ."""
    shared = [
        {name: value for name, value in settings.items() if name not in _OF_A_RUN}
        for settings in described
    ]
    for other in shared[1:]:
        differing = sorted(k for k in shared[0] if shared[0][k] != other.get(k))
        if differing:
            raise ValueError(
                "runs with different settings cannot share a results file: "
                + ", ".join(f"{k} is {shared[0][k]!r} and {other.get(k)!r}" for k in differing)
                + ". Use another output folder."
            )
    return shared[0] if shared else {}


@dataclass(frozen=True)
class _Column:
    title: str
    metric: str
    scale: float
    decimals: int
    with_ratio: bool


_COLUMNS = (
    _Column("train acc. (%)", "train_accuracy", 100.0, 2, with_ratio=False),
    _Column("test acc. (%)", "test_accuracy", 100.0, 2, with_ratio=False),
    _Column("training (s)", "train_seconds", 1.0, 1, with_ratio=True),
    _Column("prediction (ms/batch)", "predict_seconds", 1000.0, 2, with_ratio=True),
    _Column("test NFE", "nfe", 1.0, 1, with_ratio=True),
)


def format_table(summary: Summary) -> str:
    """Lay a summary out as a table, with each variant's ratio to the vanilla one.

    Args:
        summary: what `summarize` returned.

    Returns:
        Lines of text; columns read mean, spread and, in brackets, the ratio.

    Example:
        >>> one = {m: {"mean": 1.0, "std": 0.0} for m in METRICS}
        >>> print(format_table({"vanilla": one}).splitlines()[2].split()[0])
        vanilla
    """
    vanilla = summary.get("vanilla")
    rows = [["", *(column.title for column in _COLUMNS)]]
    for variant, metrics in summary.items():
        cells = [variant]
        for column in _COLUMNS:
            figures = metrics[column.metric]
            mean, std = (column.scale * figures[key] for key in ("mean", "std"))
            cell = f"{mean:.{column.decimals}f} ± {std:.{column.decimals}f}"
            if column.with_ratio and vanilla is not None:
                cell += f" [x{figures['mean'] / vanilla[column.metric]['mean']:.3f}]"
            cells.append(cell)
        rows.append(cells)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
