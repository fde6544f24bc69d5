"""The places that a snapshot has looked at, so that a second look is a quick one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.translation.entries import ABSENT, Attributes, Equal


@dataclass
class Watch:
    """The places that were looked at, so that a second look is a quick one.

    Attributes:
        tokens: structure and plain values.
        items: containers, keys and the values at them, in lists of the same length.
        attributes: objects, names of their attributes and the values of these, likewise.
        absent: modules and names that they lack, likewise.
        sized: containers whose number of entries matters.
        sizes: these numbers.
        ordered: mappings whose order matters.
        order: their keys, one after another.
        places: containers, keys and the tokens that describe the tensors there, likewise.
        repeated: containers and keys of tensors' further places, and their numbers, likewise.
        default: torch's default dtype.
        sealed: whether there are objects whose inside is not looked at.
        fickle: what code does that may come out differently at each solve, in words.
        asks_freedom: whether code mentions `requires_grad`.
        free: of each tensor whether it requires gradients, where code mentions that.
    """

    tokens: list[Any] = field(default_factory=list)
    items: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    attributes: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    absent: tuple[list[Any], ...] = field(default_factory=lambda: ([], []))
    sized: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ordered: list[Any] = field(default_factory=list)
    order: list[Any] = field(default_factory=list)
    places: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    repeated: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    default: torch.dtype = field(default_factory=torch.get_default_dtype)
    sealed: bool = False
    fickle: str | None = None
    asks_freedom: bool = False
    free: list[bool] | None = None

    def expect_item(self, container: Any, key: Any, value: Any) -> None:
        """Look later whether a value is still in its place."""
        columns, entries = self.items, (container, key, value)
        if type(container) is Attributes:
            columns, entries = self.attributes, (container.owner, key, value)
        for column, entry in zip(columns, entries, strict=True):
            column.append(entry)

    def expect_equal(self, get: Callable[[], Any]) -> None:
        """Look later whether a function gives what it gives now."""
        self.expect_item(Equal(get), get(), True)

    def expect_none(self, module: dict[str, Any], name: str) -> None:
        """Look later whether a module still lacks a name."""
        self.absent[0].append(module)
        self.absent[1].append(name)

    def expect_size(self, container: Any) -> None:
        """Look later whether a container still has as many entries."""
        self.sized.append(container)
        self.sizes.append(len(container))

    def expect_order(self, mapping: Any) -> None:
        """Look later whether a mapping still has as many entries, in the same order."""
        self.expect_size(mapping)
        self.ordered.append(mapping)
        self.order.extend(mapping)

    def expect_tensor(self, container: Any, key: Any, x: Tensor) -> None:
        """Look later which tensor is in a place."""
        for column, entry in zip(self.places, (container, key, describe(x)), strict=True):
            column.append(entry)

    def expect_again(self, container: Any, key: Any, number: int) -> None:
        """Look later whether a place has the same tensor as another one."""
        for column, entry in zip(self.repeated, (container, key, number), strict=True):
            column.append(entry)

    def tensors(self) -> list[Tensor] | None:
        """The tensors that are there now; `None` where anything else has changed."""
        containers, keys, _ = self.places
        try:
            found: list[Any] = list(map(getitem, containers, keys))
        except (LookupError, ValueError):
            return None
        distinct = len(set(map(id, found))) == len(found)
        return found if distinct and self.stands(found) else None

    def stands(self, tensors: list[Tensor]) -> bool:
        """Whether everything is as it was, but for the tensors in it, which are these."""
        # Everything is looked at by C code that loops over the places.
        containers, keys, tokens = self.places
        again, their_keys, numbers = self.repeated
        held = map(tensors.__getitem__, numbers)
        try:
            return (
                self._holds()
                and all(map(is_, map(getitem, containers, keys), tensors))
                and all(map(is_, map(getitem, again, their_keys), held))
                and list(map(describe, tensors)) == tokens
                and (self.free is None or self.free == freedom(tensors))
            )
        # Also of what is no tensor, or is changed by another thread.
        except (LookupError, ValueError, AttributeError, RuntimeError):
            return False

    def _holds(self) -> bool:
        """Whether everything but the tensors is as it was."""
        containers, keys, values = self.items
        owners, names, held = self.attributes
        return (
            all(map(is_, map(getitem, containers, keys), values))
            and all(map(is_, map(getattr, owners, names, repeat(ABSENT)), held))
            and not any(map(contains, *self.absent))
            and list(map(len, self.sized)) == self.sizes
            and all(map(is_, chain.from_iterable(self.ordered), self.order))
            and torch.get_default_dtype() is self.default
        )


def freedom(tensors: list[Tensor]) -> list[bool]:
    """Which tensors require gradients."""
    return [x.requires_grad for x in tensors]


def describe(x: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a program depends on, but for its numbers."""
    # A parameter that is frozen, or set free again, needs no new program.
    kind = type(x)
    needs_gradient = None if kind is nn.Parameter else x.requires_grad
    return kind, x.dtype, x.shape, x.device, needs_gradient


def have_same(before: list[Tensor], after: list[Tensor], numbers: list[int]) -> bool:
    """Whether two snapshots number some tensors alike; tensors of `p` are behind theirs.

    They do not where an evaluation, or another thread, has changed what the field can reach.
    """
    if len(before) == len(after):
        return all(i >= len(after) or before[i] is after[i] for i in numbers)
    return all(i < min(len(before), len(after)) and before[i] is after[i] for i in numbers)
