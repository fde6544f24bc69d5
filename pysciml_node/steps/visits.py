"""What a walk notes of objects of each kind, and what it goes on to from there.

It reads attributes, closures, globals and the contents of lists and dicts, but no property, and
calls nothing.
"""

from __future__ import annotations

import functools
import sys
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pysciml_node.problems.ode import Problem
from pysciml_node.steps.anatomy import (
    FUNCTION_PARTS,
    UNBOUND,
    content_of,
    globals_in,
    is_library,
    module_of,
    names_in,
    own_classes,
    reads_gradients,
    slots_of,
)
from pysciml_node.steps.behind import APART, MEMORY, SIMPLE, is_stream
from pysciml_node.steps.chosen import ForThese
from pysciml_node.steps.exchanged import (
    imported_by,
    kept_in_library,
    libraries_of,
    put_into_library,
)
from pysciml_node.steps.further import SMALL, Further, hold_others, may_last
from pysciml_node.steps.outside import is_outside
from pysciml_node.steps.places import MISSING, Dicts, Items, Names, Place, Single

# A limit of the entries of a list or dict. Whatever lies beyond is left to the check of every
# evaluation.
_MOST_ENTRIES = 4_096
# So many classes are known at once: some are made in passing.
_MOST_KINDS = 20_000

# What classes count in, as in `Field.calls += 1`.
_NUMBERS = (int, float, complex)

# Modules of the standard library whose instances merely hold others.
_HOLDERS = frozenset({"collections", "types", "functools", "dataclasses"})

# Dicts of a module whose entries read as attributes in its code.
_MODULE_DICTS = frozenset({"_parameters", "_buffers", "_modules"})
_OF_MODULES = frozenset(vars(nn.Module()))
_EMPTY: frozenset[type] = frozenset({bool, dict, type(nn.Module()._forward_hooks), set, type(None)})


class Visits(ABC):
    """What has been met up to now, and the visits of objects by their kinds.

    Args:
        roots: the identities of the objects that the walk begins with, and of others that are not
            to be kept alive by what is kept of it.

    Attributes:
        tensors: all tensors, each once.
        arrays: all arrays of NumPy, and what is held by objects that are not looked into, as
            tensors that share their memory.
        names: names of their places, by their ids.
        closed: whether there are objects that are not looked into, and so not put back.
        outside: what answers otherwise at each evaluation, and is not put back, in words.
        generators: the random generators, Python's and NumPy's among them.
        lazy: whether there are parameters that the first evaluation will make.
        chosen: the only tensors that receive gradients, where they have been chosen.
        modules: the modules, with their names.
        scripts: the names of compiled modules.
        caches: functions that keep their results, by `functools`.
        written: buffers that torch changes without counting.
        places: what was read, the entries of the roots first.
        met_apart: whether there was an object of `APART`.
        further: what else decides where the walk goes, for a second look.
    """

    def __init__(self, roots: set[int]) -> None:
        self.tensors: list[Tensor] = []
        self.arrays: list[Tensor] = []
        self.names: dict[int, str] = {}
        self.generators: list[Any] = []
        self.outside: list[str] = []
        self.lazy = self.closed = self.met_apart = False
        self.chosen: tuple[Tensor, ...] | None = None
        self.modules: list[tuple[str, nn.Module]] = []
        self.scripts: list[str] = []
        self.caches: list[Any] = []
        self.written: list[Tensor] = []
        self.places: list[Place] = []
        self.further = Further()
        self._roots, self._empty = roots, Dicts()
        # Keeps visited objects alive, so that no id is used twice.
        self._visited: dict[int, Any] = {}
        self._classes: set[type] = set()
        self._entered: set[tuple[int, tuple[str, ...]]] = set()
        self._shut: list[tuple[Any, str]] = []

    @abstractmethod
    def _see(self, value: Any, name: str) -> None:
        """Put a value in the queue, where it can lead to a tensor."""

    def _attributes(self, owner: dict[Any, Any], prefix: str) -> None:
        """The entries of a dict whose keys are names."""
        seen = owner.copy()
        self.places.append(Names(owner, seen, prefix))
        for key, value in seen.items():
            # Most entries lead nowhere, and need no name.
            if value is not None and _visitors.get(type(value), MISSING) is not None:
                self._see(value, f"{prefix}{key}")

    def _tensor(self, value: Tensor, name: str) -> None:
        if is_lazy(value):
            self.lazy = True
            return
        others = hold_others((value,))
        self.further.lasts &= may_last(value) and not others
        # Its attributes are in no place.
        self.closed |= others and bool(value.__dict__)
        self.tensors.append(value)
        self.names[id(value)] = name

    def _array(self, value: np.ndarray[Any, Any], name: str) -> None:
        """What a field may make a tensor of whenever it likes; constants are passed over."""
        numbers = not value.dtype.hasobject
        self.further.lasts &= numbers and value.size <= SMALL and value.flags.writeable
        if value.flags.writeable:
            try:
                shared = torch.from_numpy(value)
            except (TypeError, ValueError):  # of words, say, or against its order
                self._pass_over()
                return
            self.arrays.append(shared)
            self.names[id(shared)] = name

    def _for_these(self, value: ForThese, name: str) -> None:
        self.chosen = value.tensors
        self._object(value, name)

    def _closed(self, value: Any, name: str) -> None:
        """What is not looked into, and may hold anything: the field, say."""
        self._pass_over()
        self.generators += [value] * is_stream(value)
        self._shut.append((value, name))

    def _pass_over(self) -> None:
        """What is neither looked into nor put back may lead anywhere."""
        self.further.lasts, self.closed = False, True

    def _builtin(self, value: types.BuiltinFunctionType, name: str) -> None:
        if not isinstance(value.__self__, types.ModuleType | type | None):
            self._closed(value, name)
        self._look_outside(value)

    def _look_outside(self, value: Any) -> None:
        """Note what answers otherwise at each evaluation, and is not put back."""
        if is_outside(value):
            self.outside.append(f"{value.__qualname__}()")

    def _apart(self, value: Any, name: str) -> None:
        self.met_apart, self.further.lasts = True, False

    def _generator(self, value: torch.Generator, name: str) -> None:
        self.generators.append(value)

    def _module(self, value: nn.Module, name: str) -> None:
        kind = type(value)
        self._class(kind, name)
        self._expect_kind(value)
        self.further.expect_attribute(kind, "forward")
        self._see(kind.forward, f"{name}.forward")
        self.modules.append((name, value))
        if isinstance(value, nn.modules.batchnorm._NormBase) and value.training:
            # Torch does not count these changes as such.
            self.written += [x for x in (value.running_mean, value.running_var) if x is not None]
        # Messages name tensors as the user does: `f.net.0.weight`.
        attributes = value.__dict__
        seen = attributes.copy()
        self.places.append(Names(attributes, seen, f"{name}."))
        for key, held in seen.items():
            if key in _OF_MODULES and type(held) in _EMPTY and not held:
                self.further.expect_empty(held)
                if key in _MODULE_DICTS:
                    self._empty.owners.append(held)
                    self._empty.names.append(f"{name}.")
                continue
            if key in _MODULE_DICTS:
                self._visited[id(held)] = held
                self._attributes(held, f"{name}.")
            elif type(held) is not bool and key != "_non_persistent_buffers_set":  # of names
                self._see(held, f"{name}.{key}")

    def _script(self, value: torch.jit.ScriptModule, name: str) -> None:
        """A compiled module hides its tensors: they can be named, but not replaced."""
        self.further.lasts = False
        self.scripts.append(name)
        for key, held in (*value.named_parameters(), *value.named_buffers()):
            if id(held) not in self._visited:
                self._visited[id(held)] = held
                self._tensor(held, f"{name}.{key}")

    def _mapping(self, value: dict[Any, Any], name: str) -> None:
        if len(value) > _MOST_ENTRIES:
            self._pass_over()
            return
        seen = dict(value)
        self.places.append(Names(value, seen, name))
        self.places[-1].container = value
        for key, held in seen.items():
            self._see(held, f"{name}[{key!r}]")

    def _sequence(self, value: list[Any] | deque[Any], name: str) -> None:
        if len(value) > _MOST_ENTRIES:
            self._pass_over()
            return
        self.places.append(Items(value, list(value), name))
        self._fixed(value, name)

    def _fixed(self, value: Collection[Any], name: str) -> None:
        """The members of a container that cannot be changed, or of a set, which has no places."""
        if isinstance(value, set) or len(value) > _MOST_ENTRIES:
            self._pass_over()
        for i, held in zip(range(_MOST_ENTRIES), value, strict=False):
            self._see(held, f"{name}[{i}]")

    def _function(self, value: types.FunctionType, name: str) -> None:
        code = value.__code__
        if id(value) not in self._roots:
            for part in FUNCTION_PARTS:
                self.further.expect_attribute(value, part)
        for variable, cell in zip(code.co_freevars, value.__closure__ or (), strict=False):
            self._cell(cell, variable)
        if value.__defaults__:
            self._single(value, "__defaults__", name)
        if value.__kwdefaults__:
            self._see(value.__kwdefaults__, name)
        if value.__dict__:
            self._visited.setdefault(id(value.__dict__), value.__dict__)
            self._attributes(value.__dict__, f"{name}.")
        else:
            self.further.expect_empty(value.__dict__)
        held, names = value.__globals__, names_in(code)
        libraries = libraries_of(code, held, self.further)
        if is_library(module_of(value)):
            self._look_outside(value)
        else:
            self._globals(held, globals_in(code), names, "")
            for owner, entries in kept_in_library(code, libraries):
                self._kept(owner, entries)
            if reads_gradients(code, held):
                self.outside.append(".grad")
            for module in imported_by(code, held, self.further):
                if not is_library(module.__name__):
                    self._globals(vars(module), names, names, f"{module.__name__}.")
        for key, x in put_into_library(code, libraries, self.further):
            self._see(x, key)

    def _kept(self, owner: types.ModuleType | type, seen: dict[str, Any]) -> None:
        """What a module or a class of a library holds that evaluations may change."""
        if isinstance(owner, type):
            for key, held in seen.items():
                self._class_attribute(owner, key, held)
            return
        prefix = f"{owner.__name__}."
        self.places.append(Names(owner.__dict__, seen, prefix, whole=False))
        for key, held in seen.items():
            if held is not MISSING:
                self._see(held, f"{prefix}{key}")

    def _globals(
        self, owner: dict[str, Any], names: tuple[str, ...], inner: tuple[str, ...], prefix: str
    ) -> None:
        """The entries `names` of a module, and the entries `inner` of modules among them."""
        # Modules name one another: a round ends where it began.
        place = (id(owner), names)
        if place in self._entered:
            return
        self._entered.add(place)
        seen = {}
        for key in names:
            value = owner.get(key, MISSING)
            if value is MISSING:
                self.further.expect_none(owner, key)
                continue
            if isinstance(value, types.ModuleType):
                self.further.expect_item(owner, key, value)
                if value.__dict__ is not owner and not is_library(value.__name__):
                    # Its attributes may be more than its entries.
                    computes = hasattr(value, "__getattr__")
                    self.further.lasts &= type(value) is types.ModuleType and not computes
                    self._globals(value.__dict__, inner, inner, f"{key}.")
            else:
                seen[key] = value
        if seen:
            self.places.append(Names(owner, seen, prefix, whole=False))
            for key, value in seen.items():
                self._see(value, f"{prefix}{key}")

    def _cell(self, cell: types.CellType, name: str) -> None:
        if id(cell) in self._visited:
            return
        self._visited[id(cell)] = cell
        seen = content_of(cell)
        if seen is not UNBOUND:
            self.places.append(Single.of_cell(cell, seen, name))
            self._see(seen, name)
        else:
            self.further.lasts = False

    def _single(self, owner: Any, key: str, name: str) -> None:
        """An attribute that is no entry of a dict."""
        self.further.lasts &= id(owner) not in self._roots
        seen = getattr(owner, key)
        self.places.append(
            Single(
                lambda: getattr(owner, key),
                lambda value: setattr(owner, key, value),
                seen,
                name,
            )
        )
        self._see(seen, name)

    def _method(self, value: types.MethodType, name: str) -> None:
        self._see(value.__self__, getattr(value.__self__, "__name__", name.partition(".")[0]))
        self._see(value.__func__, name)

    def _partial(self, value: functools.partial[Any], name: str) -> None:
        def put(args: Any) -> None:
            cast(Any, value).__setstate__((value.func, args, value.keywords, value.__dict__))

        self.further.lasts &= id(value) not in self._roots
        self.further.expect_attribute(value, "func")
        self.further.expect_attribute(value, "keywords")
        self._see(value.func, name)
        self.places.append(Single(lambda: value.args, put, value.args, name))
        self._see(value.args, name)
        self._see(value.keywords, name)

    def _wrapper(self, value: Any, name: str) -> None:
        """A cached function."""
        if not is_library(module_of(value.__wrapped__)):
            self.caches.append(value)
        self.further.lasts &= id(value) not in self._roots
        self.further.expect_attribute(value, "__wrapped__")
        self._see(value.__wrapped__, name)

    def _problem(self, value: Problem, name: str) -> None:
        """The functions of a problem, and `p`; the states are arguments of the functions."""
        self._expect_kind(value)
        attributes, read = value.__dict__, ("f", "drift", "diffusion", "p")
        seen = {key: attributes[key] for key in read if key in attributes}
        self.places.append(Names(attributes, seen, f"{name}.", whole=False))
        for key, held in seen.items():
            self._see(held, key)

    def _object(self, value: Any, name: str) -> None:
        kind = type(value)
        self._class(kind, name)
        self._expect_kind(value)
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict and id(attributes) not in self._visited:
            self._visited[id(attributes)] = attributes
            self._attributes(attributes, f"{name}.")
        for key, slot in slots_of(kind):
            self.further.lasts &= id(value) not in self._roots
            try:
                seen = slot.__get__(value, kind)
            except AttributeError:  # not set
                self.further.lasts = False
                continue
            self.places.append(
                Single(
                    functools.partial(slot.__get__, value, kind),
                    functools.partial(slot.__set__, value),
                    seen,
                    f"{name}.{key}",
                    functools.partial(slot.__delete__, value),
                )
            )
            self._see(seen, f"{name}.{key}")

    def _type(self, value: type, name: str) -> None:
        self._look_outside(value)
        self._class(value, name)

    def _cython(self, value: Any, name: str) -> None:
        self._look_outside(value)
        self._object(value, name)

    def _expect_kind(self, value: Any) -> None:
        """Look later whether an object still has its class, and the same dict of attributes."""
        if id(value) not in self._roots:
            self.further.expect_attribute(value, "__class__")
            if getattr(value, "__dict__", None) is not None:
                self.further.expect_attribute(value, "__dict__")

    def _class(self, kind: type, name: str) -> None:
        """The attributes of a class, and the globals that its methods name."""
        for ancestor in own_classes(kind):
            # Apart from what is visited: code may have named the class before.
            if ancestor in self._classes:
                continue
            self._classes.add(ancestor)
            self.further.expect_class(ancestor)
            for key, held in list(ancestor.__dict__.items()):
                if type(held) is types.FunctionType:
                    self._see(held, key)
                elif isinstance(held, staticmethod | classmethod):
                    self._see(held.__func__, key)
                elif isinstance(held, property):
                    for part in (held.fget, held.fset):
                        self._see(part, key)
                elif key[:2] != "__" and (isinstance(held, _NUMBERS) or _leads_on(type(held))):
                    self._class_attribute(ancestor, key, held)

    def _class_attribute(self, kind: type, key: str, seen: Any) -> None:
        self.places.append(Single.of_class(kind, key, seen))
        if seen is not MISSING:
            self._see(seen, f"{kind.__name__}.{key}")


Visit = Callable[[Visits, Any, str], None]


def _visitor(kind: type) -> Visit | None:
    """The method that visits objects of a class; `None` for those that hold nothing."""
    if issubclass(kind, SIMPLE) and not hasattr(kind, "_fields"):
        return None
    for of, visit in _KINDS.items():
        if issubclass(kind, of):
            return visit
    top = kind.__module__.partition(".")[0]
    if top in sys.stdlib_module_names and top not in _HOLDERS and top != "__main__":
        return Visits._closed
    if top in ("numpy", "scipy") or not (kind.__dictoffset__ or slots_of(kind)):
        return Visits._closed
    return Visits._object


_KINDS: dict[type, Visit] = {
    Tensor: Visits._tensor,
    np.ndarray: Visits._array,
    **dict.fromkeys(APART, Visits._apart),
    torch.jit.ScriptModule: Visits._script,
    nn.Module: Visits._module,
    dict: Visits._mapping,
    list: Visits._sequence,
    deque: Visits._sequence,
    tuple: Visits._fixed,
    set: Visits._fixed,
    frozenset: Visits._fixed,
    types.FunctionType: Visits._function,
    types.MethodType: Visits._method,
    types.BuiltinFunctionType: Visits._builtin,
    functools.partial: Visits._partial,
    functools._lru_cache_wrapper: Visits._wrapper,
    torch.Generator: Visits._generator,
    **dict.fromkeys(MEMORY, Visits._closed),
    Problem: Visits._problem,
    ForThese: Visits._for_these,
    type: Visits._type,
    type(np.random.default_rng): Visits._cython,
}
_visitors: dict[type, Visit | None] = {}


def visit_of(kind: type) -> Visit | None:
    """As `_visitor`, which is asked once."""
    try:
        return _visitors[kind]
    except KeyError:
        if len(_visitors) > _MOST_KINDS:
            _visitors.clear()
        visit = _visitors[kind] = _visitor(kind)
        return visit


def _leads_on(kind: type) -> bool:
    """Whether an attribute of a class may be read, being of a kind: slots and the like are not."""
    is_pythons = hasattr(kind, "__set__") or kind.__module__ == "_abc"
    return (visit := visit_of(kind)) is not None and not (visit is Visits._closed and is_pythons)
