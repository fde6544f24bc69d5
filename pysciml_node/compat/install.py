"""Put a module of this package under another package's name, for code that cannot be edited."""

from __future__ import annotations

import importlib
import sys
import warnings

from pysciml_node import checks
from pysciml_node.errors import PsnWarning

# The packages that have a stand-in here, by name.
STAND_INS = {
    "torchdiffeq": "pysciml_node.compat.torchdiffeq",
    "torchsde": "pysciml_node.compat.torchsde",
}


class Installed:
    """Stand-ins that are in place of other packages; `undo` takes them out again.

    As a context manager it undoes itself at the end of the block.

    Attributes:
        name: the package whose name they bear.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        target = STAND_INS[name]
        importlib.import_module(target)
        self._before = {key: sys.modules[key] for key in _modules(name)}
        if self._before and next(iter(self._before.values())) is not sys.modules[target]:
            warnings.warn(
                f"{name} has been imported already: what has taken functions from it keeps them.\n"
                f"  Call install({name!r}) before anything imports {name}.",
                PsnWarning,
                stacklevel=3,
            )
        for key in self._before:
            del sys.modules[key]
        for key in _modules(target):
            sys.modules[name + key.removeprefix(target)] = sys.modules[key]

    def undo(self) -> None:
        """Give the name back to the package that it belongs to."""
        for key in _modules(self.name):
            del sys.modules[key]
        sys.modules.update(self._before)

    def __enter__(self) -> Installed:
        """The same."""
        return self

    def __exit__(self, *error: object) -> None:
        """Undo it."""
        self.undo()

    def __repr__(self) -> str:
        return f"import {self.name} now gives {STAND_INS[self.name]}; .undo() ends that"


def _modules(name: str) -> list[str]:
    """The modules of a package that have been imported, itself first."""
    return sorted(key for key in sys.modules if key == name or key.startswith(f"{name}."))


def install(name: str) -> Installed:
    """Let `import name` give this package's stand-in, in this process, from now on.

    Call it before anything else imports the package, as the first lines of a program. It prints
    what it has done.

    Args:
        name: the package to stand in for, `"torchdiffeq"` or `"torchsde"`.

    Returns:
        A handle: its `undo()` takes the stand-in out again, and so does the end of a `with` block.

    Raises:
        ValueError: there is no stand-in for it.

    Examples:
        >>> import pysciml_node.compat
        >>> handle = pysciml_node.compat.install("torchdiffeq")
        import torchdiffeq now gives pysciml_node.compat.torchdiffeq; .undo() ends that
        >>> from torchdiffeq import odeint
        >>> odeint.__module__
        'pysciml_node.compat.torchdiffeq.functions'
        >>> handle.undo()
    """
    installed = Installed(checks.choice("name", name, tuple(STAND_INS)))
    print(installed)
    return installed
