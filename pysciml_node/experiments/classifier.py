"""What the trainer trains: a module that predicts and reports its cost and penalty."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about a batch, and what it took to say it.

    Args:
        logits: shape ``(B, classes)``.
        penalty: scalar to add to the loss; zero in evaluation mode.
        nfe: evaluations of the field in this forward pass.
    """

    logits: Tensor
    penalty: Tensor
    nfe: int


class Classifier(nn.Module, ABC):
    """A module that the trainer can train: it predicts, and its penalty weights have schedules.

    A subclass whose training draws random numbers or follows a schedule keeps both in its extra
    state, so that its state dictionary continues a run exactly.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Prediction:
        """Predict for a batch ``x`` of shape ``(B, *D)``."""

    def step_schedules(self) -> None:
        """Advance the penalty weights by one optimizer step."""
        return
