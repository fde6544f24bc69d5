"""A published experiment: its data, model, settings and the budgets it can be run at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pysciml_node.data import Splits
from pysciml_node.experiments.trainer.runner import Build
from pysciml_node.experiments.trainer.settings import Settings, Variant
from pysciml_node.experiments.trainer.training import Trainer

BudgetName = Literal["paper", "reduced", "quick"]
BUDGETS: tuple[BudgetName, ...] = get_args(BudgetName)
Weights = Mapping[Variant, tuple[float, float]]


@dataclass(frozen=True)
class Budget:
    """The changes that a smaller budget makes to the paper's settings.

    Args:
        changes: values of settings.
        weights: first and last penalty weight of each variant whose weight changes with them.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A published experiment.

    Args:
        name: short, fit for a folder.
        title: a few words for tables and help.
        settings: the paper's.
        weights: first and last weight of each variant's penalty; the variants that can be run.
        reduced: a budget of minutes on one CPU core, at which the effect still shows.
        quick: a budget of seconds, to see that it runs.
        data_dir: default folder of the data.
        load: reads the data: `load(data_dir, download, settings)`.
        load_quick: data for the quick budget: `load_quick(data_dir, download, settings)`.
        build: makes the model of data, settings and run.
        options: settings of this experiment alone, with their descriptions for the command line.
        picture: draws what a trained model does, `picture(trainer, data, path)`; optional.
    """

    name: str
    title: str
    settings: Settings
    weights: Weights
    reduced: Budget
    quick: Budget
    data_dir: Path
    load: Callable[[Path, bool, Any], Splits[Any]]
    load_quick: Callable[[Path, bool, Any], Splits[Any]]
    build: Build
    options: Mapping[str, str] = field(default_factory=dict)
    picture: Callable[[Trainer, Splits[Any], Path], None] | None = None

    def at(self, budget: BudgetName) -> tuple[Settings, Weights]:
        """Settings and penalty weights at a budget."""
        smaller = {"paper": Budget(), "reduced": self.reduced, "quick": self.quick}[budget]
        return replace(self.settings, **smaller.changes), {**self.weights, **smaller.weights}

    def data(self, budget: BudgetName, folder: Path, download: bool, settings: Any) -> Splits[Any]:
        """The data of a budget.

        Args:
            budget: whose.
            folder: the data's folder; files that are downloaded go there.
            download: whether files that are missing may be fetched.
            settings: of the runs; the last training samples are held out for validation where
                they say so.
        """
        load = self.load_quick if budget == "quick" else self.load
        parts = load(folder, download, settings)
        held = settings.validation_samples
        if not held:
            return parts
        return Splits(parts.train[:-held], parts.train[-held:], parts.test)
