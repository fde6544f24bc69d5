"""A classifier without a solver: a noisy linear map whose penalty has a schedule."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.trainer.trainable import Classifier, Prediction


class NoisyLinear(Classifier):
    """Logits `W x`; in training the penalty is the size of `W` seen through random noise."""

    def __init__(self, features: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.1 * torch.randn(classes, features, generator=generator))
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.schedule_steps = 0

    def forward(self, x: Tensor) -> Prediction:
        penalty = torch.zeros(())
        if self.training:
            mask = torch.rand(self.weight.shape, generator=self.noise)
            penalty = 0.9**self.schedule_steps * (mask * self.weight).square().mean()
        logits = functional.linear(x.flatten(1), self.weight)
        return Prediction(logits, penalty, nfe=7 if self.training else 5)

    def step_schedules(self) -> None:
        self.schedule_steps += 1

    def get_extra_state(self):
        return {"steps": self.schedule_steps, "noise": self.noise.get_state()}

    def set_extra_state(self, state) -> None:
        self.schedule_steps = state["steps"]
        self.noise.set_state(state["noise"])


def blobs(n: int = 60, seed: int = 0) -> Splits:
    """Three well separated classes in the plane, as all of the parts."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    angle = 2 * torch.pi * y / 3
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    data = LabelledData(4 * centres + 0.2 * torch.randn(n, 2, generator=generator), y)
    return Splits(data, data, data)
