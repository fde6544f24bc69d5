"""How good a classifier is, how many field evaluations it takes and how long it computes."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pysciml_node.data import LabelledData, ordered_batches
from pysciml_node.experiments.classifier import Classifier


@dataclass(frozen=True)
class Evaluation:
    """Figures over a data set, in evaluation mode.

    Args:
        accuracy: share of samples whose largest logit is the label's, in [0, 1].
        nfe: evaluations of the field a batch, mean over the batches.
    """

    accuracy: float
    nfe: float


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation mode without gradients, and back at the end."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def evaluate(model: Classifier, data: LabelledData, batch_size: int) -> Evaluation:
    """Accuracy and field evaluations over a data set.

    Args:
        model: what to evaluate; left in the mode it was in.
        data: samples to go through once, in order.
        batch_size: samples a batch. The steps of a solve are shared by the batch, so ``nfe``
            depends on it.

    Returns:
        The figures.

    Raises:
        ValueError: ``data`` is empty.
    """
    if len(data) == 0:
        raise ValueError("data must hold at least one sample to evaluate on, but is empty.")
    correct = 0
    nfe = []
    with evaluation_mode(model):
        for batch in ordered_batches(data, batch_size):
            prediction = model(batch.x)
            correct += int((prediction.logits.argmax(dim=1) == batch.y).sum())
            nfe.append(prediction.nfe)
    return Evaluation(correct / len(data), statistics.fmean(nfe))


def predict_seconds(
    model: Classifier,
    data: LabelledData,
    batch_size: int,
    *,
    warmup: int = 3,
    repeats: int = 20,
) -> float:
    """Median wall-clock seconds of a prediction for one full batch.

    Args:
        model: what to time; left in the mode it was in.
        data: where the batches come from, in order and again from the start when they run out.
        batch_size: samples a batch; at most ``len(data)``.
        warmup: untimed predictions first.
        repeats: timed predictions.

    Returns:
        Seconds a batch.

    Raises:
        ValueError: ``data`` does not fill one batch.
    """
    full = [b for b in ordered_batches(data, batch_size) if len(b) == batch_size]
    if not full:
        raise ValueError(f"data must fill a batch of {batch_size} samples, but holds {len(data)}.")
    seconds = []
    with evaluation_mode(model):
        for k in range(warmup + repeats):
            x = full[k % len(full)].x
            started = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warmup:])
