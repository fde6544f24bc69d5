"""Places that hold values: an earlier content can be put back for a while."""

from __future__ import annotations

import copy
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, Self

from torch import Tensor
from typing_extensions import override

StandIns = Mapping[int, Tensor]
"""Replacements for tensors, by the tensors' ids."""

MISSING = object()


def _substituted(value: Any, stand_ins: StandIns) -> Any:
    """A value with stand-ins for its tensors; containers that can be changed are left alone."""
    if isinstance(value, Tensor):
        return stand_ins.get(id(value), value)
    if isinstance(value, tuple):
        parts = [_substituted(part, stand_ins) for part in value]
        if all(map(is_, parts, value)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


Test = Callable[[Any], bool]


def holds(value: Any, test: Test) -> bool:
    """Whether a value, or one inside a tuple, passes a test."""
    if isinstance(value, tuple):
        return any(holds(part, test) for part in value)
    return test(value)


class Place(ABC):
    """A place of values that a field can reach.

    Attributes:
        name: of the place.
        container: the list or dict that the place is, if any.
        cell: the cell that it is, if any.
    """

    name: str
    container: Any = None
    cell: types.CellType | None = None

    @abstractmethod
    def changed(self) -> bool:
        """Whether it holds other objects now."""

    @abstractmethod
    def settle(self) -> None:
        """Leave changed entries alone from now on: the field changes them itself."""

    @abstractmethod
    def forget(self, test: Test) -> None:
        """Leave entries that pass a test alone from now on, and do not hold them."""

    @abstractmethod
    def restore(self, stand_ins: StandIns) -> Callable[[], None] | None:
        """Put the earlier content back, with stand-ins; return a function that undoes it."""

    @abstractmethod
    def values(self) -> Iterable[Any]:
        """The values that it holds now, except those left alone."""

    def arrived(self) -> Iterable[Any]:
        """The values that it holds now, if it has changed; of a dict those that it did not hold."""
        return self.values() if self.changed() else ()

    def changes(self) -> Iterable[str]:
        """The names of entries that hold other objects now."""
        return (self.name,) if self.changed() else ()

    def only_changes(self) -> Self:
        """The same place, as far as it has changed."""
        return copy.copy(self)

    @abstractmethod
    def as_now(self) -> Self:
        """The same place, as far as it is not left alone, with what it holds now."""

    def copy(self) -> Self:
        """The same place, to be settled on its own."""
        return copy.copy(self)


class Names(Place):
    """Entries of a dict: attributes of an object, globals of a function, a dict of the user's.

    Args:
        owner: the dict.
        seen: its earlier content.
        name: of the place.
        whole: whether entries that were not seen matter too.
    """

    def __init__(
        self, owner: dict[Any, Any], seen: dict[Any, Any], name: str, whole: bool = True
    ) -> None:
        self.owner, self.seen, self.name, self.whole = owner, seen, name, whole
        self.left_alone: set[Any] = set()

    @override
    def copy(self) -> Self:
        again = copy.copy(self)
        again.seen, again.left_alone = self.seen.copy(), self.left_alone.copy()
        return again

    @override
    def changed(self) -> bool:
        owner, seen = self.owner, self.seen
        if self.whole and len(owner) == len(seen) and all(map(is_, owner.values(), seen.values())):
            return False
        return any(True for _ in self._differences({}))

    def _differences(self, stand_ins: StandIns) -> Iterator[tuple[Any, Any]]:
        """Keys whose value has to change, with the value; `MISSING` for those to leave out."""
        owner = self.owner
        for key, value in self.seen.items():
            wanted = _substituted(value, stand_ins) if stand_ins else value
            if owner.get(key, MISSING) is not wanted:
                yield key, wanted
        if self.whole and len(owner) > len(self.seen):
            for key in [k for k in owner if k not in self.seen and k not in self.left_alone]:
                yield key, MISSING

    @override
    def settle(self) -> None:
        for key, _ in [*self._differences({})]:
            self.seen.pop(key, None)
            self.left_alone.add(key)

    @override
    def forget(self, test: Test) -> None:
        for key in [key for key, value in self.seen.items() if holds(value, test)]:
            del self.seen[key]
            self.left_alone.add(key)

    @override
    def restore(self, stand_ins: StandIns) -> Callable[[], None] | None:
        owner = self.owner
        if not stand_ins and not self.changed():
            return None
        differences = [*self._differences(stand_ins)]
        if not differences:
            return None
        before = [(key, owner.get(key, MISSING)) for key, _ in differences]
        # A field sees the order of a dict too: keep it where keys come and go.
        order = list(owner) if any(x is MISSING for x in chain(*differences, *before)) else None

        def undo() -> None:
            _write(owner, before)
            if order is not None:
                _reorder(owner, order)

        _write(owner, differences)
        if order is not None and self.whole:
            _reorder(owner, list(self.seen))
        return undo

    @override
    def values(self) -> Iterable[Any]:
        owner = self.owner
        return [owner[key] for key in self.seen if key in owner]

    @override
    def arrived(self) -> Iterable[Any]:
        return [self.owner[key] for key, _ in self._differences({}) if key in self.owner]

    @override
    def changes(self) -> Iterable[str]:
        form = "{}[{!r}]" if self.container is not None else "{}{}"
        return [form.format(self.name, key) for key, _ in self._differences({})]

    @override
    def only_changes(self) -> Self:
        again = copy.copy(self)
        again.whole, again.left_alone = False, set()
        again.seen = {key: self.seen.get(key, MISSING) for key, _ in self._differences({})}
        return again

    @override
    def as_now(self) -> Self:
        again = self.copy()
        again.seen = {key: self.owner.get(key, MISSING) for key in self.seen}
        return again


def _write(owner: dict[Any, Any], entries: Iterable[tuple[Any, Any]]) -> None:
    for key, value in entries:
        if value is MISSING:
            owner.pop(key, None)
        else:
            owner[key] = value


def _reorder(owner: dict[Any, Any], order: list[Any]) -> None:
    """Put the keys into an order, others last."""
    rest = dict(owner)
    for key in [*(k for k in order if k in rest), *(k for k in rest if k not in order)]:
        value = owner.pop(key)
        owner[key] = value


class Dicts(Place):
    """Dicts of modules that were empty, such as those of buffers: one place for all of them.

    Attributes:
        owners: the dicts.
        names: what they are called.
        seen: their earlier contents; `None` where all were empty.
    """

    name = ""

    def __init__(self) -> None:
        self.owners: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.seen: list[dict[str, Any]] | None = None

    def _contents(self) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        return zip(self.owners, self.seen or ({} for _ in self.owners), strict=True)

    @override
    def copy(self) -> Self:
        again = copy.copy(self)
        again.owners, again.names = self.owners.copy(), self.names.copy()
        return again

    @override
    def changed(self) -> bool:
        if self.seen is None:
            return any(self.owners)
        return any(not _are_same(owner, seen) for owner, seen in self._contents())

    def _only(self, wanted: Test) -> Self:
        """The same place, of those dicts whose contents pass a test."""
        again = copy.copy(self)
        chosen = [i for i, held in enumerate(self._contents()) if wanted(held)]
        again.owners = [self.owners[i] for i in chosen]
        again.names = [self.names[i] for i in chosen]
        again.seen = None if self.seen is None else [self.seen[i] for i in chosen]
        return again

    @override
    def settle(self) -> None:
        self.__dict__.update(self._only(lambda held: _are_same(*held)).__dict__)

    @override
    def forget(self, test: Test) -> None:
        if self.seen is not None:
            fine = self._only(lambda held: not any(holds(x, test) for x in held[1].values()))
            self.__dict__.update(fine.__dict__)

    @override
    def restore(self, stand_ins: StandIns) -> Callable[[], None] | None:
        changed = [(owner, seen) for owner, seen in self._contents() if not _are_same(owner, seen)]
        if not changed:
            return None
        before = [(owner, owner.copy()) for owner, _ in changed]

        def put(contents: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
            for owner, held in contents:
                owner.clear()
                owner.update(held)

        put(changed)
        return lambda: put(before)

    @override
    def values(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self.owners))

    @override
    def changes(self) -> Iterable[str]:
        for name, (owner, seen) in zip(self.names, self._contents(), strict=True):
            if not _are_same(owner, seen):
                yield from (f"{name}{key}" for key in owner.keys() | seen.keys())

    @override
    def only_changes(self) -> Self:
        return self._only(lambda held: not _are_same(*held))

    @override
    def as_now(self) -> Self:
        again = self.copy()
        again.seen = [owner.copy() for owner in self.owners]
        return again


def _are_same(owner: dict[str, Any], seen: dict[str, Any]) -> bool:
    """Whether a dict holds the same objects as another, in the same order."""
    return [*owner] == [*seen] and all(map(is_, owner.values(), seen.values()))


class Items(Place):
    """The items of a list or deque.

    Args:
        owner: the list.
        seen: its earlier content.
        name: of the place.
    """

    def __init__(self, owner: list[Any] | deque[Any], seen: list[Any], name: str) -> None:
        self.owner, self.name = owner, name
        self.seen: list[Any] | None = seen
        self.container = owner

    @override
    def changed(self) -> bool:
        owner, seen = self.owner, self.seen
        if seen is None:
            return False
        return len(owner) != len(seen) or not all(map(is_, owner, seen))

    @override
    def settle(self) -> None:
        if self.changed():
            self.seen = None

    @override
    def forget(self, test: Test) -> None:
        if self.seen is not None and any(holds(value, test) for value in self.seen):
            self.seen = None

    @override
    def restore(self, stand_ins: StandIns) -> Callable[[], None] | None:
        owner = self.owner
        if self.seen is None or not (stand_ins or self.changed()):
            return None
        wanted = [_substituted(value, stand_ins) for value in self.seen]
        if len(wanted) == len(owner) and all(map(is_, wanted, owner)):
            return None
        before = list(owner)

        def undo() -> None:
            owner.clear()
            owner.extend(before)

        owner.clear()
        owner.extend(wanted)
        return undo

    @override
    def values(self) -> Iterable[Any]:
        return () if self.seen is None else self.owner

    @override
    def as_now(self) -> Self:
        again = copy.copy(self)
        again.seen = None if self.seen is None else list(self.owner)
        return again


class Single(Place):
    """One value, read and written by functions: a closure's cell, a slot, a class attribute.

    Args:
        get: reads it; where there is none it raises an error, or gives `MISSING`.
        put: writes it.
        seen: the earlier value.
        name: of the place.
        remove: takes it out, where there may be none.
    """

    def __init__(
        self,
        get: Callable[[], Any],
        put: Callable[[Any], None],
        seen: Any,
        name: str,
        remove: Callable[[], None] | None = None,
    ) -> None:
        self._read, self._set, self.seen, self.name = get, put, seen, name
        self._remove, self.left_alone = remove, False

    @classmethod
    def of_class(cls, kind: type, key: str, seen: Any) -> Single:
        """The place of a class's own attribute, which may be `MISSING`."""
        return cls(
            lambda: kind.__dict__.get(key, MISSING),
            lambda value: setattr(kind, key, value),
            seen,
            f"{kind.__name__}.{key}",
            lambda: delattr(kind, key),
        )

    @classmethod
    def of_cell(cls, cell: types.CellType, seen: Any, name: str) -> Single:
        """The place of what a function captures under a name."""

        def put(value: Any) -> None:
            cell.cell_contents = value

        def remove() -> None:
            del cell.cell_contents

        single = cls(lambda: cell.cell_contents, put, seen, name, remove)
        single.cell = cell
        return single

    def _get(self) -> Any:
        try:
            return self._read()
        except (AttributeError, ValueError):  # a slot, or a cell, that has been emptied
            return MISSING

    @override
    def changed(self) -> bool:
        return not self.left_alone and self._get() is not self.seen

    @override
    def settle(self) -> None:
        if self.changed():
            self.left_alone, self.seen = True, None

    @override
    def forget(self, test: Test) -> None:
        if holds(self.seen, test):
            self.left_alone, self.seen = True, None

    @override
    def restore(self, stand_ins: StandIns) -> Callable[[], None] | None:
        if self.left_alone:
            return None
        wanted, before = _substituted(self.seen, stand_ins), self._get()
        if wanted is before:
            return None
        put, remove = self._set, self._remove

        def write(value: Any) -> None:
            if value is MISSING and remove is not None:
                remove()
            else:
                put(value)

        write(wanted)
        return partial(write, before)

    @override
    def values(self) -> Iterable[Any]:
        value = MISSING if self.left_alone else self._get()
        return () if value is MISSING else (value,)

    @override
    def as_now(self) -> Self:
        again = copy.copy(self)
        again.seen = None if self.left_alone else self._get()
        return again
