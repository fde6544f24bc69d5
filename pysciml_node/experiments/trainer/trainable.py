"""What the trainer trains: a module that gives its loss, metric and evaluations on a batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node.data import LabelledData
from pysciml_node.layers.neural_de import NeuralDE


@dataclass(frozen=True)
class Metric:
    """The quality of a model, in one number.

    Args:
        name: in results files.
        title: heading of a table's column.
        scale: factor between the number and what tables show.
        decimals: that tables show.
        unit: what the number is.
    """

    name: str
    title: str
    scale: float
    decimals: int
    unit: str

    def show(self, value: float) -> str:
        """The value as tables show it."""
        return f"{self.scale * value:.{self.decimals}f}"


ACCURACY = Metric("accuracy", "acc. (%)", 100.0, 2, "share of the samples, 0 to 1")
SQUARED_ERROR = Metric(
    "mse",
    "MSE (1e-3)",
    1000.0,
    3,
    "squared error of a sample's observed entries, mean of the means",
)
BITS = Metric("bits", "bits/dim", 1.0, 3, "bits a dimension, of whole-number pixels")
NATS = Metric("nats", "NLL (nats)", 1.0, 3, "negative log-likelihood of a sample, mean")
METRICS = {metric.name: metric for metric in (ACCURACY, SQUARED_ERROR, BITS, NATS)}


@dataclass(frozen=True)
class Outcome:
    """A model's loss, metric and field evaluations on a batch.

    Args:
        loss: scalar, without the penalty.
        penalty: scalar to add to the loss; zero in evaluation mode.
        nfe: evaluations of the field in this forward pass.
        score: the metric, summed over the batch.
        weight: what to divide sums of `score` by.
    """

    loss: Tensor
    penalty: Tensor
    nfe: int
    score: float
    weight: float


class Trainable(nn.Module, ABC):
    """A module that the trainer can train; its penalty weights may have schedules.

    A subclass whose training draws random numbers names its generators in `_generators`. The state
    dictionary holds their states, so a run continues exactly.
    """

    metric: ClassVar[Metric]

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[str, torch.Generator] = {}

    @abstractmethod
    def outcome(self, batch: Any) -> Outcome:
        """Loss and metric of a batch."""

    @abstractmethod
    def predict(self, batch: Any) -> Any:
        """The model's prediction for a batch; its time is measured."""

    def step_schedules(self) -> None:
        """Advance the weights by one optimizer step."""
        return

    def get_extra_state(self) -> dict[str, Tensor]:
        """The states of the generators; the regularizers keep their schedules' position."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `get_extra_state` returned."""
        for name, generator in self._generators.items():
            generator.set_state(state[name])


@dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for a batch.

    Args:
        logits: shape `(B, classes)`.
        penalty: scalar to add to the loss; zero in evaluation mode.
        nfe: evaluations of the field in this forward pass.
    """

    logits: Tensor
    penalty: Tensor
    nfe: int


class Classifier(Trainable):
    """Trained with the cross entropy `mean_i -log softmax(logits_i)[y_i]`."""

    metric = ACCURACY
    node: NeuralDE

    @abstractmethod
    def forward(self, x: Tensor) -> Prediction:
        """Predict for a batch `x` of shape `(B, *D)`."""

    def step_schedules(self) -> None:
        """Advance the penalty weight by one optimizer step."""
        self.node.step_schedules()

    def predict(self, batch: LabelledData) -> Prediction:
        """Predict for a batch."""
        prediction: Prediction = self(batch.x)
        return prediction

    def outcome(self, batch: LabelledData) -> Outcome:
        """Cross entropy and number of right answers."""
        prediction = self.predict(batch)
        loss = functional.cross_entropy(prediction.logits, batch.y)
        right = float((prediction.logits.detach().argmax(dim=1) == batch.y).sum())
        return Outcome(loss, prediction.penalty, prediction.nfe, right, len(batch))
