"""The leaves of a field's extra argument, and all else that a program of it depends on."""

from __future__ import annotations

import enum
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from torch import _C, Tensor, nn
from torch.utils import _pytree as pytree

from pysciml_node.steps.anatomy import slots_of
from pysciml_node.translation.entries import PLAIN, Same
from pysciml_node.translation.libraries import is_library

Leaves = tuple[list[Tensor], Any]

_VALUES = (int, float, complex, str, np.number, np.bool_, Fraction, Decimal)
"""What does not change, but for attributes that objects of the user's classes may have."""


def leaves_of(p: Any) -> Leaves:
    """The tensors of an extra argument in the order of pytrees, and its form.

    Programs of arguments of equal forms are the same.
    """
    tensors: list[Tensor] = []
    return tensors, None if p is None else _form(p, tensors)


def _form(x: Any, tensors: list[Tensor]) -> Any:
    kind = type(x)
    if isinstance(x, Tensor):
        tensors.append(x)
        # A parameter is used as any other tensor; a class of the user's may not be.
        own: Any = None if kind is Tensor or kind is nn.Parameter else kind
        if x.__dict__:
            own = kind, *[(name, _attribute(value)) for name, value in x.__dict__.items()]
        return x.dtype, x.shape, x.device, x.requires_grad, own
    if kind is tuple or kind is list:
        return kind, *[_form(part, tensors) for part in x]
    if kind is dict:
        return kind, *x, *[_form(part, tensors) for part in x.values()]
    leaves, structure = pytree.tree_flatten(x)
    if len(leaves) == 1 and leaves[0] is x:
        return as_it_is(x) if is_value(x) else (kind, Same(x))
    return structure, [_form(leaf, tensors) for leaf in leaves]


def _attribute(x: Any) -> Any:
    return as_it_is(x) if type(x) in PLAIN else Same(x)


def is_value(x: Any) -> bool:
    """Whether a leaf is a number, a word or the like, and nothing besides."""
    kind = type(x)
    if kind in PLAIN or isinstance(x, enum.Enum):
        return True
    holds_more = getattr(x, "__dict__", None) or slots_of(kind)
    return isinstance(x, _VALUES) and (is_library(kind.__module__) or not holds_more)


def as_it_is(x: Any) -> Any:
    """A plain value in a form that is equal only to that of the same value.

    A zero with a sign is equal to one without, and a number to another kind of number.
    """
    kind = type(x)
    signed = kind is complex or (kind is not str and x == 0)
    return kind, repr(x) if signed else x


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
