"""What lookups become in a program: places that are searched for, and entries at computed places.

Places are whole numbers among the numbers of the program. A place that lies outside makes an entry
NaN, where torch raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pysciml_node.translation.builder import Builder, Joined, Traced, View, broadcast, row_strides
from pysciml_node.translation.choices import Operand, opposite, traced, where
from pysciml_node.translation.moves import MOST_PLACES
from pysciml_node.translation.operations import handles, reduced, refuse

SEARCHES = frozenset(("searchsorted", "bucketize"))
"""Operations whose operands are compared, and so must not be rounded to another dtype."""

LOOKUPS = frozenset(
    ("select", "index", "_unsafe_index", "index_select", "gather", "take", "embedding")
)
"""Operations that take entries at places which may be computed."""

# Searches --------------------------------------------------------------------------------------


@handles("searchsorted")
def _searchsorted(
    g: Builder,
    sorted_sequence: Traced,
    self: Operand,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Traced:
    if sorter is not None:
        raise refuse("searchsorted with a sorter", "aten.searchsorted")
    return _found(g, sorted_sequence, self, right or side == "right")


@handles("bucketize")
def _bucketize(
    g: Builder, self: Operand, boundaries: Traced, out_int32: bool = False, right: bool = False
) -> Traced:
    return _found(g, boundaries, self, right)


def _found(g: Builder, knots: Traced, x: Operand, right: bool) -> Traced:
    """How many knots are not above `x`, or below it; all of them where `x` is NaN.

    Torch goes by halves, and comes to places of its own among knots that do not increase or are
    NaN: there the result is NaN.
    """
    row, value = g.whole(knots), g.whole(traced(g, x))
    count = row.shape[-1]
    if len(row.shape) > 1:
        row = row.reshape((*row.shape[:-1], 1, count))
    column = value.reshape((*value.shape, 1))
    if not 0 < math.prod(broadcast(row.shape, column.shape)) <= MOST_PLACES:
        raise refuse(f"a search among {count} knots", "aten.searchsorted")
    above = g.binary("less" if right else "less_equal", column, row)
    places = g.affine(reduced(g, above, -1, False, "sum"), -1.0, float(count))
    first, rest = ((*row.shape[:-1], n) for n in (1, count - 1))
    before = g.whole(Joined((replace(row, shape=first), replace(row, shape=rest)), len(rest) - 1))
    unordered = opposite(g, g.binary("less_equal", before if count > 1 else row, row))
    found = reduced(g, unordered, -1, False, "greatest")
    return g.binary("add", places, g.binary("where", found, g.constant(math.nan)))


# Entries at places -----------------------------------------------------------------------------


def look_up(g: Builder, name: str, given: dict[str, Any]) -> View:
    """The entries of an operand at places of which some are computed.

    Args:
        g: the program.
        name: of the operation, one of `LOOKUPS`.
        given: its arguments by name.

    Raises:
        UnsupportedModule: indices with slices between them, or too many entries.
    """
    x = g.whole(_known(g, given.get("self", given.get("weight"))))
    if name == "embedding":
        if given["padding_idx"] >= 0:
            raise refuse("an embedding with a padding index", "aten.embedding")
        return _along(g, x, 0, given["indices"])
    if name in ("index", "_unsafe_index"):
        return _indexed(g, x, given["indices"])
    index = given["index"]
    if name == "take":
        flat = x.reshape((math.prod(x.shape),))
        return _along(g, flat, 0, _wrapped(g, index, flat.shape[0]))
    dim = given["dim"] % len(x.shape)
    if name == "select":
        return _along(g, x, dim, _wrapped(g, index, x.shape[dim]))
    if name == "index_select":
        return _along(g, x, dim, g.whole(index).reshape((math.prod(index.shape),)))
    return _gathered(g, x, dim, index)


def _known(g: Builder, x: Any) -> Traced:
    return g.literal(x) if isinstance(x, Tensor) else x


def _along(g: Builder, x: View, dim: int, index: Traced) -> View:
    """The entries at places along a dimension, which the dimensions of the index replace."""
    lead, n, rest = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
    if n * torch.finfo(g.dtype).eps > 1:
        raise refuse(f"a computed index among {n} entries in {g.dtype}", "aten.index")
    places = (g.whole(index).id, (math.prod(index.shape),))
    entries = (x.id, (math.prod(lead), n, math.prod(rest)))
    return g.emit("pick", [entries, places], (*lead, *index.shape, *rest))


def _wrapped(g: Builder, index: Traced, n: int) -> View:
    """A negative index counts from the end."""
    negative = g.binary("less", index, g.constant(0.0))
    return g.binary("add", index, g.affine(negative, float(n)))


def _inside(g: Builder, index: Traced, n: int) -> Traced:
    """The index, or NaN: with others it may make a place that is inside."""
    low = g.binary("less_equal", g.constant(0.0), index)
    high = g.binary("less", index, g.constant(float(n)))
    return where(g, g.binary("mul", low, high), index, math.nan)


def _indexed(g: Builder, x: View, indices: Sequence[Any]) -> View:
    """`x[i, j]`, or `x[:, i, j]`: indexed dimensions that are neighbours are one."""
    used = [d for d, index in enumerate(indices) if index is not None]
    first, last = used[0], used[-1] + 1
    if used != list(range(first, last)):
        raise refuse("a computed index with slices between indices", "aten.index")
    sizes = x.shape[first:last]
    places = [
        _inside(g, _wrapped(g, _known(g, indices[d]), n), n)
        for d, n in zip(used, sizes, strict=True)
    ]
    place = places[0]
    for further, n in zip(places[1:], sizes[1:], strict=True):
        place = g.binary("add", g.affine(place, float(n)), further)
    merged = x.reshape((*x.shape[:first], math.prod(sizes), *x.shape[last:]))
    return _along(g, merged, first, place)


def _gathered(g: Builder, x: View, dim: int, index: Traced) -> View:
    """Entries of the index's shape, each from its own place along the other dimensions."""
    size, step = math.prod(x.shape), row_strides(x.shape)[dim]
    here = torch.arange(size).reshape(x.shape).narrow(dim, 0, 1)
    here = here[tuple(slice(n) for n in index.shape)].expand(index.shape)
    place = g.affine(_inside(g, index, x.shape[dim]), float(step))
    return _along(g, x.reshape((size,)), 0, g.binary("add", place, g.literal(here)))
