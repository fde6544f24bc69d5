"""What a snapshot looks at a second time, each in the form of an entry of a dict."""

from __future__ import annotations

import array
import contextvars
import ctypes
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.translation.recent import reference

ABSENT = object()

PLAIN = frozenset(
    (
        *(int, float, bool, complex, str, bytes, type(None), type(...), slice, range),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)
"""Kinds of values that are compared as they are."""


CONTAINERS = frozenset(
    (dict, OrderedDict, defaultdict, types.MappingProxyType, list, tuple, deque, set, frozenset)
)
"""Containers that hold nothing but their entries."""

ROWS = (array.array, bytearray, memoryview, ctypes.Structure.__mro__[1])
"""Numbers in a row, of Python's own and of C's."""


VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
"""Views of dicts."""

_NUMBERS = (Tensor, np.ndarray, types.FunctionType, *ROWS)


class Value:
    """The value of a context variable, or of a weak reference."""

    def __init__(self, get: Callable[[], Any]) -> None:
        self._get = get

    def __getitem__(self, key: str) -> Any:
        return self._get()


def value_of(x: contextvars.ContextVar[Any]) -> Any:
    """The value of a context variable, which may be its default; `ABSENT` where it has none."""
    try:
        return x.get()
    except LookupError:
        return ABSENT


class Attributes:
    """An object's attributes as entries."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name, ABSENT)


class LooseAttributes:
    """The same of an object that is kept alive only where it must be."""

    def __init__(self, owner: Any) -> None:
        self._get = reference(owner)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._get(), name, ABSENT)


class Equal:
    """Whether what a function gives is still equal to what it gave."""

    def __init__(self, get: Callable[[], Any]) -> None:
        self._get = get

    def __getitem__(self, before: Any) -> bool:
        return bool(self._get() == before)


@dataclass(frozen=True)
class Calls:
    """How often a function that keeps its results was called: what it keeps may be thrown away."""

    hits: int
    misses: int


def as_it_is(x: Any) -> Any:
    """A plain value in a form that is equal only to that of the same value.

    A number is equal to another kind of number, a zero with a sign to one without, and a decimal
    to one with more zeros at its end.
    """
    kind = type(x)
    telling = kind is complex or kind not in PLAIN or (kind is not str and x == 0)
    return (kind, x, repr(x)) if telling else (kind, x)


def bytes_of(x: Any) -> bytes:
    """The numbers in a row of Python's own or of C's."""
    return memoryview(x).tobytes()


def has_numbers(x: Any, depth: int = 4) -> bool:
    """Whether an evaluation may take numbers from what an object of a library holds.

    Args:
        x: what it holds.
        depth: of containers inside containers; what lies deeper has them.
    """
    if type(x) in CONTAINERS:
        entries = list(x.values() if isinstance(x, Mapping) else x)
        return depth == 0 or any(has_numbers(entry, depth - 1) for entry in entries)
    if type(x) in PLAIN or isinstance(x, _NUMBERS):
        return True
    return is_dataclass(x) and not isinstance(x, type)


class Same:
    """Compares an object by its identity; keeps it alive only where it must."""

    __slots__ = ("_get",)

    def __init__(self, x: Any) -> None:
        self._get = reference(x)

    def __eq__(self, other: object) -> bool:
        referent = self._get()
        return isinstance(other, Same) and referent is not None and other._get() is referent

    __hash__ = None  # type: ignore[assignment]


class Settled:
    """An object that does the same as long as it is itself, with memory that is its own affair."""
