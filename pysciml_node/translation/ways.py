"""What engines have prepared for a field, kept as long as nothing changes that it can reach."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

from pysciml_node.translation.watch import Watch

# Ways to solve a field that are known.
_MOST_WAYS = 16

Made = TypeVar("Made")


def keep(watch: Watch, way: Any, made: Any) -> None:
    """Keep what has been prepared for a field, by that by which solves of it are told apart."""
    ways: dict[Any, Any] = watch.memory.setdefault(type(made), {})
    if len(ways) >= _MOST_WAYS:
        ways.clear()
    with contextlib.suppress(TypeError):  # something in `p` has no hash
        ways[way] = made


def known_of(watch: Watch, way: Any, kind: type[Made]) -> Made | None:
    """What of a kind has been kept."""
    ways: dict[Any, Made] | None = watch.memory.get(kind)
    try:
        return None if ways is None else ways.get(way)
    except TypeError:
        return None
