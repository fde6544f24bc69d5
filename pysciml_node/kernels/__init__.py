"""Kernels of infinitely wide neural ODEs, and what they say about training."""

from pysciml_node.kernels.analytic import nngp, ntk
from pysciml_node.kernels.errors import KernelConvergenceError
from pysciml_node.kernels.expectations import LeakyReLU, Sinusoid
from pysciml_node.kernels.hermite import Polynomial

__all__ = ["KernelConvergenceError", "LeakyReLU", "Polynomial", "Sinusoid", "nngp", "ntk"]
