"""What solves cost while a model trains, as numbers for loggers.

`Monitor` watches the layers of a model. Its values go to any logger; `CSVWriter` and
`TensorBoardWriter` are two for plain training loops, and `pysciml_node.lightning` has callbacks.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node._optional import require
from pysciml_node.budgets import Budget
from pysciml_node.layers.neural_de import NeuralDE
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.schedules import unscaled
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution, Stats


@dataclass(frozen=True)
class _Seen:
    """One solve. Its counts are read late: those of the backward sweep are not known before."""

    layer: str
    training: bool
    stats: Callable[[], Stats]
    seconds: float
    penalty: Tensor
    penalties: dict[str, Tensor]
    weights: dict[str, float]
    budgets: dict[str, float]

    def values(self) -> dict[str, float]:
        stats = self.stats()
        found = {
            "nfe": float(stats.nfe),
            "steps": float(stats.naccept),
            "rejected": float(stats.nreject),
            "seconds": self.seconds,
        }
        if not self.training:
            return found
        return {
            **found,
            "nfe_backward": float(stats.nfe_backward),
            "penalty": float(self.penalty),
            **{f"penalty/{name}": float(value) for name, value in self.penalties.items()},
            **{f"weight/{name}": value for name, value in self.weights.items()},
            **self.budgets,
        }


class Monitor:
    """Collects what the solves of a model cost, and what its regularizers do.

    It watches every layer that solves an equation, wherever it is in the model, also inside a
    `CNF` or a `LatentODE`. `take` gives the means since it was last called, by these names:

    | name | value, a solve |
    |---|---|
    | `nfe` | evaluations of the field, those for penalties included |
    | `nfe_backward` | evaluations in the backward sweep |
    | `steps`, `rejected` | accepted and rejected steps |
    | `seconds` | time of the forward solve |
    | `penalty` | what the regularizers add to the loss |
    | `penalty/NAME`, `weight/NAME` | a regularizer's value without its weight, and its weight |
    | `budget`, `budget/target` | what a `Budget` has reached on average, and what it is to reach |

    In a model with several such layers each name starts with that of the layer, `flow.node/nfe`.
    Solves in eval mode are kept apart, and have neither penalties nor a backward sweep.

    A monitor is a context manager, which stops watching at its end; `close` does so too.

    Args:
        model: with at least one layer that solves an equation.

    Attributes:
        evaluations: of the field in training mode since the start, those of backward sweeps
            included, as far as they have been taken.

    Raises:
        ValueError: no such layer in the model.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> node = psn.NeuralODE(torch.nn.Linear(2, 2), regularizers=[psn.LocalError(weight=0.1)])
        >>> with psn.monitoring.Monitor(node) as monitor:
        ...     solution = node(torch.ones(4, 2))
        ...     (solution.u1.sum() + solution.penalty).backward()
        ...     values = monitor.take()
        >>> values["nfe"] == solution.stats.nfe, values["weight/LocalError"]
        (True, 0.1)
    """

    def __init__(self, model: nn.Module) -> None:
        checks.instance("model", model, nn.Module, example="NeuralODE(field)")
        layers = {name: m for name, m in model.named_modules() if isinstance(m, NeuralDE)}
        if not layers:
            raise ValueError(
                f"model must have a layer that solves an equation, but {type(model).__name__} has "
                "none.\n  Give the model that holds the NeuralODE."
            )
        self.evaluations = 0
        self._seen: list[_Seen] = []
        self._handles = [
            layer.register_solve_hook(_Hook(self._seen, name if len(layers) > 1 else ""))
            for name, layer in layers.items()
        ]

    def take(self, *, training: bool = True) -> dict[str, float]:
        """The means since the last call; empty where nothing was solved.

        Args:
            training: of the solves in training mode, or those in eval mode.
        """
        training = checks.flag("training", training)
        taken = [seen for seen in self._seen if seen.training == training]
        self._seen[:] = [seen for seen in self._seen if seen.training != training]
        columns: dict[str, list[float]] = {}
        for seen in taken:
            for name, value in seen.values().items():
                columns.setdefault(f"{seen.layer}/{name}" if seen.layer else name, []).append(value)
        if training:
            counts = [seen.stats() for seen in taken]
            self.evaluations += sum(count.nfe + count.nfe_backward for count in counts)
        return {name: sum(column) / len(column) for name, column in columns.items()}

    def close(self) -> None:
        """Stop watching; what was seen can still be taken."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Hook:
    """Adds what a layer solves to a list."""

    def __init__(self, seen: list[_Seen], layer: str) -> None:
        self._seen, self._layer = seen, layer

    def __call__(self, layer: NeuralDE[Any], solution: Solution | EnsembleSolution) -> None:
        active = [r for r in layer.active_regularizers() if r.name in solution.penalties]
        self._seen.append(
            _Seen(
                self._layer,
                layer.training,
                _counts_of(solution),
                solution.seconds,
                solution.penalty.detach(),
                {name: value.detach() for name, value in solution.penalties.items()},
                {regularizer.name: regularizer.current_weight for regularizer in active},
                _budgets_of(active),
            )
        )


def _budgets_of(regularizers: list[Regularizer]) -> dict[str, float]:
    """The present course of the last budget among the weights, where it has one."""
    schedules = [unscaled(regularizer.weight)[0] for regularizer in regularizers]
    found: dict[str, float] = {}
    for budget in schedules:
        if isinstance(budget, Budget) and not math.isnan(budget.reached):
            found = {"budget": budget.reached, "budget/target": budget.target}
    return found


def _counts_of(solution: Solution | EnsembleSolution) -> Callable[[], Stats]:
    """What reads the counts later, without keeping the solution's graph where it can."""
    # Those of an ensemble are made when they are asked for, of what its members hold.
    if isinstance(solution, EnsembleSolution) and torch.is_grad_enabled():
        return lambda: solution.stats
    stats = solution.stats
    return lambda: stats


class CSVWriter:
    """Writes values to a table, a row for each step, as they come.

    A name that appears later makes a new column, which is empty in the rows above.

    Args:
        path: the file; its folder is made when absent. A file that is there is replaced.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "solves.csv"
        >>> writer = CSVWriter(path)
        >>> writer.write(0, {"nfe": 14.0})
        >>> writer.write(1, {"nfe": 20.0, "loss": 0.5})
        >>> print(path.read_text().strip())
        step,nfe,loss
        0,14.0,
        1,20.0,0.5
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = ["step"]
        self._rows: list[dict[str, float]] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a row."""
        self._rows.append({"step": step, **values})
        later = [name for name in values if name not in self._columns]
        self._columns += later
        whole = bool(later) or len(self._rows) == 1
        with self.path.open("w" if whole else "a", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, self._columns, lineterminator="\n")
            if whole:
                table.writeheader()
            table.writerows(self._rows if whole else self._rows[-1:])


class TensorBoardWriter:
    """Writes values as scalars of TensorBoard, by torch's `SummaryWriter`.

    Args:
        folder: of the run.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        require("tensorboard", extra="tensorboard", purpose="write its files")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what has not been written."""
        self._writer.close()
