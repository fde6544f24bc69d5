"""The leaves of a field's extra argument, and all else that a program of it depends on."""

from __future__ import annotations

import math
from typing import Any

from torch import _C, Tensor, nn
from torch.utils import _pytree as pytree

from pysciml_node.translation.entries import PLAIN, Same

Leaves = tuple[list[Tensor], Any]


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
        return as_it_is(x)
    return structure, [_form(leaf, tensors) for leaf in leaves]


def _attribute(x: Any) -> Any:
    return as_it_is(x) if type(x) in PLAIN else Same(x)


def as_it_is(x: Any) -> Any:
    """A plain value in a form that is equal only to that of the same value.

    A zero with a sign is equal to one without, and a number to another kind of number.
    """
    if type(x) is float and x == 0:
        return float, math.copysign(1.0, x), x
    return type(x), x


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
