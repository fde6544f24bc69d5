"""The trade-off of a weight: evaluations saved against accuracy lost, on the validation data."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pysciml_node.data import Splits
from pysciml_node.experiments.reporting.results import mean_and_std
from pysciml_node.experiments.trainer.evaluation import Evaluation, evaluate
from pysciml_node.experiments.trainer.runner import train_run
from pysciml_node.experiments.trainer.settings import Run, Settings, Variant

_LOCAL: tuple[Variant, ...] = ("local-unbiased", "local-biased")


def trade_off(
    data: Splits[Any],
    settings: Settings,
    weights: Sequence[tuple[float, float]],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Train the local variants with several weights and compare them with the vanilla run.

    The test data is not touched, so a weight may be chosen from the result.

    Args:
        data: the parts; training and validation data are used.
        settings: those shared by all variants.
        weights: first and last weight of each point of the curve.
        seeds: each point is trained once a seed; ratios are taken between equal seeds.

    Returns:
        Points with the keys `variant`, `weight`, `nfe_ratio` (to vanilla), `nfe` and
        `accuracy`, the last three with mean and spread over the seeds.

    Raises:
        ValueError: there is no validation data.
    """
    if len(data.validation) == 0:
        raise ValueError(
            "a trade-off is measured on validation data, but there is none.\n"
            "  Hold samples out: load the data with validation=1000, for example."
        )
    planned = [("vanilla", None), *itertools.product(_LOCAL, weights)]
    total = len(planned) * len(seeds)
    measured: dict[tuple[Variant, tuple[float, float] | None], list[Evaluation]] = {}
    for number, (seed, (variant, weight)) in enumerate(itertools.product(seeds, planned), start=1):
        run = Run(variant=variant, seed=seed)
        run = run if weight is None else replace(run, weight=weight)
        shown = "" if weight is None else f" {weight[0]:g}→{weight[1]:g}"
        trainer = train_run(data, settings, run, label=f"[{number}/{total}] {run.name}{shown}")
        evaluation = evaluate(trainer.model, data.validation, settings.batch_size)
        measured.setdefault((variant, weight), []).append(evaluation)
    vanilla = measured["vanilla", None]
    return [
        {
            "variant": variant,
            "weight": weight,
            "nfe_ratio": mean_and_std(
                [e.nfe / v.nfe for e, v in zip(evaluations, vanilla, strict=True)]
            ),
            "nfe": mean_and_std([e.nfe for e in evaluations]),
            "accuracy": mean_and_std([e.score for e in evaluations]),
        }
        for (variant, weight), evaluations in measured.items()
    ]
