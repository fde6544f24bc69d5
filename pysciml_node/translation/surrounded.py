"""The surroundings of a translated field, walked through once while nothing changes in them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.recent import Recent
from pysciml_node.translation.snapshot import Snapshot, reference

# Entries of a tensor that is kept although the field may hold another one by now.
_SMALL = 1024


@dataclass(frozen=True)
class _Walked:
    """The surroundings of a module as a snapshot has seen them.

    Attributes:
        owner: gives the module.
        tokens: of the snapshot; a second look that finds nothing new gives the same list.
        tensors: of the snapshot.
        surroundings: without the module itself.
    """

    owner: Callable[[], Any]
    tokens: list[Any]
    tensors: list[Tensor]
    surroundings: Surroundings

    def holds(self, f: Any, now: Snapshot) -> bool:
        """Whether a module and all that it reaches are what they were."""
        return (
            self.owner() is f
            and self.tokens is now.tokens
            and len(self.tensors) == len(now.tensors)
            and all(map(is_, self.tensors, now.tensors))
        )


_known: Recent[int, _Walked] = Recent(64)
_lock = threading.RLock()


def _forget(key: int, gone: object) -> None:
    del gone
    with _lock:
        _known.pop(key)


def surroundings_of(f: Callable[..., Any], p: Any, now: Snapshot) -> Surroundings:
    """The surroundings of a field for a solve that begins now.

    Args:
        f: the field.
        p: its extra argument.
        now: what was seen of the field just now.
    """
    if not isinstance(f, nn.Module) or p is not None or now.sealed:
        return Surroundings({"f": f, "p": p})
    with _lock:
        known = _known.get(id(f))
        if known is not None and known.holds(f, now):
            return known.surroundings.again(f)
    seen = Surroundings({"f": f, "p": p})
    # Large tensors that come and go, and graphs, are not kept beyond their time.
    if all(isinstance(x, nn.Parameter) or (x.is_leaf and x.numel() <= _SMALL) for x in now.tensors):
        owner = reference(f, functools.partial(_forget, id(f)))
        with _lock:
            _known[id(f)] = _Walked(owner, now.tokens, now.tensors, seen.lasting())
    return seen
