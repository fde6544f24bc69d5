"""Train one classifier from start to finish and measure it."""

import math
from dataclasses import asdict
from pathlib import Path

from pysciml_node.data import Splits
from pysciml_node.experiments.evaluation import evaluate, predict_seconds
from pysciml_node.experiments.model import ODEClassifier
from pysciml_node.experiments.results import RunResult
from pysciml_node.experiments.settings import Run, Settings, describe
from pysciml_node.experiments.training import Trainer, progress_bar


def make_trainer(data: Splits, settings: Settings, run: Run) -> Trainer:
    """A trainer for the classifier that fits the data.

    Args:
        data: the parts; the state's size and the number of classes follow from ``data.train``.
        settings: those shared by all variants.
        run: variant, seed and weight.

    Returns:
        The trainer, at step 0.
    """
    features = math.prod(data.train.x.shape[1:])
    classes = int(data.train.y.max()) + 1
    return Trainer(ODEClassifier(features, classes, settings, run), data, settings, run)


def train_classifier(
    data: Splits,
    settings: Settings,
    run: Run,
    *,
    label: str,
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
        checkpoint: file to keep the state in.
        checkpoint_every: optimizer steps between two savings.
        resume: continue from the checkpoint if it exists.

    Returns:
        The trainer at its last step, its model trained.

    Raises:
        ValueError: the checkpoint belongs to a run with other settings.
    """
    trainer = make_trainer(data, settings, run)
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.resume(checkpoint)
    with progress_bar(trainer, label) as listener:
        trainer.train(checkpoint=checkpoint, checkpoint_every=checkpoint_every, listener=listener)
    return trainer


def measure(trainer: Trainer, data: Splits) -> RunResult:
    """Figures of a trained classifier on all parts of the data.

    Args:
        trainer: a run at its last step.
        data: the parts.

    Returns:
        The figures, with the run's settings and history.
    """
    model, size = trainer.model, trainer.settings.batch_size
    train, test = (evaluate(model, part, size) for part in (data.train, data.test))
    validation = evaluate(model, data.validation, size) if len(data.validation) else None
    return RunResult(
        variant=trainer.run.variant,
        seed=trainer.run.seed,
        test_accuracy=test.accuracy,
        train_accuracy=train.accuracy,
        nfe=test.nfe,
        train_seconds=trainer.train_seconds,
        predict_seconds=predict_seconds(model, data.test, size),
        validation_accuracy=validation.accuracy if validation else None,
        validation_nfe=validation.nfe if validation else None,
        settings=describe(trainer.settings, trainer.run),
        history=asdict(trainer.history),
    )
