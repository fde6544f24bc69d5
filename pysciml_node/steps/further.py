"""What decides where a walk goes, besides the contents of its places: for a second look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, contains, getitem, is_
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.places import Names, Place

# Entries of a tensor that may be kept although the field holds another one by now.
SMALL = 1024


def may_last(x: Tensor) -> bool:
    """Whether a tensor may be kept beyond a solve: large ones, and graphs, may come and go."""
    return isinstance(x, nn.Parameter) or (x.is_leaf and (x.requires_grad or x.numel() <= SMALL))


_OTHERS = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks", "__dict__")


def hold_others(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors hold more than numbers: hooks, or attributes, which may hold a field."""
    if any(map(any, map(_OTHERS, tensors))):
        return True
    gradients = [y for x in tensors if x.is_leaf and (y := x.grad) is not None]
    return bool(gradients) and hold_others(gradients)


class Further:
    """What a walk has met that is no place, in columns, which C code loops over.

    Attributes:
        lasts: whether a second look can tell all that a walk would, and may hold what it met.
    """

    def __init__(self) -> None:
        self.lasts = True
        self._attributes: tuple[list[Any], ...] = ([], [], [])
        self._items: tuple[list[Any], ...] = ([], [], [])
        self._absent: tuple[list[Any], ...] = ([], [])
        self._empty: list[Any] = []
        self._classes: list[Any] = []
        self._held: list[Any] = []

    def expect_attribute(self, owner: Any, name: str) -> None:
        """Look later whether an object still has an attribute."""
        for column, x in zip(self._attributes, (owner, name, getattr(owner, name)), strict=True):
            column.append(x)

    def expect_item(self, owner: Any, key: str, value: Any) -> None:
        """Look later whether a dict still has an entry."""
        for column, x in zip(self._items, (owner, key, value), strict=True):
            column.append(x)

    def expect_none(self, owner: Any, key: str) -> None:
        """Look later whether a dict still lacks a key."""
        self._absent[0].append(owner)
        self._absent[1].append(key)

    def expect_empty(self, container: Any) -> None:
        """Look later whether a container is still empty."""
        self._empty.append(container)

    def expect_class(self, kind: type) -> None:
        """Look later whether a class still has what it has."""
        self._classes.append(kind)
        self._held.append(tuple(kind.__dict__.values()))

    def stand(self) -> bool:
        """Whether all is as it was."""
        owners, names, values = self._attributes
        dicts, keys, entries = self._items
        return (
            all(map(is_, map(getattr, owners, names), values))
            and all(map(is_, map(getitem, dicts, keys), entries))
            and not any(map(contains, *self._absent))
            and not any(self._empty)
            and all(map(_has_same, self._classes, self._held))
        )


def _has_same(kind: type, held: tuple[Any, ...]) -> bool:
    values = kind.__dict__.values()
    return len(values) == len(held) and all(map(is_, values, held))


class Glance:
    """A quick look at places: whether all of them hold what they held.

    Args:
        places: the places; settled ones are looked at one by one.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self._owners: list[dict[Any, Any]] = []
        self._values: list[Any] = []
        self._sizes: list[int] = []
        self._others: list[Place] = []
        for place in places:
            if (
                type(place) is Names
                and type(place.owner) is dict
                and place.whole
                and not place.left_alone
            ):
                self._owners.append(place.owner)
                self._values += place.seen.values()
                self._sizes.append(len(place.seen))
            else:
                self._others.append(place)

    def beside(self, places: Iterable[Place]) -> Glance:
        """A look at further places too."""
        both = object.__new__(Glance)
        both.__dict__.update(self.__dict__, _others=[*self._others, *places])
        return both

    def stand(self) -> bool:
        """Whether no place has changed."""
        return (
            list(map(len, self._owners)) == self._sizes
            and all(map(is_, chain.from_iterable(map(dict.values, self._owners)), self._values))
            and not any(map(_changed, self._others))
        )


def _changed(place: Place) -> bool:
    return place.changed()
