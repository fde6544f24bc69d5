"""Continuous normalizing flows as the trainer trains them: of points, and of images."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pysciml_node import checks
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import RK4, Tsit5
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.trainer.model import make_adjoint
from pysciml_node.experiments.trainer.penalties import make_regularizers
from pysciml_node.experiments.trainer.settings import Run, Settings
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import BITS, NATS, Metric, Outcome, Trainable
from pysciml_node.flows import (
    CNF,
    Chain,
    Density,
    Flow,
    Logit,
    MultiScale,
    bits_per_dimension,
    dequantize,
)
from pysciml_node.layers.timed import TimeDependence, TimedField

Architecture = Literal["flat", "multi-scale"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True, kw_only=True)
class FlowSettings(Settings):
    """Settings of a flow.

    Args:
        layers: hidden layers of the field, each of the width `hidden`.
        time: how they see the time: `"ignore"`, `"concat"` or `"concatsquash"`.
        training_step: size of the fixed steps of RK4 that training takes, as the paper does with
            regularization; 0 trains with Tsit5 at `tolerance`. Evaluations are always at
            `tolerance`.
    """

    layers: int = 3
    time: TimeDependence = "concatsquash"
    training_step: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "0 trains with adaptive steps, 0.25 with four steps of RK4."
        checks.number("training_step", self.training_step, at_least=0, at_most=1, hint=hint)
        checks.whole("layers", self.layers)


@dataclass(frozen=True, kw_only=True)
class ImageFlowSettings(FlowSettings):
    """Settings of a flow of images.

    Args:
        architecture: `"flat"`, one flow of the flattened image, or `"multi-scale"`, several
            convolutional ones.
        levels: how many values a pixel has.
        alpha: of the logit transform.
    """

    architecture: Architecture = "flat"
    levels: int = 256
    alpha: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("architecture", self.architecture, ARCHITECTURES)


class FlowModel(Trainable):
    """Trained on the negative log-likelihood, in nats a sample.

    Args:
        settings: of the flow.
        run: variant, seed and weight.
    """

    metric: ClassVar[Metric] = NATS
    flow: Flow

    def __init__(self, settings: FlowSettings, run: Run) -> None:
        super().__init__()
        self.settings = settings
        draws = streams(run.seed)
        self._initial = draws["parameters"]
        self._generators = {"penalty": draws["penalty"], "noise": draws["pixels"]}
        probes = self._generators["penalty"]
        self._options: dict[str, Any] = {
            "rtol": settings.tolerance,
            "atol": settings.tolerance,
            "engine": settings.engine,
            "adjoint": make_adjoint(settings.adjoint),
            "regularizers": make_regularizers(settings, run, probes),
            "generator": probes,
        }

    def train(self, mode: bool = True) -> Self:
        """Change mode, and with it the solver."""
        super().train(mode)
        fixed = mode and self.settings.training_step > 0
        for module in self.modules():
            if isinstance(module, CNF):
                node = module.node
                node.algorithm = RK4() if fixed else Tsit5()
                node.options = (
                    {"controller": FixedStep(), "dt0": self.settings.training_step} if fixed else {}
                )
        return self

    def density(self, x: Tensor) -> Density:
        """The flow's density of a batch."""
        density: Density = self.flow(x.to(getattr(torch, self.settings.dtype)))
        return density

    def score(self, log_prob: Tensor) -> Tensor:
        """The metric of each sample."""
        return -log_prob

    def outcome(self, batch: LabelledData) -> Outcome:
        """Metric of a batch, which is the loss too."""
        density = self.density(batch.x)
        scores = self.score(density.log_prob)
        total = float(scores.detach().sum())
        return Outcome(scores.mean(), density.penalty, int(density.nfe), total, len(batch))

    def predict(self, batch: LabelledData) -> Tensor:
        """Log-densities of a batch."""
        return self.density(batch.x).log_prob

    def step_schedules(self) -> None:
        """Advance the penalty weights by one optimizer step."""
        self.flow.step_schedules()


class PlaneFlow(FlowModel):
    """A flow of points in the plane, its trace exact."""

    def __init__(self, settings: FlowSettings, run: Run) -> None:
        super().__init__(settings, run)
        field = TimedField.mlp(
            2,
            [settings.hidden] * settings.layers,
            time=settings.time,
            generator=self._initial,
        )
        self.flow = self.cnf = CNF(field, event_shape=2, **self._options)
        self.to(getattr(torch, settings.dtype))


class ImageFlow(FlowModel):
    """A flow of images with whole-number pixels, trained on bits a dimension.

    Pixels are given in [0, 1] and rounded to whole numbers of `settings.levels` values. Uniform
    noise is added to them, so the bits are a bound on those of the whole numbers. Training draws
    it anew; every evaluation adds the same noise.

    Args:
        shape: of an image, `(H, W)`.
        settings: of the flow.
        run: variant, seed and weight.
    """

    metric = BITS

    def __init__(self, shape: tuple[int, int], settings: ImageFlowSettings, run: Run) -> None:
        super().__init__(settings, run)
        self.levels, self.dimensions = settings.levels, math.prod(shape)
        hidden = [settings.hidden] * settings.layers
        if settings.architecture == "multi-scale":
            self.shape: tuple[int, ...] = (1, *shape)

            def field(channels: int) -> TimedField:
                return TimedField.conv(
                    channels, hidden, time=settings.time, generator=self._initial
                )

            self.flow = MultiScale(self.shape, field, alpha=settings.alpha, **self._options)
        else:
            self.shape = (self.dimensions,)
            flat = TimedField.mlp(
                self.dimensions,
                hidden,
                time=settings.time,
                activation=functional.softplus,
                generator=self._initial,
            )
            steps = [Logit(settings.alpha), CNF(flat, **self._options)]
            self.flow = Chain(steps, event_shape=self.shape)
        self.to(getattr(torch, settings.dtype))

    def density(self, x: Tensor) -> Density:
        """The flow's density of images with pixels in [0, 1]."""
        noise = self._generators["noise"] if self.training else torch.Generator().manual_seed(0)
        whole = (x * (self.levels - 1)).round().to(getattr(torch, self.settings.dtype))
        pixels = dequantize(whole, self.levels, generator=noise)
        return super().density(pixels.reshape(-1, *self.shape))

    def score(self, log_prob: Tensor) -> Tensor:
        """Bits a dimension of each image."""
        return bits_per_dimension(log_prob, self.dimensions, self.levels)


def make_plane_flow(data: Splits[LabelledData], settings: FlowSettings, run: Run) -> PlaneFlow:
    """A flow in the plane, whatever the data."""
    del data
    return PlaneFlow(settings, run)


def make_image_flow(data: Splits[LabelledData], settings: ImageFlowSettings, run: Run) -> ImageFlow:
    """The flow that fits the images `(N, H, W)`."""
    height, width = data.train.x.shape[1:]
    return ImageFlow((height, width), settings, run)
