"""What the code that a callable reaches mentions."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

from pysciml_node.steps.anatomy import module_of, names_in, words_in
from pysciml_node.translation.entries import has_numbers

# Functions whose answer is that of the place where a solve is called.
_MODES = frozenset(("is_grad_enabled", "is_inference_mode_enabled"))

# What derivatives that are taken inside a field are found by.
_DERIVATIVES = frozenset(("autograd", "func"))

# What finds modules by words, or by what stands in them, and what makes code of words.
_FINDS = frozenset(("__import__", "import_module", "getmodule"))
_FINDERS = frozenset(("sys", "importlib", "inspect", "pkgutil", "pydoc", "runpy", "pickle"))
_SPEAKS = ("eval", "exec")

# What leads to the globals of any code.
_GLOBALS = frozenset(("__globals__", "f_globals", "f_locals"))

# What looks for attributes by words.
_LOOKS_UP = frozenset(
    (
        *("getattr", "vars", "__dict__", "attrgetter", "__getattribute__", "methodcaller"),
        *("getmembers", "getattr_static", "getmembers_static"),
    )
)

# What programs of tensors do not depend on, and the code of a field may.
_ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "requires_grad": attrgetter("requires_grad"),
    "is_leaf": attrgetter("is_leaf"),
    "is_contiguous": Tensor.stride,
    "stride": Tensor.stride,
    "storage_offset": Tensor.storage_offset,
    "grad_fn": lambda x: type(x.grad_fn),
    "retains_grad": attrgetter("retains_grad"),
    "is_inference": Tensor.is_inference,
    "is_neg": Tensor.is_neg,
    "_version": lambda x: None if x.is_inference() else x._version,
    "_base": lambda x: x._base is None,
    "Parameter": type,
}

_NAME = re.compile(r"[^\W\d]\w*")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass
class Mentions:
    """What the code that a callable reaches mentions.

    Attributes:
        names: of globals, attributes and modules, all together: any code may be handed any module.
        words: strings in code and in data, any of which may be the name of an attribute.
        fickle: what code does that may come out differently at each solve, in words.
        reads_gradients: the name of code that mentions `grad`, if there is any.
        has_gradients: something that it reaches has an attribute of that name.
        computes: it may look for attributes by words that it has computed.
        finds: it may come to modules by words, or by what stands in them.
    """

    names: dict[str, None] = field(default_factory=lambda: {"__getattr__": None})
    words: dict[str, None] = field(default_factory=dict)
    fickle: str | None = None
    reads_gradients: str | None = None
    has_gradients: bool = False
    computes: bool = False
    finds: bool = False
    _speaks: bool = False
    _said: bool = False
    _has_builtins: bool = False

    @property
    def speaks_anywhere(self) -> bool:
        """Whether code that stands anywhere may have its globals looked up, by any words."""
        return self._said or (self._has_builtins and self.computes)

    def add(self, code: types.CodeType, held: dict[str, Any] | None = None) -> None:
        """Note what code mentions, and the globals that it sees, where they are known."""
        names, words, held = names_in(code), words_in(code), held or {}
        self.names.update(dict.fromkeys((*names, *filter(str.isidentifier, words))))
        self.words.update(dict.fromkeys(words))
        if not _MODES.isdisjoint(names):
            self.fickle = "asks whether gradients are recorded"
        if not _GLOBALS.isdisjoint((*names, *words)):
            self.fickle = "reaches globals by __globals__, or by a frame"
        derivatives = "grad" in held or not _DERIVATIVES.isdisjoint(names)
        if "grad" in names and not derivatives:
            self.reads_gradients = code.co_name
        self.computes |= not _LOOKS_UP.isdisjoint(names)
        self.finds |= not _FINDS.isdisjoint((*names, *words))
        self._speaks |= any(name in names and name not in held for name in _SPEAKS)

    def why_fickle(self) -> str | None:
        """What code does that may come out differently at each solve, in words."""
        if self.computes and any(map(_is_piece, self.words)):
            return "may reach globals by a name that it puts together"
        return self.fickle

    def meet(self, x: Any) -> None:
        """Note that code comes to something of a library, by whatever name."""
        module = x.__name__ if isinstance(x, types.ModuleType) else module_of(x)
        self.finds |= x is __import__ or str(module).partition(".")[0] in _FINDERS
        self._has_builtins |= module == "builtins" and isinstance(x, types.ModuleType)
        self._speaks |= (said := any(x is y for y in (globals, eval, exec)))
        self._said |= said
        self.computes |= any(x is y for y in (getattr, vars))

    def asked(self) -> list[Callable[[Tensor], Any]]:
        """What code asks of tensors."""
        return [ask for name, ask in _ANSWERS.items() if name in self.names]

    def spoken(self) -> list[tuple[dict[str, Any], str]]:
        """Modules that may be reached by words, as entries of the dict that has them."""
        if self._speaks:
            self.names.update(dict.fromkeys(_NAME.findall(" ".join(self.words))))
        words = filter(_MODULE.fullmatch, self.words) if self.finds else ()
        return [(sys.modules, word) for word in words]

    def within(self, held: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        """What code may take from a module, as entries of its dict, also where it lacks them."""
        names = [*self.names, *(word for word in self.words if word in held)]
        if self.computes:
            names += [x for x in held if not x.startswith("__") and has_numbers(held[x])]
        return [(held, name) for name in names]


def _is_piece(word: str) -> bool:
    """Whether a word looks like a part of the name by which a function has its globals."""
    told = "_" in word or word.endswith("als")
    return told and len(word) > 2 and word in "__globals__"


def looks_up_globals(code: types.CodeType, held: dict[str, Any]) -> bool:
    """Whether code may look up any of its globals, by words."""
    names = names_in(code)
    return any(name in names and name not in held for name in ("globals", *_SPEAKS))
