"""Drop-in signatures of other packages, over this package's solvers.

Each is imported when it is first asked for.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from pysciml_node.compat.install import Installed, install

if TYPE_CHECKING:
    from pysciml_node.compat import torchdiffeq, torchsde

__all__ = ["Installed", "install", "torchdiffeq", "torchsde"]


def __getattr__(name: str) -> ModuleType:
    """A stand-in by its name."""
    if name in ("torchdiffeq", "torchsde"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
