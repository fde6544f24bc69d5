"""MNIST classified by a neural ODE: arXiv:2303.02262, section 4.1."""

from pathlib import Path

from pysciml_node import data as datasets
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.trainer.experiment import Budget, Experiment
from pysciml_node.experiments.trainer.model import make_classifier
from pysciml_node.experiments.trainer.settings import Settings

QUICK_SAMPLES = 2048


def load_mnist(folder: Path, download: bool, settings: Settings) -> Splits[LabelledData]:
    """MNIST, whatever the settings."""
    del settings
    return datasets.mnist(folder, download=download)


def load_few(folder: Path, download: bool, settings: Settings) -> Splits[LabelledData]:
    """The first images of each part of MNIST."""
    whole = load_mnist(folder, download, settings)
    first = slice(QUICK_SAMPLES)
    return Splits(whole.train[first], whole.validation, whole.test[first])


MNIST_ODE = Experiment(
    name="mnist",
    title="MNIST, neural ODE",
    # A look at the curve while training; the figures at the end use all of the test data.
    settings=Settings(monitor_samples=2048),
    # The weights of the other variants are those of arXiv:2105.03918 and arXiv:2007.04504.
    weights={
        "local-unbiased": (2.5, 1.0),
        "local-biased": (2.5, 1.0),
        "global-error": (100.0, 10.0),
        "global-stiffness": (0.0285, 0.0285),
        "steer": (0.5, 0.5),
        "taylor": (3.02e-3, 3.02e-3),
    },
    reduced=Budget(
        {
            "steps": 300,
            "batch_size": 128,
            "tolerance": 1e-7,
            "dtype": "float64",
            "step_size": "solver",
            "stop_gradient": False,
            "evaluate_every": 100,
            "evaluation_batch_size": 512,
            "validation_samples": 5000,
            "train_samples": 5000,
        },
        # Chosen on the images held out for validation.
        {"local-unbiased": (25.0, 7.5), "local-biased": (25.0, 7.5)},
    ),
    quick=Budget({"timed_predictions": 2, "steps": 20, "tolerance": 1e-4, "evaluate_every": 10}),
    data_dir=Path("data/mnist"),
    load=load_mnist,
    load_quick=load_few,
    build=make_classifier,
)
