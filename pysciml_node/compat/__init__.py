"""Drop-in signatures of other packages, over this package's solvers."""

from pysciml_node.compat import torchdiffeq, torchsde
from pysciml_node.compat.install import Installed, install

__all__ = ["Installed", "install", "torchdiffeq", "torchsde"]
