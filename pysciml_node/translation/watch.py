"""The places that a snapshot has looked at, so that a second look is a quick one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from operator import contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.translation.entries import ABSENT, Attributes, Equal


@dataclass
class Watch:
    """The places that were looked at, so that a second look is a quick one.

    Attributes:
        owner: gives the callable.
        kind: its class.
        tokens: structure and plain values.
        items: containers, keys and the values at them, in lists of the same length.
        attributes: objects, names of their attributes and the values of these, likewise.
        absent: modules and names that they lack, likewise.
        sized: containers whose number of entries matters.
        sizes: these numbers.
        places: container and key of each tensor, and the token that describes it.
        repeated: container and key of a tensor's further places, and its number.
        default: torch's default dtype.
        sealed: whether there are objects whose inside is not looked at.
        fickle: what code does that may come out differently at each solve, in words.
        asks_freedom: whether code mentions `requires_grad`.
        free: of each tensor whether it requires gradients, where code mentions that.
    """

    owner: Callable[[], Any]
    kind: type
    tokens: list[Any] = field(default_factory=list)
    items: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    attributes: tuple[list[Any], ...] = field(default_factory=lambda: ([], [], []))
    absent: tuple[list[Any], ...] = field(default_factory=lambda: ([], []))
    sized: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    places: list[tuple[Any, Any, Any]] = field(default_factory=list)
    repeated: list[tuple[Any, Any, int]] = field(default_factory=list)
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

    def tensors(self) -> list[Tensor] | None:
        """The tensors that are there now; `None` where anything else has changed."""
        try:
            # Most places are looked at by C code that loops over them.
            containers, keys, values = self.items
            if not all(map(is_, map(getitem, containers, keys), values)):
                return None
            owners, names, held = self.attributes
            if not all(map(is_, map(getattr, owners, names, repeat(ABSENT)), held)):
                return None
            if any(map(contains, *self.absent)):
                return None
            if list(map(len, self.sized)) != self.sizes:
                return None
            tensors: list[Tensor] = []
            for container, key, token in self.places:
                tensor = container[key]
                if not isinstance(tensor, Tensor) or describe(tensor) != token:
                    return None
                tensors.append(tensor)
            for container, key, index in self.repeated:
                if container[key] is not tensors[index]:
                    return None
        except (LookupError, ValueError):
            return None
        if self.free is not None and self.free != freedom(tensors):
            return None
        distinct = len(set(map(id, tensors))) == len(tensors)
        return tensors if distinct and torch.get_default_dtype() is self.default else None


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
