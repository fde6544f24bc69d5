"""The program of a batch as that of some of its rows, where no row depends on another.

Values of a few rows stay in the nearest cache from one operation to the next, where those of the
whole batch would go out to memory and back. A value of a batch is a stack of blocks, each with a
run of numbers for every row; most have one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pysciml_node.torch_engine.native import elementwise
from pysciml_node.torch_engine.native.text import Shape
from pysciml_node.translation.program import Operation, Program


class _Mixed(Exception):
    """Rows depend on each other, or lie in a way that is not followed."""


@dataclass(frozen=True)
class Rows:
    """A program of some rows of a batch.

    Attributes:
        program: of `count` rows. What depends on no row, or on parameters alone, is as it was.
        total: rows of the batch.
        count: rows of the program.
        part: rows that one call of its code goes through, a multiple of these; all, or some of a
            batch that is taken in parts.
        wide: values that have rows, all but those of `held`.
        held: values that depend on parameters alone and have a run of numbers for each row.
    """

    program: Program
    total: int
    count: int
    part: int
    wide: frozenset[int]
    held: frozenset[int]

    @property
    def in_parts(self) -> bool:
        """Whether a call goes through a part of the batch alone."""
        return self.part < self.total

    @property
    def turns(self) -> int:
        """How many times the program is gone through in a call."""
        return self.part // self.count


def by_rows(program: Program, count: int | None = None, part: int | None = None) -> Rows | None:
    """The program of `count` rows, or `None` where rows depend on each other.

    Args:
        program: of the batch, along the first axis of all parts of the state.
        count: rows; default all, which shows what depends on them.
        part: rows of a part, a multiple of these; default all rows.
    """
    shapes = [shape for _, shape in program.state]
    total = shapes[0][0] if shapes[0] else 1
    if total == 1 or any(shape[:1] != (total,) for shape in shapes):
        return None
    try:
        return _Cut(program, total, count or total, part or total).run()
    except _Mixed:
        return None


@dataclass
class _Cut:
    """Goes through a program once."""

    program: Program
    total: int
    count: int
    part: int
    wide: dict[int, int] = field(default_factory=dict)  # blocks of each value that has rows
    fixed: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    whole: set[int] = field(default_factory=set)  # values that the body reads as they are
    sizes: dict[int, int] = field(default_factory=dict)
    steps: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        program = self.program
        self.wide |= {id: 1 for id, _ in program.state}
        self.fixed |= {p.id for p in program.parameters} | {id for id, _ in program.constants}
        self.sizes |= {id: math.prod(shape) for id, shape in program.state}
        self.sizes |= {p.id: math.prod(p.shape) for p in program.parameters}
        self.sizes |= {step.out: math.prod(step.shape) for step in program.operations}

    def run(self) -> Rows:
        """The program of the rows."""
        program = self.program
        for step in program.operations:
            if all(id in self.fixed for id in step.inputs) and step.out not in program.outputs:
                self.fixed.add(step.out)
                self.steps.append(step)
            elif not any(id in self.wide for id in step.inputs):
                self.whole.update(step.inputs)
                self.steps.append(step)
            elif step.op in _CUTS:
                _CUTS[step.op](self, step)
            else:
                raise _Mixed
        if any(self.wide.get(id) != 1 for id in program.outputs) or self.whole & self.held:
            raise _Mixed
        state = tuple((id, (self.count, *shape[1:])) for id, shape in program.state)
        shapes = tuple(shape for _, shape in state)
        cut = replace(program, state=state, operations=tuple(self.steps), shapes=shapes)
        sets = frozenset(self.wide), frozenset(self.held)
        return Rows(cut, self.total, self.count, self.part, *sets)

    def axis(self, shape: Shape, blocks: int) -> int:
        """The axis of the rows, which others may be joined to."""
        for a, n in enumerate(shape):
            if math.prod(shape[:a]) == blocks and n % self.total == 0 and n > 0:
                return a
        raise _Mixed

    def cut(self, shape: Shape, a: int) -> Shape:
        """A shape with fewer rows."""
        return (*shape[:a], shape[a] // self.total * self.count, *shape[a + 1 :])

    def flat(self, id: int) -> Shape:
        """The shape of a value with rows as one run."""
        return (self.sizes[id] // self.total * self.count,)

    def hold(self, id: int, blocks: int) -> None:
        """Read by rows what depends on no state."""
        if id not in self.fixed or blocks != 1:
            raise _Mixed
        self.held.add(id)

    def read_whole(self, ids: Sequence[int]) -> None:
        """Read what has no rows."""
        if any(id in self.wide for id in ids):
            raise _Mixed
        self.whole.update(ids)

    def append(self, step: Operation, blocks: int, **changes: Any) -> None:
        """A step of fewer rows; its shape is cut unless it is given."""
        if "shape" not in changes:
            changes["shape"] = self.cut(step.shape, self.axis(step.shape, blocks))
        self.wide[step.out] = blocks
        self.steps.append(replace(step, **changes))

    # Operations --------------------------------------------------------------------------------

    def entries(self, step: Operation) -> None:
        """A function entry by entry."""
        (shape,), blocks = step.in_shapes, self.wide[step.inputs[0]]
        self.append(step, blocks, in_shapes=(self.cut(shape, self.axis(shape, blocks)),))

    def pair(self, step: Operation) -> None:
        """A function of two operands, which may be repeated."""
        rank = len(step.shape)
        aligned = [(1,) * (rank - len(shape)) + shape for shape in step.in_shapes]
        axes = {
            self.axis(shape, self.wide[id])
            for id, shape in zip(step.inputs, aligned, strict=True)
            if id in self.wide
        }
        if len(axes) > 1:
            raise _Mixed
        (a,) = axes
        blocks, shapes = math.prod(step.shape[:a]), []
        for id, shape in zip(step.inputs, aligned, strict=True):
            if id not in self.wide and shape[a] == 1:
                self.whole.add(id)
            elif shape[a] == step.shape[a]:
                if id not in self.wide:
                    self.hold(id, math.prod(shape[:a]))
                shape = self.cut(shape, a)
            else:
                raise _Mixed
            shapes.append(shape)
        shape = self.cut(step.shape, a)
        self.append(step, blocks, shape=shape, in_shapes=tuple(shapes))

    def reduced(self, step: Operation) -> None:
        """A sum or a maximum over other axes than that of the rows."""
        (source,) = step.in_shapes
        a = self.axis(source, self.wide[step.inputs[0]])
        if a in step.attributes["dims"]:
            raise _Mixed
        shape = self.cut(step.shape, a)
        blocks = math.prod(step.shape[:a])
        self.append(step, blocks, shape=shape, in_shapes=(self.cut(source, a),))

    def joined(self, step: Operation) -> None:
        """Pieces side by side."""
        dim, out = step.attributes["dim"], step.shape
        widths = step.attributes["widths"]
        pieces = [(*out[:dim], width, *out[dim + 1 :]) for width in widths]
        axes = {
            self.axis(piece, self.wide[id])
            for id, piece in zip(step.inputs, pieces, strict=True)
            if id in self.wide
        }
        if len(axes) > 1 or dim in axes:
            raise _Mixed
        (a,) = axes
        shapes = []
        for id, own, piece in zip(step.inputs, step.in_shapes, pieces, strict=True):
            single = math.prod(own) == 1 and id not in self.wide
            if single:
                self.whole.add(id)
            elif id not in self.wide:
                self.hold(id, math.prod(piece[:a]))
            shapes.append(own if single else self.cut(piece, a))
        shape = self.cut(out, a)
        self.append(step, math.prod(out[:a]), shape=shape, in_shapes=tuple(shapes))

    def run_of(self, step: Operation) -> None:
        """A run of entries: some whole blocks."""
        (id,), offset, size = step.inputs, step.attributes["offset"], math.prod(step.shape)
        block = self.sizes[id] // self.wide[id]
        if offset % block or size % block:
            raise _Mixed
        attributes = {**step.attributes, "offset": offset // self.total * self.count}
        shapes = (self.flat(id),)
        self.append(step, size // block, in_shapes=shapes, attributes=attributes)

    def strided(self, step: Operation) -> None:
        """Entries by strides: those of the rows, of blocks, and others within a row."""
        (id,), attributes = step.inputs, step.attributes
        block = self.sizes[id] // self.wide[id]
        run, size, stride = block // self.total, list(attributes["size"]), attributes["stride"]
        if 0 in size:
            raise _Mixed
        axes, strides = [], []
        before, within = divmod(attributes["offset"], block)
        start = before * (run * self.count) + within
        for a, (n, s) in enumerate(zip(size, stride, strict=True)):
            joined = max(n // self.total, 1)
            if n > 1 and n % self.total == 0 and s * joined == run:
                axes.append(a)
                within += (joined - 1) * s
            elif n > 1 and s >= block:
                if s % block:
                    raise _Mixed
                s = s // self.total * self.count
            elif n > 1:
                within += (n - 1) * s
            strides.append(s)
        if len(axes) != 1 or within >= run:
            raise _Mixed
        (a,) = axes
        shape = self.cut(tuple(size), a)
        changed = {**attributes, "size": shape, "stride": tuple(strides), "offset": start}
        blocks = math.prod(size[:a])
        shapes = (self.flat(id),)
        self.append(step, blocks, shape=shape, in_shapes=shapes, attributes=changed)

    def placed(self, step: Operation) -> None:
        """Entries by their places in a row."""
        (id,), a = step.inputs, step.attributes
        if self.wide[id] != 1 or a["outer"] % self.total:
            raise _Mixed
        attributes = {**a, "outer": a["outer"] // self.total * self.count}
        if step.op == "take" and a["outer"] * a["stride"] != self.sizes[id]:
            raise _Mixed
        if step.op == "put" and a["outer"] * a["stride"] != math.prod(step.shape):
            raise _Mixed
        self.append(step, 1, in_shapes=(self.flat(id),), attributes=attributes)

    def picked(self, step: Operation) -> None:
        """Entries of each row at places that all share, or of all rows alike at places of each."""
        (x, index), (entries, places) = step.inputs, step.in_shapes
        wide = x if x in self.wide else index
        if self.wide[wide] != 1:
            raise _Mixed
        if wide == x:
            if entries[0] % self.total:
                raise _Mixed
            entries = self.cut(entries, 0)
            self.read_whole((index,))
        else:
            if entries[0] != 1 or places[0] % self.total:
                raise _Mixed
            places = self.cut(places, 0)
            self.read_whole((x,))
        self.append(step, 1, in_shapes=(entries, places))

    def linear(self, step: Operation) -> None:
        """A product with a weight."""
        a, shapes = step.attributes, list(step.in_shapes)
        pieces = len(a["columns"])
        rows = math.prod(step.shape[:-1])
        if rows % self.total:
            raise _Mixed
        for i, (id, (_, width)) in enumerate(zip(step.inputs, a["columns"], strict=False)):
            if id not in self.wide:
                self.hold(id, 1)
            elif self.wide[id] != 1:
                raise _Mixed
            shapes[i] = (rows // self.total * self.count, width)
        self.read_whole(step.inputs[pieces:])
        self.append(step, 1, in_shapes=tuple(shapes))

    def stacked(self, step: Operation) -> None:
        """A stack of products, each of one row's own matrices, or of one with shared ones."""
        a = dict(step.attributes)
        if any(self.wide.get(id, 1) != 1 for id in step.inputs):
            raise _Mixed
        if a["batch"] % self.total == 0:
            a["batch"] = a["batch"] // self.total * self.count
            for id, shared in zip(step.inputs, (a["shared_a"], a["shared_b"]), strict=True):
                if shared:
                    self.read_whole((id,))
                elif id not in self.wide:
                    self.hold(id, 1)
        elif a["batch"] == 1 and a["rows"] % self.total == 0 and not a["transposed_a"]:
            a["rows"] = a["rows"] // self.total * self.count
            self.read_whole(step.inputs[1:])
        else:
            raise _Mixed
        shapes = tuple(
            self.cut(shape, self.axis(shape, 1)) if id in {*self.wide, *self.held} else shape
            for id, shape in zip(step.inputs, step.in_shapes, strict=True)
        )
        self.append(step, 1, in_shapes=shapes, attributes=a)

    def of_samples(self, step: Operation) -> None:
        """A convolution or a normalization, of each sample by itself."""
        x, *others = step.inputs
        a, shape = step.attributes, step.in_shapes[0]
        run = self.sizes[x] // self.total
        if self.wide.get(x) != 1:
            raise _Mixed
        if step.op == "norm" and run % (a["groups"] * a["channels"] * a["pixels"]):
            raise _Mixed
        self.read_whole(others)
        shapes = (self.cut(shape, self.axis(shape, 1)), *step.in_shapes[1:])
        if step.op == "conv" and self.axis(shape, 1) != 0:
            raise _Mixed
        self.append(step, 1, in_shapes=shapes)


_CUTS: dict[str, Callable[[_Cut, Operation], None]] = {
    **dict.fromkeys((*elementwise.FORWARD, "sin", "cos"), _Cut.entries),
    **dict.fromkeys(elementwise.PAIRS, _Cut.pair),
    **dict.fromkeys(("sum", "greatest"), _Cut.reduced),
    **dict.fromkeys(("take", "put"), _Cut.placed),
    "pick": _Cut.picked,
    **dict.fromkeys(("conv", "norm"), _Cut.of_samples),
    "cat": _Cut.joined,
    "view": _Cut.strided,
    "range": _Cut.run_of,
    "linear": _Cut.linear,
    "bmm": _Cut.stacked,
}


def without_repetitions(program: Program) -> Program:
    """The program without operations that compute what an earlier one has computed."""
    same: dict[int, int] = {}
    first: dict[str, int] = {}
    steps = []
    for step in program.operations:
        inputs = tuple(same.get(id, id) for id in step.inputs)
        step = replace(step, inputs=inputs)
        if step.out in program.outputs:  # which have places of their own
            steps.append(step)
            continue
        words = (step.op, inputs, step.in_shapes, step.shape, sorted(step.attributes.items()))
        known = first.setdefault(repr(words), step.out)
        if known == step.out:
            steps.append(step)
        else:
            same[step.out] = known
    return replace(program, operations=tuple(steps))
