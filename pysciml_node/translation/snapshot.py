"""Snapshots of everything that a callable can reach, noted so that two of them can be compared."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pysciml_node.steps.anatomy import function_of, parts_of
from pysciml_node.translation import again
from pysciml_node.translation.entries import Calls
from pysciml_node.translation.look import Look
from pysciml_node.translation.watch import Watch
from pysciml_node.translation.watched import keep, watches_on


class Snapshot(NamedTuple):
    """Everything that a callable can reach.

    Attributes:
        watch: the places that were looked at.
        tensors: the distinct tensors, in the order of the walk: equal tokens mean the same places.
        parts: what a function was given, by `parts_of`.
    """

    watch: Watch
    tensors: list[Tensor]
    parts: tuple[Any, ...]

    @property
    def tokens(self) -> list[Any]:
        """Structure and plain values, in the order of the walk.

        For a tensor they hold dtype, shape and device, and not its numbers.
        """
        return self.watch.tokens

    @property
    def held(self) -> list[Tensor]:
        """The tensors but for those that a function was given."""
        given = self.watch.given
        return self.tensors if given is None else self.tensors[len(given.first) :]

    @property
    def sealed(self) -> bool:
        """Whether there are objects of other libraries, whose inside is not looked at."""
        return self.watch.sealed

    @property
    def fickle(self) -> str | None:
        """What code does that may come out differently at each solve, in words."""
        return self.watch.fickle

    @staticmethod
    def again(f: Any) -> Snapshot | None:
        """A second look; `None` where there was no first one, or anything has changed since."""
        function = function_of(f)
        anchor, parts = (f, ()) if function is None else (function.__code__, parts_of(f))
        for watch in watches_on(anchor):
            tensors = again.tensors(watch, parts)
            if tensors is not None:
                return Snapshot(watch, tensors, parts)
        return None

    @staticmethod
    def of(f: Any) -> Snapshot:
        """Look at everything that `f` can reach: attributes, closures, globals, hooks.

        The walk is skipped where nothing has changed since the last one.
        """
        known = Snapshot.again(f)
        if known is not None:
            return known
        look = Look(f)
        keep(f, look.watch)
        return Snapshot(look.watch, look.tensors, parts_of(f))

    def changes(self, later: Snapshot) -> frozenset[int]:
        """Places at which a later snapshot differs, if both have the same structure.

        Calls of functions that keep their results do not count: what they keep decides.
        """
        if len(self.tokens) != len(later.tokens):
            return frozenset()
        pairs = zip(self.tokens, later.tokens, strict=True)
        changed = [i for i, (before, after) in enumerate(pairs) if before != after]
        return frozenset(i for i in changed if not isinstance(later.tokens[i], Calls))
