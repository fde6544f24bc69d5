"""The choice of a solver for a trained field: what costs least at equal results."""

from pysciml_node.tuning.trials import AdjointTrial, Trial, Tuning
from pysciml_node.tuning.tune import tune

__all__ = ["AdjointTrial", "Trial", "Tuning", "tune"]
