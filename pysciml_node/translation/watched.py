"""What was seen of fields, kept for a second look."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.anatomy import FIRST_OF_ITS_OWN, anchor_of, parts_of
from pysciml_node.translation.entries import PLAIN
from pysciml_node.translation.recent import RecentOf
from pysciml_node.translation.watch import Watch

# Fields, and functions of the same code with different parts.
_MOST_FIELDS, _MOST_OF_A_CODE = 64, 8

_watched: RecentOf[tuple[Watch, ...]] = RecentOf(_MOST_FIELDS)
"""By the anchor of a field, the newest first."""


def watches_on(anchor: Any) -> tuple[Watch, ...]:
    """What is kept of a field, or of functions of a code."""
    return _watched.get(anchor) or ()


def entries() -> Any:
    """What is kept, by the identity of an anchor: what gives it, its class, and its watches."""
    return _watched.entries


def keep(f: Any, watch: Watch) -> None:
    """Keep a watch: in place of the one before, or beside those of functions of the same code."""
    anchor = anchor_of(f)
    if watch.given is None:
        _watched[anchor] = (watch,)
        return
    _watched[anchor] = (watch, *watches_on(anchor))[:_MOST_OF_A_CODE]
    watch.code = weakref.ref(anchor)
    if not all(map(_is_let_go, parts_of(f)[FIRST_OF_ITS_OWN:])):
        # What is kept alive is so no longer than the function.
        watch.ends = weakref.ref(f, forgetting(watch))


def forgetting(watch: Watch) -> Callable[[object], None]:
    """A function that forgets a watch, which it does not hold, when something there is gone."""
    return functools.partial(_forget, weakref.ref(watch))


def _forget(watch: Callable[[], Watch | None], gone: object) -> None:
    del gone
    forgotten = watch()
    code = None if forgotten is None or forgotten.code is None else forgotten.code()
    if code is not None:
        _watched[code] = tuple(x for x in watches_on(code) if x is not forgotten)


def _is_let_go(part: Any) -> bool:
    """Whether a watch on a part of a function does not keep it alive, or it is small."""
    if isinstance(part, types.FunctionType):
        return part.__closure__ is None and not part.__defaults__
    lasting = Tensor | nn.Module | type | types.ModuleType
    return type(part) in PLAIN or isinstance(part, lasting)
