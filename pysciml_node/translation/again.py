"""The second look in C, where there is a compiler; `Watch.tensors` says in Python what it does."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from importlib.resources import files
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pysciml_node.problems.state import kind_of
from pysciml_node.translation.given import Given
from pysciml_node.translation.stable_abi import function_of
from pysciml_node.translation.watch import CHANGED, Places, Watch

# Functions of Python's stable ABI, and objects, in the order of again.c.
_FUNCTIONS = (
    *("PyObject_GetItem", "PyObject_GetAttr", "PyObject_Type", "PyObject_CallNoArgs"),
    *("PyObject_GetIter", "PyIter_Next", "PyDict_Next", "PySequence_Contains", "PyObject_IsTrue"),
    *("PyObject_RichCompareBool", "PyObject_Size", "PyTuple_GetItem", "PyBytes_AsString"),
    *("PyList_New", "PyList_Append", "PyList_GetItem", "PyErr_Occurred"),
    *("Py_IncRef", "Py_DecRef"),
)
_DEFAULT = torch.get_default_dtype
_OBJECTS = (
    *(None, True, "dtype", "shape", "device", "is_cpu"),
    *("layout", "requires_grad", "__dict__"),
)

_look: Callable[[bytes, tuple[Any, ...]], list[Tensor] | None] | None = None


def source() -> str:
    """The code of the second look."""
    return (files(__package__) / "again.c").read_text(encoding="utf-8")


def use(library: ctypes.CDLL) -> None:
    """Take second looks by a library from now on; where there is no interpreter's lock, in Python.

    Args:
        library: made of `source()`.
    """
    global _look
    _look = function_of(library, "look", _FUNCTIONS, _OBJECTS)


def tensors(watch: Watch, parts: tuple[Any, ...]) -> list[Tensor] | None:
    """The tensors that are there now; `None` where anything else has changed.

    Args:
        watch: the places that were looked at.
        parts: what the field was given.
    """
    if _look is None:
        return watch.tensors(parts)
    try:
        found = _look(watch.memory.get(_look) or note(watch), parts)
        # It has asked torch itself.
        if found is None or not watch.asked or watch.answer(found):
            return found
    except CHANGED:
        pass
    return None


def note(watch: Watch) -> bytes:
    """The columns of a watch, which keeps what stands there in use, as C reads them."""
    noted: bytes | None = watch.memory.get(_look)
    if noted is None:
        noted = watch.memory[_look] = _noted(watch)
    return noted


def _noted(watch: Watch) -> bytes:
    given, repeated = watch.given, watch.repeated
    words = (
        *_rows(() if given is None else given.first),
        *_rows(*map(_places, watch.places)),
        *((-1,) if given is None else _given(given)),
        *_seen(watch.seen),
        *_rows(*map(_places, watch.absent)),
        *_rows(*map(_places, repeated[:2]), repeated[2]),
        *_rows(*zip(*map(_tensor, watch.described), strict=True)),
        *(id(_DEFAULT), id(watch.default)),
    )
    return struct.pack(f"{len(words)}n", *words)


def _rows(*columns: Iterable[int]) -> list[int]:
    """The rows of columns one after another, behind their number."""
    rows = list(zip(*columns, strict=True))
    return [len(rows), *chain.from_iterable(rows)]


def _places(objects: Iterable[Any]) -> list[int]:
    """Where objects lie: CPython's identities are addresses."""
    return list(map(id, objects))


def _given(given: Given) -> list[int]:
    return [
        *_rows(_places(given.kinds)),
        *_rows(given.places, _places(given.seen)),
        *_rows(given.tensors, given.numbers),
    ]


def _seen(seen: Places) -> list[int]:
    """All places but those of tensors; the entries of dicts are gone through in their order."""
    dicts: dict[int, dict[int, int]] = {}
    ordered = []
    for mapping, keys in zip(seen.ordered, map(_places, seen.order), strict=True):
        if type(mapping) is dict and id(mapping) not in dicts:
            dicts[id(mapping)] = dict.fromkeys(keys, 0)
        else:
            ordered.append((id(mapping), *_rows(keys)))
    items = []
    for container, key, value in zip(*map(_places, seen.items), strict=True):
        entries = dicts.get(container, {})
        if entries.get(key) == 0:
            entries[key] = value
        else:
            items.append((container, key, value))
    gone_through = [(at, *_rows(entries, entries.values())) for at, entries in dicts.items()]
    return [
        *_rows(_places(seen.empty)),
        *_rows(_places(seen.sized), seen.sizes),
        *(len(gone_through), *chain.from_iterable(gone_through)),
        *(len(items), *chain.from_iterable(items)),
        *_rows(*map(_places, seen.attributes)),
        *(len(ordered), *chain.from_iterable(ordered)),
    ]


def _tensor(described: tuple[Any, ...]) -> tuple[int, ...]:
    """A tensor in the words of `describe`: whether it requires gradients may not matter."""
    kind, dtype, shape, device, layout, needs_gradient, bare = described
    place = True if kind_of(device) == "cpu" else device
    objects = map(id, (kind, dtype, shape, place, layout))
    return *objects, 0 if needs_gradient is None else id(needs_gradient), bare
