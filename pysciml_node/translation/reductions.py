"""What extrema, products, cumulative sums, softmax and norms become in a program."""

from __future__ import annotations

import math
from typing import Any

from pysciml_node.translation.builder import Builder, Joined, Traced, View
from pysciml_node.translation.choices import isinf, where
from pysciml_node.translation.operations import HANDLERS, handles, reduced, refuse


class Unknown:
    """A result that programs do not have, such as the place of a maximum."""


# Extrema ---------------------------------------------------------------------------------------


def _extremum(
    g: Builder, x: Traced, dim: Any, keepdim: bool, sign: float, one: bool = False
) -> Traced:
    """The greatest of `sign * x`, times `sign`.

    Equal ones share the gradient, or the first has it if `one`.
    """
    turned = g.affine(x, sign)
    top = reduced(g, turned, dim, True, "greatest")
    chosen: View = g.binary("equal", turned, top)
    if one:
        first = g.binary("less", scan(g, "add", chosen, dim), g.constant(1.5))
        chosen = g.binary("minimum", chosen, first)
    total = reduced(g, g.binary("where", chosen, x), dim, keepdim, "sum")
    return g.binary("div", total, reduced(g, chosen, dim, keepdim, "sum"))


@handles("amax")
def _amax(g: Builder, self: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
    return _extremum(g, self, dim, keepdim, 1.0)


@handles("amin")
def _amin(g: Builder, self: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
    return _extremum(g, self, dim, keepdim, -1.0)


def _first(sign: float, pairwise: str) -> Any:
    def handler(
        g: Builder,
        self: Traced,
        dim: int | None = None,
        keepdim: bool = False,
        other: Traced | None = None,
    ) -> Any:
        if other is not None:
            return g.binary(pairwise, self, other)
        if dim is None:
            return _extremum(g, self, None, False, sign)
        return [_extremum(g, self, dim, keepdim, sign, one=True), Unknown()]

    return handler


HANDLERS["max"], HANDLERS["min"] = _first(1.0, "maximum"), _first(-1.0, "minimum")


# Along a dimension -----------------------------------------------------------------------------


def _part(x: View, dim: int, start: int, length: int) -> View:
    shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
    return View(x.id, shape, x.stride, x.offset + start * x.stride[dim])


def scan(g: Builder, op: str, x: Traced, dim: int) -> View:
    """`x[0]`, `op(x[0], x[1])`, ...: in as many steps as the number of entries has bits.

    Reference: W. D. Hillis, G. L. Steele, Commun. ACM 29 (1986) 1170-1183.
    """
    view = g.whole(x)
    if not view.shape:
        return view
    dim %= len(view.shape)
    n, reach = view.shape[dim], 1
    while reach < n:
        first, rest = _part(view, dim, 0, reach), _part(view, dim, reach, n - reach)
        combined = g.binary(op, rest, _part(view, dim, 0, n - reach))
        view, reach = g.whole(Joined((first, combined), dim)), 2 * reach
    return view


HANDLERS["cumsum"] = lambda g, self, dim, dtype=None: scan(g, "add", self, dim)
HANDLERS["cumprod"] = lambda g, self, dim, dtype=None: scan(g, "mul", self, dim)


@handles("prod")
def _prod(
    g: Builder, self: Traced, dtype: Any = None, dim: int | None = None, keepdim: bool = False
) -> View:
    view = g.whole(self)
    if dim is None:
        view, dim = view.reshape((math.prod(view.shape),)), 0
    dim %= max(len(view.shape), 1)
    while view.shape and view.shape[dim] > 1:
        n = view.shape[dim]
        half = n // 2
        product = g.binary("mul", _part(view, dim, 0, half), _part(view, dim, half, half))
        pieces = (product, _part(view, dim, 2 * half, 1)) if n % 2 else (product,)
        view = g.whole(Joined(pieces, dim)) if n % 2 else product
    if keepdim or not view.shape:
        return view
    return view.reshape((*view.shape[:dim], *view.shape[dim + 1 :]))


def _shifted(g: Builder, x: Traced, dim: Any) -> tuple[View, View]:
    """`x` less its greatest entry, and that entry; 0 where it is infinite."""
    top = reduced(g, x, dim, True, "greatest")
    top = g.whole(where(g, isinf(g, top), 0.0, top))
    return g.binary("sub", x, top), top


@handles("softmax", "_softmax")
def softmax(g: Builder, self: Traced, dim: int, **_: Any) -> View:
    """`exp(x)`, divided by its sum."""
    top = reduced(g, self, dim, True, "greatest")
    powers = g.unary("exp", g.binary("sub", self, top))
    return g.binary("div", powers, reduced(g, powers, dim, True, "sum"))


@handles("log_softmax", "_log_softmax")
def _log_softmax(g: Builder, self: Traced, dim: int, **_: Any) -> View:
    rest, _top = _shifted(g, self, dim)
    return g.binary("sub", rest, g.unary("log", reduced(g, g.unary("exp", rest), dim, True, "sum")))


@handles("logsumexp")
def _logsumexp(g: Builder, self: Traced, dim: Any, keepdim: bool = False) -> View:
    rest, top = _shifted(g, self, dim)
    logarithm = g.unary("log", reduced(g, g.unary("exp", rest), dim, True, "sum"))
    total = g.binary("add", logarithm, top)
    return total if keepdim else reduced(g, total, dim, False, "sum")


@handles("var")
def var(
    g: Builder,
    self: Traced,
    dim: Any = None,
    unbiased: bool = True,
    correction: Any = None,
    keepdim: bool = False,
) -> Traced:
    """The mean square of what is left without the mean, by `n - correction`."""
    away = g.binary("sub", self, reduced(g, self, dim, True, "mean"))
    total = reduced(g, g.unary("square", away), dim, keepdim, "sum")
    count = math.prod(self.shape) // max(math.prod(total.shape), 1)
    lost = float(unbiased) if correction is None else float(correction)
    return g.affine(total, 1.0 / max(count - lost, 0.0) if count > lost else math.inf)


@handles("std")
def _std(g: Builder, self: Traced, dim: Any = None, **options: Any) -> Traced:
    return _root(g, g.whole(var(g, self, dim, **options)))


@handles("linalg_vector_norm")
def _norm(
    g: Builder, self: Traced, ord: float, dim: Any, keepdim: bool, dtype: Any = None
) -> Traced:
    if math.isinf(ord):
        return _extremum(g, g.unary("abs", self), dim, keepdim, math.copysign(1.0, ord))
    if ord == 0:
        raise refuse("a vector norm of order 0", "aten.linalg_vector_norm")
    if ord == 1:
        return reduced(g, g.unary("abs", self), dim, keepdim, "sum")
    size = (
        g.unary("square", self)
        if ord == 2
        else g.unary("power", g.unary("abs", self), exponent=ord)
    )
    return _root(g, reduced(g, size, dim, keepdim, "sum"), ord)


def _root(g: Builder, x: View, order: float = 2.0) -> Traced:
    """The root of what is not negative; at 0 torch gives norms the gradient 0, one of many."""
    empty = g.binary("equal", x, g.constant(0.0))
    safe = g.binary("add", x, empty)
    root = g.unary("sqrt", safe) if order == 2 else g.unary("power", safe, exponent=1.0 / order)
    return where(g, empty, 0.0, root)
