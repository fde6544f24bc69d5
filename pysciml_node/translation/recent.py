"""A memory that forgets: it keeps the entries used last, up to a number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The entries that were used last.

    Args:
        size: how many are kept.

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
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """An entry, which counts as used last from now on; `None` where there is none."""
        entry = self._entries.get(key)
        if entry is not None:
            self._touch(key)
        return entry

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._touch(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def _touch(self, key: K) -> None:
        try:
            self._entries.move_to_end(key)
        except KeyError:
            return  # another thread has taken it out

    def pop(self, key: K) -> V | None:
        """Take an entry out; `None` where there is none."""
        return self._entries.pop(key, None)
