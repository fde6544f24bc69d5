"""Modules that hold a differential equation."""

from pysciml_node.layers.neural_ode import NeuralODE

__all__ = ["NeuralODE"]
