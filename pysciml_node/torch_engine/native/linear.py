"""Products with a weight as C: their value, and what they do to cotangents."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pysciml_node.torch_engine.native import elementwise
from pysciml_node.torch_engine.native.layout import Layout, Packing
from pysciml_node.torch_engine.native.text import (
    PAD,
    contiguous,
    loops,
    whole,
)
from pysciml_node.translation.program import Operation


@dataclass(frozen=True)
class _Linear:
    """The operands and sizes of `input @ weight.T + bias`."""

    rows: int
    inner: int
    columns: int
    pieces: list[tuple[int, int, int]]  # value, first column, width
    singles: list[tuple[int, int]]  # value, column
    weight: int
    by_input: bool
    bias: int | None

    @classmethod
    def of(cls, step: Operation) -> _Linear:
        a = step.attributes
        count, scalars = len(a["columns"]), len(a["scalars"])
        return cls(
            rows=math.prod(step.shape[:-1]),
            inner=a["in_features"],
            columns=a["out_features"],
            pieces=[
                (id, start, width)
                for id, (start, width) in zip(step.inputs, a["columns"], strict=False)
            ],
            singles=list(zip(step.inputs[count:], a["scalars"], strict=False)),
            weight=step.inputs[count + scalars],
            by_input=a["by_input"],
            bias=step.inputs[-1] if a["bias"] else None,
        )

    @property
    def plain(self) -> bool:
        """Whether the input is one value, as it lies."""
        return not self.singles and len(self.pieces) == 1 and self.pieces[0][2] == self.inner

    @property
    def forward_by_columns(self) -> bool:
        """Whether the value is formed with columns in vectors, and not the sums."""
        return 2 * self.columns >= PAD or self.columns >= self.inner

    @property
    def backward_by_columns(self) -> bool:
        """The same of the input's cotangent."""
        return 2 * self.inner >= PAD or self.inner >= self.columns


def _packing(e: Layout, m: _Linear, turned: bool) -> Packing:
    """The weight as `(outputs, inputs)`, or turned; packed once for all that ask for it."""
    # A weight may stand on either side of a transpose in one program.
    key = m.weight, turned, m.by_input
    if key not in e.packings:
        columns = m.columns if turned else m.inner
        rows = m.inner if turned else m.columns
        stride, offset = whole(columns), e.packed.size
        e.packed.take(rows * stride)
        stored = (m.columns, m.inner) if m.by_input else (m.inner, m.columns)
        flip = turned if m.by_input else not turned
        e.packings[key] = Packing(offset, *stored, stride, flip, m.weight)
    return e.packings[key]


def _input(e: Layout, m: _Linear, step: Operation) -> tuple[str, list[str]]:
    """The whole input of a product, put together where it has several parts."""
    if m.plain:
        return e.place[m.pieces[0][0]], []
    x = e.extra[step.out] = e.room(step, m.rows * m.inner, "x")
    lines: list[str] = []
    for id, start, width in m.pieces:
        lines += loops(
            (m.rows, width), [(m.inner, 1), (width, 1)], f"({x} + {start})",
            lambda at, id=id: f"{e.place[id]}[{at[1]}]", False,  # type: ignore[misc]
        )  # fmt: skip
    for id, column in m.singles:
        lines.append(
            f"for (int i = 0; i < {m.rows}; i++) {x}[{m.inner} * i + {column}] = {e.place[id]}[0];"
        )
    return x, lines


def linear(e: Layout, step: Operation) -> list[str]:
    """`y = x W + b`."""
    m, y = _Linear.of(step), e.place[step.out]
    x, lines = _input(e, m, step)
    e.cost += m.rows * m.inner * m.columns
    if _packs(e, m, step):
        start, later = "0", m.bias is not None
        if m.bias is not None and m.bias in e.fixed:
            start, later = e.place[m.bias], False
        name = "psn_by_columns" if m.forward_by_columns else "psn_by_inner"
        w = _packing(e, m, m.forward_by_columns)
        lines.append(
            f"{name}({m.rows}, {m.inner}, {m.columns}, {x}, {m.inner}, P + {w.offset}, "
            f"{w.stride}, {start}, {y}, {m.columns});"
        )
    else:
        by_row, by_column = (1, m.inner) if m.by_input else (m.columns, 1)
        later = m.bias is not None
        lines += [
            e.zero(step.out),
            f"psn_matmul({m.rows}, {m.inner}, {m.columns}, {x}, {m.inner}, 1, "
            f"{e.place[m.weight]}, {by_row}, {by_column}, {y}, {m.columns}, 1);",
        ]
    if later:
        assert m.bias is not None
        bias = e.place[m.bias]
        strides = [contiguous((m.rows, m.columns)), (0, 1)]
        lines += loops((m.rows, m.columns), strides, y, lambda at: f"{bias}[{at[1]}]", True)
    activation = step.attributes["activation"]
    if activation != "identity":
        value = elementwise.FORWARD[activation](f"{y}[i]", step.attributes)
        count = e.count(e.sizes[step.out])
        lines += ["#pragma omp simd", f"for (int i = 0; i < {count}; i++) {y}[i] = {value};"]
    return lines


def linear_pull(e: Layout, step: Operation) -> list[str]:
    """What the cotangent of `y` does to those of `x`, `W` and `b`."""
    m, y, g = _Linear.of(step), e.place[step.out], e.bar[step.out]
    lines: list[str] = []
    activation = step.attributes["activation"]
    if activation != "identity":
        before = e.bars.take(e.sizes[step.out])
        value = elementwise.PULLBACK[activation](f"{g}[i]", "", f"{y}[i]", step.attributes)
        count = e.count(e.sizes[step.out])
        lines += ["#pragma omp simd", f"for (int i = 0; i < {count}; i++) {before}[i] = {value};"]
        g = before
    if m.bias is not None and e.wants(m.bias):
        lines += e.begin(m.bias)
        lines += loops(
            (m.rows, m.columns), [(0, 1), (m.columns, 1)], e.bar[m.bias],
            lambda at: f"{g}[{at[1]}]", True,
        )  # fmt: skip
    x = e.place[m.pieces[0][0]] if m.plain else e.extra[step.out]
    if e.wants(m.weight):
        lines += _weight_pull(e, m, step, x, g)
    inputs = [id for id, *_ in m.pieces] + [id for id, _ in m.singles]
    if any(e.wants(id) for id in inputs):
        lines += _input_pull(e, m, step, g)
    return lines


def _packs(e: Layout, m: _Linear, step: Operation) -> bool:
    """Whether the weight is packed: it is known before the first evaluation, and not just then."""
    return m.weight in e.fixed and step.out not in e.fixed


def _weight_pull(e: Layout, m: _Linear, step: Operation, x: str, g: str) -> list[str]:
    if _packs(e, m, step):
        turned = m.columns > m.inner
        w = _packing(e, m, turned)
        w.trained = True
        first, second = (m.inner, m.columns) if turned else (m.columns, m.inner)
        a, b = (x, g) if turned else (g, x)
        return [
            f"psn_outer({m.rows}, {first}, {second}, {a}, {first}, {b}, {second}, "
            f"D + {w.offset}, {w.stride});"
        ]
    a, b, first, second = (g, x, m.columns, m.inner) if m.by_input else (x, g, m.inner, m.columns)
    return [
        *e.begin(m.weight),
        f"psn_matmul({first}, {m.rows}, {second}, {a}, 1, {first}, {b}, {second}, 1, "
        f"{e.bar[m.weight]}, {second}, 1);",
    ]


def _input_pull(e: Layout, m: _Linear, step: Operation, g: str) -> list[str]:
    first = m.pieces[0][0] if m.plain else None
    # Written in place where nothing has been added to it yet.
    direct = first is not None and first not in e.summed and first not in e.started
    into = e.bar[first] if direct and first is not None else e.bars.take(m.rows * m.inner)
    if _packs(e, m, step):
        w = _packing(e, m, not m.backward_by_columns)
        name = "psn_by_columns" if m.backward_by_columns else "psn_by_inner"
        lines = [
            f"{name}({m.rows}, {m.columns}, {m.inner}, {g}, {m.columns}, P + {w.offset}, "
            f"{w.stride}, 0, {into}, {m.inner});"
        ]
    else:
        by_row, by_column = (m.inner, 1) if m.by_input else (1, m.columns)
        lines = [
            f"memset({into}, 0, {m.rows * m.inner} * sizeof(REAL));",
            f"psn_matmul({m.rows}, {m.columns}, {m.inner}, {g}, {m.columns}, 1, "
            f"{e.place[m.weight]}, {by_row}, {by_column}, {into}, {m.inner}, 1);",
        ]
    if direct and first is not None:
        e.started.add(first)
        return lines
    for id, start, width in m.pieces:
        if e.wants(id):
            lines += e.begin(id)
            lines += loops(
                (m.rows, width), [(width, 1), (m.inner, 1)], e.bar[id],
                lambda at, s=start: f"({into} + {s})[{at[1]}]", True,  # type: ignore[misc]
            )  # fmt: skip
    for id, column in m.singles:
        if e.wants(id):
            lines += e.begin(id)
            lines += loops(
                (m.rows,), [(0,), (m.inner,)], e.bar[id],
                lambda at, c=column: f"({into} + {c})[{at[1]}]", True,  # type: ignore[misc]
            )  # fmt: skip
    return lines
