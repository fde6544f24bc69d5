"""Looks at the code that a callable can reach: at the globals and modules that it names."""

from __future__ import annotations

import os
import sys
import types
from abc import ABC, abstractmethod
from operator import attrgetter
from typing import Any

from pysciml_node.steps.anatomy import (
    UNBOUND,
    captured_by,
    content_of,
    globals_in,
    imports_in,
    module_of,
    names_in,
    words_in,
)
from pysciml_node.translation.entries import Attributes, Same
from pysciml_node.translation.libraries import is_library, is_of_library
from pysciml_node.translation.mentions import Mentions, looks_up_globals
from pysciml_node.translation.watch import Watch

# What reads the environment.
_ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb"))

# By its name: the types that mypy has cached are without this attribute, those it reads have it.
_builtins_of = attrgetter("__builtins__")

# Kinds of globals whose inside matters only to code that names them.
_DEFINED = (type, types.FunctionType, types.BuiltinFunctionType)


class CodeLook(ABC):
    """The part of a look that is concerned with code, and with what it names."""

    def __init__(self) -> None:
        self.watch = Watch()
        self._tokens = self.watch.tokens
        self._mentions = Mentions()
        # Modules of the user's.
        self._modules: list[types.ModuleType] = []
        self._libraries: list[types.ModuleType] = []
        # Those in which code stands that was met: the dicts that hold their names.
        self._spaces: dict[int, dict[str, Any]] = {}
        # Those whose names are looked up by words, in code that stands there.
        self._asked: dict[int, dict[str, Any]] = {}
        # What such code says.
        self._said: dict[str, None] = {}

    @abstractmethod
    def add(self, x: Any) -> None:
        """Note an object, and what can be reached from it."""

    @abstractmethod
    def _at(self, container: Any, key: Any, x: Any) -> None:
        """Note what stands at a place."""

    @abstractmethod
    def _made_of(self, x: Any, *parts: Any) -> None:
        """Note an object that does not change, of parts that may."""

    @abstractmethod
    def _kind(self, x: Any) -> None:
        """Note the class of an object, which can be exchanged."""

    @abstractmethod
    def _dict(self, x: Any) -> None:
        """Note a dict, and what can be reached from it."""

    def _function(self, f: types.FunctionType) -> None:
        if not is_library(module_of(f)):
            # The parts of a function can be exchanged, though hardly anybody does.
            parts = Attributes(f)
            for name in ("__code__", "__defaults__", "__kwdefaults__", "__dict__"):
                self.watch.expect_item(parts, name, getattr(f, name))
            self.add(f.__defaults__)
            self.add(f.__kwdefaults__)
            self._dict(f.__dict__)
        for cell, content in zip(f.__closure__ or (), captured_by(f), strict=True):
            self._content(cell, content)
        self._code(f)

    def _content(self, cell: types.CellType, content: Any) -> None:
        if content is UNBOUND:
            self._tokens.append("unbound")
        else:
            self._at(Attributes(cell), "cell_contents", content)

    def _cell(self, cell: types.CellType) -> None:
        """A cell that is held by itself: what comes into an empty one later is seen, too."""
        self._tokens.append(type(cell))
        self.watch.expect_equal(lambda: content_of(cell) is UNBOUND)
        self._content(cell, content_of(cell))

    def _builtin(self, x: Any) -> None:
        """A function that is written in C, which may be the method of an object."""
        self._mentions.meet(x)
        owner = x.__self__
        alone = owner is None or isinstance(owner, types.ModuleType | type)
        if alone and (owner is None or is_of_library(owner)):
            self._tokens.append(Same(x))
        else:
            self._made_of(x, x.__name__, owner)

    def _code(self, f: types.FunctionType) -> None:
        """Note the code of a function, and what it names."""
        if is_library(module_of(f)):
            self._tokens.append(f.__code__)
            self._mentions.meet(f)
            return  # it does not change while a program runs, but what was handed to it may
        held = f.__globals__
        self._spaces[id(held)] = held
        self._tokens.append(f.__code__)
        self._mentions.add(f.__code__, held)
        if not _ENVIRONMENT.isdisjoint(names_in(f.__code__)):
            self._tokens.append(dict(os.environ))
            self.watch.expect_equal(lambda: dict(os.environ))
        if looks_up_globals(f.__code__, held):
            self._asked[id(held)] = held
            self._said |= dict.fromkeys((*names_in(f.__code__), *words_in(f.__code__)))
        # An attribute `self.rate` has nothing to do with a global `rate`, unless code comes to the
        # module as an object: then all names are looked up there.
        others: dict[str, Any] = _builtins_of(f)
        for name in globals_in(f.__code__):
            self._entry(held, name)
            if name not in held and name in others:
                self._definition_or_entry(others, name)
        for name in imports_in(f.__code__, held.get("__package__")):
            self._entry(sys.modules, name)

    def _text(self, code: types.CodeType) -> None:
        """Note code that is evaluated by words, or not at all."""
        self._tokens.append(code)
        self._mentions.add(code)

    def _entry(self, held: dict[str, Any], name: str) -> None:
        """Note what a module has by a name, or that it has nothing."""
        if name in held:
            self._tokens.append(name)
            self._at(held, name, held[name])
        else:
            self.watch.expect_none(held, name)

    def _of_library(self, held: Any, name: str) -> None:
        """Note what a library, or a class of one, has by a name: it can be exchanged."""
        value = held[name]
        self._tokens += [name, Same(value)]
        self.watch.expect_item(held, name, value)
        if isinstance(value, types.ModuleType) or not is_of_library(value):
            self.add(value)

    def _every_global(self, held: dict[str, Any]) -> None:
        """Note all that a module holds, for code that looks it up by words."""
        self.watch.expect_order(held)
        for name in [x for x in held if not x.startswith("__")]:
            self._definition_or_entry(held, name)

    def _definition_or_entry(self, held: dict[str, Any], name: str) -> None:
        """Note what a module has by a name, without the inside of functions and classes."""
        value = held[name]
        self._tokens.append(name)
        if isinstance(value, _DEFINED):
            self._tokens.append(Same(value))
            self.watch.expect_item(held, name, value)
        else:
            self._at(held, name, value)

    def _python_module(self, x: types.ModuleType) -> None:
        self._tokens.append(Same(x))
        self._mentions.meet(x)
        if type(x) is not types.ModuleType and not is_library(x.__name__):
            self._kind(x)
        (self._libraries if is_library(x.__name__) else self._modules).append(x)

    def _look_into_modules(self) -> None:
        """Note the names in modules, some of which lead to more names and more modules."""
        looked: set[tuple[int, str]] = set()
        whole: set[int] = set()
        # Without what is said in all that a module holds, which may name anything.
        said = [*self._mentions.names, *self._mentions.words]
        while True:
            entries = self._mentions.spoken()
            for held in self._looked_up():
                if id(held) not in whole:
                    whole.add(id(held))
                    self._every_global(held)
                entries += [(held, x) for x in (*said, *self._said) if x in held]
            for held in self._open():
                entries += self._mentions.within(held)
            # What is not looked into may hold a module in which code stands.
            for held in self._spaces.values() if self.watch.sealed else ():
                entries += [(held, x) for x in self._mentions.names]
            for module in self._libraries:
                entries += [(vars(module), x) for x in self._mentions.names if x in vars(module)]
            new = [entry for entry in entries if (id(entry[0]), entry[1]) not in looked]
            if not new:
                break
            for held, name in new:
                looked.add((id(held), name))
                entry = self._of_library if is_library(held.get("__name__")) else self._entry
                entry(held, name)
        for held in self._open() if self._mentions.computes else ():
            self.watch.expect_size(held)

    def _looked_up(self) -> list[dict[str, Any]]:
        """The dicts in which code may look up any name."""
        return list((self._spaces if self._mentions.speaks_anywhere else self._asked).values())

    def _open(self) -> list[dict[str, Any]]:
        """The dicts of the modules of the user's whose names code may ask for."""
        spaces = {id(vars(x)): vars(x) for x in self._modules}
        return list((spaces | self._spaces if self._mentions.finds else spaces).values())

    def _stands_in(self, kind: type) -> None:
        """Note the module of a class, which is found by its name."""
        home = sys.modules.get(str(module_of(kind)))
        if isinstance(home, types.ModuleType):
            self._spaces[id(vars(home))] = vars(home)
