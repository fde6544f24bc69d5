"""What a solve begins with that others with the same field do not share."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from pysciml_node.problems.state import bare_entries
from pysciml_node.steps.anatomy import UNBOUND, cells_of, function_of
from pysciml_node.steps.places import Items, Names, Place, Single
from pysciml_node.steps.walk import Walk

_COUNT: Callable[[Tensor], int] = attrgetter("_version")
# Without anything of their own to walk through.
_TENSORS = frozenset((Tensor, nn.Parameter))
_NUMBERS = frozenset((float, int, type(None)))


class Start:
    """A field as it was made for one solve, and its extra argument.

    Args:
        name: what the field is called.
        f: the field: a module, a function or a method, or what is derived from one.
        p: its extra argument.
        parts: what the field was given, by `parts_of`.
        shared: the tensors that other solves share.
        versions: how often each of them had been changed in place; default as it is now.

    Attributes:
        is_plain: whether the extra argument holds nothing but tensors and numbers in containers.
    """

    __slots__ = (
        *("_entries", "_parts", "_tensors", "_versions", "_walk"),
        *("f", "is_plain", "name", "p"),
    )

    def __init__(
        self,
        name: str,
        f: Any,
        p: Any,
        parts: tuple[Any, ...],
        shared: list[Tensor],
        versions: Sequence[int | None] | None = None,
    ) -> None:
        self.name, self.f, self.p, self._parts, self._walk = name, f, p, parts, None
        # What is in `p`, which is a tuple, a list or a dict, where that needs no walk.
        self._entries: Any = None
        if parts:
            shared = [*shared, *(x for x in parts if isinstance(x, Tensor))]
        self.is_plain = True
        if type(p) in _TENSORS:
            shared = [*shared, p]
        elif (entries := bare_entries(p)) is not None:
            shared = [*shared, *(x for x in entries if isinstance(x, Tensor))]
            self._entries = dict(p) if type(p) is dict else entries
        elif type(p) not in _NUMBERS:
            x = self._walk = Walk({"p": p})
            shared = [*shared, *x.tensors]
            self.is_plain = not (x.modules or x.generators or x.lazy or x.chosen or x.met_apart)
        self._tensors = shared
        self._versions = versions_of(shared) if versions is None else versions

    def versions(self) -> dict[int, int | None]:
        """How often each tensor had been changed in place, by their ids."""
        return dict(zip(map(id, self._tensors), self._versions, strict=True))

    def places(self) -> list[Place]:
        """The places that are its own: what the field captures, and the containers in `p`."""
        pairs = zip(cells_of(self.f), self._captured(), strict=True)
        cells = [Single.of_cell(cell, x, name) for cell, (name, x) in pairs if x is not UNBOUND]
        return [*cells, *self._containers()]

    def _containers(self) -> list[Place]:
        """The places in `p`, with what was there."""
        if self._walk is not None:
            return self._walk.places[1:]
        if self._entries is None or type(self.p) is tuple:
            return []
        kind = Names if type(self.p) is dict else Items
        place = kind(self.p, self._entries, "p")
        place.container = self.p
        return [place]

    def named(self) -> list[tuple[str, Any]]:
        """The modules and tensors that are its own, with their names."""
        field = self.f.__self__ if isinstance(self.f, types.MethodType) else self.f
        walk, entries = self._walk, self._entries
        tensors = [] if walk is None else [(walk.names[id(x)], x) for x in walk.tensors]
        if entries is not None:
            rows = entries.items() if type(entries) is dict else enumerate(entries)
            tensors = [(f"p[{key!r}]", x) for key, x in rows]
        every = [(self.name, field), *self._captured(), ("p", self.p), *tensors]
        return [(name, x) for name, x in every if isinstance(x, nn.Module | Tensor)]

    def _captured(self) -> list[tuple[str, Any]]:
        """What the field captured when the solve began, by name."""
        function = function_of(self.f)
        names = () if function is None else function.__code__.co_freevars
        contents = self._parts[len(self._parts) - len(names) :]
        return list(zip(names, contents, strict=True))


def version_of(x: Tensor) -> int | None:
    """The number of changes in place of a tensor; `None` where torch does not count them."""
    return None if x.is_inference() else x._version


def versions_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """The same of several."""
    try:
        return list(map(_COUNT, tensors))
    except RuntimeError:  # torch refuses where it does not count
        return [version_of(x) for x in tensors]
