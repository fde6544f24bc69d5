"""Walks that later solves of the same field begin with, while nothing has changed."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from operator import is_
from typing import Any

from torch import Tensor, nn

from pysciml_node.steps.anatomy import FUNCTION_PARTS, captured_by, cells_of
from pysciml_node.steps.further import Glance, hold_others
from pysciml_node.steps.places import Names, Place, Single
from pysciml_node.steps.visits import visit_of
from pysciml_node.steps.walk import Walk

_MOST_FIELDS = 64
# So often in a row a field may have changed, before its walks are not kept any more.
_MOST_MISSES = 4


class Known:
    """A walk that began with a field, without its anchors: these are not kept alive.

    Attributes:
        misses: how often in a row the field had changed.
        anchors: references to them.
    """

    def __init__(self, roots: dict[str, Any], walk: Walk, misses: int) -> None:
        f, *_ = roots.values()
        anchors = anchors_of(f)
        forget = functools.partial(_forget, _key(f, anchors))
        self.misses, self.names, self._as_made = misses, tuple(roots), _as_made(f, anchors)
        self.anchors = [weakref.ref(x, forget) for x in anchors]
        # Some functions are called by a `__dict__` of their own, which is empty here.
        self._attributes = [getattr(x, "__dict__", None) for x in anchors]
        places = {id(x): n for n, x in enumerate(anchors)}
        self._own = [(name, places[id(x)]) for name, x in walk.modules if id(x) in places]
        self._modules = [x for x in walk.modules if id(x[1]) not in places]
        self._further, self._walk = walk.further, copy.copy(walk)
        # The first is that of the roots; what a function captures is its own where it has anchors.
        self._made_anew = type(f) is types.FunctionType and f is not anchors[0]
        own = set(map(id, cells_of(f))) if self._made_anew else ()
        self._places = [x for x in walk.places[1:] if id(x.cell) not in own]
        self._walk.let_go()
        self._glance = self._walk.glance = Glance(self._places)

    def stands(self, roots: dict[str, Any]) -> bool:
        """Whether a walk that begins with these would meet the same again."""
        f, *_ = roots.values()
        return (
            self.names == tuple(roots)
            and self._is_made_alike(f)
            and self._glance.stand()
            and self._further.stand()
            and not hold_others(self._walk.tensors)
        )

    def _is_made_alike(self, f: Any) -> bool:
        anchors = anchors_of(f)
        made = _as_made(f, anchors)
        return (
            len(anchors) == len(self.anchors)
            and all(ref() is x for ref, x in zip(self.anchors, anchors, strict=True))
            and len(made) == len(self._as_made)
            and all(map(is_, made, self._as_made))
            and all(
                getattr(x, "__dict__", None) is y
                for x, y in zip(anchors, self._attributes, strict=True)
            )
        )

    def changed(self, roots: dict[str, Any]) -> bool:
        """Whether places hold other objects since it stood."""
        f, *_ = roots.values()
        return not self._glance.stand() or (self._made_anew and not self._is_made_alike(f))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the walk has met."""
        return self._walk.tensors

    @property
    def generators(self) -> list[Any]:
        """The random generators that it has met."""
        return self._walk.generators

    @property
    def memory(self) -> dict[Any, Any]:
        """What others keep with the walk."""
        return self._walk.memory

    @property
    def counts(self) -> bool:
        """Whether it has met functions that keep their results, which are counted at each solve."""
        return bool(self._walk.caches)

    def walk(self, roots: dict[str, Any], made: Made) -> Walk:
        """The walk, beginning with the field.

        Args:
            roots: as of `Walk`.
            made: of what the field was when it stood.
        """
        again = Walk.__new__(Walk)
        again.__dict__.update(self._walk.__dict__)
        f, *_ = roots.values()
        anchors, captured = made
        cells = _cells(f, captured) if self._made_anew else []
        again.places = [Names(roots, roots.copy(), ""), *cells, *self._places]
        if cells:
            again.glance = self._glance.beside(cells)
        own = [(name, anchors[n]) for name, n in self._own]
        again.modules, again.written = own + self._modules, self._walk.written.copy()
        return again


Made = tuple[tuple[Any, ...], list[Any]]
"""The anchors of a field, and what it captures where it is a function."""


def made_of(f: Any) -> Made:
    """What a field is made of now."""
    return anchors_of(f), captured_by(f) if type(f) is types.FunctionType else []


_known: OrderedDict[Any, Known] = OrderedDict()
"""By the identities of what a field is known by, the one used last at the end."""


def known_from(roots: dict[str, Any], note: Any = None) -> Known | None:
    """What is known of a walk that would meet the same again; `None` of others.

    Args:
        roots: as of `Walk`.
        note: what others must keep with it, where there is such a thing.
    """
    f, *others = roots.values()
    known = _known.get(_key(f, anchors_of(f)))
    if known is None or others != [None] or known.misses > _MOST_MISSES:
        return None
    if (note is not None and known.memory.get(note) is None) or not known.stands(roots):
        return None
    known.misses = 0
    return known


def walk_from(roots: dict[str, Any]) -> Walk:
    """A walk through all that is reached now; the last one from there, while it is the same.

    Args:
        roots: as of `Walk`.
    """
    f, *others = roots.values()
    kinds = nn.Module | types.FunctionType | types.MethodType
    if others != [None] or not isinstance(f, kinds):
        return Walk(roots)
    known = known_from(roots)
    if known is not None:
        return known.walk(roots, made_of(f))
    anchors = anchors_of(f)
    key = _key(f, anchors)
    known = _known.get(key)
    before = known is not None and all(map(is_, anchors, (x() for x in known.anchors)))
    if known is not None and before and known.misses > _MOST_MISSES:
        return Walk(roots)
    walk = Walk(roots, anchors)
    if walk.further.lasts and type(anchors[0]) is not types.MethodType:
        _known[key] = Known(roots, walk, 0 if known is None else known.misses + 1)
        if len(_known) > _MOST_FIELDS:
            _known.popitem(last=False)
    else:
        _known.pop(key, None)
    return walk


def anchors_of(f: Any) -> tuple[Any, ...]:
    """The objects by which a field is known again, and with which what is known of it goes.

    A method, and a function that captures modules and other objects, is often made anew for each
    solve: they are the method's object, and the function's code with these objects. Others are
    known by themselves.
    """
    if type(f) is types.MethodType:
        if type(f.__func__) is types.FunctionType and _lives_apart(type(f.__self__)):
            return (f.__self__,)
    elif type(f) is types.FunctionType and not (f.__defaults__ or f.__kwdefaults__ or f.__dict__):
        held = [x for x in captured_by(f) if visit_of(type(x)) is not None]
        if all(map(_lives_apart, map(type, held))):
            return (f.__code__, *held)
    return (f,)


def _lives_apart(kind: type) -> bool:
    """Whether a walk holds no more of an object than its attributes, and it says when it goes."""
    alone = visit_of(kind) in (Walk._module, Walk._object)
    return alone and kind.__dictoffset__ != 0 and kind.__weakrefoffset__ != 0


def _key(f: Any, anchors: tuple[Any, ...]) -> Any:
    """What a field is found by."""
    if f is anchors[0]:
        return id(f)
    ids = tuple(map(id, anchors))
    return (*ids, id(f.__func__)) if type(f) is types.MethodType else ids


def _cells(f: types.FunctionType, captured: list[Any]) -> list[Place]:
    """The places of what a function has captured."""
    rows = zip(f.__code__.co_freevars, cells_of(f), captured, strict=True)
    return [Single.of_cell(cell, seen, name) for name, cell, seen in rows]


def _as_made(f: Any, anchors: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a field is by itself, apart from its anchors and what it holds."""
    if type(f) is types.MethodType:
        return type(f), f.__func__, type(f.__self__)
    if type(f) is not types.FunctionType:
        return (type(f),)
    if anchors[0] is f:
        return type(f), *(getattr(f, part) for part in FUNCTION_PARTS)
    held = captured_by(f)
    simple = (x for x in held if visit_of(type(x)) is None)
    return type(f), f.__globals__, f.__module__, *map(type, held), *simple


def _forget(key: Any, gone: weakref.ref[Any]) -> None:
    known = _known.get(key)
    if known is not None and any(x is gone for x in known.anchors):
        _known.pop(key, None)
