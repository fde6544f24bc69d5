"""Kernels of infinitely wide neural ODEs, and what they say about training."""

from pysciml_node.kernels.analytic import nngp, ntk
from pysciml_node.kernels.empirical import empirical_ntk
from pysciml_node.kernels.errors import KernelConvergenceError
from pysciml_node.kernels.expectations import LeakyReLU, Sinusoid
from pysciml_node.kernels.hermite import Polynomial
from pysciml_node.kernels.regression import (
    GradientDescent,
    condition_number,
    max_learning_rate,
    posterior,
    rank,
    spectrum,
)
from pysciml_node.kernels.report import ActivationReport, activation_report

__all__ = [
    "ActivationReport",
    "GradientDescent",
    "KernelConvergenceError",
    "LeakyReLU",
    "Polynomial",
    "Sinusoid",
    "activation_report",
    "condition_number",
    "empirical_ntk",
    "max_learning_rate",
    "nngp",
    "ntk",
    "posterior",
    "rank",
    "spectrum",
]
