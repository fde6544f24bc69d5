"""Density estimation by regularized continuous normalizing flows: arXiv:2002.02798."""

from dataclasses import replace
from pathlib import Path

from pysciml_node import data as datasets
from pysciml_node.data import LabelledData, Splits
from pysciml_node.data.plane import plane_splits
from pysciml_node.experiments.published.flow_model import (
    FlowSettings,
    ImageFlowSettings,
    make_image_flow,
    make_plane_flow,
)
from pysciml_node.experiments.reporting.flow_pictures import draw_images, draw_plane
from pysciml_node.experiments.trainer.experiment import Budget, Experiment, Weights

_FLOW_OPTIONS = {
    "layers": "hidden layers of the field",
    "time": "how its layers see the time: ignore, concat or concatsquash",
    "training_step": "train with RK4 at this step, as the paper does with regularization; 0 for "
    "the solver of the evaluations",
}
_IMAGE_OPTIONS = {
    **_FLOW_OPTIONS,
    "architecture": "flat, or multi-scale as in the paper",
    "alpha": "of the logit transform",
}
QUICK_SAMPLES = 256

PLANE_SETTINGS = FlowSettings(
    steps=2000,
    batch_size=500,
    learning_rate=5e-3,
    decay="cosine",
    last_learning_rate=1e-4,
    tolerance=1e-5,
    hidden=64,
    layers=3,
    step_size="solver",
    stop_gradient=False,
    taylor_order=2,
    evaluate_every=200,
    train_samples=5000,
)
PLANE_WEIGHTS: Weights = {
    "kinetic": (0.05, 0.05),
    "jacobian": (0.05, 0.05),
    "rnode": (0.05, 0.05),
    "local-unbiased": (1.0, 1.0),
    "local-biased": (1.0, 1.0),
    "local-stiffness": (0.05, 0.05),
    "global-error": (1.0, 1.0),
    "global-stiffness": (0.05, 0.05),
    "taylor": (0.05, 0.05),
    "steer": (0.25, 0.25),
}


def plane_experiment(shape: str) -> Experiment:
    """A flow in the plane.

    Args:
        shape: of the data, one of `pysciml_node.data.plane.SHAPES`.

    Raises:
        ValueError: an unknown shape.
    """

    def load(folder: Path, download: bool, settings: FlowSettings) -> Splits[LabelledData]:
        del folder, download, settings
        return plane_splits(shape)

    def load_quick(folder: Path, download: bool, settings: FlowSettings) -> Splits[LabelledData]:
        del folder, download, settings
        return plane_splits(shape, train=2000, validation=200, test=500)

    return Experiment(
        name=f"cnf_2d/{shape}",
        title=f"{shape}, continuous flow",
        settings=PLANE_SETTINGS,
        weights=PLANE_WEIGHTS,
        reduced=Budget({"steps": 600, "batch_size": 256, "hidden": 32, "evaluate_every": 100}),
        quick=Budget(
            {"steps": 6, "batch_size": 64, "hidden": 8, "tolerance": 1e-3, "evaluate_every": 3}
        ),
        data_dir=Path("data"),
        load=load,
        load_quick=load_quick,
        build=make_plane_flow,
        options=_FLOW_OPTIONS,
        picture=draw_plane,
    )


def load_digits(folder: Path, download: bool, settings: ImageFlowSettings) -> Splits[LabelledData]:
    """The 8x8 digits."""
    del folder, download, settings
    return datasets.digits()


def load_mnist(folder: Path, download: bool, settings: ImageFlowSettings) -> Splits[LabelledData]:
    """MNIST."""
    del settings
    return datasets.mnist(folder, download=download)


def load_few_mnist(
    folder: Path, download: bool, settings: ImageFlowSettings
) -> Splits[LabelledData]:
    """The first images of each part of MNIST."""
    whole = load_mnist(folder, download, settings)
    first = slice(QUICK_SAMPLES)
    return Splits(whole.train[first], whole.validation, whole.test[first])


# Bits a dimension and penalty are added up as in the paper's code, with equal weights of both.
IMAGE_WEIGHTS: Weights = {
    "kinetic": (0.01, 0.01),
    "jacobian": (0.01, 0.01),
    "rnode": (0.01, 0.01),
    "local-unbiased": (0.1, 0.1),
    "local-biased": (0.1, 0.1),
    "local-stiffness": (0.01, 0.01),
    "global-error": (0.1, 0.1),
    "global-stiffness": (0.01, 0.01),
    "taylor": (1e-3, 1e-3),
    "steer": (0.25, 0.25),
}

# The paper's multi-scale flow of MNIST. With regularization it trains with --training-step 0.25.
CNF_MNIST = Experiment(
    name="cnf_mnist",
    title="MNIST, continuous flow",
    settings=ImageFlowSettings(
        steps=30_000,
        batch_size=200,
        learning_rate=1e-3,
        tolerance=1e-5,
        hidden=64,
        layers=3,
        time="concat",
        architecture="multi-scale",
        alpha=1e-5,
        taylor_order=2,
        evaluate_every=300,
        monitor_samples=1000,
        train_samples=10_000,
    ),
    weights=IMAGE_WEIGHTS,
    reduced=Budget({"steps": 100, "hidden": 16, "layers": 1, "evaluate_every": 20}),
    quick=Budget(
        {
            "steps": 2,
            "batch_size": 16,
            "hidden": 2,
            "layers": 1,
            "tolerance": 1e-2,
            "evaluate_every": 2,
        }
    ),
    data_dir=Path("data/mnist"),
    load=load_mnist,
    load_quick=load_few_mnist,
    build=make_image_flow,
    options=_IMAGE_OPTIONS,
    picture=draw_images,
)

CNF_DIGITS = replace(
    CNF_MNIST,
    name="cnf_digits",
    title="8x8 digits, continuous flow",
    settings=ImageFlowSettings(
        steps=500,
        batch_size=100,
        learning_rate=5e-3,
        tolerance=1e-5,
        hidden=128,
        layers=2,
        time="concat",
        architecture="flat",
        levels=17,
        alpha=1e-5,
        step_size="solver",
        stop_gradient=False,
        taylor_order=2,
        evaluate_every=50,
    ),
    # Data as small as these are fitted within minutes, by weights that are larger accordingly.
    weights={
        **IMAGE_WEIGHTS,
        "kinetic": (0.05, 0.05),
        "jacobian": (0.05, 0.05),
        "rnode": (0.05, 0.05),
    },
    reduced=Budget({"steps": 200, "evaluate_every": 40}),
    quick=Budget(
        {"steps": 4, "batch_size": 64, "hidden": 8, "tolerance": 1e-2, "evaluate_every": 2}
    ),
    load=load_digits,
    load_quick=load_digits,
)
