"""The surroundings of a translated field, walked through once while nothing changes in them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.anatomy import function_of
from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.start import Start
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.snapshot import Snapshot

# Entries of a tensor that is kept although the field may hold another one by now.
_SMALL = 1024


@dataclass(frozen=True)
class Walked:
    """The surroundings of a field as a snapshot has seen them.

    Attributes:
        tensors: of the snapshot, but for those that a function was given.
        surroundings: without the field itself, and what it was given.
    """

    tensors: list[Tensor]
    surroundings: Surroundings

    def has(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors."""
        return all(map(is_, self.tensors, tensors))

    @staticmethod
    def known(now: Snapshot) -> Walked | None:
        """The surroundings of a field, where they are kept."""
        walked: Walked | None = now.watch.memory.get(WALKED)
        return walked if walked is not None and walked.has(now.held) else None


WALKED = (Walked, "f")
"""By what the memory of a watch has the surroundings of a field."""


def surroundings_of(
    f: Callable[..., Any], p: Any, now: Snapshot, name: str = "f"
) -> Callable[[], Surroundings]:
    """A function that gives the surroundings of a field for a solve that begins now.

    Args:
        f: the field.
        p: its extra argument.
        now: what was seen of the field just now.
        name: what messages call the field.
    """
    held, memory, key = now.held, now.watch.memory, (Walked, name)
    known: Walked | None = memory.get(key)
    # Large tensors that come and go, and graphs, are not kept beyond their time.
    if known is None or not known.has(held):
        known = None
        if _is_whole(f, now) and all(map(_lasts, held)):
            walked = Surroundings({name: f, "p": None}).lasting()
            known = memory[key] = Walked(held, walked)
    if known is not None:
        start = Start(name, f, p, now.parts, known.tensors)
        if start.is_plain:
            # It is put together when it is called, which most solves do not come to.
            return functools.partial(known.surroundings.again, start)
    seen = Surroundings({name: f, "p": p})
    return lambda: seen


def _lasts(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or (x.is_leaf and (x.requires_grad or x.numel() <= _SMALL))


def _is_whole(f: Any, now: Snapshot) -> bool:
    """Whether all that a field depends on can be looked at, but for what a function captures."""
    given, function = now.watch.given, function_of(f)
    if given is not None and function is not None:
        # Default values, and given tensors that are elsewhere too, are not told apart.
        apart = not (function.__defaults__ or given.repeat(now.watch.repeated[2]))
        return apart and not now.sealed
    inner = f.inner if isinstance(f, DerivedField) else f
    return isinstance(inner, nn.Module | types.FunctionType) and not now.sealed
