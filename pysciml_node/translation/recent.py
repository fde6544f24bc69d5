"""Memories that forget: they keep the entries used last, up to a number."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The entries that were used last.

    Args:
        size: how many are kept.

    Attributes:
        entries: the one that was used last at the end.

    Examples:
        >>> recent = Recent(2)
        >>> recent["a"], recent["b"] = 1, 2
        >>> recent.get("a")
        1
        >>> recent["c"] = 3
        >>> recent.get("b") is None, len(recent)
        (True, 2)
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: K) -> V | None:
        """An entry, which counts as used last from now on; `None` where there is none."""
        entry = self.entries.get(key)
        if entry is not None:
            self._touch(key)
        return entry

    def __setitem__(self, key: K, value: V) -> None:
        self.entries[key] = value
        self._touch(key)
        if len(self.entries) > self._size:
            self.entries.popitem(last=False)

    def _touch(self, key: K) -> None:
        try:
            self.entries.move_to_end(key)
        except KeyError:
            return  # another thread has taken it out

    def pop(self, key: K) -> V | None:
        """Take an entry out; `None` where there is none."""
        return self.entries.pop(key, None)


class RecentOf(Generic[V]):
    """What is kept of the objects that were used last, by identity: equal ones are not the same.

    An object is not kept alive, and what was kept of it goes with it. One whose class has been
    exchanged is another one.

    Args:
        size: the number of objects.

    Examples:
        >>> class Field: ...
        >>> field, recent = Field(), RecentOf(2)
        >>> recent[field] = "a program"
        >>> recent.get(field), recent.get(Field())
        ('a program', None)
        >>> del field
        >>> len(recent)
        0
    """

    def __init__(self, size: int) -> None:
        self._entries: Recent[int, tuple[Callable[[], Any], type, V]] = Recent(size)

    @property
    def entries(self) -> dict[int, tuple[Callable[[], Any], type, V]]:
        """By the identity of an object: what gives it, its class, and what is kept of it."""
        return self._entries.entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, x: Any) -> V | None:
        """What is kept of an object, which counts as used last from now on."""
        entry = self._entries.get(id(x))
        if entry is None:
            return None
        referent, kind, value = entry
        return value if referent() is x and type(x) is kind else None

    def __setitem__(self, x: Any, value: V) -> None:
        # A method has what it needs at the end of a process too, when a module's names are gone.
        gone = functools.partial(self._forget, id(x))
        self._entries[id(x)] = reference(x, gone), type(x), value

    def _forget(self, key: int, gone: object) -> None:
        del gone
        self._entries.pop(key)


def reference(x: Any, gone: Callable[[Any], None] | None = None) -> Callable[[], Any]:
    """A function that gives an object; it keeps the object alive only where it must."""
    try:
        return weakref.ref(x, gone)
    except TypeError:
        return lambda: x
