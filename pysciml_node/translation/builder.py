"""Programs in the making: views are followed without moving data, operations are appended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pysciml_node.translation.program import Operation, Parameter, Program

Shape = tuple[int, ...]

MAX_RUNS = 4
"""Runs of dimensions, alike for both operands, that broadcasting in Julia can tell apart."""

FUSABLE = {"tanh", "sigmoid", "relu"}
"""Activations whose derivative follows from their value."""


@dataclass(frozen=True)
class View:
    """Entries of a value: `shape`, `stride` and `offset` as torch has them."""

    id: int
    shape: Shape
    stride: Shape
    offset: int = 0

    @property
    def is_single(self) -> bool:
        """Whether all entries are the same one."""
        return all(s == 0 or n == 1 for n, s in zip(self.shape, self.stride, strict=True))

    def expand(self, shape: Shape) -> View:
        """Broadcast to `shape`."""
        lead = len(shape) - len(self.shape)
        dimensions = zip(self.shape, self.stride, shape[lead:], strict=True)
        stride = tuple(0 if n == 1 and m != 1 else s for n, s, m in dimensions)
        return replace(self, shape=shape, stride=(0,) * lead + stride)

    def core(self) -> View:
        """The view without its repetitions: dimensions along which it repeats are 1."""
        shape = tuple(1 if s == 0 else n for n, s in zip(self.shape, self.stride, strict=True))
        return replace(self, shape=shape)

    def reshape(self, shape: Shape) -> View:
        """A contiguous view by another shape."""
        return replace(self, shape=shape, stride=row_strides(shape))

    @property
    def transposed(self) -> View:
        """The last two dimensions exchanged."""
        *lead, m, n = self.shape
        *lead_stride, s, r = self.stride
        return replace(self, shape=(*lead, n, m), stride=(*lead_stride, r, s))


@dataclass(frozen=True)
class Joined:
    """Views side by side along `dim`, joined only when an operation asks for it."""

    pieces: tuple[View, ...]
    dim: int

    @property
    def shape(self) -> Shape:
        """The shape of the concatenation."""
        width = sum(piece.shape[self.dim] for piece in self.pieces)
        shape = self.pieces[0].shape
        return (*shape[: self.dim], width, *shape[self.dim + 1 :])


Traced = View | Joined


def row_strides(shape: Sequence[int]) -> Shape:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def broadcast(*shapes: Shape) -> Shape:
    """The shape to which all of them expand."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def runs(shape: Shape, first: Shape, second: Shape) -> int:
    """Runs of neighbouring dimensions in which each operand is either whole or repeated."""
    kinds = [(a == n, b == n) for n, a, b in zip(shape, first, second, strict=True) if n != 1]
    return sum(i == 0 or kind != kinds[i - 1] for i, kind in enumerate(kinds))


class Builder:
    """Appends operations to a program.

    Args:
        dtype: of all values.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sizes: list[int] = []
        self.time = self._new(1)
        self.tensors: list[Tensor | int] = []
        self._state: list[tuple[int, Shape]] = []
        self._parameters: list[Parameter] = []
        self._constants: dict[int, float] = {}
        self._operations: list[Operation] = []
        self._views: dict[tuple[Any, ...], View] = {}

    def _new(self, size: int) -> int:
        self._sizes.append(size)
        return len(self._sizes) - 1

    # Sources ---------------------------------------------------------------------------------

    def time_view(self) -> View:
        """The time, 0-dimensional."""
        return View(self.time, (), ())

    def state_part(self, shape: Shape) -> View:
        """The next part of the state."""
        id = self._new(math.prod(shape))
        self._state.append((id, shape))
        return View(id, shape, row_strides(shape))

    def parameter(self, name: str, shape: Shape, source: Tensor | int, trained: bool) -> View:
        """A run of the parameter vector; `source` is its tensor, or that tensor's number."""
        last = self._parameters[-1] if self._parameters else None
        offset = last.offset + math.prod(last.shape) if last else 0
        id = self._new(math.prod(shape))
        self._parameters.append(Parameter(id, name, shape, offset, trained))
        self.tensors.append(source)
        return View(id, shape, row_strides(shape))

    def source_of(self, value: Traced) -> int | None:
        """The number of the tensor that a value is a view of, if it is one."""
        pairs = zip(self._parameters, self.tensors, strict=True)
        sources = (x for parameter, x in pairs if parameter.id == self.whole(value).id)
        source = next(sources, None)
        return source if isinstance(source, int) else None

    def constant(self, value: float, shape: Shape = ()) -> View:
        """One number, as a tensor of any shape."""
        key = ("constant", value)
        if key not in self._views:
            id = self._new(1)
            self._constants[id] = value
            self._views[key] = View(id, (), ())
        return self._views[key].expand(shape)

    def literal(self, tensor: Tensor) -> View:
        """A tensor known when the module is translated."""
        values = tensor.detach().to(self.dtype)
        if values.numel() and bool((values == values.reshape(-1)[0]).all()):
            return self.constant(float(values.reshape(-1)[0]), tuple(values.shape))
        name = f"constant {len(self.tensors)}"
        return self.parameter(name, tuple(values.shape), values.clone(), trained=False)

    def number(self, view: Traced) -> float | None:
        """The value of a view that is a single constant."""
        return self._constants.get(view.id) if isinstance(view, View) else None

    # Operations ------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: Sequence[tuple[int, Shape]], shape: Shape, **attributes: Any
    ) -> View:
        """Append an operation; the result is contiguous."""
        id = self._new(math.prod(shape))
        ids, shapes = tuple(i for i, _ in inputs), tuple(s for _, s in inputs)
        self._operations.append(Operation(op, ids, shapes, id, shape, attributes))
        return View(id, shape, row_strides(shape))

    def whole(self, x: Traced) -> View:
        """The same entries as a separate value, by rows."""
        if isinstance(x, Joined):
            return self._concatenate(x)
        size = math.prod(x.shape)
        strides = zip(x.shape, x.stride, row_strides(x.shape), strict=True)
        dense = all(n == 1 or s == r for n, s, r in strides)
        if dense and size == self._sizes[x.id]:
            return x.reshape(x.shape)
        key = ("range" if dense else "view", x)
        if key not in self._views:
            source = [(x.id, (self._sizes[x.id],))]
            if dense:
                view = self.emit("range", source, x.shape, offset=x.offset)
            else:
                view = self.emit(
                    "view", source, x.shape, size=x.shape, stride=x.stride, offset=x.offset
                )
            self._views[key] = view
        return self._views[key]

    def _concatenate(self, x: Joined) -> View:
        if ("cat", x) not in self._views:
            inputs: list[tuple[int, Shape]] = []
            for piece in x.pieces:
                if piece.is_single:
                    inputs.append((self.whole(piece.core()).id, (1,)))
                else:
                    inputs.append((self.whole(piece).id, piece.shape))
            widths = [piece.shape[x.dim] for piece in x.pieces]
            self._views["cat", x] = self.emit("cat", inputs, x.shape, dim=x.dim, widths=widths)
        return self._views["cat", x]

    def unary(self, op: str, x: Traced, **attributes: Any) -> View:
        """A function entry by entry; repeated entries are computed once."""
        view = x if isinstance(x, View) else self.whole(x)
        core = view.core()
        value = self.emit(op, [(self.whole(core).id, core.shape)], core.shape, **attributes)
        return value.expand(view.shape)

    def affine(self, x: Traced, factor: float = 1.0, shift: float = 0.0) -> Traced:
        """`factor * x + shift`."""
        if factor == 1.0 and shift == 0.0:
            return x
        return self.unary("affine", x, factor=factor, shift=shift)

    def binary(self, op: str, a: Traced, b: Traced) -> View:
        """A function of two operands, broadcast."""
        shape = broadcast(a.shape, b.shape)
        views = [(x if isinstance(x, View) else self.whole(x)).expand(shape) for x in (a, b)]
        pairs = zip(views[0].stride, views[1].stride, strict=True)
        repeated = [s == 0 and r == 0 for s, r in pairs]
        core = tuple(1 if again else n for n, again in zip(shape, repeated, strict=True))
        first, second = (view.core() for view in views)
        if runs(core, first.shape, second.shape) > MAX_RUNS:
            first, second = (
                replace(view, shape=core) if view is not first else view for view in views
            )
        inputs = [(self.whole(x).id, x.shape) for x in (first, second)]
        return self.emit(op, inputs, core).expand(shape)

    # The end ---------------------------------------------------------------------------------

    def finish(self, outputs: Sequence[Traced]) -> Program:
        """The program with these results."""
        ids = [self.whole(x).id for x in outputs]
        self._operations = _used(self._operations, ids)
        produced = {step.out for step in self._operations if step.op != "range"}
        consumed = {id for step in self._operations for id in step.inputs}
        results: list[int] = []
        for id, x in zip(ids, outputs, strict=True):
            if id not in produced or id in consumed or id in results:
                id = self.emit("identity", [(id, x.shape)], x.shape).id
            results.append(id)
        return Program(
            time=self.time,
            state=tuple(self._state),
            parameters=tuple(self._parameters),
            constants=tuple(self._constants.items()),
            operations=tuple(_fused(self._operations, results)),
            outputs=tuple(results),
            shapes=tuple(tuple(x.shape) for x in outputs),
        )


def _used(operations: list[Operation], outputs: Sequence[int]) -> list[Operation]:
    """Without operations that no output depends on."""
    needed, kept = set(outputs), []
    for step in reversed(operations):
        if step.out in needed:
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _fused(operations: list[Operation], outputs: Sequence[int]) -> list[Operation]:
    """Activations joined to the product before them, where nothing else needs its value."""
    uses = Counter(id for step in operations for id in step.inputs)
    uses.update(outputs)
    fused: list[Operation] = []
    place: dict[int, int] = {}
    for step in operations:
        before = place.get(step.inputs[0]) if step.op in FUSABLE else None
        if before is not None and uses[step.inputs[0]] == 1:
            linear = fused[before]
            attributes = {**linear.attributes, "activation": step.op}
            # In the product's shape, which has its rows: W @ u is one of as many rows as W has.
            fused[before] = replace(linear, out=step.out, attributes=attributes)
            continue
        if step.op == "linear":
            place[step.out] = len(fused)
        fused.append(step)
    return fused
