"""The anatomy of functions and classes: names in their code, slots, and what they were given."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

# Code in these libraries is not searched for globals. Their instances are.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy", "scipy", "pysciml_node"}) - {
    "__main__"
}


@functools.lru_cache(maxsize=4096)
def is_library(module: str | None) -> bool:
    """Whether a module belongs to a library whose code is not searched."""
    return module is not None and module.partition(".")[0] in _LIBRARIES


# The bit in the flags of a class that was made while the program runs.
MADE = 1 << 9


def module_of(x: Any) -> str | None:
    """The module in whose code a function or a class was made, as far as it has a name.

    A wrapper takes over the name of the module that it wraps something of, but not its globals. A
    class that was made where no module has a name says that it is one of Python's own.
    """
    if isinstance(x, types.FunctionType):
        return x.__globals__.get("__name__")
    name: str | None = getattr(x, "__module__", None)
    made = name == "builtins" and isinstance(x, type) and x.__flags__ & MADE
    return None if made else name


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """The global and attribute names in a function's code, and in the functions inside it."""
    return _mentioned(code, _every_name)


@functools.lru_cache(maxsize=4096)
def words_in(code: types.CodeType) -> tuple[str, ...]:
    """The strings in a function's code, and in the functions inside it."""
    return _mentioned(code, _every_word)


@functools.lru_cache(maxsize=4096)
def globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function, or a function inside it, looks up as globals.

    An attribute `self.net` has nothing to do with a global `net`. Names that no source can spell
    are left out: by them pytest has assertions, in modules of tests, reach all that it knows.
    """
    return _mentioned(code, _global_names)


@functools.lru_cache(maxsize=4096)
def imports_in(code: types.CodeType, package: str | None) -> tuple[str, ...]:
    """The modules that a function, or a function inside it, may import, by their whole names.

    Args:
        code: of the function.
        package: in which it stands: `from .part import x` names what is there, or further up.
    """
    # How far up is not looked at: a name too many does no harm.
    parts = package.split(".") if package else []
    above = [".".join(parts[:i]) for i in range(len(parts) + 1)]
    names = _mentioned(code, _imported_names)
    return tuple({".".join(filter(None, (start, name))): None for name in names for start in above})


@functools.lru_cache(maxsize=4096)
def stored_in(code: types.CodeType) -> tuple[str, ...]:
    """The attributes that a function, or a function inside it, gives to what a global leads to."""
    return _mentioned(code, _stored_names)


def reads_gradients(code: types.CodeType, held: dict[str, Any]) -> bool:
    """Whether a function reads the `.grad` of something else than a module, such as of a tensor.

    Args:
        code: of the function.
        held: its globals.
    """
    owners = (name for name in _owners_of_grad(code) if name not in ("autograd", "func"))
    return any(not isinstance(held.get(name), types.ModuleType) for name in owners)


@functools.lru_cache(maxsize=4096)
def _owners_of_grad(code: types.CodeType) -> tuple[str, ...]:
    return _mentioned(code, _names_before_grad) if "grad" in names_in(code) else ()


def _mentioned(
    code: types.CodeType, names_of: Callable[[types.CodeType], Iterable[str]]
) -> tuple[str, ...]:
    names = dict.fromkeys(names_of(code))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_mentioned(constant, names_of))
    return tuple(names)


def _every_name(code: types.CodeType) -> Iterable[str]:
    return code.co_names


def _every_word(code: types.CodeType) -> Iterable[str]:
    constants = list(code.co_consts)
    while constants:
        x = constants.pop()
        if isinstance(x, str):
            yield x
        elif isinstance(x, tuple | frozenset):
            constants += x


def _global_names(code: types.CodeType) -> Iterable[str]:
    for instruction in dis.get_instructions(code):
        # Class bodies look names up by LOAD_NAME.
        looks_up = "GLOBAL" in instruction.opname or instruction.opname == "LOAD_NAME"
        if looks_up and not (name := str(instruction.argval)).startswith("@"):
            yield name


def _imported_names(code: types.CodeType) -> Iterable[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            yield str(instruction.argval)


_EXTENDS = dis.opmap["EXTENDED_ARG"]
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def _stored_names(code: types.CodeType) -> Iterable[str]:
    if "setattr" in code.co_names:
        yield from filter(str.isidentifier, _every_word(code))
    from_global = False  # whether the last instructions were a global and attributes of it
    for x in dis.get_instructions(code):
        if x.opname == "STORE_ATTR" and from_global:
            yield str(x.argval)
        further = x.opname in _ATTRIBUTES and from_global
        from_global = further or x.opname in ("LOAD_GLOBAL", "LOAD_NAME") or x.opcode == _EXTENDS


def _names_before_grad(code: types.CodeType) -> Iterable[str]:
    before = ""
    for x in dis.get_instructions(code):
        if x.opname in _ATTRIBUTES and x.argval == "grad":
            yield before
        if x.opcode != _EXTENDS:
            before = str(x.argval)


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


@functools.lru_cache(maxsize=1024)
def own_classes(kind: type) -> tuple[type, ...]:
    """A class and those that it inherits from, without the ones of libraries."""
    return tuple(x for x in kind.__mro__ if not is_library(module_of(x)))


FUNCTION_PARTS = ("__code__", "__defaults__", "__kwdefaults__")
"""Of a function, what may be exchanged."""

UNBOUND = object()
"""Stands for the content of a cell that has none yet."""

FIRST_OF_ITS_OWN = 2
"""Where the parts of a function begin that it does not share with all functions of a module."""


def function_of(f: Any) -> types.FunctionType | None:
    """A function itself, or that of a method; `None` for other callables."""
    function = f.__func__ if type(f) is types.MethodType else f
    return function if type(function) is types.FunctionType else None


def anchor_of(f: Any) -> Any:
    """What tells a field from others: the code of a function or method, and any other by itself.

    A function is often made again for each solve, from the same code.
    """
    function = function_of(f)
    return f if function is None else function.__code__


def parts_of(f: Any) -> tuple[Any, ...]:
    """What a function or a method was given when it was made; empty for other callables.

    Functions of the same code and the same parts do the same. The parts are its class, globals,
    owner, keyword defaults and its dict, where these are not empty, default values, and what it
    captures.
    """
    function = function_of(f)
    if function is None:
        return ()
    owner = f.__self__ if function is not f else None
    further = function.__kwdefaults__ or None, function.__dict__ or None
    defaults = function.__defaults__ or ()
    return (type(f), function.__globals__, owner, *further, *defaults, *captured_by(function))


def cells_of(f: Any) -> tuple[types.CellType, ...]:
    """The cells of a function or method, in the order of its code's `co_freevars`."""
    function = function_of(f)
    return () if function is None else function.__closure__ or ()


def captured_by(f: types.FunctionType) -> list[Any]:
    """What is in the cells of a function, in the order of its `co_freevars`."""
    cells = f.__closure__
    if cells is None:
        return []
    try:
        return [cell.cell_contents for cell in cells]
    except ValueError:
        return [content_of(cell) for cell in cells]


def content_of(cell: types.CellType) -> Any:
    """What is in a cell, or `UNBOUND`."""
    try:
        return cell.cell_contents
    except ValueError:
        return UNBOUND
