"""The leaves of a field's extra argument, and all else that a program of it depends on."""

from __future__ import annotations

import enum
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import _C, Tensor, nn
from torch.utils import _pytree as pytree

from pysciml_node.steps.anatomy import slots_of
from pysciml_node.translation.entries import PLAIN, Same, as_it_is
from pysciml_node.translation.libraries import is_library
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.watch import answers

Leaves = tuple[list[Tensor], Any]
Ask = Callable[[Tensor], Any]

_VALUES = (int, float, complex, str, np.number, np.bool_, Fraction, Decimal)
"""What does not change, but for attributes that objects of the user's classes may have."""


def leaves_of(p: Any) -> Leaves:
    """The tensors of an extra argument in the order of pytrees, and its form.

    Programs of arguments of equal forms are the same.
    """
    tensors: list[Tensor] = []
    kinds: dict[type, None] = {}
    form = None if p is None else _form(p, tensors, kinds)
    return tensors, (form, *[_as_it_stands(x, tensors) for x in kinds]) if kinds else form


def form_for(now: Snapshot, leaves: Leaves) -> Any:
    """The form of an extra argument for a function: with what the function may ask of its tensors.

    Args:
        now: what the function can reach. Some of it may be in the argument too.
        leaves: of the argument.
    """
    return form_among(now.tensors, now.watch.asked, leaves)


def form_among(reached: list[Tensor], asked: list[Ask], leaves: Leaves) -> Any:
    """The same.

    Args:
        reached: the tensors that the function can reach.
        asked: what its code asks of tensors.
        leaves: of the argument.
    """
    tensors, form = leaves
    if not tensors:
        return form
    # Each the number of its last place: mostly there is one tensor, or none is met twice.
    numbers = {id(x): i for i, x in enumerate((*tensors, *reached))}
    same = [numbers[id(x)] for x in tensors]
    return (form, *same, *answers(asked, tensors)) if asked else (form, *same)


def fickle_class(p: Any) -> tuple[str, str] | None:
    """A class of the user's in an extra argument that may do something else at each solve.

    Returns:
        Its name, and what it does, in words.
    """
    kinds: dict[type, None] = {}
    _form(p, [], kinds)
    fickle = ((kind.__name__, Snapshot.of(kind).fickle) for kind in kinds)
    return next(((name, words) for name, words in fickle if words is not None), None)


def _form(x: Any, tensors: list[Tensor], kinds: dict[type, None]) -> Any:
    """The form of a part; adds its tensors, and the user's classes in it."""
    kind = type(x)
    if isinstance(x, Tensor):
        tensors.append(x)
        # A parameter is used as any other tensor; a class of the user's may not be.
        own: Any = None if kind is Tensor or kind is nn.Parameter else kind
        if x.__dict__:
            own = kind, *[(name, _attribute(value)) for name, value in x.__dict__.items()]
        return x.dtype, x.shape, x.device, x.layout, x.requires_grad, own
    if kind is tuple or kind is list:
        return kind, *[_form(part, tensors, kinds) for part in x]
    if kind is dict:
        return kind, *x, *[_form(part, tensors, kinds) for part in x.values()]
    if kind in PLAIN:
        return as_it_is(x)
    if not is_library(kind.__module__):
        kinds[kind] = None
    if kind.__base__ is tuple and hasattr(kind, "_fields"):
        return kind, *[_form(part, tensors, kinds) for part in x]
    parts, structure = pytree.tree_flatten(x, is_leaf=lambda part: part is not x)
    if len(parts) == 1 and parts[0] is x:
        return as_it_is(x) if is_value(x) else (kind, Same(x))
    return structure, [_form(part, tensors, kinds) for part in parts]


def _as_it_stands(kind: type, tensors: list[Tensor]) -> Any:
    """A class in a form that is equal as long as it, and all that it can reach, is as it was.

    Its methods may read what is outside of the argument, and ask of the argument's tensors.
    """
    now = Snapshot.of(kind)
    return now.watch, *map(_contents, now.tensors), *answers(now.watch.asked, tensors)


def _contents(x: Tensor) -> Any:
    """The entries of a tensor that a class can reach, which a program would have as constants."""
    if x.requires_grad:  # where it is used there is no program
        return "trained"
    if x.device.type == "cpu" and x.layout is torch.strided:
        return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return object()  # another one each time


def _attribute(x: Any) -> Any:
    return as_it_is(x) if type(x) in PLAIN else Same(x)


def is_value(x: Any) -> bool:
    """Whether a leaf is a number, a word or the like, and nothing besides."""
    kind = type(x)
    if kind in PLAIN or isinstance(x, enum.Enum):
        return True
    holds_more = getattr(x, "__dict__", None) or slots_of(kind)
    return isinstance(x, _VALUES) and (is_library(kind.__module__) or not holds_more)


def class_of_its_own(tensors: list[Tensor]) -> str | None:
    """The name of a class of tensors that changes what operations do, if there is one."""
    for x in tensors:
        kind: Any = type(x)
        function = _called_by(kind)
        dispatched = kind.__torch_dispatch__ is not _C._disabled_torch_dispatch_impl
        usual = function is _called_by(Tensor) or function is _C._disabled_torch_function_impl
        if dispatched or not usual:
            return str(kind.__name__)
    return None


def _called_by(kind: Any) -> Any:
    """What operations call for a class of tensors."""
    function = kind.__torch_function__
    return getattr(function, "__func__", function)
