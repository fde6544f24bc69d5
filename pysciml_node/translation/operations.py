"""What each torch operation becomes in a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pysciml_node.errors import UnsupportedModule
from pysciml_node.translation.builder import (
    MAX_RUNS,
    Builder,
    Joined,
    Shape,
    Traced,
    View,
    broadcast,
    runs,
)

Number = int | float
Handler = Callable[..., Any]
HandlerT = TypeVar("HandlerT", bound=Handler)

HANDLERS: dict[str, Handler] = {}
"""By the name of the aten operation, called with the builder and the operation's arguments."""


def handles(*names: str) -> Callable[[HandlerT], HandlerT]:
    """Register the handler of some operations."""

    def register(handler: HandlerT) -> HandlerT:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def refuse(what: str, operation: str) -> UnsupportedModule:
    """The error for a use of an operation that programs do not have."""
    return UnsupportedModule(f"{what} cannot be translated.", operation=operation)


# Entry by entry ------------------------------------------------------------------------------

for _name in (
    *("tanh", "sigmoid", "relu", "exp", "expm1", "sqrt", "rsqrt", "reciprocal", "square"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("log", "log2", "log10", "log1p", "abs", "erf", "erfc", "silu", "sign", "floor"),
):
    HANDLERS[_name] = lambda g, self, _op=_name: g.unary(_op, self)


for _name in ("detach", "item", "_local_scalar_dense"):
    HANDLERS[_name] = lambda g, self: g.unary("stop", self)
HANDLERS["pysciml_node::stop"] = lambda g, x: g.unary("stop", x)


@handles("exp2")
def _exp2(g: Builder, self: Traced) -> View:
    return g.unary("exponential", self, base=2.0)


@handles("neg")
def _neg(g: Builder, self: Traced) -> Traced:
    return g.affine(self, -1.0)


@handles("gelu")
def _gelu(g: Builder, self: Traced, approximate: str) -> View:
    return g.unary("gelu" if approximate == "none" else "gelu_tanh", self)


@handles("leaky_relu")
def _leaky_relu(g: Builder, self: Traced, negative_slope: Number) -> View:
    return g.unary("leaky_relu", self, slope=float(negative_slope))


@handles("elu")
def _elu(g: Builder, self: Traced, alpha: Number, scale: Number, input_scale: Number) -> View:
    scales = {"alpha": float(alpha), "scale": float(scale), "input_scale": float(input_scale)}
    return g.unary("elu", self, **scales)


@handles("celu")
def _celu(g: Builder, self: Traced, alpha: Number) -> View:
    return _elu(g, self, alpha, 1.0, 1.0 / float(alpha))


@handles("selu")
def _selu(g: Builder, self: Traced) -> View:
    # G. Klambauer et al., Self-Normalizing Neural Networks, NeurIPS 2017, equation 14.
    return _elu(g, self, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)


@handles("softplus")
def _softplus(g: Builder, self: Traced, beta: Number, threshold: Number) -> View:
    return g.unary("softplus", self, beta=float(beta), threshold=float(threshold))


@handles("log_sigmoid")
def _log_sigmoid(g: Builder, self: Traced) -> Traced:
    # Above it `log(1 + exp(x))` is `x` to the last digit, and below it `exp(x)` is finite.
    threshold = 40.0
    return g.affine(_softplus(g, g.affine(self, -1.0), 1.0, threshold), -1.0)


@handles("log_sigmoid_forward")
def _log_sigmoid_forward(g: Builder, self: Traced) -> list[Traced]:
    # The second result is torch's own, for its backward pass.
    return [_log_sigmoid(g, self), g.unary("exp", g.affine(g.unary("abs", self), -1.0))]


@handles("mish")
def _mish(g: Builder, self: Traced) -> View:
    return g.binary("mul", self, g.unary("tanh", _softplus(g, self, 1.0, 20.0)))


def _operand(g: Builder, x: Traced | Number) -> Traced | float:
    """A number where the operand is one."""
    if isinstance(x, View | Joined):
        number = g.number(x)
        return x if number is None else number
    return float(x)


def _shape_of(*operands: Any) -> Shape:
    shapes = [x.shape for x in operands if isinstance(x, View | Joined)]
    return broadcast(*shapes)


def _expanded(g: Builder, x: Traced, shape: Shape) -> Traced:
    if x.shape == shape:
        return x
    return (g.whole(x) if isinstance(x, Joined) else x).expand(shape)


@handles("add")
def _add(g: Builder, self: Any, other: Any, alpha: Number = 1, sign: float = 1.0) -> Traced:
    shape, factor = _shape_of(self, other), float(alpha) * sign
    a, b = _operand(g, self), _operand(g, other)
    if isinstance(a, float) and isinstance(b, float):
        return g.constant(a + factor * b, shape)
    if isinstance(b, float):
        return _expanded(g, g.affine(_traced(a), 1.0, factor * b), shape)
    if isinstance(a, float):
        return _expanded(g, g.affine(b, factor, a), shape)
    if factor == -1.0:
        return g.binary("sub", a, b)
    return g.binary("add", a, g.affine(b, factor))


@handles("sub")
def _sub(g: Builder, self: Any, other: Any, alpha: Number = 1) -> Traced:
    return _add(g, self, other, alpha, -1.0)


@handles("rsub")
def _rsub(g: Builder, self: Any, other: Any, alpha: Number) -> Traced:
    return _add(g, other, self, alpha, -1.0)


def _traced(x: Traced | float) -> Traced:
    assert not isinstance(x, float)
    return x


@handles("mul")
def _mul(g: Builder, self: Any, other: Any) -> Traced:
    shape = _shape_of(self, other)
    a, b = _operand(g, self), _operand(g, other)
    if isinstance(a, float) and isinstance(b, float):
        return g.constant(a * b, shape)
    if isinstance(a, float):
        a, b = b, a
    if isinstance(b, float):
        return _expanded(g, g.affine(_traced(a), b), shape)
    return g.binary("mul", _traced(a), b)


@handles("div", "true_divide")
def _div(g: Builder, self: Any, other: Any, rounding_mode: str | None = None) -> Traced:
    if rounding_mode is not None:
        rounded = HANDLERS["floor_divide"] if rounding_mode == "floor" else _quotient
        return rounded(g, self, other)
    shape = _shape_of(self, other)
    a, b = _operand(g, self), _operand(g, other)
    if isinstance(b, float):
        if isinstance(a, float):
            return g.constant(a / b if b else math.copysign(math.inf, a), shape)
        digits, exponent = math.frexp(b)
        if abs(digits) == 0.5 and abs(exponent) < 100:  # the reciprocal of a power of two is exact
            return _expanded(g, g.affine(a, 1.0 / b), shape)
    above, below = (g.constant(x) if isinstance(x, float) else x for x in (a, b))
    return _expanded(g, g.binary("div", above, below), shape)


def _quotient(g: Builder, self: Any, other: Any) -> Traced:
    whole: Traced = HANDLERS["trunc"](g, _div(g, self, other))
    return whole


_POWERS = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


@handles("pow")
def _pow(g: Builder, self: Any, exponent: Any) -> Traced:
    shape = _shape_of(self, exponent)
    base, power = _operand(g, self), _operand(g, exponent)
    if isinstance(power, float):
        if isinstance(base, float):
            return g.constant(float(torch.tensor(base, dtype=g.dtype) ** power), shape)
        if power == 0.0:
            return g.constant(1.0, shape)
        if power == 1.0:
            return _expanded(g, base, shape)
        if power in _POWERS:
            return _expanded(g, g.unary(_POWERS[power], base), shape)
        return _expanded(g, g.unary("power", base, exponent=power), shape)
    if isinstance(base, float):
        return _expanded(g, g.unary("exponential", power, base=base), shape)
    return g.binary("pow", base, power)


HANDLERS["maximum"] = lambda g, self, other: g.binary("maximum", self, other)
HANDLERS["minimum"] = lambda g, self, other: g.binary("minimum", self, other)
HANDLERS["atan2"] = lambda g, self, other: g.binary("atan2", self, other)


@handles("hypot")
def _hypot(g: Builder, self: Traced, other: Traced) -> View:
    return g.unary("sqrt", g.binary("add", g.unary("square", self), g.unary("square", other)))


# Constants -----------------------------------------------------------------------------------


@handles("zeros_like", "new_zeros")
def _zeros(g: Builder, self: Traced, size: Sequence[int] | None = None, **_: Any) -> View:
    return g.constant(0.0, self.shape if size is None else tuple(size))


@handles("ones_like", "new_ones")
def _ones(g: Builder, self: Traced, size: Sequence[int] | None = None, **_: Any) -> View:
    return g.constant(1.0, self.shape if size is None else tuple(size))


@handles("full_like", "new_full")
def _full(
    g: Builder, self: Traced, fill_value: Number, size: Sequence[int] | None = None, **_: Any
) -> View:
    return g.constant(float(fill_value), self.shape if size is None else tuple(size))


# Sums ----------------------------------------------------------------------------------------


def reduced(g: Builder, x: Traced, dim: Any, keepdim: bool, kind: str) -> View:
    """The sum, mean or greatest of the entries along some dimensions, or all of them.

    Args:
        g: the program.
        x: what is reduced.
        dim: a dimension or several; nothing means all.
        keepdim: whether they stay, with one entry.
        kind: "sum", "mean" or "greatest"; no gradient goes through the last.
    """
    rank = len(x.shape)
    wanted = [dim] if isinstance(dim, int) else dim or range(rank)
    dims = sorted({d % rank for d in wanted}) if rank else []
    kept = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
    view = g.whole(x)
    if runs(x.shape, x.shape, kept) > MAX_RUNS:
        for d in dims:
            view = reduced(g, view, d, True, kind)
    else:
        count = math.prod(x.shape[d] for d in dims)
        op = "greatest" if kind == "greatest" else "sum"
        scale = {} if kind == "greatest" else {"factor": 1.0 / count if kind == "mean" else 1.0}
        view = g.emit(op, [(view.id, x.shape)], kept, dims=dims, **scale)
    if keepdim:
        return view
    return view.reshape(tuple(n for d, n in enumerate(x.shape) if d not in dims))


@handles("sum")
def _sum(
    g: Builder, self: Traced, dtype: Any = None, dim: Any = None, keepdim: bool = False
) -> View:
    return reduced(g, self, dim, keepdim, "sum")


@handles("mean")
def _mean(
    g: Builder, self: Traced, dtype: Any = None, dim: Any = None, keepdim: bool = False
) -> Traced:
    # Divided, as in torch: 49 times 1 / 49 is below 1, which a share of truths is compared with.
    total = reduced(g, self, dim, keepdim, "sum")
    return _div(g, total, math.prod(self.shape) / max(math.prod(total.shape), 1))


# Side by side --------------------------------------------------------------------------------


@handles("cat", "concat", "concatenate")
def _cat(g: Builder, tensors: Sequence[Traced], dim: int) -> Traced:
    rank = max(len(x.shape) for x in tensors)
    dim %= rank
    pieces: list[View] = []
    for x in tensors:
        if x.shape == (0,) or x.shape[dim] == 0:
            continue
        if isinstance(x, Joined):
            pieces += x.pieces if x.dim == dim else [g.whole(x)]
        else:
            pieces.append(x)
    return pieces[0] if len(pieces) == 1 else Joined(tuple(pieces), dim)


@handles("stack")
def _stack(g: Builder, tensors: Sequence[Traced], dim: int) -> Traced:
    dim %= len(tensors[0].shape) + 1
    pieces = []
    for x in tensors:
        view = g.whole(x) if isinstance(x, Joined) else x
        shape = (*view.shape[:dim], 1, *view.shape[dim:])
        stride = (*view.stride[:dim], 0, *view.stride[dim:])
        pieces.append(View(view.id, shape, stride, view.offset))
    return _cat(g, pieces, dim)


# The same entries ----------------------------------------------------------------------------


@handles("clone", "contiguous", "alias", "lift_fresh_copy")
def _same(g: Builder, self: Traced, **_: Any) -> Traced:
    return self


@handles("prims::copy_strided")
def _lying(g: Builder, a: Traced, stride: Any) -> Traced:
    return a


@handles("copy")
def _copy(g: Builder, self: Traced, src: Traced, **_: Any) -> Traced:
    return _expanded(g, src, self.shape)


@handles("dropout", "alpha_dropout", "feature_dropout")
def _dropout(g: Builder, input: Traced, p: float, train: bool) -> Traced:
    if train and p > 0:
        raise UnsupportedModule(
            "dropout in training mode is random, and cannot be translated; call .eval() on it.",
            operation="aten.dropout",
        )
    return input
