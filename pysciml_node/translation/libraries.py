"""Which code belongs to libraries, and what is known of their objects."""

from __future__ import annotations

import functools
import sys
import sysconfig

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

# The bit in the flags of a class that was made while the program runs.
_MADE = 1 << 9


def is_opaque(kind: type) -> bool:
    """Whether the inside of a class's objects is a library's own affair."""
    return is_library(kind.__module__) and kind.__module__.partition(".")[0] not in _WALKED


@functools.lru_cache(maxsize=1024)
def is_a_value(kind: type) -> bool:
    """Whether objects of a class are numbers, words or the like, besides what they hold."""
    bases = [base for base in kind.__mro__ if base is not object and is_opaque(base)]
    return any(not base.__flags__ & _MADE for base in bases)


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
