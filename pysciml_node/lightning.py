"""Callbacks for Lightning: what solves cost in its loggers, schedules, budgets, an end by cost.

Lightning is imported by this module alone. It is not a dependency of the package.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn

from pysciml_node import checks
from pysciml_node._optional import require
from pysciml_node.budgets import Budget
from pysciml_node.monitoring import Monitor
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.schedules import Constant

# Lightning has two names with callbacks of their own: the one that the program uses is taken.
_NAME = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
_lightning = require(_NAME, extra="lightning", purpose="make its callbacks")
Callback: Any = _lightning.Callback

__all__ = ["HoldBudget", "LogSolves", "StepSchedules", "StopAfter"]


class LogSolves(Callback):
    """Logs what solves cost and what regularizers do, into whatever loggers the trainer has.

    Training steps are logged as `train/nfe`, `train/penalty/LocalError` and so on, and validation
    and tests as means over their epoch, `val/nfe` and `test/nfe`. The names are those of
    `pysciml_node.monitoring.Monitor`.

    Args:
        progress: names, such as `"nfe"`, that the progress bar shows too.

    Raises:
        ValueError: when training starts: no layer of the model solves an equation.
    """

    def __init__(self, progress: tuple[str, ...] = ()) -> None:
        self.progress = tuple(checks.sequence("progress", progress, str, example='"nfe"'))
        self._monitor: Monitor | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start watching the module's layers."""
        self.teardown(trainer, pl_module, stage)
        self._monitor = Monitor(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Log a training step."""
        self._log(pl_module, "train")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Log a batch of the validation."""
        # What is solved before training is no part of it.
        self._log(pl_module, None if trainer.sanity_checking else "val")

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Log a batch of the test."""
        self._log(pl_module, "test")

    def _log(self, pl_module: Any, part: str | None) -> None:
        assert self._monitor is not None
        values = self._monitor.take(training=part == "train")
        if part is None:
            return
        for name, value in values.items():
            pl_module.log(f"{part}/{name}", value, prog_bar=name in self.progress, batch_size=1)


class StepSchedules(Callback):
    """Counts one step of every regularizer's weight schedule after each step of the optimizer."""

    def __init__(self) -> None:
        self._counted = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from where the training starts or goes on."""
        self._counted = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Count a step, if the optimizer has taken one: it may wait for several batches."""
        if trainer.global_step > self._counted:
            self._counted = trainer.global_step
            for regularizer in _regularizers(pl_module):
                regularizer.step()


class HoldBudget(Callback):
    """Holds a budget of evaluations: a `pysciml_node.Budget` as the weight of all regularizers.

    Its horizon is the number of training batches, which the trainer knows. Regularizers share the
    budget in the proportion of the weights that they have, which must be numbers. The state is in
    the checkpoints of the model.

    Args:
        nfe: evaluations of the field that a solve may take.
        options: of `Budget`: `steps`, `seconds` or `fraction` in place of `nfe`, `limit`, and the
            others.

    Attributes:
        budget: the `Budget`, once training has started; its `report()` says what was reached.

    Raises:
        TypeError: options that `Budget` does not have.
        ValueError: when training starts: no regularizer, or a weight that is a schedule.
    """

    def __init__(self, nfe: float | None = None, **options: Any) -> None:
        self._options = {"nfe": nfe, **options}
        Budget(**self._options)
        self.budget: Budget | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the regularizers the budget, before a checkpoint is read."""
        if stage != "fit" or self.budget is not None:
            return
        regularizers = _regularizers(pl_module)
        if not regularizers:
            raise ValueError(
                "a budget is held by the weights of regularizers, but the model has none.\n"
                "  Give its NeuralODE regularizers=[LocalError()]."
            )
        parts = [_part(regularizer) for regularizer in regularizers]
        self.budget = Budget(**{"horizon": _batches(trainer), **self._options})
        for regularizer, part in zip(regularizers, parts, strict=True):
            regularizer.weight = self.budget * part

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what was reached."""
        assert self.budget is not None
        _lightning.utilities.rank_zero_info(self.budget.report())


class StopAfter(Callback):
    """Stops training once it has taken so many evaluations of the field, on all ranks together.

    Evaluations of backward sweeps are counted too, those of validation are not. The count is in
    the trainer's checkpoints.

    Args:
        evaluations: that the training may take.
    """

    def __init__(self, evaluations: float) -> None:
        self.evaluations = checks.number("evaluations", evaluations, above=0)
        self.taken = 0.0
        self._monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start watching the module's layers."""
        self._monitor = Monitor(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Count, and stop when it is enough."""
        assert self._monitor is not None
        before = self._monitor.evaluations
        self._monitor.take()
        self._monitor.take(training=False)
        more = pl_module.all_gather(self._monitor.evaluations - before)
        self.taken += float(more.sum()) if hasattr(more, "sum") else float(more)
        if self.taken >= self.evaluations:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop watching."""
        if self._monitor is not None:
            self._monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """What has been taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.taken = state_dict["taken"]


def _regularizers(module: nn.Module) -> list[Regularizer]:
    return [inner for inner in module.modules() if isinstance(inner, Regularizer)]


def _part(regularizer: Regularizer) -> float:
    """A regularizer's part of a budget: its constant weight."""
    if not isinstance(regularizer.weight, Constant):
        raise ValueError(
            f"{regularizer.name} has the weight {regularizer.weight!r}, which the budget would "
            "replace.\n  Give it a number, its part of the budget."
        )
    return regularizer.weight.value


def _batches(trainer: Any) -> int | None:
    """Training batches in all, as far as they are known."""
    steps = trainer.estimated_stepping_batches
    return int(steps) * trainer.accumulate_grad_batches if math.isfinite(steps) else None
