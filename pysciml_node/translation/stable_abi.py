"""Functions of Python's that are written in C, without Python's headers."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Sequence
from typing import Any


def function_of(
    library: ctypes.CDLL, functions: Sequence[str], objects: Sequence[object]
) -> Any | None:
    """The function that `begin` of a library makes; `None` where there is no interpreter's lock.

    Under that lock a library may borrow objects, and go through them.

    Args:
        library: made of C.
        functions: names of functions of Python's stable ABI, which it is handed.
        objects: what it is handed behind them: CPython's identities are addresses.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    found = (ctypes.cast(getattr(ctypes.pythonapi, x), ctypes.c_void_p) for x in functions)
    addresses = [*(x.value for x in found), *map(id, objects)]
    begin = ctypes.PyDLL(library._name, handle=library._handle).begin
    begin.restype = ctypes.py_object
    return begin((ctypes.c_void_p * len(addresses))(*addresses))
