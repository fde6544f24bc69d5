"""CIFAR-10 classified by a convolutional neural ODE: arXiv:2303.02262, section 4.4."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node import data as datasets
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.published.image_layers import FieldBatchNorm, initialize_, tracking
from pysciml_node.experiments.trainer.experiment import Budget, Experiment
from pysciml_node.experiments.trainer.model import node_options
from pysciml_node.experiments.trainer.settings import DecayName, Run, Settings
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import Classifier, Prediction
from pysciml_node.layers import NeuralODE
from pysciml_node.layers.timed import ConcatConv2d

SIDE = 32
_COLOURS = 3
_CHANNELS = 8
QUICK_SAMPLES = 12


@dataclass(frozen=True, kw_only=True)
class ConvSettings(Settings):
    """Settings that the convolutional runs share; the defaults are paper D's.

    Args:
        side: of the images, in pixels; smaller ones are averages of blocks of the data's 32.
    """

    steps: int = 31250
    batch_size: int = 32
    learning_rate: float = 3e-3
    decay: DecayName = "cosine"
    last_learning_rate: float = 1e-4
    tolerance: float = 1e-4
    hidden: int = 64
    taylor_order: int = 2
    evaluate_every: int = 2500
    side: int = SIDE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side(self.side)


def check_side(side: int) -> None:
    """Refuse a side that does not divide 32, or that is too small to convolve twice.

    Raises:
        ValueError: `side` is one of these.
    """
    if side < 4 or SIDE % side:
        raise ValueError(
            f"side must be 4, 8, 16 or {SIDE}, but is {side}.\n"
            "  Blocks of pixels are averaged, so the side has to divide the data's."
        )


class ConvField(nn.Module):
    """Three convolutions that see the time as a channel, batch normalization and GELU between.

    Args:
        channels: of the state.
        hidden: of the inner layers.
        generator: source of the initial weights.

    Reference:
        The architecture is that of M. Poli et al., Hypersolvers, arXiv:2007.09601.
    """

    def __init__(self, channels: int, hidden: int, *, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (channels, hidden, hidden, channels)
        self.convolutions = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(sizes):
            layer = ConcatConv2d(inputs, outputs, generator=generator)
            layer.layer.bias = None
            self.convolutions.append(layer)
        self.norms = nn.ModuleList([FieldBatchNorm(hidden), FieldBatchNorm(hidden)])

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The rate of the images `(B, channels, H, W)` at time `t`."""
        first, second, last = self.convolutions
        for layer, norm in zip((first, second), self.norms, strict=True):
            u = functional.gelu(norm(layer(t, u)))
        rate: Tensor = last(t, u)
        return rate


class ConvClassifier(Classifier):
    """Five learned channels beside the three colours flow from t = 0 to 1; then a linear readout.

    Args:
        classes: number of classes.
        settings: width, tolerance, engine and adjoint.
        run: variant, seed and weight.
    """

    def __init__(self, classes: int, settings: ConvSettings, run: Run) -> None:
        super().__init__()
        draws = streams(run.seed)
        initial = draws["parameters"]
        self._generators = {"penalty": draws["penalty"]}
        self.more = nn.Conv2d(_COLOURS, _CHANNELS - _COLOURS, 3, padding=1)
        self.norm = nn.BatchNorm2d(_CHANNELS)
        self.fewer = nn.Conv2d(_CHANNELS, 1, 3, padding=1)
        self.head = nn.Linear(settings.side**2, classes)
        for layer in (self.more, self.fewer, self.head):
            initialize_(layer, initial)
        self.field = ConvField(_CHANNELS, settings.hidden, generator=initial)
        self.node = NeuralODE(
            self.field,
            **node_options(settings, run, self._generators["penalty"]),
        )
        self.to(getattr(torch, settings.dtype))

    def forward(self, x: Tensor) -> Prediction:
        """Predict for images `(B, 3, side, side)`, converted to the parameters' dtype."""
        x = x.to(self.head.weight.dtype)
        u0 = self.norm(torch.cat((x, self.more(x)), 1))
        solution = self.node(u0)
        if self.training:
            # The averages that evaluation normalizes by: over both ends of the flow.
            with tracking(self.field):
                for t, u in ((0.0, u0), (1.0, solution.u1)):
                    self.field(u.new_tensor(t), u.detach())
        logits = self.head(functional.gelu(self.fewer(solution.u1)).flatten(1))
        return Prediction(logits, solution.penalty, int(solution.stats.nfe))


def make_conv_classifier(
    data: Splits[LabelledData], settings: ConvSettings, run: Run
) -> ConvClassifier:
    """The classifier that fits the data."""
    return ConvClassifier(int(data.train.y.max()) + 1, settings, run)


class Sized(Protocol):
    """Settings that say how large images are."""

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        ...


def load_cifar10(folder: Path, download: bool, settings: Sized) -> Splits[LabelledData]:
    """CIFAR-10, or the subset that the folder holds, in the settings' size."""
    whole = datasets.cifar10(folder, download=download)

    def reduced(part: LabelledData) -> LabelledData:
        if settings.side == SIDE or not len(part):
            return part
        return LabelledData(functional.avg_pool2d(part.x, SIDE // settings.side), part.y)

    return Splits(*(reduced(part) for part in (whole.train, whole.validation, whole.test)))


def load_large_digits(folder: Path, download: bool, settings: Sized) -> Splits[LabelledData]:
    """A few of scikit-learn's digits, as large as CIFAR-10's images: nothing is downloaded."""
    del folder, download
    whole = datasets.digits()

    def enlarged(part: LabelledData) -> LabelledData:
        few = part[:QUICK_SAMPLES]
        size = settings.side // few.x.shape[-1]
        images = few.x.repeat_interleave(size, 1).repeat_interleave(size, 2)
        return LabelledData(images[:, None].repeat(1, _COLOURS, 1, 1), few.y)

    return Splits(*(enlarged(part) for part in (whole.train, whole.validation[:0], whole.test)))


# The state is large and the field is a deep one: the solver's own step, and the gradient through
# all of it, are what makes the penalty act within few steps.
FULL_GRADIENT: dict[str, Any] = {"step_size": "solver", "stop_gradient": False}

CIFAR10 = Experiment(
    name="cifar10",
    title="CIFAR-10, convolutional neural ODE",
    settings=ConvSettings(monitor_samples=1024, train_samples=10_000),
    # The papers of the other variants have no such experiment: their weights are those for MNIST.
    weights={
        "local-unbiased": (2.5, 2.5),
        "local-biased": (2.5, 2.5),
        "global-error": (2.5, 2.5),
        "global-stiffness": (0.1, 0.1),
        "steer": (0.5, 0.5),
        "taylor": (0.01, 0.01),
    },
    reduced=Budget(
        {
            "steps": 300,
            "batch_size": 16,
            "side": 16,
            "hidden": 16,
            "evaluate_every": 100,
            "evaluation_batch_size": 32,
            "validation_samples": 1000,
            "monitor_samples": 512,
            "train_samples": 1000,
            **FULL_GRADIENT,
        },
        {"local-unbiased": (1000.0, 1000.0), "local-biased": (1000.0, 1000.0)},
    ),
    quick=Budget(
        {
            "timed_predictions": 2,
            "steps": 2,
            "batch_size": 4,
            "hidden": 4,
            "tolerance": 1e-2,
            "evaluate_every": 2,
        }
    ),
    data_dir=Path("data/cifar10"),
    load=load_cifar10,
    load_quick=load_large_digits,
    build=make_conv_classifier,
    options={"side": "of the images, in pixels; 4, 8, 16 or 32"},
)
