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

from pysciml_node.steps.anatomy import names_in, words_in
from pysciml_node.translation.entries import has_numbers

# Functions whose answer is that of the place where a solve is called.
_MODES = frozenset(("is_grad_enabled", "is_inference_mode_enabled"))

# What derivatives that are taken inside a field are found by.
_DERIVATIVES = frozenset(("autograd", "func"))

# What reaches modules by words, and what makes code of words.
_IMPORTS = frozenset(("import_module", "__import__", "modules"))
_SPEAKS = ("eval", "exec")

# What leads to the globals of any code.
_GLOBALS = frozenset(("__globals__", "f_globals", "f_locals"))

# What looks for attributes by words.
_LOOKS_UP = frozenset(("getattr", "vars", "__dict__", "attrgetter"))

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
    """

    names: dict[str, None] = field(default_factory=lambda: {"__getattr__": None})
    words: dict[str, None] = field(default_factory=dict)
    fickle: str | None = None
    reads_gradients: str | None = None
    has_gradients: bool = False
    computes: bool = False
    _imports: bool = False
    _speaks: bool = False

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
        self._imports |= not _IMPORTS.isdisjoint(names)
        self._speaks |= any(name in names and name not in held for name in _SPEAKS)

    def asked(self) -> list[Callable[[Tensor], Any]]:
        """What code asks of tensors."""
        return [ask for name, ask in _ANSWERS.items() if name in self.names]

    def spoken(self) -> list[tuple[dict[str, Any], str]]:
        """Modules that may be reached by words, as entries of the dict that has them."""
        if self._speaks:
            self.names.update(dict.fromkeys(_NAME.findall(" ".join(self.words))))
        words = list(self.words) if self._imports else []
        return [(sys.modules, word) for word in words if word in sys.modules]

    def within(self, module: types.ModuleType) -> list[tuple[dict[str, Any], str]]:
        """What code may take from a module, as entries of its dict, also where it lacks them."""
        held = vars(module)
        names = [*self.names, *(word for word in self.words if word in held)]
        if self.computes:
            names += [x for x in held if not x.startswith("__") and has_numbers(held[x])]
        return [(held, name) for name in names]


def looks_up_globals(code: types.CodeType, held: dict[str, Any]) -> bool:
    """Whether code may look up any of its globals, by words."""
    names = names_in(code)
    return any(name in names and name not in held for name in ("globals", *_SPEAKS))
