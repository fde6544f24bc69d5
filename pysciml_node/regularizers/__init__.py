"""Regularizers that keep learned equations cheap to solve, behind one interface."""

from pysciml_node.regularizers.base import Regularizer, attach_penalties
from pysciml_node.regularizers.local import LocalError, LocalStiffness

__all__ = ["LocalError", "LocalStiffness", "Regularizer", "attach_penalties"]
