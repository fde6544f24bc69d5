"""Which operations of an exported graph are views, which are checks, and what they are called."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

VIEWS = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t"),
    *("numpy_T", "mT", "expand", "expand_as", "view_as", "reshape_as", "select", "slice", "narrow"),
    *("unbind", "split", "split_with_sizes", "chunk", "tensor_split", "unsqueeze", "squeeze"),
    *("movedim", "swapaxes", "swapdims", "diagonal", "ravel", "broadcast_to"),
    *("unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "broadcast_in_dim"),
}
"""Operations whose results are views of their first argument, or copies in the same order."""

CHECKS = {
    *("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"),
    "_has_same_storage_numel",  # asked where a number gets its tangent
}
"""Operations without a result that a program needs."""

UNDEFINED = {"empty", "empty_like", "new_empty", "empty_strided"}

CASTS = {"to", "_to_copy", "type_as", "convert_element_type"}
"""Operations that may give the same numbers in another dtype."""

_TRUTHS = {
    *("lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "any", "all", "where", "mul", "cat"),
    *("logical_not", "logical_and", "logical_or", "logical_xor", "__and__", "__or__", "__xor__"),
    *("bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor", "masked_fill", "clone", "detach"),
}
_COUNTS = {
    *("sum", "cumsum", "add", "sub", "rsub", "mul", "neg", "where", "clone", "cat", "detach"),
    *("searchsorted", "bucketize", "alias"),
    *("clamp", "clamp_min", "clamp_max", "minimum", "maximum"),
}


def name_of(target: Any) -> str:
    """The name of an operation, without its overload."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(target)
    space, _, name = str(schema.name).rpartition("::")
    return name if space == "aten" else f"{space}::{name}"


def has_numbers(name: str, dtypes: set[torch.dtype]) -> bool:
    """Whether the results of an operation are numbers that programs have, exactly.

    Truths are 1 and 0. What is counted with them stays far below where whole numbers end.
    """
    for dtype in dtypes:
        if dtype is torch.bool:
            allowed = name in _TRUTHS
        elif dtype.is_floating_point:
            allowed = True
        else:
            allowed = name in _COUNTS and not dtype.is_complex
        if not allowed:
            return False
    return True


def arguments_of(node: Node) -> list[tuple[str, Any]]:
    """The arguments of a call by name, with the defaults of the operation."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named = [(str(i), value) for i, value in enumerate(node.args)]
        return [*named, *node.kwargs.items()]
    values = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return [
        (a.name, values.get(a.name, node.kwargs.get(a.name, a.default_value)))
        for a in schema.arguments
    ]


_FILLS = ("aten.full.", "aten.full_like.", "aten.new_full.", "aten.fill.")


def instead_of(operation: str) -> str:
    """What to do where an operation cannot be translated, as far as that is known, in words."""
    if operation.startswith(_FILLS):
        return " with a number that is computed: write torch.ones(shape) * number"
    if operation.startswith("prims."):
        return ": a derivative in forward mode uses it; take it in reverse, by torch.func.jacrev"
    if operation.partition(".")[2].partition(".")[0].endswith("_"):
        return (
            ": it changes a tensor of the field in place, as spectral_norm does in training mode, "
            "until .eval() is called on it"
        )
    return ""
