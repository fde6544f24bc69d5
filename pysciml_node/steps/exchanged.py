"""What has been put in the place of functions of a library."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from pysciml_node.steps.anatomy import globals_in, imports_in, is_library, names_in
from pysciml_node.steps.behind import is_stream
from pysciml_node.steps.further import Further
from pysciml_node.steps.outside import is_outside
from pysciml_node.steps.places import MISSING

Entry = tuple[Mapping[str, Any], str, Any]
"""A namespace, a name, and what it has by that name, or `MISSING`."""


def put_into_library(
    code: types.CodeType, held: dict[str, Any], further: Further
) -> Iterator[tuple[str, Any]]:
    """What a function comes to in libraries, and in tensors, that is of none: names and values.

    And what draws from the random numbers that Python or NumPy has for all, and what answers from
    outside, such as clocks.

    Args:
        code: of the function.
        held: its globals.
        further: is told what to look for later.
    """
    names = names_in(code)
    methods = ((Tensor.__dict__, name, Tensor.__dict__.get(name, MISSING)) for name in names)
    modules = chain((held.get(name) for name in globals_in(code)), imported_by(code, held, further))
    entries = (_entries(x, names) for x in modules if isinstance(x, types.ModuleType))
    for owner, name, value in (*methods, *chain.from_iterable(entries)):
        if value is MISSING:
            further.expect_none(owner, name)
            continue
        further.expect_item(owner, name, value)
        if _is_foreign(value) or is_outside(value):
            yield name, value


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


def _entries(module: types.ModuleType, names: tuple[str, ...]) -> Iterator[Entry]:
    """What a module of a library has by names, some of which may lead on to modules in it."""
    todo, seen = [module], {id(module)}
    while todo:
        module = todo.pop()
        held = vars(module) if is_library(module.__name__) else {}
        for name in names:
            if (value := held.get(name, MISSING)) is MISSING:
                continue
            if not isinstance(value, types.ModuleType):
                yield held, name, value
            elif id(value) not in seen:
                seen.add(id(value))
                todo.append(value)


def _is_foreign(value: Any) -> bool:
    """Whether a library has something that is not of a library, such as a function in its place.

    Wrappers take over the name of the module that they wrap something of, but not its globals.
    """
    if isinstance(value, types.FunctionType):
        return not is_library(value.__globals__.get("__name__"))
    if isinstance(value, types.BuiltinFunctionType):
        return is_stream(value.__self__)
    return isinstance(value, functools.partial | types.MethodType) or not is_library(
        type(value).__module__
    )
