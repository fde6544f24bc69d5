"""The surroundings of a translated field, walked through once while nothing changes in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.recent import RecentOf
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.watch import Watch

# Entries of a tensor that is kept although the field may hold another one by now.
_SMALL = 1024


@dataclass(frozen=True)
class Walked:
    """The surroundings of a module, or of what is derived from it, as a snapshot has seen them.

    Attributes:
        watch: of the snapshot; a second look that finds nothing new has the same.
        tensors: of the snapshot.
        surroundings: without the field itself.
    """

    watch: Watch
    tensors: list[Tensor]
    surroundings: Surroundings

    def holds(self, now: Snapshot) -> bool:
        """Whether all that the field reaches is what it was, numbers aside."""
        same = len(self.tensors) == len(now.tensors) and all(map(is_, self.tensors, now.tensors))
        return self.watch is now.watch and same

    def stands(self) -> bool:
        """The same, by another look."""
        return self.watch.stands(self.tensors)

    def see(self, f: Any) -> Callable[[], Surroundings]:
        """A function that gives the surroundings of a solve that begins now.

        It puts them together when it is called, which most solves do not come to.
        """
        return functools.partial(self.surroundings.again, f, self.surroundings.versions())


_known: RecentOf[Walked] = RecentOf(64)


def surroundings_of(f: Callable[..., Any], p: Any, now: Snapshot) -> Callable[[], Surroundings]:
    """A function that gives the surroundings of a field for a solve that begins now.

    Args:
        f: the field.
        p: its extra argument.
        now: what was seen of the field just now.
    """
    known = walked_of(f, p, now)
    if known is not None:
        return known.see(f)
    seen = Surroundings({"f": f, "p": p})
    # Large tensors that come and go, and graphs, are not kept beyond their time.
    if _is_whole(f, p, now) and all(map(_lasts, now.tensors)):
        _known[f] = Walked(now.watch, now.tensors, seen.lasting())
    return lambda: seen


def walked_of(f: Any, p: Any, now: Snapshot) -> Walked | None:
    """What is kept of a field's surroundings, where nothing has changed in them."""
    if not _is_whole(f, p, now):
        return None
    known = _known.get(f)
    return known if known is not None and known.holds(now) else None


def _lasts(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or (x.is_leaf and x.numel() <= _SMALL)


def _is_whole(f: Any, p: Any, now: Snapshot) -> bool:
    """Whether all that a field depends on is in a module, and can be looked at."""
    module = f.inner if isinstance(f, DerivedField) else f
    return isinstance(module, nn.Module) and p is None and not now.sealed
