"""What comparisons, choices and rounding become in a program.

What is true or false is 1 or 0. A choice is a sum of two parts, of which one is 0 at each entry.
The part that is not chosen is not multiplied by 0, so that an infinity or NaN in it goes unseen.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pysciml_node.translation.builder import Builder, Joined, Traced, View, broadcast
from pysciml_node.translation.operations import HANDLERS, handles, reduced, refuse

Operand = Traced | float | int


def traced(g: Builder, x: Operand) -> Traced:
    """A number as a value."""
    return x if isinstance(x, View | Joined) else g.constant(float(x))


def _shaped(g: Builder, x: Traced, *others: Operand) -> Traced:
    """Expanded to what it has been broadcast with."""
    shape = broadcast(*(y.shape for y in (x, *others) if isinstance(y, View | Joined)))
    return x if x.shape == shape else (g.whole(x) if isinstance(x, Joined) else x).expand(shape)


# Comparisons -----------------------------------------------------------------------------------


def _compare(op: str, turned: bool) -> Any:
    def handler(g: Builder, self: Operand, other: Operand) -> View:
        a, b = traced(g, self), traced(g, other)
        return g.binary(op, b, a) if turned else g.binary(op, a, b)

    return handler


for _name, _op, _turned in (
    *(("lt", "less", False), ("gt", "less", True), ("le", "less_equal", False)),
    *(("ge", "less_equal", True), ("eq", "equal", False)),
):
    HANDLERS[_name] = _compare(_op, _turned)


def opposite(g: Builder, x: Operand) -> Traced:
    """True where `x` is false."""
    return g.affine(traced(g, x), -1.0, 1.0)


def truth(g: Builder, x: Operand) -> Traced:
    """Whether `x` is another number than 0."""
    return opposite(g, g.binary("equal", traced(g, x), g.constant(0.0)))


@handles("ne")
def _ne(g: Builder, self: Operand, other: Operand) -> Traced:
    return opposite(g, g.binary("equal", traced(g, self), traced(g, other)))


# Of torch's operations by bits only those of truths come here.
_CONNECTIVES = {"and": "minimum", "or": "maximum", "xor": "sub"}


def _connect(op: str, bits: bool) -> Any:
    def handler(g: Builder, self: Operand, other: Operand) -> View:
        a, b = (traced(g, x) if bits else truth(g, x) for x in (self, other))
        joined = g.binary(op, a, b)
        return g.unary("square", joined) if op == "sub" else joined

    return handler


for _name, _op in _CONNECTIVES.items():
    HANDLERS[f"logical_{_name}"] = _connect(_op, bits=False)
    HANDLERS[f"bitwise_{_name}"] = HANDLERS[f"__{_name}__"] = _connect(_op, bits=True)

HANDLERS["bitwise_not"] = lambda g, self: opposite(g, self)


@handles("logical_not")
def _not(g: Builder, self: Traced) -> View:
    return g.binary("equal", self, g.constant(0.0))


@handles("any")
def _any(g: Builder, self: Traced, dim: Any = None, keepdim: bool = False) -> View:
    return reduced(g, truth(g, self), dim, keepdim, "greatest")


@handles("all")
def _all(g: Builder, self: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
    return opposite(g, _any(g, _not(g, self), dim, keepdim))


@handles("isnan")
def _isnan(g: Builder, self: Traced) -> Traced:
    return _ne(g, self, self)


@handles("isinf")
def isinf(g: Builder, self: Traced) -> View:
    """Whether an entry is infinite, of either sign."""
    return g.binary("equal", g.unary("abs", self), g.constant(math.inf))


# Choices ---------------------------------------------------------------------------------------


@handles("where")
def where(g: Builder, condition: Operand, self: Operand = 0.0, other: Operand = 0.0) -> Traced:
    """`self` where the condition holds, elsewhere `other`."""
    mask = traced(g, condition)
    parts = [
        g.binary("where", chosen, traced(g, x))
        for chosen, x in ((mask, self), (opposite(g, mask), other))
        if isinstance(x, View | Joined) or x != 0.0
    ]
    chosen = g.constant(0.0) if not parts else parts[0]
    if len(parts) == 2:
        chosen = g.binary("add", *parts)
    return _shaped(g, chosen, mask, self, other)


@handles("sinc")
def _sinc(g: Builder, self: Traced) -> Traced:
    zero = g.binary("equal", self, g.constant(0.0))
    # What is divided by must not be 0 where it is not chosen either, or slopes would be NaN.
    angle = g.affine(where(g, zero, 1.0, self), math.pi)
    return where(g, zero, 1.0, g.binary("div", g.unary("sin", angle), angle))


@handles("masked_fill")
def _masked_fill(g: Builder, self: Traced, mask: Traced, value: Operand) -> Traced:
    return where(g, mask, value, self)


def _bounded(g: Builder, x: Traced, bound: Operand, low: bool) -> Traced:
    """At least the bound, or at most; as in torch, `x` has the gradient where both are equal."""
    a, b = (x, traced(g, bound)) if low else (traced(g, bound), x)
    return where(g, g.binary("less", a, b), bound, x)


@handles("clamp", "hardtanh", "clamp_min", "clamp_max", "clip")
def clamp(
    g: Builder,
    self: Traced,
    min: Any = None,
    max: Any = None,
    min_val: Any = None,
    max_val: Any = None,
) -> Traced:
    """Between two bounds, numbers or tensors."""
    low, high = (min if min is not None else min_val), (max if max is not None else max_val)
    if not isinstance(low, View | Joined) and not isinstance(high, View | Joined):
        return g.unary("clamp", self, low=low, high=high)
    bounded = self if low is None else _bounded(g, self, low, True)
    return bounded if high is None else _bounded(g, bounded, high, False)


@handles("relu6")
def _relu6(g: Builder, self: Traced) -> Traced:
    return clamp(g, self, 0.0, 6.0)


# Rounding --------------------------------------------------------------------------------------


@handles("ceil")
def _ceil(g: Builder, self: Traced) -> Traced:
    return g.affine(g.unary("floor", g.affine(self, -1.0)), -1.0)


@handles("trunc", "fix")
def trunc(g: Builder, self: Traced) -> View:
    """The whole part."""
    return g.binary("mul", g.unary("sign", self), g.unary("floor", g.unary("abs", self)))


@handles("round")
def _round(g: Builder, self: Traced, decimals: int = 0) -> View:
    if decimals:
        raise refuse("rounding to decimals", "aten.round")
    return g.unary("round", self)


HANDLERS["remainder"] = lambda g, self, other: g.binary(
    "remainder", traced(g, self), traced(g, other)
)
HANDLERS["fmod"] = lambda g, self, other: g.binary("fmod", traced(g, self), traced(g, other))


@handles("floor_divide")
def floor_divide(g: Builder, self: Operand, other: Operand) -> View:
    """`floor(self / other)`, right where the quotient is rounded up to a whole number."""
    a, b = traced(g, self), traced(g, other)
    exact = g.binary("sub", a, g.binary("remainder", a, b))
    return g.unary("round", g.binary("div", exact, b))


# Dtypes ----------------------------------------------------------------------------------------


def cast(g: Builder, x: Traced, source: torch.dtype, target: torch.dtype) -> Traced:
    """A value of one dtype as one of another; a program has numbers of a single one."""
    if target is torch.bool and source is not torch.bool:
        return truth(g, x)
    if source.is_floating_point and not target.is_floating_point:
        return trunc(g, x)
    return x
