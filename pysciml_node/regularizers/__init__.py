"""Regularizers that keep learned equations cheap to solve, behind one interface."""

from pysciml_node.regularizers.all_steps import GlobalError, GlobalStiffness
from pysciml_node.regularizers.base import Regularizer, attach_penalties
from pysciml_node.regularizers.end_time import RandomEndTime
from pysciml_node.regularizers.integral import (
    Integral,
    IntegralRegularizer,
    JacobianFrobenius,
    KineticEnergy,
)
from pysciml_node.regularizers.local import LocalError, LocalStiffness
from pysciml_node.regularizers.taylor import TaylorDerivative

__all__ = [
    "GlobalError",
    "GlobalStiffness",
    "Integral",
    "IntegralRegularizer",
    "JacobianFrobenius",
    "KineticEnergy",
    "LocalError",
    "LocalStiffness",
    "RandomEndTime",
    "Regularizer",
    "TaylorDerivative",
    "attach_penalties",
]
