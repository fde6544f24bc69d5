"""Drop-in signatures of other packages, over this package's solvers."""

from pysciml_node.compat import torchdiffeq, torchsde

__all__ = ["torchdiffeq", "torchsde"]
