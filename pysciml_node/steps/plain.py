"""Whether a field is plain: what its code does and reads can be told from the names in it.

A plain field takes no derivatives inside, so that its evaluations need not be kept apart from the
graph of those before, which takes about as long as an operation of torch, forward and backward. And
all the tensors that it can read have been met, so that looking whether these are as they were need
no further evaluation.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.autograd import Function

from pysciml_node.steps.anatomy import globals_in, imports_in, is_library, names_in, words_in

# Parts of the names of derivatives: torch.autograd.grad, x.backward(), torch.func.vjp.
_DERIVATIVE = re.compile(r"grad|backward|functorch|\bfunc\b|jacobian|hessian")
# What finds things by words, which may be computed, and what makes code of words.
_BY_WORDS = frozenset(
    (
        *("getattr", "__getattribute__", "attrgetter", "methodcaller", "vars", "__dict__"),
        *("globals", "locals", "eval", "exec", "compile"),
        *("modules", "import_module", "__import__", "builtins"),
    )
)
# What changes tensors without torch counting it.
_UNCOUNTED = frozenset(("data", "numpy", "from_numpy"))
# What tells of gradients inside of a field as they arrive.
_HOOKS = frozenset(("register_hook", "register_prehook"))
_TENSORS = frozenset((Tensor, nn.Parameter))
# Where functions that are written in C take no derivatives, and keep no tensors.
_FUNCTIONS = frozenset(("torch", "torch._C", "torch._C._nn", "math", "time", "posix"))


def are_plain(objects: Iterable[Any]) -> bool:
    """Whether a field is plain.

    Args:
        objects: all that it can reach.
    """
    return all(map(_is_plain, objects))


def may_hook(objects: Iterable[Any]) -> bool:
    """Whether the code of a field registers hooks of what it computes, as far as names tell.

    Args:
        objects: all that it can reach.
    """
    return any(
        isinstance(x, types.FunctionType)
        and not is_library(x.__module__)
        and not _HOOKS.isdisjoint(names_in(x.__code__))
        for x in objects
    )


def _is_plain(x: Any) -> bool:
    if isinstance(x, Tensor):
        return type(x) in _TENSORS  # others may run code at any operation
    if isinstance(x, np.ndarray):
        return not x.flags.writeable  # nobody counts what is written to it
    if isinstance(x, types.FunctionType):
        if _is_own(x.__module__):
            held = vars(sys.modules[x.__module__])
            return _is_exempt(held.get(x.__qualname__.partition(".")[0]))
        return not _is_suspect(x.__module__) and (is_library(x.__module__) or _is_clear(x))
    if isinstance(x, types.BuiltinFunctionType):
        return x.__module__ in _FUNCTIONS
    kind = x if isinstance(x, type) else type(x)
    if issubclass(kind, Function) and not is_library(kind.__module__):
        return False  # its backward is called by others
    if _is_suspect(kind.__module__) and not _is_exempt(kind):
        return False
    # Code of a metaclass is in no place that a walk goes to; that of Cython has no name here.
    made_by = type(kind).__module__
    return isinstance(made_by, str) and is_library(made_by)


def _is_own(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "pysciml_node"


@functools.lru_cache(maxsize=4096)
def _is_suspect(module: str | None) -> bool:
    """Whether code of a module may take derivatives where nothing else mentions them."""
    if module is None:
        return True
    return _is_own(module) or (is_library(module) and _DERIVATIVE.search(module) is not None)


def _is_exempt(kind: Any) -> bool:
    """Whether a class of this package says that its code goes back to its arguments at most."""
    said = isinstance(kind, type) and _is_own(kind.__module__)
    return said and getattr(kind, "ends_at_arguments", False)


def _is_clear(function: types.FunctionType) -> bool:
    """Whether a function mentions nothing that could lead elsewhere."""
    code, held = function.__code__, function.__globals__
    modules = (held.get(name) for name in globals_in(code))
    return _says_nothing_else(code) and not any(
        _is_suspect(x.__name__) for x in modules if isinstance(x, types.ModuleType)
    )


@functools.lru_cache(maxsize=4096)
def _says_nothing_else(code: types.CodeType) -> bool:
    said = (*names_in(code), *words_in(code))
    return (
        (_BY_WORDS | _HOOKS | _UNCOUNTED).isdisjoint(said)
        and not imports_in(code, None)
        and not any(map(_DERIVATIVE.search, said))
    )
