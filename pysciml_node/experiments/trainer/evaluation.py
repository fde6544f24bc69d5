"""A model's score, field evaluations and computing time."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pysciml_node.data import ordered_batches
from pysciml_node.data.labelled import DataT
from pysciml_node.experiments.trainer.trainable import Trainable


@dataclass(frozen=True)
class Evaluation:
    """Figures over a data set, in evaluation mode.

    Args:
        score: the model's metric.
        nfe: evaluations of the field a batch, mean over the batches.
    """

    score: float
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


def evaluate(model: Trainable, data: DataT, batch_size: int) -> Evaluation:
    """Metric and field evaluations over a data set.

    Args:
        model: what to evaluate; left in the mode it was in.
        data: samples to go through once, in order.
        batch_size: samples a batch. The steps of a solve are shared by the batch, so `nfe`
            depends on it.

    Returns:
        The figures.

    Raises:
        ValueError: `data` is empty.
    """
    if len(data) == 0:
        raise ValueError(
            "data must hold at least one sample to evaluate on, but is empty.\n"
            "  Check the shares that the data was split by."
        )
    with evaluation_mode(model):
        outcomes = [model.outcome(batch) for batch in ordered_batches(data, batch_size)]
    score = sum(outcome.score for outcome in outcomes) / sum(o.weight for o in outcomes)
    return Evaluation(score, statistics.fmean(outcome.nfe for outcome in outcomes))


def predict_seconds(
    model: Trainable,
    data: DataT,
    batch_size: int,
    *,
    warmup: int = 3,
    repeats: int = 20,
    seconds: float = 60.0,
) -> tuple[float, float]:
    """Median wall-clock and CPU seconds of a prediction for one full batch.

    Args:
        model: what to time; left in the mode it was in.
        data: where the batches come from, in order and again from the start when they run out.
        batch_size: samples a batch; at most `len(data)`.
        warmup: untimed predictions first.
        repeats: timed predictions.
        seconds: after so many, no further prediction is begun.

    Returns:
        Seconds a batch: by the clock, and of this process summed over its cores.

    Raises:
        ValueError: `data` does not fill one batch.
    """
    full = [b for b in ordered_batches(data, batch_size) if len(b) == batch_size]
    if not full:
        raise ValueError(
            f"data must fill a batch of {batch_size} samples, but holds {len(data)}.\n"
            f"  Write batch_size={max(len(data), 1)} or less."
        )
    walls, cpus = [], []
    begun = time.perf_counter()
    with evaluation_mode(model):
        for k in range(warmup + repeats):
            batch = full[k % len(full)]
            wall, cpu = time.perf_counter(), time.process_time()
            model.predict(batch)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            if time.perf_counter() - begun > seconds:
                break
    warm = warmup if len(walls) > warmup else 0
    return statistics.median(walls[warm:]), statistics.median(cpus[warm:])
