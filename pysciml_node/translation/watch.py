"""The places that a snapshot has looked at, so that a second look is a quick one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from operator import contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pysciml_node.translation.entries import Attributes, Equal
from pysciml_node.translation.given import Given

Contents = tuple[tuple[int, Tensor], ...]
"""Numbers of tensors whose entries are part of a program, with those entries."""

CHANGED = (LookupError, ValueError, AttributeError, RuntimeError)
"""What is raised where something is gone, or is no tensor, or is changed by another thread."""

# Containers that are nothing but their entries: one that is empty is false.
_BUILT_IN = frozenset((dict, OrderedDict, list, tuple, set, frozenset, deque))


class Places:
    """Places and what was found there, in columns, which C code loops over.

    Attributes:
        items: containers, keys and the values at them, in lists of the same length.
        attributes: objects, names of their attributes and the values of these, likewise.
        empty: containers without entries.
        sized: others whose number of entries matters.
        sizes: these numbers.
        ordered: mappings whose order matters.
        order: their keys, a list for each.
    """

    def __init__(self) -> None:
        self.items: tuple[list[Any], ...] = ([], [], [])
        self.attributes: tuple[list[Any], ...] = ([], [], [])
        self.empty: list[Any] = []
        self.sized: list[Any] = []
        self.sizes: list[int] = []
        self.ordered: list[Any] = []
        self.order: list[Any] = []

    def expect_item(self, container: Any, key: Any, value: Any) -> None:
        """Look later whether a value is still in its place."""
        columns, entries = self.items, (container, key, value)
        if type(container) is Attributes:
            columns, entries = self.attributes, (container.owner, key, value)
        for column, entry in zip(columns, entries, strict=True):
            column.append(entry)

    def expect_size(self, container: Any) -> None:
        """Look later whether a container still has as many entries."""
        if type(container) in _BUILT_IN and not container:
            self.empty.append(container)
            return
        self.sized.append(container)
        self.sizes.append(len(container))

    def expect_order(self, mapping: Any) -> None:
        """Look later whether a mapping still has as many entries, in the same order."""
        self.expect_size(mapping)
        if len(mapping) > 1:
            self.ordered.append(mapping)
            self.order.append(list(mapping))

    def hold(self) -> bool:
        """Whether all is as it was."""
        containers, keys, values = self.items
        owners, names, held = self.attributes
        return (
            not any(self.empty)
            and list(map(len, self.sized)) == self.sizes
            and all(map(is_, map(getitem, containers, keys), values))
            and all(map(is_, map(getattr, owners, names), held))
            and all(map(is_, *map(chain.from_iterable, (self.ordered, self.order))))
        )


@dataclass(eq=False)
class Watch:
    """The places that were looked at, so that a second look is a quick one.

    Attributes:
        tokens: structure and plain values.
        given: what a function was given; `None` where the field is none.
        seen: the places, but for those of tensors.
        absent: modules and names that they lack, in lists of the same length.
        places: containers and keys of tensors, likewise; those that are given are before them.
        described: all tensors, in words.
        repeated: containers and keys of tensors' further places, and their numbers, likewise.
        default: torch's default dtype.
        sealed: whether there are objects whose inside is not looked at.
        fickle: what code does that may come out differently at each solve, in words.
        asked: what code asks of tensors besides, such as whether they require gradients.
        answers: what they answer.
        ends: a reference to the function that it goes with, where it keeps something alive.
        code: a reference to the code of the function, with which the watch is kept.
        memory: what others keep as long as nothing has changed, by keys of their own.
    """

    tokens: list[Any] = field(default_factory=list)
    given: Given | None = None
    seen: Places = field(default_factory=Places)
    absent: tuple[list[Any], ...] = field(default_factory=lambda: ([], []))
    places: tuple[list[Any], ...] = field(default_factory=lambda: ([], []))
    described: list[Any] = field(default_factory=list)
    repeated: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    default: torch.dtype = field(default_factory=torch.get_default_dtype)
    sealed: bool = False
    fickle: str | None = None
    asked: list[Callable[[Tensor], Any]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    ends: Any = None
    code: Any = None
    memory: dict[Any, Any] = field(default_factory=dict)

    def expect_item(self, container: Any, key: Any, value: Any) -> None:
        """Look later whether a value is still in its place."""
        self.seen.expect_item(container, key, value)

    def expect_equal(self, get: Callable[[], Any]) -> None:
        """Look later whether a function gives what it gives now."""
        self.expect_item(Equal(get), get(), True)

    def expect_none(self, module: dict[str, Any], name: str) -> None:
        """Look later whether a module still lacks a name."""
        self.absent[0].append(module)
        self.absent[1].append(name)

    def expect_size(self, container: Any) -> None:
        """Look later whether a container still has as many entries."""
        self.seen.expect_size(container)

    def expect_order(self, mapping: Any) -> None:
        """Look later whether a mapping still has as many entries, in the same order."""
        self.seen.expect_order(mapping)

    def expect_tensor(self, container: Any, key: Any) -> None:
        """Look later which tensor is in a place."""
        self.places[0].append(container)
        self.places[1].append(key)

    def expect_again(self, container: Any, key: Any, number: int) -> None:
        """Look later whether a place has the same tensor as another one."""
        for column, entry in zip(self.repeated, (container, key, number), strict=True):
            column.append(entry)

    def tensors(self, parts: tuple[Any, ...]) -> list[Tensor] | None:
        """The tensors that are there now; `None` where anything else has changed.

        The same in C is in again.c: what is asked here is asked there.

        Args:
            parts: what the field was given.
        """
        given, (again, their_keys, numbers) = self.given, self.repeated
        try:
            found: list[Any] = list(map(getitem, *self.places))
            if given is not None:
                found = [*map(parts.__getitem__, given.first), *found]
            held = map(found.__getitem__, numbers)
            stands = (
                (given is None or given.holds(parts, found))
                and self._holds()
                and all(map(is_, map(getitem, again, their_keys), held))
                and list(map(describe, found)) == self.described
                and len(set(map(id, found))) == len(found)
                and self.answer(found)
            )
        except CHANGED:
            return None
        return found if stands else None

    def _holds(self) -> bool:
        """Whether everything but the tensors is as it was."""
        return self.seen.hold() and not any(map(contains, *self.absent))

    def answer(self, found: list[Tensor]) -> bool:
        """Whether tensors, and torch, answer as before when they are asked."""
        return torch.get_default_dtype() is self.default and (
            not self.asked or answers(self.asked, found) == self.answers
        )


def answers(asked: list[Callable[[Tensor], Any]], tensors: list[Tensor]) -> list[Any]:
    """What tensors answer when they are asked."""
    return [ask(x) for ask in asked for x in tensors]


class NotMadeError(Exception):
    """A tensor has no shape before the first evaluation of its module."""


def describe(x: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a program depends on, but for its numbers.

    Raises:
        NotMadeError: it is yet to be made.
    """
    if is_lazy(x):
        raise NotMadeError
    # A parameter that is frozen, or set free again, needs no new program.
    kind = type(x)
    needs_gradient = None if kind is nn.Parameter else x.requires_grad
    return kind, x.dtype, x.shape, x.device, x.layout, needs_gradient, not x.__dict__


def have_same(before: list[Tensor], after: list[Tensor], numbers: list[int]) -> bool:
    """Whether two snapshots number some tensors alike; tensors of `p` are behind theirs.

    They do not where an evaluation, or another thread, has changed what the field can reach.
    """
    if len(before) == len(after):
        return all(i >= len(after) or before[i] is after[i] for i in numbers)
    return all(i < min(len(before), len(after)) and before[i] is after[i] for i in numbers)


def have_contents(tensors: list[Tensor], contents: Contents) -> bool:
    """Whether tensors still have the entries that are part of a program."""
    return not contents or all(_have_same_entries(tensors[i], x) for i, x in contents)


def _have_same_entries(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal, where entries that are no numbers equal themselves."""
    if x.layout is not torch.strided:  # sparse ones are not compared by torch
        x, y = x.to_dense(), y.to_dense()
    if torch.equal(x, y):
        return True
    return x.is_floating_point() and bool(((x == y) | (x.isnan() & y.isnan())).all())
