"""CIFAR-10 classified by a neural ODE on two scales: arXiv:2303.02262, section 4.4."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node import checks
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.published.cifar10 import (
    FULL_GRADIENT,
    SIDE,
    check_side,
    load_cifar10,
    load_large_digits,
)
from pysciml_node.experiments.published.image_layers import channel_mask, initialize_
from pysciml_node.experiments.trainer.experiment import Budget, Experiment
from pysciml_node.experiments.trainer.model import node_options
from pysciml_node.experiments.trainer.settings import DecayName, Run, Settings
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import Classifier, Prediction
from pysciml_node.layers import NeuralODE

_GROUPS = 4
_SCALES = 2
# Of the head's bottlenecks: channels inside, and the factor to those that leave them.
_HEAD_CHANNELS = (8, 16)
_HEAD_EXPANSION = 4


@dataclass(frozen=True, kw_only=True)
class MultiScaleSettings(Settings):
    """Settings that the runs on two scales share; the defaults are paper D's, except the solver.

    The paper's is VCAB3, an Adams method of order three, which the engine written in torch does
    not have; BS3 is of the same order.

    Args:
        hidden: channels of each scale.
        expansion: factor from them to those inside a residual block.
        dropout: share of the channels inside a block that training leaves out.
        last_channels: that the head averages over the image.
        side: of the images, in pixels; smaller ones are averages of blocks of the data's 32.
    """

    steps: int = 20000
    batch_size: int = 128
    learning_rate: float = 1e-3
    decay: DecayName = "cosine"
    last_learning_rate: float = 1e-4
    solver: str = "BS3"
    tolerance: float = 0.05
    hidden: int = 24
    taylor_order: int = 2
    evaluate_every: int = 2000
    expansion: int = 5
    dropout: float = 0.2
    last_channels: int = 200
    side: int = SIDE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side(self.side)
        if self.hidden % _GROUPS:
            raise ValueError(
                f"hidden must be a multiple of {_GROUPS}, but is {self.hidden}.\n"
                f"  Group normalization divides the channels into {_GROUPS} groups."
            )
        checks.number("dropout", self.dropout, at_least=0, below=1, hint="0 switches it off.")


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class _Block(nn.Module):
    """Two convolutions with the input injected before the residual sum."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * channels
        self.first, self.first_norm = _conv(channels, inner, 3), nn.GroupNorm(_GROUPS, inner)
        self.second, self.second_norm = _conv(inner, channels, 3), nn.GroupNorm(_GROUPS, channels)
        self.last_norm = nn.GroupNorm(_GROUPS, channels)

    def forward(self, z: Tensor, injected: Tensor | None, mask: Tensor | None) -> Tensor:
        inner = functional.relu(self.first_norm(self.first(z)))
        out = self.second_norm(self.second(inner if mask is None else inner * mask))
        if injected is not None:
            out = out + injected
        normed: Tensor = self.last_norm(functional.relu(out + z))
        return normed


class MultiScaleField(nn.Module):
    """`dz/dt = F(z; x) - z` for images on two scales: a residual block on each, then an exchange.

    The state is flat, `(B, C S^2 + C (S / 2)^2)` for images of `S` pixels a side, and `p`
    holds the injected input `"x"` of the first scale and, in training, the dropout masks
    `"mask 0"` and `"mask 1"`.

    Args:
        channels: `C` of each scale.
        expansion: inside the blocks.
        side: `S`.

    Reference:
        S. Bai, V. Koltun, J. Z. Kolter, Multiscale Deep Equilibrium Models, arXiv:2006.08656;
        A. Pal, A. Edelman, C. Rackauckas, Continuous Deep Equilibrium Models, arXiv:2201.12240.
    """

    def __init__(self, channels: int, expansion: int, side: int = SIDE) -> None:
        super().__init__()
        self.shapes = [(channels, side >> scale, side >> scale) for scale in range(_SCALES)]
        self.sizes = [c * h * w for c, h, w in self.shapes]
        self.blocks = nn.ModuleList([_Block(channels, expansion) for _ in range(_SCALES)])
        self.up = nn.Sequential(_conv(channels, channels, 1), nn.GroupNorm(_GROUPS, channels))
        self.down = nn.Sequential(_conv(channels, channels, 3, 2), nn.GroupNorm(_GROUPS, channels))
        self.after = nn.ModuleList(
            nn.Sequential(nn.ReLU(), _conv(channels, channels, 1), nn.GroupNorm(_GROUPS, channels))
            for _ in range(_SCALES)
        )

    def split(self, z: Tensor) -> list[Tensor]:
        """The images of each scale, from the flat state."""
        parts = torch.split(z, self.sizes, dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, t: Tensor, z: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """The rate of the flat states."""
        del t
        large, small = (
            block(image, p["x"] if scale == 0 else None, p.get(f"mask {scale}"))
            for scale, (block, image) in enumerate(zip(self.blocks, self.split(z), strict=True))
        )
        raised = functional.interpolate(self.up(small), scale_factor=2.0, mode="nearest")
        mixed = (large + raised, small + self.down(large))
        out = [layer(image).flatten(1) for layer, image in zip(self.after, mixed, strict=True)]
        return torch.cat(out, 1) - z


class _Head(nn.Module):
    """A bottleneck on each scale, the sum on the smaller one, and a linear readout."""

    def __init__(self, channels: int, last: int, classes: int) -> None:
        super().__init__()
        wide = [_HEAD_EXPANSION * inner for inner in _HEAD_CHANNELS]
        self.scales = nn.ModuleList(
            nn.Sequential(
                _conv(channels, inner, 1),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                _conv(inner, inner, 3),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                _conv(inner, outputs, 1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )
            for inner, outputs in zip(_HEAD_CHANNELS, wide, strict=True)
        )
        self.down = nn.Sequential(
            nn.Conv2d(wide[0], wide[1], 3, stride=2, padding=1), nn.BatchNorm2d(wide[1]), nn.ReLU()
        )
        self.last = nn.Sequential(nn.Conv2d(wide[1], last, 1), nn.BatchNorm2d(last), nn.ReLU())
        self.linear = nn.Linear(last, classes)

    def forward(self, images: list[Tensor]) -> Tensor:
        large, small = (scale(image) for scale, image in zip(self.scales, images, strict=True))
        features = self.last(self.down(large) + small).mean(dim=(2, 3))
        logits: Tensor = self.linear(features)
        return logits


class MultiScaleClassifier(Classifier):
    """The image, convolved, is injected into a flow on two scales from t = 0 to 1.

    The first scale starts at the convolved image, the second at zero.

    Args:
        classes: number of classes.
        settings: sizes, tolerance, engine and adjoint.
        run: variant, seed and weight.
    """

    def __init__(self, classes: int, settings: MultiScaleSettings, run: Run) -> None:
        super().__init__()
        draws = streams(run.seed)
        self._generators = {"penalty": draws["penalty"], "dropout": draws["training"]}
        self.dropout = settings.dropout
        self.inner_channels = settings.expansion * settings.hidden
        channels = settings.hidden
        self.stem = nn.Sequential(
            _conv(3, channels, 3),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            _conv(channels, channels, 3),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.field = MultiScaleField(channels, settings.expansion, settings.side)
        self.head = _Head(channels, settings.last_channels, classes)
        initialize_(self, draws["parameters"])
        self.node = NeuralODE(
            self.field,
            **node_options(settings, run, self._generators["penalty"]),
        )
        self.to(getattr(torch, settings.dtype))

    def forward(self, x: Tensor) -> Prediction:
        """Predict for images `(B, 3, side, side)`, converted to the parameters' dtype."""
        injected = self.stem(x.to(self.head.linear.weight.dtype))
        flat = injected.flatten(1)
        p = {"x": injected}
        if self.training and self.dropout > 0:
            for scale in range(_SCALES):
                p[f"mask {scale}"] = channel_mask(
                    injected, self.inner_channels, self.dropout, self._generators["dropout"]
                )
        start = torch.cat((flat, flat.new_zeros(len(flat), self.field.sizes[1])), 1)
        solution = self.node(start, p)
        logits = self.head(self.field.split(solution.u1))
        return Prediction(logits, solution.penalty, int(solution.stats.nfe))


def make_multi_scale_classifier(
    data: Splits[LabelledData], settings: MultiScaleSettings, run: Run
) -> MultiScaleClassifier:
    """The classifier that fits the data."""
    return MultiScaleClassifier(int(data.train.y.max()) + 1, settings, run)


CIFAR10_MULTI_SCALE = Experiment(
    name="cifar10-multi-scale",
    title="CIFAR-10, multi-scale neural ODE",
    settings=MultiScaleSettings(monitor_samples=1024, train_samples=10_000),
    weights={
        "local-unbiased": (0.1, 5.0),
        "local-biased": (0.1, 5.0),
        "global-error": (0.1, 5.0),
        "steer": (0.5, 0.5),
        "taylor": (0.01, 0.01),
    },
    reduced=Budget(
        {
            "steps": 200,
            "batch_size": 16,
            "side": 16,
            "hidden": 8,
            "expansion": 3,
            "evaluate_every": 100,
            "evaluation_batch_size": 32,
            "validation_samples": 1000,
            "monitor_samples": 512,
            "train_samples": 1000,
            **FULL_GRADIENT,
        }
    ),
    quick=Budget(
        {
            "timed_predictions": 2,
            "steps": 2,
            "batch_size": 4,
            "hidden": 4,
            "expansion": 1,
            "evaluate_every": 2,
        }
    ),
    data_dir=Path("data/cifar10"),
    load=load_cifar10,
    load_quick=load_large_digits,
    build=make_multi_scale_classifier,
    options={
        "expansion": "channels inside a residual block, in multiples of --hidden",
        "side": "of the images, in pixels; 4, 8, 16 or 32",
        "dropout": "share of these channels that training leaves out",
    },
)
