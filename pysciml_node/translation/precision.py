"""Numbers of another precision than the state's, of which a program has none.

Beside a state in double precision torch computes `i / 3` and `mask * 0.1` in single precision. Such
operations on whole numbers, truths, and what is made of them, are rounded to that one by one. The
others, as those of a state that is cast, are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysciml_node.translation.builder import Builder, Traced
from pysciml_node.translation.choices import cast
from pysciml_node.translation.moves import is_traced
from pysciml_node.translation.names import CASTS, VIEWS, arguments_of, name_of

_COMPARISONS = frozenset(("lt", "gt", "le", "ge", "eq", "ne"))

_FILLED = frozenset(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"))
"""Operations that take nothing but the shape of their first argument."""

_PASSED = frozenset(("clone", "contiguous", "alias", "lift_fresh_copy", "detach"))
"""Operations that compute nothing."""

_ROUNDED = frozenset(
    ("add", "sub", "rsub", "mul", "div", "true_divide", "reciprocal", "square", "sqrt", "remainder")
)
"""Operations that are exact but for one rounding: twice as many digits come to the same result."""

_EXACT = _COMPARISONS | {
    *("neg", "abs", "relu", "sign", "floor", "ceil", "trunc", "fix", "round", "fmod"),
    *("minimum", "maximum", "clamp", "clamp_min", "clamp_max", "where", "masked_fill"),
    *("amax", "amin", "max", "min", "cat", "stack"),
}
"""Operations whose results are among their operands, or are as exact as these."""

_OPERANDS = frozenset(
    ("self", "other", "min", "max", "min_val", "max_val", "value", "fill_value", "tensors")
)
"""Arguments that are numbers, and not such as dimensions."""


def computed_in(node: Node, name: str) -> torch.dtype | None:
    """The floating dtype in which torch computes an operation, if it does."""
    if name in _COMPARISONS:
        sides = dict(arguments_of(node))
        dtype = torch.result_type(*(_meant(sides[key]) for key in ("self", "other")))
        return dtype if dtype.is_floating_point else None
    if name in _PASSED:
        return None
    results = pytree.tree_leaves(node.meta.get("val"))
    floating = (x.dtype for x in results if isinstance(x, Tensor) and not _counts(x.dtype))
    return next(floating, None)


def has_cast(source: torch.dtype, target: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a program of a dtype has the numbers of a cast, or these rounded to single ones."""
    if target is dtype or target is source or _counts(target):
        return True
    whole = _counts(source) and target in (torch.float32, torch.float64)
    return whole or source is torch.bool


def rounded_cast(g: Builder, x: Traced, source: torch.dtype, target: torch.dtype) -> Traced:
    """A value of one dtype as one of another, rounded where whole numbers become single ones."""
    large = g.dtype is torch.float64 and target is torch.float32 and _is_whole(source)
    return _single(g, x) if large else cast(g, x, source, target)


def in_single(
    g: Builder,
    node: Node,
    given: dict[str, Any],
    values: dict[Node, Any],
    call: Callable[[dict[str, Any]], Any],
) -> Any:
    """An operation in single precision, in a program of double precision.

    Args:
        g: the program.
        node: the operation.
        given: its arguments by name.
        values: what the nodes before it stand for.
        call: what the operation becomes with some arguments.

    Returns:
        Its result; nothing where that is not torch's to the last bit.
    """
    name = name_of(node.target)
    if g.dtype is not torch.float64 or computed_in(node, name) is not torch.float32:
        return None
    # Sums of truths are exact; those of whole numbers may be too large, and rounded in any order.
    of_truths = all(map(_is_truth, node.all_input_nodes))
    exact = name in _EXACT or name in _FILLED or (name == "sum" and of_truths)
    if not exact and name not in _ROUNDED and not (name == "mean" and of_truths):
        return None
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        return None
    own = (x for x in node.all_input_nodes if _dtype(x) is g.dtype)
    if name not in _FILLED and any(is_traced(values[x]) for x in own):
        return None
    rounded = {
        key: _rounded(g, source, given[key])
        for key, source in arguments_of(node)
        if key in _OPERANDS and not (name in _FILLED and key == "self")
    }
    result = call({**given, **rounded})
    return result if exact else _single(g, result)


def _single(g: Builder, x: Traced) -> Traced:
    """A value rounded to single precision."""
    return g.unary("single", x)


def _rounded(g: Builder, source: Any, x: Any) -> Any:
    """An operand as torch reads it, which brings all of them to one dtype first."""
    if isinstance(x, list | tuple):
        return [_rounded(g, *pair) for pair in zip(source, x, strict=True)]
    if isinstance(x, Tensor):
        return x.to(torch.float32)
    if is_traced(x):
        return _single(g, x) if _is_whole(_dtype(source)) else x
    return x if x is None else float(torch.tensor(x, dtype=torch.float32))


def _is_truth(node: Node) -> bool:
    """Whether a value is 0 or 1, made of truths by casts alone."""
    while _dtype(node) is not torch.bool and node.op == "call_function":
        source = node.args[0] if node.args else None
        if name_of(node.target) not in VIEWS | CASTS or not isinstance(source, Node):
            return False
        node = source
    return _dtype(node) is torch.bool


def _counts(dtype: torch.dtype | None) -> bool:
    """Whether a dtype is one of whole numbers or truths."""
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


def _is_whole(dtype: torch.dtype | None) -> bool:
    """Whether a dtype is one of whole numbers."""
    return _counts(dtype) and dtype is not torch.bool


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _meant(x: Any) -> Any:
    """What stands for an argument in torch's rules: a tensor without numbers, or a number."""
    return x.meta["val"] if isinstance(x, Node) else x
