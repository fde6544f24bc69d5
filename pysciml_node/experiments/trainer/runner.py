"""Train one model from start to finish and measure it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pysciml_node.data import Splits
from pysciml_node.experiments.reporting.results import RunResult
from pysciml_node.experiments.trainer.evaluation import evaluate, predict_seconds
from pysciml_node.experiments.trainer.model import make_classifier
from pysciml_node.experiments.trainer.settings import Run, Settings, describe
from pysciml_node.experiments.trainer.trainable import Trainable
from pysciml_node.experiments.trainer.training import Trainer, progress_bar

Build = Callable[[Any, Any, Run], Trainable]


def make_trainer(
    data: Splits[Any], settings: Settings, run: Run, *, build: Build = make_classifier
) -> Trainer:
    """A trainer for the model that fits the data.

    Args:
        data: the parts.
        settings: those shared by all variants.
        run: variant, seed and weight.
        build: makes the model of data, settings and run.

    Returns:
        The trainer, at step 0.
    """
    return Trainer(build(data, settings, run), data, settings, run)


def train_run(
    data: Splits[Any],
    settings: Settings,
    run: Run,
    *,
    label: str,
    build: Build = make_classifier,
    checkpoint: Path | None = None,
    checkpoint_every: int = 250,
    resume: bool = False,
) -> Trainer:
    """Train with a progress bar.

    Args:
        data: the parts.
        settings: those shared by all variants.
        run: variant, seed and weight.
        label: what to write before the progress bar.
        build: makes the model of data, settings and run.
        checkpoint: file to keep the state in.
        checkpoint_every: optimizer steps between two savings.
        resume: continue from the checkpoint if it exists.

    Returns:
        The trainer at its last step, its model trained.

    Raises:
        ValueError: the checkpoint belongs to a run with other settings.
    """
    trainer = make_trainer(data, settings, run, build=build)
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.resume(checkpoint)
    with progress_bar(trainer, label) as listener:
        trainer.train(checkpoint=checkpoint, checkpoint_every=checkpoint_every, listener=listener)
    return trainer


def measure(trainer: Trainer, data: Splits[Any]) -> RunResult:
    """Figures of a trained model on all parts of the data.

    Args:
        trainer: a run at its last step.
        data: the parts.

    Returns:
        The figures, with the run's settings and history.
    """
    model, size = trainer.model, trainer.settings.evaluated_at_once
    train = evaluate(model, data.train[: trainer.settings.train_samples], size)
    test = evaluate(model, data.test[: trainer.settings.test_samples], size)
    validation = evaluate(model, data.validation, size) if len(data.validation) else None
    wall, cpu = predict_seconds(
        model, data.test, min(size, len(data.test)), repeats=trainer.settings.timed_predictions
    )
    return RunResult(
        variant=trainer.run.variant,
        seed=trainer.run.seed,
        metric=model.metric.name,
        test=test.score,
        train=train.score,
        nfe=test.nfe,
        train_seconds=trainer.train_seconds,
        train_cpu_seconds=trainer.train_cpu_seconds,
        predict_seconds=wall,
        predict_cpu_seconds=cpu,
        validation=validation.score if validation else None,
        validation_nfe=validation.nfe if validation else None,
        settings=describe(trainer.settings, trainer.run),
        history=asdict(trainer.history),
    )
