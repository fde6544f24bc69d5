"""Packages that only some features need."""

import importlib
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: name to import, e.g. `"matplotlib.pyplot"`.
        extra: the extra of `pysciml_node` that installs it.
        purpose: what needs it, in words that end the sentence "... is needed to".

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed; the message holds the command that installs it.

    Examples:
        >>> require("json", extra="examples", purpose="read results").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed to {purpose}, but could not be imported ({error}).\n"
            f"  Install it with: pip install 'pysciml_node[{extra}]'"
        ) from error
