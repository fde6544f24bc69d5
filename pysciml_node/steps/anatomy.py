"""The anatomy of functions and classes: the names in their code, their slots."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

# Code in these libraries is not searched for globals. Their instances are.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy", "scipy", "pysciml_node"}) - {
    "__main__"
}


@functools.lru_cache(maxsize=4096)
def is_library(module: str | None) -> bool:
    """Whether a module belongs to a library whose code is not searched."""
    return module is not None and module.partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """The global and attribute names in a function's code, and in the functions inside it."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(names_in(constant)))
    return tuple(names)


def slots_of(kind: type) -> list[tuple[str, Any]]:
    """The slots of a class, with their descriptors."""
    slots = []
    for ancestor in kind.__mro__:
        names = ancestor.__dict__.get("__slots__", ())
        for key in (names,) if isinstance(names, str) else tuple(names):
            slot = ancestor.__dict__.get(key)
            if isinstance(slot, types.MemberDescriptorType):
                slots.append((key, slot))
    return slots
