"""Which code belongs to libraries, and what is known of their objects."""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
from typing import Any

from pysciml_node.steps.anatomy import MADE, module_of

# Libraries whose objects hold numbers that a field computes with, or functions that do.
_WALKED = (
    *("torch", "types", "pysciml_node", "numpy", "collections", "functools"),
    *("weakref", "_weakrefset"),
)

# Libraries whose objects an evaluation does not change.
_SILENT = frozenset(
    (
        *("builtins", "operator", "enum", "typing", "abc", "_abc", "_thread", "pathlib"),
        *("datetime", "fractions", "decimal", "re", "inspect"),
    )
)


def is_of_library(x: Any) -> bool:
    """Whether a module, a class or a function is a library's, or an object of a library's class.

    Functions that are given arguments in advance are of whoever gives them.
    """
    if isinstance(x, types.ModuleType):
        return is_library(x.__name__)
    if isinstance(x, types.MethodType):
        return is_of_library(x.__func__) and is_of_library(x.__self__)
    if isinstance(x, functools.partial):
        return False
    return is_library(module_of(x if isinstance(x, types.FunctionType | type) else type(x)))


def is_opaque(kind: type) -> bool:
    """Whether the inside of a class's objects is a library's own affair."""
    return is_library(module_of(kind)) and kind.__module__.partition(".")[0] not in _WALKED


@functools.lru_cache(maxsize=1024)
def is_a_value(kind: type) -> bool:
    """Whether objects of a class are numbers, words or the like, besides what they hold."""
    bases = [base for base in kind.__mro__ if base is not object and is_opaque(base)]
    return any(not base.__flags__ & MADE for base in bases)


def is_silent(kind: type) -> bool:
    """Whether an evaluation does not change objects of a library's class."""
    return kind.__module__.partition(".")[0] in _SILENT


@functools.cache
def is_library(name: str | None) -> bool:
    """Whether a module is installed, and so does not change while a program runs."""
    top = str(name).partition(".")[0]
    if top in ("torch", "pysciml_node") or top in sys.stdlib_module_names:
        return top != "__main__"
    # What a module answers for names that it lacks is not asked.
    file = getattr(sys.modules.get(str(name)), "__dict__", {}).get("__file__")
    places = (sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    return file is not None and any(file.startswith(place) for place in places)
