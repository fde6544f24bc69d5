"""Layers of the image classifiers: normalization inside a field, initial weights, dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class FieldBatchNorm(nn.Module):
    """Batch normalization for use inside a vector field.

    In training it normalizes by the batch's own statistics, so that the field is a function of
    its arguments alone: running averages that moved with each evaluation would count accepted,
    rejected and replayed steps alike. They move in evaluations under `tracking` only.

    Args:
        channels: of the image.
        momentum: share of the new statistics in the running averages.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        self.momentum = momentum
        self.tracked = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(B, channels, H, W)`."""
        averages = self.tracked or not self.training
        return functional.batch_norm(
            x,
            self.running_mean if averages else None,
            self.running_variance if averages else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
        )


@contextmanager
def tracking(module: nn.Module) -> Iterator[None]:
    """Let the running averages of a module's `FieldBatchNorm` layers move, without gradients."""
    layers = [layer for layer in module.modules() if isinstance(layer, FieldBatchNorm)]
    for layer in layers:
        layer.tracked = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.tracked = False


def initialize_(module: nn.Module, generator: torch.Generator) -> None:
    """Draw Glorot-uniform weights and zero biases for all linear and convolutional layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def channel_mask(like: Tensor, channels: int, dropout: float, generator: torch.Generator) -> Tensor:
    """A dropout mask `(B, channels, 1, 1)` with mean 1, to be held fixed through a solve.

    Reference:
        S. Bai, V. Koltun, J. Z. Kolter, Multiscale Deep Equilibrium Models, arXiv:2006.08656,
        section 3.3.
    """
    drawn = torch.rand(len(like), channels, 1, 1, generator=generator)
    return (drawn >= dropout).to(like) / (1.0 - dropout)
