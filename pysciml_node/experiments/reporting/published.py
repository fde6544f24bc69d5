"""The published figures, and ours beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pysciml_node.experiments.reporting.results import Summary, lay_out
from pysciml_node.experiments.trainer.trainable import METRICS

# Mean and spread; hours and seconds as the papers give them. Hardware differs from variant to
# variant: the ratios to vanilla are comparable, where vanilla is of the same paper.
Figure = tuple[float, float]


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Args:
        test: the metric on the test data, in the table's units.
        training: hours, or seconds a batch.
        prediction: seconds a batch.
        nfe: on the test data.
        copied: whether the table takes the row over from arXiv:2105.03918, on other hardware.
    """

    test: Figure
    training: Figure
    prediction: Figure
    nfe: Figure
    copied: bool = False


# Tables 1 to 4 of arXiv:2303.02262.
TABLES: dict[str, dict[str, Published]] = {
    "mnist": {
        "vanilla": Published((97.612, 0.163), (0.54, 0.001), (0.088, 0.020), (303.559, 3.194)),
        "steer": Published((97.94, 0.03), (1.31, 0.07), (0.092, 0.002), (265.0, 3.46), True),
        "taylor": Published((97.89, 0.0), (1.19, 0.07), (0.079, 0.007), (80.3, 0.43), True),
        "global-error": Published((97.32, 0.06), (0.82, 0.02), (0.060, 0.001), (177.0, 0.0), True),
        "global-stiffness": Published(
            (98.08, 0.15), (1.24, 0.06), (0.094, 0.003), (259.0, 3.46), True
        ),
        "local-unbiased": Published(
            (97.526, 0.131), (0.49, 0.002), (0.046, 0.002), (187.961, 1.812)
        ),
        "local-biased": Published((97.488, 0.016), (1.12, 0.065), (0.044, 0.002), (182.849, 1.578)),
    },
    "mnist-sde": {
        "vanilla": Published((96.66, 0.16), (2.70, 0.0), (0.51, 0.07), (313.86, 2.94)),
        "global-error": Published((96.27, 0.35), (4.19, 0.04), (7.23, 0.14), (184.67, 2.31), True),
        "global-stiffness": Published(
            (96.80, 0.07), (8.54, 0.37), (14.50, 0.40), (382.00, 4.00), True
        ),
        "local-unbiased": Published((96.57, 0.13), (2.10, 0.01), (0.39, 0.10), (228.93, 1.77)),
        "local-biased": Published((96.44, 0.16), (1.90, 0.0), (0.36, 0.03), (230.10, 0.71)),
    },
    "physionet": {
        "vanilla": Published((3.41, 0.10), (2.48, 0.22), (0.16, 0.01), (758.0, 25.87)),
        "steer": Published((3.48, 0.01), (1.62, 0.26), (0.54, 0.06), (699.0, 141.1), True),
        "taylor": Published((4.21, 0.01), (12.3, 0.32), (0.22, 0.02), (167.3, 11.93), True),
        "global-error": Published((3.57, 0.0), (0.94, 0.13), (0.21, 0.02), (287.0, 17.32), True),
        "global-stiffness": Published((3.58, 0.05), (0.87, 0.09), (0.20, 0.01), (273.0, 0.0), True),
        "local-unbiased": Published((3.64, 0.07), (2.31, 0.02), (0.09, 0.0), (422.0, 4.58)),
        "local-biased": Published((3.63, 0.08), (2.12, 0.24), (0.10, 0.01), (463.0, 63.02)),
    },
    "cifar10": {
        "vanilla": Published((67.394, 0.849), (0.457, 0.018), (0.130, 0.013), (115.315, 12.136)),
        "local-unbiased": Published(
            (67.678, 0.874), (0.399, 0.014), (0.096, 0.007), (89.048, 7.335)
        ),
        "local-biased": Published((67.745, 0.824), (0.555, 0.008), (0.088, 0.003), (81.301, 1.255)),
    },
    "cifar10-multi-scale": {
        "vanilla": Published((80.048, 6.740), (0.572, 0.012), (0.170, 0.005), (27.616, 0.905)),
        "local-unbiased": Published(
            (80.432, 5.548), (0.641, 0.025), (0.175, 0.019), (27.760, 0.177)
        ),
        "local-biased": Published((83.460, 0.727), (0.774, 0.293), (0.163, 0.015), (26.334, 0.992)),
    },
}


def compare(experiment: str, summary: Summary, *, markdown: bool = False) -> str:
    """Our figures beside the published ones, as ratios to vanilla where figures are costs.

    Args:
        experiment: a key of `TABLES`.
        summary: what `pysciml_node.experiments.reporting.results.summarize` returned.
        markdown: as a table of Markdown, and not in columns of equal width.

    Returns:
        Lines of text. `†` marks published rows that were measured elsewhere than their vanilla.

    Examples:
        >>> ours = {"nfe": {"mean": 50.0, "std": 0.0}}
        >>> compare("mnist", {"local-biased": ours}).splitlines()[2].split()[-3:]
        ['50.0', '182.8', 'x0.602']
    """
    table, vanilla = TABLES[experiment], summary.get("vanilla")
    heading = ["", "test: ours", "paper", "training: ours", "paper", "prediction: ours", "paper"]
    rows = [[*heading, "NFE: ours", "paper"]]
    for variant, figures in summary.items():
        published = table.get(variant)
        rows.append([variant, *_scores(figures, published)])
        for ours, theirs in _COSTS.items():
            rows[-1] += [_ours(figures, vanilla, ours), _theirs(published, table, theirs)]
    return as_markdown(rows) if markdown else lay_out(rows)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table of Markdown, the first one its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


# Our times are CPU seconds: those do not depend on what else the machine does.
_COSTS = {"train_cpu_seconds": "training", "predict_cpu_seconds": "prediction", "nfe": "nfe"}


def _scores(figures: dict[str, dict[str, float]], published: Published | None) -> list[str]:
    """The metric on the test data, ours and theirs, in the units of tables."""
    ours = [
        metric.show(figures[f"test_{name}"]["mean"]) + _spread(figures[f"test_{name}"], metric.show)
        for name, metric in METRICS.items()
        if f"test_{name}" in figures
    ]
    return [ours[0] if ours else "-", "-" if published is None else f"{published.test[0]:.2f}"]


def _ours(
    figures: dict[str, dict[str, float]], vanilla: dict[str, dict[str, float]] | None, name: str
) -> str:
    if name not in figures:
        return "-"
    shown = _number(figures[name]["mean"]) + _spread(
        figures[name], lambda std: _number(std, figures[name]["mean"])
    )
    return shown if vanilla is None else shown + _ratio(figures[name], vanilla[name])


def _spread(figure: dict[str, float], show: Callable[[float], str]) -> str:
    """The spread over the seeds, where there are several."""
    return f" ± {show(figure['std'])}" if figure["std"] > 0 else ""


def _ratio(figure: dict[str, float], vanilla: dict[str, float]) -> str:
    return f" x{figure['mean'] / vanilla['mean']:.3f}"


def _theirs(published: Published | None, table: dict[str, Published], name: str) -> str:
    if published is None:
        return "-"
    mark = "†" if published.copied else ""
    value, vanilla = getattr(published, name)[0], getattr(table["vanilla"], name)[0]
    return f"{_number(value)} x{value / vanilla:.3f}{mark}"


def _number(value: float, like: float | None = None) -> str:
    """A number with decimals that suit its size, or that of the number it stands beside."""
    return f"{value:.1f}" if (value if like is None else like) >= 10 else f"{value:.3f}"
