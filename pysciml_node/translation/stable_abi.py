"""Functions of Python's that are written in C, without Python's headers."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Sequence
from typing import Any


class _Definition(ctypes.Structure):
    """A `PyMethodDef`; a function of Python's needs it as long as it lives."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("words", ctypes.c_char_p),
    )


_WITH_ARRAY = 0x80  # METH_FASTCALL
_definitions: list[_Definition] = []


def function_of(
    library: ctypes.CDLL, name: str, functions: Sequence[str], objects: Sequence[object]
) -> Any | None:
    """A function of a library as one of Python's; `None` where there is no interpreter's lock.

    Under that lock a library may borrow objects, and go through them.

    Args:
        library: made of C.
        name: of the function, which takes its arguments as an array.
        functions: names of functions of Python's stable ABI, which its `begin` is handed.
        objects: what it is handed behind them: CPython's identities are addresses.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    found = (ctypes.cast(getattr(ctypes.pythonapi, x), ctypes.c_void_p) for x in functions)
    addresses = [*(x.value for x in found), *map(id, objects)]
    library.begin((ctypes.c_void_p * len(addresses))(*addresses))
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p)
    definition = _Definition(name.encode(), address, _WITH_ARRAY, None)
    _definitions.append(definition)
    make = ctypes.PYFUNCTYPE(ctypes.py_object, *[ctypes.c_void_p] * 3)
    return make(("PyCFunction_NewEx", ctypes.pythonapi))(ctypes.addressof(definition), None, None)
