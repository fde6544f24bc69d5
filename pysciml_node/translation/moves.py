"""What operations become that only move entries: results are entries of operands, or a number.

Torch itself does the operation on the places of the entries, so that nothing about an index, a flip
or a pad is written a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pysciml_node.translation.builder import Builder, Joined, Shape, Traced, View
from pysciml_node.translation.choices import where
from pysciml_node.translation.operations import refuse

MOST_PLACES = 1 << 20
"""Places that a program may hold of one operation."""

MOVES: dict[str, str | None] = {
    **dict.fromkeys(("index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim")),
    **dict.fromkeys(("flip", "fliplr", "flipud", "roll", "rot90", "embedding", "as_strided_copy")),
    **dict.fromkeys(
        ("repeat", "tile", "repeat_interleave", "unfold", "tril", "triu", "diag_embed")
    ),
    **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "replication_pad1d")),
    **dict.fromkeys(("replication_pad2d", "_pad_circular", "pixel_shuffle", "pixel_unshuffle")),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "channel_shuffle", "im2col")),
    **dict.fromkeys(("select_scatter", "slice_scatter", "diagonal_scatter", "index_copy")),
    **dict.fromkeys(("constant_pad_nd", "pad", "scatter", "index_fill"), "value"),
}
"""Operations of this kind, and which of their arguments is a number that entries are set to."""

ADDITIONS = dict.fromkeys(("index_add", "scatter_add", "index_put", "_unsafe_index_put"))
"""Operations that add entries of one operand to some of another, or put them there."""


def is_traced(value: Any) -> bool:
    """Whether a value depends on the state, the time or the parameters."""
    return isinstance(value, View | Joined)


def is_index(value: Any) -> bool:
    """Whether a value is a known tensor of whole numbers or of truths."""
    return isinstance(value, Tensor) and not value.is_floating_point()


def depends_on_state(given: dict[str, Any]) -> bool:
    """Whether the places of an operation are not known when the field is translated."""
    places = [given.get(key) for key in ("index", "indices")]
    return any(is_traced(x) for x in pytree.tree_leaves(places, is_leaf=is_traced))


def fills(name: str, given: dict[str, Any]) -> bool:
    """Whether an operation sets entries to a number other than 0."""
    number = given.get(MOVES.get(name) or "")
    return isinstance(number, int | float) and number != 0


def move(g: Builder, name: str, target: Callable[..., Any], given: dict[str, Any]) -> View:
    """Follow an operation that moves entries.

    Args:
        g: the program.
        name: of the operation.
        target: the operation.
        given: its arguments by name.

    Raises:
        UnsupportedModule: too many places.
    """
    given = {key: _operand(g, value) for key, value in given.items()}
    sources = [x for x in pytree.tree_leaves(given, is_leaf=is_traced) if is_traced(x)]
    # Places count from 1: what is 0 comes from no operand.
    starts = [1]
    for x in sources:
        starts.append(starts[-1] + math.prod(x.shape))
    order = iter(starts)

    def places(x: Any) -> Any:
        return _counted(x.shape, next(order)) if is_traced(x) else x

    numbered = pytree.tree_map(places, given, is_leaf=is_traced)
    fill = MOVES[name]
    number = numbered.get(fill) if fill is not None else None
    if isinstance(number, int | float):
        numbered[fill] = 0.0
    entries = target(**numbered)
    shape = tuple(entries.shape)
    whole = [g.whole(x).reshape((math.prod(x.shape),)) for x in sources]
    joined = whole[0] if len(whole) == 1 else g.whole(Joined(tuple(whole), 0))
    moved = take(g, joined, entries.reshape(-1).long() - 1, shape)
    if not number:
        return moved
    filled = torch.where(entries == 0, entries.new_tensor(number), 0.0)
    return g.binary("add", moved, g.literal(filled))


def _operand(g: Builder, value: Any) -> Any:
    """A known tensor of numbers as a value of the program."""
    if isinstance(value, Tensor):
        return value.cpu() if is_index(value) else g.literal(value)
    return value


def _counted(shape: Shape, start: int) -> Tensor:
    count = math.prod(shape)
    # As floating-point numbers: not all of these operations take others.
    return torch.arange(start, start + count, dtype=torch.float64, device="cpu").reshape(shape)


def take(g: Builder, x: View, places: Tensor, shape: Shape) -> View:
    """The entries of a value at some places, by rows; 0 at negative ones."""
    size = math.prod(x.shape)
    return g.emit("take", [(x.id, (size,))], shape, **_compressed(places, shape))


def put(g: Builder, x: Traced, places: Tensor, shape: Shape) -> View:
    """Zeros of a shape, to which the entries of a value are added at some places."""
    view = g.whole(x)
    return g.emit("put", [(view.id, view.shape)], shape, **_compressed(places, view.shape))


def _compressed(places: Tensor, shape: Shape) -> dict[str, Any]:
    """Places as blocks of neighbours, repeated at equal distances."""
    sizes = [math.prod(shape[d:]) for d in range(len(shape), -1, -1)]
    block = max((n for n in sizes if _is_blocks(places, n)), default=1)
    starts = places[::block] if block else places
    outer, stride = 1, 0
    for d in range(len(shape), 0, -1):
        repeats = math.prod(shape[:d])
        distance = _distance(starts, repeats)
        if distance is not None:
            outer, stride = repeats, distance
            break
    kept = starts[: len(starts) // outer].tolist() if outer else []
    if len(kept) > MOST_PLACES:
        raise refuse(f"an operation that moves {len(kept)} entries to places of their own", "take")
    return {"places": kept, "outer": outer, "stride": stride, "block": max(block, 1)}


def _is_blocks(places: Tensor, block: int) -> bool:
    """Whether places come in runs of neighbours of a length, none of them negative."""
    if block <= 1:
        return block == 1
    runs = places.reshape(-1, block)
    first = runs[:, :1]
    return bool(((first >= 0) & (runs == first + torch.arange(block))).all())


def _distance(starts: Tensor, repeats: int) -> int | None:
    """The distance of equal rows of places, if there are so many of them."""
    if repeats <= 1 or len(starts) % repeats or len(starts) == 0:
        return None
    rows = starts.reshape(repeats, -1)
    first, known = rows[0], rows[0] >= 0
    if not bool(known.any()):
        return None
    distance = int((rows[1] - first)[known][0])
    expected = first + distance * torch.arange(repeats)[:, None]
    return distance if torch.equal(torch.where(known, expected, -1), rows) else None


def add(g: Builder, name: str, given: dict[str, Any]) -> Traced:
    """`index_add`, `scatter_add`, and `index_put` of either kind."""
    target = g.whole(_operand(g, given["self"]))
    shape = target.shape
    here = torch.arange(math.prod(shape)).reshape(shape)
    source = _operand(g, given.get("source", given.get("src", given.get("values"))))
    if name == "index_add":
        places = here.index_select(given["dim"], given["index"].reshape(-1))
        source = g.affine(source, float(given["alpha"]))
    elif name == "scatter_add":
        index = given["index"]
        places = here.gather(given["dim"], index)
        source = _first(g.whole(source), tuple(index.shape))
    elif any(is_traced(i) for i in given["indices"]):
        return _masked(g, target, source, given)
    else:
        places = here[tuple(slice(None) if i is None else i for i in given["indices"])]
        if not given["accumulate"]:
            return _replaced(g, target, source, places)
    shaped = _spread(g, source, tuple(places.shape))
    return g.binary("add", target, put(g, shaped, places.reshape(-1), shape))


def _masked(g: Builder, target: View, source: Traced, given: dict[str, Any]) -> Traced:
    """The entries at which a mask holds by one number."""
    (mask, *others) = given["indices"]
    if others or given["accumulate"] or math.prod(source.shape) != 1 or not is_traced(mask):
        raise refuse("index_put by an index that depends on the state", "aten.index_put")
    lead = mask.shape + (1,) * (len(target.shape) - len(mask.shape))
    return where(g, g.whole(mask).reshape(lead), g.whole(source).reshape(()), target)


def _replaced(g: Builder, target: View, source: Traced, places: Tensor) -> View:
    """The entries at some places by those of another value."""
    size = math.prod(target.shape)
    whole = g.whole(_spread(g, source, tuple(places.shape)))
    sources = torch.arange(size)
    sources[places.reshape(-1)] = size + torch.arange(places.numel())
    pieces = (target.reshape((size,)), whole.reshape((places.numel(),)))
    return take(g, g.whole(Joined(pieces, 0)), sources, target.shape)


def _spread(g: Builder, x: Traced, shape: Shape) -> Traced:
    return x if x.shape == shape else (x if isinstance(x, View) else g.whole(x)).expand(shape)


def _first(x: View, shape: Shape) -> View:
    return View(x.id, shape, x.stride, x.offset)


__all__: Sequence[str] = [
    *("ADDITIONS", "MOVES", "add", "depends_on_state", "fills", "is_traced", "move")
]
