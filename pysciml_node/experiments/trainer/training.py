"""A training run that can be stopped and continued bit for bit."""

import io
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pysciml_node._optional import require
from pysciml_node.data import ShuffledBatches, Splits
from pysciml_node.data.files import whole_file
from pysciml_node.experiments.trainer.evaluation import evaluate
from pysciml_node.experiments.trainer.settings import OptimizerName, Run, Settings, describe
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import Trainable

_FORMAT = 2
_OPTIMIZERS: dict[OptimizerName, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
}


@dataclass
class History:
    """The course of a run.

    Args:
        loss: task loss of every optimizer step, without the penalty.
        penalty: weighted penalty of every step.
        nfe: field evaluations of every step's forward pass.
        monitor: name of the part of the data that the evaluations below use.
        evaluated_at: optimizer steps after which the model was evaluated.
        score: the model's metric there.
        evaluation_nfe: field evaluations a batch there.
    """

    monitor: str
    loss: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    evaluated_at: list[int] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    evaluation_nfe: list[float] = field(default_factory=list)


class Trainer:
    """Trains a model on its loss plus its penalty.

    Everything that decides how a run goes on (parameters, optimizer, schedules, random generators,
    position in the data, history) is in the state, so a run continued from a checkpoint ends with
    the same parameters, bit for bit, as one never interrupted.

    Args:
        model: what to train.
        data: training data, and the part to watch.
        settings: steps, batch size, learning rate and so on.
        run: variant and seed; the batches' order follows from the seed.
    """

    def __init__(self, model: Trainable, data: Splits[Any], settings: Settings, run: Run) -> None:
        self.model = model
        self.settings = settings
        self.run = run
        self.step = 0
        self.train_seconds = 0.0
        self.train_cpu_seconds = 0.0
        part, watched = data.monitor
        self.history = History(monitor=part)
        self._watched = watched[: settings.monitor_samples]
        self._learning_rates = settings.learning_rates()
        self._batches: ShuffledBatches[Any] = ShuffledBatches(
            data.train,
            settings.batch_size,
            generator=streams(run.seed)["batches"],
        )
        self._optimizer = _OPTIMIZERS[settings.optimizer](
            model.parameters(),
            lr=settings.learning_rate,  # type: ignore[call-arg]
        )

    def train(
        self,
        *,
        until: int | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int = 250,
        listener: Callable[["Trainer"], None] | None = None,
    ) -> None:
        """Train up to a step.

        Args:
            until: step to stop after; the settings' number of steps when None.
            checkpoint: file to save the state in, as training goes and at the end.
            checkpoint_every: optimizer steps between two savings.
            listener: called with this trainer after every step.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.train()
        while self.step < last:
            wall, cpu = time.perf_counter(), time.process_time()
            self._train_step()
            self.train_seconds += time.perf_counter() - wall
            self.train_cpu_seconds += time.process_time() - cpu
            if self.step % self.settings.evaluate_every == 0 or self.step == self.settings.steps:
                self._evaluate()
            if checkpoint is not None and (self.step % checkpoint_every == 0 or self.step == last):
                self.save(checkpoint)
            if listener is not None:
                listener(self)

    def _train_step(self) -> None:
        batch = next(self._batches)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rates(self.step)
        self._optimizer.zero_grad()
        outcome = self.model.outcome(batch)
        (outcome.loss + outcome.penalty).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.model.step_schedules()
        self.step += 1
        values = float(outcome.loss.detach()), float(outcome.penalty.detach())
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f"the loss is {values[0]} and the penalty {values[1]} at step {self.step} of "
                f"{self.run.name}.\n  Try a smaller learning rate or penalty weight."
            )
        self.history.loss.append(values[0])
        self.history.penalty.append(values[1])
        self.history.nfe.append(outcome.nfe)

    def _evaluate(self) -> None:
        evaluation = evaluate(self.model, self._watched, self.settings.evaluated_at_once)
        self.history.evaluated_at.append(self.step)
        self.history.score.append(evaluation.score)
        self.history.evaluation_nfe.append(evaluation.nfe)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the run goes on, and what describes it."""
        return {
            "format": _FORMAT,
            "run": describe(self.settings, self.run),
            "step": self.step,
            "train_seconds": self.train_seconds,
            "train_cpu_seconds": self.train_cpu_seconds,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
            "history": asdict(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run from its state.

        Args:
            state: what `state_dict` returned for a run with the same settings.

        Raises:
            ValueError: the state belongs to a run with other settings.
        """
        current = {"format": _FORMAT, **describe(self.settings, self.run)}
        saved = {"format": state["format"], **state["run"]}
        differences = [
            f"{name} is {current.get(name)!r}, there {saved.get(name)!r}"
            for name in sorted(current.keys() | saved.keys())
            if current.get(name) != saved.get(name)
        ]
        if differences:
            raise ValueError(
                "the checkpoint belongs to another run: " + "; ".join(differences) + ".\n"
                "  Continue with the settings it was made with, or start without resuming."
            )
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._batches.load_state_dict(state["batches"])
        self.history = History(**state["history"])
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        self.train_cpu_seconds = state["train_cpu_seconds"]

    def save(self, path: Path) -> None:
        """Write the state to a file; an interruption leaves the previous file whole.

        Args:
            path: the file; its folder is made when absent.

        Raises:
            OSError: the file cannot be written, for example because the disk is full.
        """
        content = io.BytesIO()
        torch.save(self.state_dict(), content)
        with whole_file(path) as stream:
            stream.write(content.getbuffer())

    def resume(self, path: Path) -> None:
        """Continue from a file that `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: the file is no whole checkpoint, or belongs to a run with other settings.
            FileNotFoundError: there is no such file.
        """
        try:
            state = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(_no_checkpoint(path, reason)) from error
        missing = self.state_dict().keys() - (state.keys() if isinstance(state, dict) else ())
        if missing:
            raise ValueError(_no_checkpoint(path, f"it lacks {', '.join(sorted(missing))}"))
        self.load_state_dict(state)


def _no_checkpoint(path: Path, reason: str) -> str:
    return (
        f"{path} is not a whole checkpoint of this version ({reason}).\n"
        "  Delete it, or start without resuming."
    )


@contextmanager
def progress_bar(trainer: Trainer, label: str) -> Iterator[Callable[[Trainer], None]]:
    """Show a run's progress with its live loss and field evaluations.

    Args:
        trainer: the run; the bar starts at its step.
        label: what to write before the bar.

    Yields:
        A listener for `Trainer.train`.

    Raises:
        ImportError: tqdm is not installed.
    """
    tqdm = require("tqdm", extra="examples", purpose="show progress").tqdm
    with tqdm(
        total=trainer.settings.steps,
        initial=trainer.step,
        desc=label,
        unit="step",
        # Where the bar cannot be redrawn in place, each update is a line of its own.
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:

        def listener(run: Trainer) -> None:
            history = run.history
            shown = {"nfe": history.nfe[-1], "loss": f"{history.loss[-1]:.4f}"}
            if history.score:
                metric = run.model.metric
                shown[history.monitor] = f"{metric.show(history.score[-1])} {metric.title}"
            bar.set_postfix(shown, refresh=False)
            bar.update(run.step - bar.n)

        yield listener
