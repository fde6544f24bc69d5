"""The program of one member as that of several abreast: each value has a last dimension more.

A loop over the members is then the innermost one everywhere, and becomes vector code whatever the
field is. What depends on shared parameters alone stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pysciml_node.torch_engine.native import elementwise
from pysciml_node.torch_engine.native.emit import Emitter
from pysciml_node.torch_engine.native.layout import Layout
from pysciml_node.torch_engine.native.operations import OPERATIONS, Emission
from pysciml_node.torch_engine.native.text import Shape, contiguous
from pysciml_node.translation.program import Operation, Program

_AS_THEY_ARE = {
    *(*elementwise.FORWARD, *elementwise.PAIRS),
    *("sin", "cos", "sum", "greatest", "pick"),
}


@dataclass
class _Widening:
    """Goes through a program once.

    Args:
        program: of one member.
        own: parameters that are each member's own.
        width: members abreast.
    """

    program: Program
    own: frozenset[int]
    width: int
    wide: set[int] = field(init=False)
    steps: list[Operation] = field(default_factory=list)
    next: int = field(init=False)

    def __post_init__(self) -> None:
        program = self.program
        self.wide = {program.time, *(id for id, _ in program.state), *self.own}
        known = [
            *self.wide,
            *(p.id for p in program.parameters),
            *(id for id, _ in program.constants),
            *(step.out for step in program.operations),
        ]
        self.next = 1 + max(known)

    def run(self) -> Program | None:
        """The program of all, or `None` where an operation has no such form."""
        program, width = self.program, self.width
        for step in program.operations:
            if not self.wide.intersection(step.inputs):
                self.steps.append(step)
            elif step.op in _AS_THEY_ARE:
                self._append(replace(step, in_shapes=self._shapes(step)))
            elif step.op in _OTHER:
                _OTHER[step.op](self, step)
            else:
                return None
        # These may need further operations.
        outputs = tuple(
            id if id in self.wide else self.spread(id, shape, contiguous(shape))
            for id, shape in zip(program.outputs, program.shapes, strict=True)
        )
        return replace(
            program,
            state=tuple((id, (*shape, width)) for id, shape in program.state),
            parameters=tuple(
                replace(p, shape=(*p.shape, width)) if p.id in self.own else p
                for p in program.parameters
            ),
            operations=tuple(self.steps),
            outputs=outputs,
        )

    def _shapes(self, step: Operation) -> tuple[Shape, ...]:
        return tuple(
            (*shape, self.width if id in self.wide else 1)
            for id, shape in zip(step.inputs, step.in_shapes, strict=True)
        )

    def _append(self, step: Operation) -> None:
        """A step whose shape is still that of one member."""
        self.wide.add(step.out)
        self.steps.append(replace(step, shape=(*step.shape, self.width)))

    def new(self, op: str, inputs: tuple[int, ...], shape: Shape, **attributes: Any) -> int:
        """Append an operation of several operands with their own shapes."""
        out, self.next = self.next, self.next + 1
        self.wide.add(out)
        shapes = ((),) * len(inputs)
        self.steps.append(Operation(op, inputs, shapes, out, (*shape, self.width), attributes))
        return out

    def spread(self, id: int, shape: Shape, stride: Shape) -> int:
        """A value by strides of one member, as a value of all."""
        wide = id in self.wide
        step = self.width if wide else 1
        strides = (*(s * step for s in stride), int(wide))
        return self.new("view", (id,), shape, size=(*shape, self.width), stride=strides, offset=0)

    def _moved(self, step: Operation) -> None:
        a, width = dict(step.attributes), self.width
        a["offset"] *= width
        if step.op == "view":
            a["size"] = (*a["size"], width)
            a["stride"] = (*(s * width for s in a["stride"]), 1)
        self._append(replace(step, in_shapes=self._shapes(step), attributes=a))

    def _placed(self, step: Operation) -> None:
        a, width = dict(step.attributes), self.width
        a["places"] = [place * width if place > 0 else place for place in a["places"]]
        a["stride"], a["block"] = a["stride"] * width, a["block"] * width
        self._append(replace(step, in_shapes=self._shapes(step), attributes=a))

    def _cat(self, step: Operation) -> None:
        dim, shape = step.attributes["dim"], step.shape
        inputs = []
        for id, own, width in zip(
            step.inputs, step.in_shapes, step.attributes["widths"], strict=True
        ):
            block = (*shape[:dim], width, *shape[dim + 1 :])
            if math.prod(own) != math.prod(block):
                id = self.spread(id, block, (0,) * len(block))
            elif id not in self.wide:
                id = self.spread(id, block, contiguous(block))
            inputs.append(id)
        blocks = tuple(
            (*shape[:dim], width, *shape[dim + 1 :], self.width)
            for width in step.attributes["widths"]
        )
        self._append(replace(step, inputs=tuple(inputs), in_shapes=blocks))

    def _linear(self, step: Operation) -> None:
        a = step.attributes
        inner, columns = a["in_features"], a["out_features"]
        rows = math.prod(step.shape[:-1])
        parts, singles = len(a["columns"]), len(a["scalars"])
        pieces = [
            (start, width, id, False)
            for id, (start, width) in zip(step.inputs, a["columns"], strict=False)
        ]
        pieces += [
            (start, 1, id, True)
            for id, start in zip(step.inputs[parts:], a["scalars"], strict=False)
        ]
        pieces.sort()
        x = pieces[0][2]
        if len(pieces) > 1 or pieces[0][3]:
            x = self._joined(pieces, rows, inner)
        weight = step.inputs[parts + singles]
        by_row, by_column = (1, inner) if a["by_input"] else (columns, 1)
        product = _Product(
            1, rows, inner, columns,
            self._lying(x, (0, inner, 1)), self._lying(weight, (0, by_row, by_column)),
        )  # fmt: skip
        shape = (rows, columns)
        last = "product"
        plan: list[tuple[str, tuple[int, ...], tuple[Shape, ...], dict[str, Any]]] = [
            (last, (x, weight), ((), ()), {"product": product})
        ]
        if a["bias"]:
            bias = step.inputs[-1]
            lanes = self.width if bias in self.wide else 1
            plan.append(("add", (bias,), ((*shape, self.width), (1, columns, lanes)), {}))
        if a["activation"] != "identity":
            plan.append((a["activation"], (), ((*shape, self.width),), dict(a)))
        out = -1
        for i, (op, others, shapes, attributes) in enumerate(plan):
            inputs = others if op == "product" else (out, *others)
            out, self.next = (
                (step.out, self.next) if i == len(plan) - 1 else (self.next, self.next + 1)
            )
            self._append(Operation(op, inputs, shapes, out, shape, attributes))

    def _joined(self, pieces: list[tuple[int, int, int, bool]], rows: int, inner: int) -> int:
        """The parts of a product's input as one value."""
        parts = tuple(
            self.spread(id, (rows, width), (0, 0) if single else (width, 1))
            if single or id not in self.wide
            else id
            for _, width, id, single in pieces
        )
        widths = [width for _, width, _, _ in pieces]
        out, self.next = self.next, self.next + 1
        blocks = tuple((rows, width, self.width) for width in widths)
        attributes = {"dim": 1, "widths": widths}
        self._append(Operation("cat", parts, blocks, out, (rows, inner), attributes))
        return out

    def _bmm(self, step: Operation) -> None:
        a = step.attributes
        m, k, n = a["rows"], a["inner"], a["columns"]
        left = (0 if a["shared_a"] else m * k, *((1, m) if a["transposed_a"] else (k, 1)))
        right = (0 if a["shared_b"] else k * n, *((1, k) if a["transposed_b"] else (n, 1)))
        x, y = step.inputs
        product = _Product(a["batch"], m, k, n, self._lying(x, left), self._lying(y, right))
        self._append(replace(step, op="product", attributes={"product": product}))

    def _lying(self, id: int, strides: tuple[int, int, int]) -> tuple[int, ...]:
        """Strides of an operand of a product, and of the members in it."""
        wide = id in self.wide
        return (*(s * (self.width if wide else 1) for s in strides), int(wide))


_OTHER: dict[str, Callable[[_Widening, Operation], None]] = {
    "cat": _Widening._cat,
    "view": _Widening._moved,
    "range": _Widening._moved,
    "take": _Widening._placed,
    "put": _Widening._placed,
    "linear": _Widening._linear,
    "bmm": _Widening._bmm,
}


def abreast(program: Program, own: frozenset[int], width: int) -> Program | None:
    """The program of `width` members at once, or `None` where an operation has no such form.

    Args:
        program: of one member.
        own: parameters that are each member's own.
        width: how many.
    """
    return _Widening(program, own, width).run()


@dataclass(frozen=True)
class _Product:
    """A stack of products; `left` and `right` are strides: stack, row, column, member."""

    batch: int
    rows: int
    inner: int
    columns: int
    left: tuple[int, ...]
    right: tuple[int, ...]

    def result(self, width: int) -> tuple[int, ...]:
        """Strides of the result."""
        return (self.rows * self.columns * width, self.columns * width, width, 1)


def _call(add: bool, sizes: tuple[int, int, int], *operands: tuple[str, tuple[int, ...]]) -> str:
    places = ", ".join(
        f"{place} + {stack} * b, {row}, {column}, {lane}"
        for place, (stack, row, column, lane) in operands
    )
    return f"psn_product({int(add)}, {', '.join(map(str, sizes))}, {places});"


def _turned(strides: tuple[int, ...]) -> tuple[int, ...]:
    stack, row, column, lane = strides
    return stack, column, row, lane


def _product(e: Layout, step: Operation) -> list[str]:
    p: _Product = step.attributes["product"]
    e.cost += p.batch * p.rows * p.inner * p.columns * e.abreast
    x, y = (e.place[id] for id in step.inputs)
    call = _call(
        False,
        (p.rows, p.inner, p.columns),
        (x, p.left),
        (y, p.right),
        (e.place[step.out], p.result(e.abreast)),
    )
    return [f"for (int b = 0; b < {p.batch}; b++)", f"  {call}"]


def _product_pull(e: Layout, step: Operation) -> list[str]:
    p: _Product = step.attributes["product"]
    left, right = step.inputs
    g = e.bar[step.out], p.result(e.abreast)
    head = f"for (int b = 0; b < {p.batch}; b++)"
    lines: list[str] = []
    if e.wants(left):
        sizes = p.rows, p.columns, p.inner
        call = _call(True, sizes, g, (e.place[right], _turned(p.right)), (e.bar[left], p.left))
        lines += [*e.begin(left), head, f"  {call}"]
    if e.wants(right):
        sizes = p.inner, p.rows, p.columns
        call = _call(True, sizes, (e.place[left], _turned(p.left)), g, (e.bar[right], p.right))
        lines += [*e.begin(right), head, f"  {call}"]
    return lines


class WideEmitter(Emitter):
    """Writes the program of members abreast."""

    operations: ClassVar = {**OPERATIONS, "product": Emission(_product, _product_pull)}
