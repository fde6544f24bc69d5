"""Figures of finished runs: their summary over seeds, the file they are kept in and the table."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pysciml_node.cli.doctor import environment
from pysciml_node.data.files import whole_file
from pysciml_node.experiments.trainer.settings import VARIANTS, Variant
from pysciml_node.experiments.trainer.trainable import METRICS

COSTS = ("nfe", "train_seconds", "train_cpu_seconds", "predict_seconds", "predict_cpu_seconds")
UNITS = {
    **{name: metric.unit for name, metric in METRICS.items()},
    "nfe": "evaluations of the field in a forward pass, mean over the test batches",
    "train_seconds": "wall-clock seconds of all optimizer steps, evaluations not counted",
    "train_cpu_seconds": "the same, seconds of this process on all its cores",
    "predict_seconds": "wall-clock seconds of a prediction for one batch, median over batches",
    "predict_cpu_seconds": "the same, seconds of this process on all its cores",
    "mean, std": "over the seeds; std with n - 1 in the denominator, 0 for a single seed",
}
# What may differ between runs of one file: these describe a run, not the experiment.
_OF_A_RUN = ("variant", "seed", "weight", "budget")


@dataclass(frozen=True)
class RunResult:
    """Figures of one finished run; `UNITS` says what they measure.

    Args:
        variant: which penalty was used.
        seed: of the run.
        metric: name of the metric that `test` and `train` hold.
        test: the metric on the test data.
        train: the metric on the training data.
        nfe: on the test data.
        train_seconds: of all optimizer steps.
        train_cpu_seconds: of all optimizer steps.
        predict_seconds: of a batch.
        predict_cpu_seconds: of a batch.
        validation: the metric on the validation data; None without.
        validation_nfe: on the validation data; None without.
        settings: everything that determined the run.
        history: of the run, as plain data.
    """

    variant: Variant
    seed: int
    metric: str
    test: float
    train: float
    nfe: float
    train_seconds: float
    train_cpu_seconds: float
    predict_seconds: float
    predict_cpu_seconds: float
    validation: float | None
    validation_nfe: float | None
    settings: dict[str, Any]
    history: dict[str, Any]

    def figures(self) -> dict[str, float]:
        """The metric on test and training data, and the costs, by the names of results files."""
        scores = {f"test_{self.metric}": self.test, f"train_{self.metric}": self.train}
        return scores | {name: getattr(self, name) for name in COSTS}


Summary = dict[str, dict[str, dict[str, float]]]


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value.

    Args:
        values: at least one.

    Returns:
        `{"mean": ..., "std": ...}`.
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
        `{variant: {metric: {"mean": ..., "std": ...}}}` for the variants that have runs.
    """
    runs = list(runs)
    summary: Summary = {}
    for variant in VARIANTS:
        figures = [run.figures() for run in runs if run.variant == variant]
        if figures:
            summary[variant] = {
                name: mean_and_std([figure[name] for figure in figures]) for name in figures[0]
            }
    return summary


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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file of this version ({error!r}).\n"
            "  Move it away, or use another output folder."
        ) from error


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
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with whole_file(path) as stream:
        stream.write(text.encode("utf-8"))


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
        settings: of the planned run, as `trainer.settings.describe` gives them.

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
    for later in shared[1:]:
        differing = sorted(k for k in shared[0] if shared[0][k] != later.get(k))
        if differing:
            raise ValueError(
                "runs with different settings cannot share a results file: "
                + ", ".join(f"{k} is {shared[0][k]!r} and {later.get(k)!r}" for k in differing)
                + ".\n  Use another output folder."
            )
    return shared[0] if shared else {}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        title: its heading.
        figure: its name in summaries.
        scale: factor between figure and table.
        decimals: shown.
        with_ratio: whether the ratio to the vanilla variant is shown too.
    """

    title: str
    figure: str
    scale: float
    decimals: int
    with_ratio: bool


_COST_COLUMNS = (
    Column("training (s)", "train_seconds", 1.0, 1, with_ratio=True),
    Column("training (CPU s)", "train_cpu_seconds", 1.0, 1, with_ratio=True),
    Column("prediction (CPU ms/batch)", "predict_cpu_seconds", 1000.0, 2, with_ratio=True),
    Column("test NFE", "nfe", 1.0, 1, with_ratio=True),
)


def columns_of(summary: Summary) -> list[Column]:
    """The columns that a summary fills, its metric first.

    Examples:
        >>> figures = {"test_accuracy": {"mean": 1.0, "std": 0.0}}
        >>> [column.title for column in columns_of({"vanilla": figures})]
        ['test acc. (%)']
    """
    filled = {name for figures in summary.values() for name in figures}
    scores = [
        Column(f"{part} {m.title}", f"{part}_{m.name}", m.scale, m.decimals, with_ratio=False)
        for m in METRICS.values()
        for part in ("train", "test")
    ]
    return [column for column in (*scores, *_COST_COLUMNS) if column.figure in filled]


def format_table(summary: Summary) -> str:
    """Lay a summary out as a table, with each variant's ratio to the vanilla one.

    Args:
        summary: what `summarize` returned.

    Returns:
        Lines of text; columns read mean, spread and, in brackets, the ratio.

    Examples:
        >>> figures = {"nfe": {"mean": 20.0, "std": 0.0}}
        >>> print(format_table({"vanilla": figures}).splitlines()[2].split()[0])
        vanilla
    """
    vanilla = summary.get("vanilla")
    columns = columns_of(summary)
    rows = [["", *(column.title for column in columns)]]
    for variant, metrics in summary.items():
        cells = [variant]
        for column in columns:
            figures = metrics[column.figure]
            mean, std = (column.scale * figures[key] for key in ("mean", "std"))
            cell = f"{mean:.{column.decimals}f} ± {std:.{column.decimals}f}"
            if column.with_ratio and vanilla is not None:
                cell += f" [x{figures['mean'] / vanilla[column.figure]['mean']:.3f}]"
            cells.append(cell)
        rows.append(cells)
    return lay_out(rows)


def lay_out(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text: a heading, a rule and the rest, in aligned columns."""
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
