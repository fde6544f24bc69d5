"""Snapshots of everything that a callable can reach, noted so that two of them can be compared."""

from __future__ import annotations

import argparse
import array
import contextvars
import functools
import os
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from pysciml_node.steps.anatomy import imports_in, names_in, slots_of
from pysciml_node.translation.entries import Attributes, Calls, Value, bytes_of
from pysciml_node.translation.recent import RecentOf, reference
from pysciml_node.translation.watch import Watch, describe, freedom

_PLAIN = frozenset(
    (
        *(int, float, bool, complex, str, bytes, type(None), type(...), slice, range),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)

# Containers that hold nothing but their entries.
_CONTAINERS = frozenset(
    (dict, OrderedDict, defaultdict, types.MappingProxyType, list, tuple, deque, set, frozenset)
)

# Attributes of a module that no evaluation looks at.
_UNSEEN = (
    *("_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)

# Libraries whose objects hold numbers that a field computes with.
_WALKED = ("torch", "types", "pysciml_node")

# Libraries whose objects an evaluation does not change.
_SILENT = frozenset(
    (
        *("builtins", "numpy", "torch", "functools", "operator", "enum", "typing", "abc", "_abc"),
        *("_thread", "weakref", "pathlib", "datetime", "fractions", "decimal", "re", "inspect"),
    )
)

# Functions whose answer is that of the place where a solve is called.
_MODES = frozenset(("is_grad_enabled", "is_inference_mode_enabled"))

# What derivatives that are taken inside a field are found by.
_DERIVATIVES = frozenset(("autograd", "func"))

# What reads the environment.
_ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb"))

# Kinds of globals whose inside matters only to code that names them.
_DEFINED = (type, types.FunctionType, types.BuiltinFunctionType)

_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


class Snapshot(NamedTuple):
    """Everything that a callable can reach.

    Attributes:
        watch: the places that were looked at.
        tensors: the distinct tensors, in the order of the walk: equal tokens mean the same places.
    """

    watch: Watch
    tensors: list[Tensor]

    @property
    def tokens(self) -> list[Any]:
        """Structure and plain values, in the order of the walk.

        For a tensor they hold dtype, shape and device, and not its numbers.
        """
        return self.watch.tokens

    @property
    def sealed(self) -> bool:
        """Whether there are objects of other libraries, whose inside is not looked at."""
        return self.watch.sealed

    @property
    def fickle(self) -> str | None:
        """What code does that may come out differently at each solve, in words."""
        return self.watch.fickle

    @staticmethod
    def of(f: Any) -> Snapshot:
        """Look at everything that `f` can reach: attributes, closures, globals, hooks.

        The walk is skipped where nothing has changed since the last one.
        """
        known = _watched.get(f)
        if known is not None:
            tensors = known.tensors()
            if tensors is not None:
                return Snapshot(known, tensors)
        walk = _Walk(f)
        walk.add(f)
        for name in _GLOBAL_HOOKS:
            walk.add(getattr(hooks_of_all, name))
        walk.add(torch.get_default_dtype())
        walk.finish()
        _watched[f] = walk.watch
        return Snapshot(walk.watch, walk.tensors)

    def changes(self, later: Snapshot) -> frozenset[int]:
        """Places at which a later snapshot differs, if both have the same structure.

        Calls of functions that keep their results do not count: what they keep decides.
        """
        if len(self.tokens) != len(later.tokens):
            return frozenset()
        pairs = zip(self.tokens, later.tokens, strict=True)
        changed = [i for i, (before, after) in enumerate(pairs) if before != after]
        return frozenset(i for i in changed if not isinstance(later.tokens[i], Calls))


_watched: RecentOf[Watch] = RecentOf(64)


class _Same:
    """Compares an object by its identity; keeps it alive only where it must."""

    __slots__ = ("_get",)

    def __init__(self, x: Any) -> None:
        self._get = reference(x)

    def __eq__(self, other: object) -> bool:
        referent = self._get()
        return isinstance(other, _Same) and referent is not None and other._get() is referent

    __hash__ = None  # type: ignore[assignment]


class Settled:
    """An object that does the same as long as it is itself, with memory that is its own affair."""


class _Walk:
    """Walks through everything that can be reached, each object once."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self.watch = Watch()
        self.tensors: list[Tensor] = []
        self._tokens = self.watch.tokens
        # The objects are kept, so that no identity is given out twice.
        self._seen: dict[int, tuple[int, Any]] = {}
        self._indices: dict[int, int] = {}
        # Modules of the user's, and all names in code: any code may be handed any module.
        self._modules: list[types.ModuleType] = []
        self._names: dict[str, None] = {"__getattr__": None}
        # Code mentions `grad`; something that it reaches has an attribute of that name.
        self._reads_gradients = self._has_gradients = False

    def add(self, x: Any) -> None:
        """Note an object, and what can be reached from it."""
        kind: Any = type(x)
        if kind in _PLAIN:
            self._tokens.append((kind, x))
            return
        seen = self._seen.get(id(x))
        if seen is not None:
            self._tokens.append(seen[0])
            return
        self._seen[id(x)] = (len(self._seen), x)
        _handler(kind)(self, x)

    def finish(self) -> None:
        """At the end of a walk, note what code takes from modules, and what it asks of tensors."""
        self._look_into_modules()
        self._has_gradients |= any("grad" in vars(module) for module in self._modules)
        if self.watch.asks_freedom:
            self.watch.free = freedom(self.tensors)
            self._tokens += self.watch.free
        if self._reads_gradients and not self._has_gradients:
            self.watch.fickle = "reads the gradients of tensors"

    def _look_into_modules(self) -> None:
        """Note the names in modules, some of which lead to more names and more modules."""
        looked: set[tuple[int, str]] = set()
        while True:
            pairs = [(id(x), name) for x in self._modules for name in self._names]
            new = [pair for pair in pairs if pair not in looked]
            if not new:
                return
            looked.update(new)
            for module, name in new:
                self._entry(vars(self._seen[module][1]), name)

    def _at(self, container: Any, key: Any, x: Any) -> None:
        """Note what stands at a place."""
        if not isinstance(x, Tensor):
            self.watch.expect_item(container, key, x)
            self.add(x)
        elif id(x) in self._indices:
            self.watch.expect_again(container, key, self._indices[id(x)])
            self._tokens.append(self._indices[id(x)])
        else:
            self._seen[id(x)] = (len(self._seen), x)
            self._tensor(x, container, key)

    def _tensor(self, x: Tensor, container: Any, key: Any) -> None:
        self._indices[id(x)] = len(self.tensors)
        self.tensors.append(x)
        self._tokens.append(describe(x))
        # Before what the tensor holds itself: a second look finds them in the same order.
        self.watch.expect_tensor(container, key, x)
        if x.__dict__:
            self._dict(x.__dict__)

    def _loose_tensor(self, x: Tensor) -> None:
        """A tensor at a place that cannot change: a set's, or a key."""
        self._tensor(x, (x,), 0)

    def _kind(self, x: Any) -> None:
        """Note the class of an object, which can be exchanged."""
        if self._root is not x:  # a watch does not keep it alive
            self.watch.expect_item(Attributes(x), "__class__", type(x))
        self.add(type(x))

    def _module(self, x: nn.Module) -> None:
        self._kind(x)
        values = x.__dict__
        self._has_gradients |= "grad" in values
        self.watch.expect_order(values)
        for key, value in values.items():
            if key not in _UNSEEN:
                self._tokens.append(key)
                self._at(values, key, value)
        self._slots(x)

    def _dict(self, x: Any) -> None:
        self._tokens.append(len(x))
        self._has_gradients |= "grad" in x
        self.watch.expect_order(x)
        for key, value in x.items():
            if type(key) in _PLAIN:
                self._tokens.append(key)
            else:
                self.add(key)
            self._at(x, key, value)

    def _sequence(self, x: Any) -> None:
        self._tokens.append((type(x), len(x)))
        self.watch.expect_size(x)
        for i, value in enumerate(x):
            self._at(x, i, value)
        self._further(x)

    def _set(self, x: Any) -> None:
        self._tokens.append((type(x), frozenset(e for e in x if type(e) in _PLAIN)))
        self.watch.expect_equal(lambda: frozenset(map(id, x)))
        for value in x:
            if type(value) not in _PLAIN:
                self.add(value)
        self._further(x)

    def _function(self, f: types.FunctionType) -> None:
        self._tokens.append(f.__code__)
        names = names_in(f.__code__)
        if _is_library(f.__module__):
            # It does not change while a program runs, but what was handed to it may.
            self._cells(f)
            return
        # The parts of a function can be exchanged, though hardly anybody does.
        parts = Attributes(f)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.watch.expect_item(parts, name, getattr(f, name))
        self.add(f.__defaults__)
        self.add(f.__kwdefaults__)
        self._dict(f.__dict__)
        self._asks(names, f.__globals__)
        self._cells(f)
        self._names.update(dict.fromkeys(names))
        for name in names:  # of globals, and of attributes, which may become those of globals
            self._entry(f.__globals__, name)
        for name in imports_in(f.__code__, f.__globals__.get("__package__")):
            self._entry(sys.modules, name)

    def _entry(self, held: dict[str, Any], name: str) -> None:
        """Note what a module has by a name, or that it has nothing."""
        if name in held:
            self._tokens.append(name)
            self._at(held, name, held[name])
        else:
            self.watch.expect_none(held, name)

    def _cells(self, f: types.FunctionType) -> None:
        """Note what a function captures."""
        for cell in f.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # the name is not bound yet
                self._tokens.append("unbound")
                continue
            self._at(Attributes(cell), "cell_contents", content)

    def _asks(self, names: tuple[str, ...], held: dict[str, Any]) -> None:
        """Note what code asks for that stands in no place."""
        if not _MODES.isdisjoint(names):
            self.watch.fickle = "asks whether gradients are recorded"
        self.watch.asks_freedom |= "requires_grad" in names
        derivatives = "grad" in held or not _DERIVATIVES.isdisjoint(names)
        self._reads_gradients |= "grad" in names and not derivatives
        if not _ENVIRONMENT.isdisjoint(names):
            self._tokens.append(dict(os.environ))
            self.watch.expect_equal(lambda: dict(os.environ))
        if "globals" in names and "globals" not in held:
            self._every_global(held)

    def _every_global(self, held: dict[str, Any]) -> None:
        """Note all that a module holds, for code that looks it up by words."""
        self.watch.expect_order(held)
        for name, value in list(held.items()):
            if name.startswith("__"):
                continue
            self._tokens.append(name)
            if isinstance(value, _DEFINED):
                self._tokens.append(_Same(value))
                self.watch.expect_item(held, name, value)
            else:
                self._at(held, name, value)

    def _python_module(self, x: types.ModuleType) -> None:
        self._tokens.append(_Same(x))
        if not _is_library(x.__name__):
            self._modules.append(x)

    def _class(self, x: type) -> None:
        self._tokens.append(_Same(x))
        if type(x) is not type:
            self.add(type(x))
        for owner in x.__mro__:
            if _is_library(owner.__module__):
                continue
            held = vars(owner)
            self._has_gradients |= "grad" in held
            self.watch.expect_order(held)
            for name, value in held.items():
                if isinstance(value, types.FunctionType) or not name.startswith("__"):
                    self._tokens.append(name)
                    self._at(held, name, value)

    def _array(self, x: Any) -> None:
        def all_of() -> tuple[str, tuple[int, ...], bytes]:
            return str(x.dtype), x.shape, x.tobytes()

        self._tokens.append(all_of())
        self.watch.expect_equal(all_of)
        if x.dtype.hasobject:  # whose bytes are addresses
            self.add(tuple(x.ravel()))

    def _buffer(self, x: Any) -> None:
        """Numbers in a row of Python's own."""
        numbers = bytes_of(x)
        self._tokens.append((type(x), getattr(x, "typecode", None), numbers))
        self.watch.expect_equal(lambda: bytes_of(x))

    def _mapping(self, x: Any) -> None:
        """A dict, or a container like it: a wrapper of several, a configuration."""
        self._dict(x)
        self._further(x)

    def _variable(self, x: Any) -> None:
        self._at(Value(functools.partial(x.get, None)), "value", x.get(None))

    def _reference(self, x: Any) -> None:
        self._at(Value(x), "value", x())

    def _keeping(self, x: Any) -> None:
        """A function that keeps its results."""
        self.add(x.__wrapped__)
        if _is_library(x.__module__):
            return
        self._tokens.append(Calls(*x.cache_info()[:2]))
        self.watch.expect_equal(lambda: x.cache_info()[:2])

    def _opaque(self, x: Any) -> None:
        """An object of another library: itself, and the numbers that it holds directly."""
        self._tokens.append(_Same(x))
        if type(x).__module__.partition(".")[0] in _SILENT and not hasattr(x, "__next__"):
            return
        self.watch.sealed = True
        held = getattr(x, "__dict__", None)
        if not isinstance(held, dict):
            return
        self.watch.expect_size(held)
        for name, value in held.items():
            if type(value) in _PLAIN or isinstance(value, Tensor | np.ndarray):
                self._tokens.append(name)
                self._at(held, name, value)

    def _object(self, x: Any) -> None:
        self._kind(x)
        self._parts(x)
        if getattr(x, "__dict__", None) is None:
            self._tokens.append(_Same(x))

    def _further(self, x: Any) -> None:
        """What a container of a user's class holds besides its entries."""
        held = hasattr(x, "__dict__") or slots_of(type(x))
        if held and type(x) not in _CONTAINERS:
            self._kind(x)
            self._parts(x)

    def _parts(self, x: Any) -> None:
        """The attributes of an object: in its dict, and in slots."""
        values = getattr(x, "__dict__", None)
        if values is not None:
            self._dict(values)
        self._slots(x)

    def _slots(self, x: Any) -> None:
        parts = Attributes(x)
        for name, _ in slots_of(type(x)):
            if hasattr(x, name):
                self._tokens.append(name)
                self._at(parts, name, getattr(x, name))


_KINDS: tuple[tuple[Any, Callable[[_Walk, Any], None]], ...] = (
    (Tensor, _Walk._loose_tensor),
    (nn.Module, _Walk._module),
    ((dict, Mapping), _Walk._mapping),
    ((list, tuple, deque), _Walk._sequence),
    ((set, frozenset), _Walk._set),
    (types.FunctionType, _Walk._function),
    (types.ModuleType, _Walk._python_module),
    (type, _Walk._class),
    (functools.partial, lambda walk, x: walk.add((x.func, x.args, x.keywords))),
    (types.MethodType, lambda walk, x: walk.add((x.__func__, x.__self__))),
    ((staticmethod, classmethod), lambda walk, x: walk.add(x.__func__)),
    (functools._lru_cache_wrapper, _Walk._keeping),
    (property, lambda walk, x: walk.add((x.fget, x.fset))),
    ((np.ndarray, np.generic), _Walk._array),
    ((array.array, bytearray, memoryview), _Walk._buffer),
    (contextvars.ContextVar, _Walk._variable),
    (weakref.ref, _Walk._reference),
    ((argparse.Namespace, threading.local), _Walk._object),
    (Settled, lambda walk, x: walk._tokens.append(_Same(x))),
)


@functools.lru_cache(maxsize=1024)
def _handler(kind: Any) -> Callable[[_Walk, Any], None]:
    """The method that walks the objects of a class."""
    for kinds, handler in _KINDS:
        if issubclass(kind, kinds):
            return handler
    opaque = _is_library(kind.__module__) and kind.__module__.partition(".")[0] not in _WALKED
    return _Walk._opaque if opaque else _Walk._object


@functools.cache
def _is_library(name: str | None) -> bool:
    """Whether a module is installed, and so does not change while a program runs."""
    top = str(name).partition(".")[0]
    if top in ("torch", "pysciml_node") or top in sys.stdlib_module_names:
        return top != "__main__"
    # What a module answers for names that it lacks is not asked.
    file = getattr(sys.modules.get(str(name)), "__dict__", {}).get("__file__")
    places = (sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    return file is not None and any(file.startswith(place) for place in places)
