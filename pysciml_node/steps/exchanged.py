"""What has been put in the place of functions of a library, or beside them."""

from __future__ import annotations

import functools
import os
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from pysciml_node.steps.anatomy import (
    globals_in,
    imports_in,
    is_library,
    names_in,
    stored_in,
)
from pysciml_node.steps.behind import is_stream
from pysciml_node.steps.further import Further
from pysciml_node.steps.outside import is_outside
from pysciml_node.steps.places import MISSING

# What may be in a module of a library although it is of none: numbers, words, containers, tensors.
_DATA = (int, float, complex, str, bytes, tuple, list, dict, set, deque, Tensor, np.ndarray)
_CONSTANTS = frozenset(("pi", "e", "tau", "inf", "nan", "euler_gamma"))


def libraries_of(
    code: types.CodeType, held: dict[str, Any], further: Further
) -> list[types.ModuleType]:
    """The modules of libraries that a function comes to by names.

    Args:
        code: of the function.
        held: its globals.
        further: is told what to look for later.
    """
    names = names_in(code)
    todo: list[Any] = [held.get(name) for name in globals_in(code)]
    todo += imported_by(code, held, further)
    found = dict[int, types.ModuleType]()
    while todo:
        x = todo.pop()
        if isinstance(x, types.ModuleType) and id(x) not in found and is_library(x.__name__):
            found[id(x)] = x
            todo += map(vars(x).get, names)
    return [*found.values()]


def put_into_library(
    code: types.CodeType, libraries: list[types.ModuleType], further: Further
) -> Iterator[tuple[str, Any]]:
    """What a function comes to in libraries, and in tensors, that is of none: names and values.

    And what draws from the random numbers that Python or NumPy has for all, and what answers from
    outside, such as clocks.

    Args:
        code: of the function.
        libraries: see `libraries_of`.
        further: is told what to look for later.
    """
    names, methods = names_in(code), vars(Tensor)
    for owner in (methods, *map(vars, libraries)):
        for name in names:
            value = owner.get(name, MISSING)
            if value is MISSING:
                if owner is methods:
                    further.expect_none(owner, name)
            elif not isinstance(value, types.ModuleType):
                further.expect_item(owner, name, value)
                if _is_foreign(value) or is_outside(value):
                    yield name, value


def kept_in_library(
    code: types.CodeType, libraries: list[types.ModuleType]
) -> Iterator[tuple[types.ModuleType | type, dict[str, Any]]]:
    """What evaluations of a function may change in libraries: owners, and entries.

    They are data of modules, and what it writes itself to modules and classes, which may be
    `MISSING` by now.

    Args:
        code: of the function.
        libraries: see `libraries_of`.
    """
    stored = stored_in(code)
    names = (*names_in(code), *stored)
    kinds = dict[int, type]()
    for module in libraries:
        held = vars(module)
        seen = {name: held.get(name, MISSING) for name in stored}
        if module is not sys:  # whose lists and dicts are the interpreter's
            there = ((name, held.get(name)) for name in names)
            seen |= {k: x for k, x in there if isinstance(x, _DATA) and k not in _CONSTANTS}
        if seen:
            yield module, seen
        if stored:
            kinds |= {id(x): x for x in map(held.get, names) if isinstance(x, type)}
    for kind in kinds.values():
        yield kind, {name: vars(kind).get(name, MISSING) for name in stored}


def imported_by(
    code: types.CodeType, held: dict[str, Any], further: Further
) -> list[types.ModuleType]:
    """The modules that a function imports when it runs, as far as they are there by now.

    Args:
        code: of the function.
        held: its globals.
        further: is told what to look for later.
    """
    found = []
    for name in imports_in(code, held.get("__package__")):
        if isinstance(module := sys.modules.get(name), types.ModuleType):
            found.append(module)
        else:
            further.expect_none(sys.modules, name)
    return found


def _is_foreign(value: Any) -> bool:
    """Whether a library has something that is not of a library, such as a function in its place.

    Wrappers take over the name of the module that they wrap something of, but not its globals.
    """
    if isinstance(value, types.FunctionType):
        return not is_library(value.__globals__.get("__name__"))
    if isinstance(value, types.BuiltinFunctionType):
        return is_stream(value.__self__)
    if isinstance(value, functools.partial | types.MethodType | type(os.environ)):
        return True
    return not is_library(type(value).__module__)
