"""Walks that later solves of the same field begin with, while nothing has changed."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.anatomy import FUNCTION_PARTS, owner_of
from pysciml_node.steps.further import Glance, hold_others
from pysciml_node.steps.places import Names
from pysciml_node.steps.walk import Walk, visit_of

_MOST_FIELDS = 64
# So often in a row a field may have changed, before its walks are not kept any more.
_MOST_MISSES = 4


class Known:
    """A walk that began with a field, without the field: it is not kept alive.

    Nor is the object that a method is of.

    Attributes:
        misses: how often in a row the field had changed.
    """

    def __init__(self, roots: dict[str, Any], walk: Walk, misses: int) -> None:
        f, *_ = roots.values()
        owner = owner_of(f)
        self.misses = misses
        self.owner, self.names, self._as_made = _reference(f), tuple(roots), _as_made(f)
        # Some functions are called by a `__dict__` of their own, which is empty here.
        self._attributes = owner.__dict__
        self._further, self._own = walk.further, [x for x, y in walk.modules if y is owner]
        self._modules = [x for x in walk.modules if x[1] is not owner]
        self._walk = copy.copy(walk)
        # The first is that of the roots.
        self._places = walk.places[1:]
        self._walk.let_go()
        self._glance = self._walk.glance = Glance(self._places)

    def stands(self, roots: dict[str, Any]) -> bool:
        """Whether a walk that begins with these would meet the same again."""
        f, *_ = roots.values()
        return (
            self.names == tuple(roots)
            and owner_of(f).__dict__ is self._attributes
            and all(x is y for x, y in zip(_as_made(f), self._as_made, strict=True))
            and self._glance.stand()
            and self._further.stand()
            and not hold_others(self._walk.tensors)
        )

    def changed(self) -> bool:
        """Whether places hold other objects since it stood."""
        return not self._glance.stand()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the walk has met."""
        return self._walk.tensors

    @property
    def counts(self) -> bool:
        """Whether it has met functions that keep their results, which are counted at each solve."""
        return bool(self._walk.caches)

    def walk(self, roots: dict[str, Any]) -> Walk:
        """The walk, beginning with the field."""
        again = Walk.__new__(Walk)
        again.__dict__.update(self._walk.__dict__)
        owner = owner_of(next(iter(roots.values())))
        again.places = [Names(roots, roots.copy(), ""), *self._places]
        own = [(name, owner) for name in self._own]
        again.modules, again.written = own + self._modules, self._walk.written.copy()
        return again


_known: OrderedDict[Any, Known] = OrderedDict()
"""By the identity of the field, or of a method's function and object, the last one at the end."""


def known_from(roots: dict[str, Any]) -> Known | None:
    """What is known of a walk that would meet the same again; `None` of others.

    Args:
        roots: as of `Walk`.
    """
    f, *others = roots.values()
    known = _known.get(_key(f))
    if (
        known is None
        or others != [None]
        or known.owner() is not owner_of(f)
        or known.misses > _MOST_MISSES
        or not known.stands(roots)
    ):
        return None
    known.misses = 0
    return known


def walk_from(roots: dict[str, Any]) -> Walk:
    """A walk through all that is reached now; the last one from there, while it is the same.

    Args:
        roots: as of `Walk`.
    """
    f, *others = roots.values()
    if others != [None] or not _may_be_known(f):
        return Walk(roots)
    known = known_from(roots)
    if known is not None:
        return known.walk(roots)
    key = _key(f)
    known = _known.get(key)
    if known is not None and known.owner() is owner_of(f) and known.misses > _MOST_MISSES:
        return Walk(roots)
    walk = Walk(roots)
    if walk.further.lasts:
        _known[key] = Known(roots, walk, 0 if known is None else known.misses + 1)
        if len(_known) > _MOST_FIELDS:
            _known.popitem(last=False)
    else:
        _known.pop(key, None)
    return walk


def _may_be_known(f: Any) -> bool:
    """Whether a field lasts longer than a solve, and may tell whether it is as it was."""
    if type(f) is types.MethodType:
        kind = type(f.__self__)
        # Of others a walk holds more than their attributes, or nothing tells that they are gone.
        alone = visit_of(kind) in (Walk._module, Walk._object)
        return alone and kind.__dictoffset__ != 0 and kind.__weakrefoffset__ != 0
    return isinstance(f, nn.Module | types.FunctionType)


def _key(f: Any) -> Any:
    return (id(f.__self__), id(f.__func__)) if type(f) is types.MethodType else id(f)


def _reference(f: Any) -> weakref.ref[Any]:
    """A reference to a field, or to a method's object, with which what is known of it goes."""
    return weakref.ref(owner_of(f), functools.partial(_forget, _key(f)))


def _forget(key: Any, gone: weakref.ref[Any]) -> None:
    known = _known.get(key)
    if known is not None and known.owner is gone:
        _known.pop(key, None)


def _as_made(f: Any) -> tuple[Any, ...]:
    """What a field is by itself, apart from what it holds."""
    if isinstance(f, types.FunctionType):
        return type(f), *(getattr(f, part) for part in FUNCTION_PARTS)
    if type(f) is types.MethodType:
        return type(f), f.__func__, type(f.__self__)
    return (type(f),)
