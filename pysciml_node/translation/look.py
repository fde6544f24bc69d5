"""Looks at everything that a callable can reach: what is there, and where to look again."""

from __future__ import annotations

import argparse
import contextvars
import functools
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from operator import attrgetter, itemgetter, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from typing_extensions import override

from pysciml_node.steps.anatomy import (
    FIRST_OF_ITS_OWN,
    function_of,
    module_of,
    parts_of,
    slots_of,
)
from pysciml_node.translation.code import CodeLook
from pysciml_node.translation.entries import (
    CONTAINERS,
    PLAIN,
    ROWS,
    VIEWS,
    Attributes,
    Calls,
    LooseAttributes,
    Same,
    Settled,
    Value,
    as_it_is,
    bytes_of,
    has_numbers,
    value_of,
)
from pysciml_node.translation.given import Given
from pysciml_node.translation.libraries import is_a_value, is_library, is_opaque, is_silent
from pysciml_node.translation.watch import answers, describe
from pysciml_node.translation.watched import forgetting

# Attributes of a module that no evaluation looks at.
_UNSEEN = (
    *("_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)

_METHODS = (
    *(types.FunctionType, staticmethod, classmethod, property),
    *(functools.partialmethod, functools.singledispatchmethod),
)

_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


class Look(CodeLook):
    """A look at everything that a callable can reach, each object once.

    Args:
        root: the callable.

    Attributes:
        watch: the places that were looked at.
        tensors: the distinct tensors, in the order of the walk.
    """

    def __init__(self, root: Any) -> None:
        super().__init__()
        self._root = root
        # What a watch does not keep alive: it is told, or told of, their classes otherwise.
        self._let_go = {id(root)}
        self.tensors: list[Tensor] = []
        # The objects are kept, so that no identity is given out twice.
        self._seen: dict[int, tuple[int, Any]] = {}
        self._indices: dict[int, int] = {}
        self._begin()
        for name in _GLOBAL_HOOKS:
            self.add(getattr(hooks_of_all, name))
        self.add(torch.get_default_dtype())
        self._finish()

    def _begin(self) -> None:
        """Note the field, and what can be reached from it."""
        f, parts = self._root, parts_of(self._root)
        function = function_of(f)
        if function is None:
            self.add(f)
            return
        self._seen[id(f)] = (0, f)
        self._given(parts)
        self._code(function)

    def _given(self, parts: tuple[Any, ...]) -> None:
        """Note what a function was given: first all tensors, which may be others each time."""
        given = self.watch.given = Given([type(part) for part in parts])
        self._let_go.update(map(id, parts))
        gone = forgetting(self.watch)
        tensors = [(place, x) for place, x in enumerate(parts) if isinstance(x, Tensor)]
        for place, x in tensors:
            if id(x) not in self._indices:
                self._number(x)
            given.expect_tensor(place, self._indices[id(x)])
        for place, part in enumerate(parts):
            if not isinstance(part, Tensor):
                given.expect(place, part, gone)
                if place >= FIRST_OF_ITS_OWN:
                    self.add(part)
                continue
            self._tokens.append(self._indices[id(part)])
            if part.__dict__:  # another tensor may have other attributes
                given.expect(place, part, gone)
                self.add(self._dict_of(part))

    @override
    def add(self, x: Any) -> None:
        kind: Any = type(x)
        if kind in PLAIN:
            self._tokens.append(as_it_is(x))
            if kind is str:
                self._mentions.words[x] = None
            return
        seen = self._seen.get(id(x))
        if seen is not None:
            self._tokens.append(("again", seen[0]))
            return
        self._seen[id(x)] = (len(self._seen), x)
        _handler(kind)(self, x)

    def _finish(self) -> None:
        """At the end of a walk, note what code takes from modules, and what it asks of tensors."""
        self._look_into_modules()
        mentions, watch = self._mentions, self.watch
        mentions.has_gradients |= any("grad" in vars(module) for module in self._modules)
        watch.fickle = mentions.why_fickle()
        watch.asked = mentions.asked()
        watch.answers = answers(watch.asked, self.tensors)
        self._tokens += watch.answers
        if mentions.reads_gradients and not mentions.has_gradients:
            watch.fickle = f"reads the gradients of tensors, in {mentions.reads_gradients}"

    @override
    def _at(self, container: Any, key: Any, x: Any) -> None:
        if not isinstance(x, Tensor):
            self.watch.expect_item(container, key, x)
            self.add(x)
        elif id(x) in self._indices:
            self.watch.expect_again(container, key, self._indices[id(x)])
            self._tokens.append(("tensor", self._indices[id(x)]))
        else:
            self._tensor(x, container, key)

    def _number(self, x: Tensor) -> None:
        self._seen[id(x)] = (len(self._seen), x)
        self._indices[id(x)] = len(self.tensors)
        self.tensors.append(x)
        self._tokens.append(describe(x))
        self.watch.described.append(describe(x))

    def _tensor(self, x: Tensor, container: Any, key: Any) -> None:
        self._number(x)
        # Before what the tensor holds itself: a second look finds them in the same order.
        self.watch.expect_tensor(container, key)
        if x.__dict__:  # another tensor may have other attributes
            self.watch.expect_item(container, key, x)
            self._dict(self._dict_of(x))

    def _loose_tensor(self, x: Tensor) -> None:
        """A tensor at a place that cannot change: a set's, or a key."""
        self._tensor(x, (x,), 0)

    def _kind(self, x: Any) -> None:
        """Note the class of an object, which can be exchanged."""
        if id(x) not in self._let_go:
            self.watch.expect_item(Attributes(x), "__class__", type(x))
        self.add(type(x))

    def _dict_of(self, x: Any) -> Any:
        """The attributes of an object; their dict can be exchanged."""
        self._expect_attribute(x, "__dict__")
        return x.__dict__

    def _expect_attribute(self, x: Any, name: str) -> None:
        """Look later whether an attribute that is in no dict is still the same object."""
        place = (LooseAttributes if id(x) in self._let_go else Attributes)(x)
        self.watch.expect_item(place, name, getattr(x, name))

    def _module(self, x: nn.Module) -> None:
        self._kind(x)
        values = self._dict_of(x)
        self._mentions.has_gradients |= "grad" in values
        self.watch.expect_order(values)
        for key, value in list(values.items()):
            if key not in _UNSEEN:
                self._tokens.append(key)
                self._at(values, key, value)
        self._slots(x)
        owner = next(owner for owner in type(x).__mro__ if "forward" in vars(owner))
        if is_library(module_of(owner)):
            self._of_library(vars(owner), "forward")

    @override
    def _dict(self, x: Any) -> None:
        self._tokens.append((type(x), len(x)))
        self._mentions.has_gradients |= "grad" in x
        self.watch.expect_order(x)
        for key, value in list(x.items()):  # which another thread may add to
            if type(key) in PLAIN:
                self._tokens.append(as_it_is(key))
            else:
                self.add(key)
            self._at(x, key, value)

    def _sequence(self, x: Any) -> None:
        self._tokens.append((type(x), len(x)))
        self.watch.expect_size(x)
        for i, value in enumerate(list(x)):
            self._at(x, i, value)
        self._further(x)

    @override
    def _made_of(self, x: Any, *parts: Any) -> None:
        """An object that does not change, of parts that may."""
        self._tokens.append(type(x))
        self.add(parts)

    def _partial(self, x: functools.partial[Any]) -> None:
        """A partial function: it can be filled again as a whole, and may have attributes."""
        for name in ("func", "args", "keywords"):
            self._expect_attribute(x, name)
        self._made_of(x, x.func, x.args, x.keywords)
        self._further(x)

    def _set(self, x: Any) -> None:
        self._tokens.append((type(x), frozenset(as_it_is(e) for e in x if type(e) in PLAIN)))
        self.watch.expect_equal(lambda: frozenset(map(id, x)))
        for value in list(x):
            if type(value) not in PLAIN:
                self.add(value)
        self._further(x)

    def _class(self, x: type) -> None:
        self._tokens.append(Same(x))
        if type(x) is not type:
            self.add(type(x))
        self.watch.expect_item(Attributes(x), "__mro__", x.__mro__)
        for owner in x.__mro__:
            if is_library(module_of(owner)):
                continue
            self._stands_in(owner)
            self._tokens.append(Same(owner))
            held = vars(owner)
            self._mentions.has_gradients |= "grad" in held
            self.watch.expect_order(held)
            for name, value in list(held.items()):
                if isinstance(value, _METHODS) or not name.startswith("__"):
                    self._tokens.append(name)
                    self._at(held, name, value)

    def _array(self, x: Any) -> None:
        def all_of() -> tuple[str, tuple[int, ...], bytes]:
            return str(x.dtype), x.shape, x.tobytes()

        self._tokens.append(all_of())
        self.watch.expect_equal(all_of)
        if x.dtype.hasobject:  # whose bytes are addresses
            self.add(tuple(x.ravel()))
        self._further(x)

    def _buffer(self, x: Any) -> None:
        """Numbers in a row of Python's own, or of C's."""
        numbers = bytes_of(x)
        self._tokens.append((type(x), getattr(x, "typecode", None), numbers))
        self.watch.expect_equal(lambda: bytes_of(x))

    def _mapping(self, x: Any) -> None:
        """A dict, or a container like it: a wrapper of several, a configuration."""
        self._dict(x)
        self._further(x)

    def _variable(self, x: Any) -> None:
        held = Value(lambda: value_of(x))
        self._at(held, "value", held["value"])

    def _local(self, x: threading.local) -> None:
        """What a thread has for itself: another one looks at its own."""
        self._kind(x)
        self._tokens.append(list(vars(x)))
        self.watch.expect_equal(lambda: list(vars(x)))
        for name, value in vars(x).items():
            self._at(Attributes(x), name, value)

    def _reference(self, x: Any) -> None:
        self._at(Value(x), "value", x())

    def _keeping(self, x: Any) -> None:
        """A function that keeps its results."""
        self.add(x.__wrapped__)
        if is_library(module_of(x.__wrapped__)):
            return
        self._tokens.append(Calls(*x.cache_info()[:2]))
        self.watch.expect_equal(lambda: x.cache_info()[:2])

    def _opaque(self, x: Any) -> None:
        """An object of another library: itself, and the numbers that it holds."""
        self._tokens.append(Same(x))
        if is_silent(type(x)) and not hasattr(x, "__next__"):
            return
        self.watch.sealed = True
        slots = [name for name, _ in slots_of(type(x)) if hasattr(x, name)]
        self._numbers(x, Attributes(x), [(name, getattr(x, name)) for name in slots])
        held = getattr(x, "__dict__", None)
        if not isinstance(held, dict):
            return
        self.watch.expect_item(LooseAttributes(x), "__dict__", held)
        self.watch.expect_size(held)
        self._numbers(x, held, list(held.items()))

    def _numbers(self, x: Any, place: Any, attributes: list[tuple[str, Any]]) -> None:
        """Note the attributes of a library's object in which an evaluation may find numbers."""
        for name, value in attributes:
            if type(value) is type(x) or has_numbers(value):
                self._tokens.append(name)
                self._at(place, name, value)

    def _object(self, x: Any) -> None:
        self._kind(x)
        self._parts(x)
        kind: Any = type(x)
        if getattr(x, "__dict__", None) is None or is_a_value(kind):
            self._tokens.append(Same(x))

    def _proxy(self, x: Any) -> None:
        """A weak reference that stands for its object."""
        self.add(x.__class__)
        self._parts(x)

    def _further(self, x: Any) -> None:
        """What a container of a user's class holds besides its entries."""
        held = hasattr(x, "__dict__") or slots_of(type(x))
        if held and type(x) not in CONTAINERS:
            self._kind(x)
            self._parts(x)

    def _parts(self, x: Any) -> None:
        """The attributes of an object: in its dict, and in slots."""
        if getattr(x, "__dict__", None) is not None:
            self._dict(self._dict_of(x))
        self._slots(x)

    def _slots(self, x: Any) -> None:
        parts = Attributes(x)
        for name, _ in slots_of(type(x)):
            if hasattr(x, name):
                self._tokens.append(name)
                self._at(parts, name, getattr(x, name))


_KINDS: tuple[tuple[Any, Callable[[Look, Any], None]], ...] = (
    (Tensor, Look._loose_tensor),
    (nn.Module, Look._module),
    ((dict, Mapping), Look._mapping),
    ((list, tuple, deque), Look._sequence),
    ((set, frozenset), Look._set),
    (types.FunctionType, Look._function),
    (types.BuiltinFunctionType, Look._builtin),
    (types.MethodWrapperType, Look._builtin),
    (types.CodeType, Look._text),
    (types.CellType, Look._cell),
    (types.ModuleType, Look._python_module),
    (type, Look._class),
    (functools.partial, Look._partial),
    (VIEWS, lambda walk, x: walk._made_of(x, x.mapping)),
    (super, lambda walk, x: walk._made_of(x, x.__thisclass__, x.__self__)),
    (types.MethodType, lambda walk, x: walk._made_of(x, x.__func__, x.__self__)),
    ((staticmethod, classmethod), lambda walk, x: walk._made_of(x, x.__func__)),
    ((attrgetter, itemgetter, methodcaller), lambda walk, x: walk._made_of(x, *x.__reduce__())),
    (functools._lru_cache_wrapper, Look._keeping),
    (property, lambda walk, x: walk._made_of(x, x.fget, x.fset)),
    ((np.ndarray, np.generic), Look._array),
    (ROWS, Look._buffer),
    (contextvars.ContextVar, Look._variable),
    (weakref.ref, Look._reference),
    (weakref.ProxyTypes, Look._proxy),
    (argparse.Namespace, Look._object),
    (threading.local, Look._local),
    (Settled, lambda walk, x: walk._tokens.append(Same(x))),
)


@functools.lru_cache(maxsize=1024)
def _handler(kind: Any) -> Callable[[Look, Any], None]:
    """The method that walks the objects of a class."""
    for kinds, handler in _KINDS:
        if issubclass(kind, kinds):
            return handler
    return Look._opaque if is_opaque(kind) else Look._object
