"""Each operation of a program as C: its value, and what it does to cotangents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pysciml_node.torch_engine.native import elementwise
from pysciml_node.torch_engine.native.layout import Layout
from pysciml_node.torch_engine.native.linear import linear, linear_pull
from pysciml_node.torch_engine.native.text import (
    Shape,
    broadcast_strides,
    contiguous,
    loops,
    number,
)
from pysciml_node.translation.program import Operation

Emit = Callable[[Layout, Operation], list[str]]


@dataclass(frozen=True)
class Emission:
    """How an operation is written.

    Attributes:
        forward: its value.
        pullback: adds to the cotangents of its operands what that of its result brings.
    """

    forward: Emit
    pullback: Emit


OPERATIONS: dict[str, Emission] = {}


# Entry by entry ------------------------------------------------------------------------------


def _unary(e: Layout, step: Operation) -> list[str]:
    x, y = e.place[step.inputs[0]], e.place[step.out]
    size = e.sizes[step.out]
    count = e.count(size, step.op in elementwise.LIBRARY)
    value = elementwise.FORWARD[step.op](f"{x}[i]", step.attributes)
    return ["#pragma omp simd", f"for (int i = 0; i < {count}; i++) {y}[i] = {value};"]


def _unary_pull(e: Layout, step: Operation) -> list[str]:
    (id,) = step.inputs
    x, y, g = e.place[id], e.place[step.out], e.bar[step.out]

    def value(i: str) -> str:
        return elementwise.PULLBACK[step.op](f"{g}[{i}]", f"{x}[{i}]", f"{y}[{i}]", step.attributes)

    return e.add_to(id, e.sizes[step.out], value, step.op in elementwise.LIBRARY)


for _name in elementwise.FORWARD:
    OPERATIONS[_name] = Emission(_unary, _unary_pull)


def _angle(e: Layout, step: Operation) -> list[str]:
    x, y = e.place[step.inputs[0]], e.place[step.out]
    return [f"psn_sines({e.sizes[step.out]}, {x}, {y}, {int(step.op == 'cos')});"]


def _angle_pull(e: Layout, step: Operation) -> list[str]:
    (id,) = step.inputs
    size, slope = e.sizes[step.out], e.bars.take(e.sizes[step.out])
    sign = "-" if step.op == "cos" else ""
    return [
        f"psn_sines({size}, {e.place[id]}, {slope}, {int(step.op == 'sin')});",
        *e.add_to(id, size, lambda i: f"{sign}{e.bar[step.out]}[{i}] * {slope}[{i}]", True),
    ]


OPERATIONS["sin"] = OPERATIONS["cos"] = Emission(_angle, _angle_pull)


# Pairs ---------------------------------------------------------------------------------------


def _pair(e: Layout, step: Operation) -> list[str]:
    a, b = (e.place[id] for id in step.inputs)
    y, function = e.place[step.out], elementwise.PAIRS[step.op]
    if step.in_shapes[0] == step.in_shapes[1]:
        count = e.count(e.sizes[step.out], step.op in elementwise.LIBRARY_PAIRS)
        value = function(f"{a}[i]", f"{b}[i]")
        return ["#pragma omp simd", f"for (int i = 0; i < {count}; i++) {y}[i] = {value};"]
    shape, strides = _paired(step)
    return loops(
        shape, [strides[2], *strides[:2]], y,
        lambda at: function(f"{a}[{at[1]}]", f"{b}[{at[2]}]"), accumulate=False,
    )  # fmt: skip


def _paired(step: Operation) -> tuple[Shape, list[Shape]]:
    """The loops of a pair, with the strides of both operands and of the result."""
    shape = step.shape
    return shape, [*(broadcast_strides(s, shape) for s in step.in_shapes), contiguous(shape)]


def _pair_pull(e: Layout, step: Operation) -> list[str]:
    a, b = (e.place[id] for id in step.inputs)
    y, g = e.place[step.out], e.bar[step.out]
    shape, strides = _paired(step)
    lines: list[str] = []
    for side, id in enumerate(step.inputs):
        if not e.wants(id):
            continue
        slope = elementwise.PAIR_PULLBACKS[step.op][side]
        if step.in_shapes[0] == step.in_shapes[1]:
            lines += e.add_to(
                id,
                e.sizes[step.out],
                lambda i, slope=slope: slope(f"{g}[{i}]", f"{a}[{i}]", f"{b}[{i}]", f"{y}[{i}]"),  # type: ignore[misc]
                step.op in elementwise.LIBRARY_PAIRS,
            )
            continue
        lines += e.begin(id)
        lines += loops(
            shape,
            [strides[side], strides[2], strides[0], strides[1]],
            e.bar[id],
            lambda at, slope=slope: slope(  # type: ignore[misc]
                f"{g}[{at[1]}]", f"{a}[{at[2]}]", f"{b}[{at[3]}]", f"{y}[{at[1]}]"
            ),
            accumulate=True,
        )
    return lines


for _name in elementwise.PAIRS:
    OPERATIONS[_name] = Emission(_pair, _pair_pull)


# Entries moved and summed ----------------------------------------------------------------------


def _sum(e: Layout, step: Operation) -> list[str]:
    (source,), x, y = step.in_shapes, e.place[step.inputs[0]], e.place[step.out]
    kept = broadcast_strides(step.shape, source)
    factor = step.attributes["factor"]
    scale = [] if factor == 1.0 else [
        f"for (int i = 0; i < {e.sizes[step.out]}; i++) {y}[i] *= {number(factor)};"
    ]  # fmt: skip
    return [
        e.zero(step.out),
        *loops(source, [kept, contiguous(source)], y, lambda at: f"{x}[{at[1]}]", True),
        *scale,
    ]


def _sum_pull(e: Layout, step: Operation) -> list[str]:
    (id,), (source,) = step.inputs, step.in_shapes
    kept, g = broadcast_strides(step.shape, source), e.bar[step.out]
    factor = number(step.attributes["factor"])
    strides = [contiguous(source), kept]
    return e.begin(id) + loops(
        source, strides, e.bar[id], lambda at: f"{g}[{at[1]}] * {factor}", True
    )


OPERATIONS["sum"] = Emission(_sum, _sum_pull)


def _pieces(step: Operation) -> list[tuple[int, Shape, Shape, Shape, int]]:
    """Of a concatenation: operand, loops, strides of the result and the operand, place."""
    dim = step.attributes["dim"]
    outer, inner = math.prod(step.shape[:dim]), math.prod(step.shape[dim + 1 :])
    row, start = step.shape[dim] * inner, 0
    products: list[tuple[int, Shape, Shape, Shape, int]] = []
    widths = step.attributes["widths"]
    for id, shape, width in zip(step.inputs, step.in_shapes, widths, strict=True):
        block = width * inner
        single = math.prod(shape) == 1 and outer * block != 1
        own = (0, 0) if single else (block, 1)
        products.append((id, (outer, block), (row, 1), own, start * inner))
        start += width
    return products


def _cat(e: Layout, step: Operation) -> list[str]:
    lines: list[str] = []
    for id, shape, out, own, start in _pieces(step):
        target, x = f"({e.place[step.out]} + {start})", e.place[id]
        lines += loops(shape, [out, own], target, lambda at, x=x: f"{x}[{at[1]}]", False)  # type: ignore[misc]
    return lines


def _cat_pull(e: Layout, step: Operation) -> list[str]:
    lines: list[str] = []
    for id, shape, out, own, start in _pieces(step):
        if e.wants(id):
            g = f"({e.bar[step.out]} + {start})"
            lines += e.begin(id)
            lines += loops(shape, [own, out], e.bar[id], lambda at, g=g: f"{g}[{at[1]}]", True)  # type: ignore[misc]
    return lines


OPERATIONS["cat"] = Emission(_cat, _cat_pull)


def _viewed(step: Operation) -> tuple[Shape, Shape, int]:
    """Shape, strides and offset of a view."""
    a = step.attributes
    if step.op == "range":
        return (math.prod(step.shape),), (1,), a["offset"]
    return tuple(a["size"]), tuple(a["stride"]), a["offset"]


def _view(e: Layout, step: Operation) -> list[str]:
    shape, stride, offset = _viewed(step)
    x = f"({e.place[step.inputs[0]]} + {offset})"
    strides = [contiguous(shape), stride]
    return loops(shape, strides, e.place[step.out], lambda at: f"{x}[{at[1]}]", False)


def _view_pull(e: Layout, step: Operation) -> list[str]:
    (id,), (shape, stride, offset) = step.inputs, _viewed(step)
    g, target = e.bar[step.out], f"({e.bar[id]} + {offset})"
    strides = [stride, contiguous(shape)]
    return e.begin(id) + loops(shape, strides, target, lambda at: f"{g}[{at[1]}]", True)


OPERATIONS["view"] = OPERATIONS["range"] = Emission(_view, _view_pull)


def _greatest(e: Layout, step: Operation) -> list[str]:
    (source,), x, y = step.in_shapes, e.place[step.inputs[0]], e.place[step.out]
    kept = broadcast_strides(step.shape, source)
    lines = loops(
        source, [kept, contiguous(source)], y,
        lambda at: f"psn_maximum({y}[{at[0]}], {x}[{at[1]}])", False,
    )  # fmt: skip
    return [
        f"for (int i = 0; i < {e.sizes[step.out]}; i++) {y}[i] = -(REAL)INFINITY;",
        # One after the other: several may meet in one place.
        *(line for line in lines if not line.startswith("#pragma")),
    ]


OPERATIONS["greatest"] = Emission(_greatest, lambda e, step: [])


def _placed(e: Layout, step: Operation) -> tuple[str, str, bool]:
    """The loops of entries and their places: what they run over, and whether some have none."""
    a = step.attributes
    name = f"places{step.out}{e.suffix}"
    text = f"static const int {name}[] = {{{', '.join(map(str, a['places']))}}};"
    if text not in e.constants:
        e.constants.append(text)
    count, block = len(a["places"]), a["block"]
    head = (
        f"for (int o = 0; o < {a['outer']}; o++) for (int i = 0; i < {count}; i++) {{ "
        f"int from = {name}[i], to = {block} * ({count} * o + i); "
    )
    return head, f"for (int j = 0; j < {block}; j++)", min(a["places"], default=0) < 0


def _take(e: Layout, step: Operation) -> list[str]:
    head, within, holes = _placed(e, step)
    x, y, stride = e.place[step.inputs[0]], e.place[step.out], step.attributes["stride"]
    value = f"{x}[{stride} * o + from + j]"
    if holes:
        value = f"from < 0 ? (REAL)0 : {value}"
    return [f"{head}{within} {y}[to + j] = {value}; }}"]


def _take_pull(e: Layout, step: Operation) -> list[str]:
    head, within, holes = _placed(e, step)
    (id,), stride = step.inputs, step.attributes["stride"]
    target = f"{e.bar[id]}[{stride} * o + from + j]"
    test = "if (from >= 0) " if holes else ""
    return [*e.begin(id), f"{head}{test}{within} {target} += {e.bar[step.out]}[to + j]; }}"]


OPERATIONS["take"] = Emission(_take, _take_pull)


def _put(e: Layout, step: Operation) -> list[str]:
    head, within, _ = _placed(e, step)
    x, y, stride = e.place[step.inputs[0]], e.place[step.out], step.attributes["stride"]
    return [e.zero(step.out), f"{head}{within} {y}[{stride} * o + from + j] += {x}[to + j]; }}"]


def _put_pull(e: Layout, step: Operation) -> list[str]:
    head, within, _ = _placed(e, step)
    (id,), stride = step.inputs, step.attributes["stride"]
    value = f"{e.bar[step.out]}[{stride} * o + from + j]"
    return [*e.begin(id), f"{head}{within} {e.bar[id]}[to + j] += {value}; }}"]


OPERATIONS["put"] = Emission(_put, _put_pull)


def _pick_sizes(step: Operation) -> str:
    (outer, n, inner, *x_lanes), (places, *lanes) = step.in_shapes
    sizes = outer, n, inner, places, *(x_lanes or (1,)), *(lanes or (1,))
    return f"(Pick){{{', '.join(map(str, sizes))}}}"


def _pick(e: Layout, step: Operation) -> list[str]:
    x, index = (e.place[id] for id in step.inputs)
    return [f"psn_pick({_pick_sizes(step)}, {x}, {index}, {e.place[step.out]});"]


def _pick_pull(e: Layout, step: Operation) -> list[str]:
    id, index = step.inputs
    g, bar = e.bar[step.out], e.bar[id]
    return [*e.begin(id), f"psn_pick_pull({_pick_sizes(step)}, {g}, {e.place[index]}, {bar});"]


OPERATIONS["pick"] = Emission(_pick, _pick_pull)


# Products --------------------------------------------------------------------------------------


OPERATIONS["linear"] = Emission(linear, linear_pull)


def _bmm(e: Layout, step: Operation) -> list[str]:
    a, (left, right) = step.attributes, step.inputs
    e.cost += a["batch"] * a["rows"] * a["inner"] * a["columns"]
    return [e.zero(step.out), *_stacked(step, e.place[left], e.place[right], e.place[step.out])]


def _stacked(step: Operation, x: str, y: str, z: str, target: str = "out") -> list[str]:
    """The products of a stack, or those of its cotangents."""
    a = step.attributes
    m, k, n = a["rows"], a["inner"], a["columns"]
    left = f"1, {m}" if a["transposed_a"] else f"{k}, 1"
    right = f"1, {k}" if a["transposed_b"] else f"{n}, 1"
    left_turned = f"{m}, 1" if a["transposed_a"] else f"1, {k}"
    right_turned = f"{k}, 1" if a["transposed_b"] else f"1, {n}"
    x_b = f"({x} + {0 if a['shared_a'] else m * k} * b)"
    y_b = f"({y} + {0 if a['shared_b'] else k * n} * b)"
    z_b = f"({z} + {m * n} * b)"
    call = {
        "out": f"psn_matmul({m}, {k}, {n}, {x_b}, {left}, {y_b}, {right}, {z_b}, {n}, 1);",
        "left": f"psn_matmul({m}, {n}, {k}, {z_b}, {n}, 1, {y_b}, {right_turned}, {x_b}, {left});",
        "right": f"psn_matmul({k}, {m}, {n}, {x_b}, {left_turned}, {z_b}, {n}, 1, {y_b}, {right});",
    }[target]
    return [f"for (int b = 0; b < {a['batch']}; b++)", f"  {call}"]


def _bmm_pull(e: Layout, step: Operation) -> list[str]:
    (left, right), g = step.inputs, e.bar[step.out]
    lines: list[str] = []
    if e.wants(left):
        lines += [*e.begin(left), *_stacked(step, e.bar[left], e.place[right], g, "left")]
    if e.wants(right):
        lines += [*e.begin(right), *_stacked(step, e.place[left], e.bar[right], g, "right")]
    return lines


OPERATIONS["bmm"] = Emission(_bmm, _bmm_pull)


def _conv_sizes(step: Operation) -> str:
    x, w, a = step.in_shapes[0], step.in_shapes[1], step.attributes
    numbers = [
        *x, w[0], *step.shape[2:], *w[2:], *a["stride"], *a["padding"], *a["dilation"],
        x[1] // w[1],
    ]  # fmt: skip
    return f"(Conv){{{', '.join(map(str, numbers))}}}"


def _conv(e: Layout, step: Operation) -> list[str]:
    x, w, *bias = (e.place[id] for id in step.inputs)
    e.cost += math.prod(step.shape) * math.prod(step.in_shapes[1][1:])
    tail = bias[0] if bias else "0"
    return [f"psn_conv({_conv_sizes(step)}, {x}, {w}, {tail}, {e.place[step.out]});"]


def _conv_pull(e: Layout, step: Operation) -> list[str]:
    wanted = [id for id in step.inputs if e.wants(id)]
    bars = [e.bar[id] if id in wanted else "0" for id in step.inputs]
    x, w = (e.place[id] for id in step.inputs[:2])
    return [
        *(line for id in wanted for line in e.begin(id)),
        f"psn_conv_pull({_conv_sizes(step)}, {x}, {w}, {e.bar[step.out]}, "
        f"{', '.join([*bars, '0'][:3])});",
    ]


OPERATIONS["conv"] = Emission(_conv, _conv_pull)


def _norm_operands(step: Operation) -> tuple[str, int, int | None, int | None]:
    a, rest = step.attributes, list(step.inputs[1:])
    weight = rest.pop(0) if a["weight"] else None
    bias = rest.pop(0) if a["bias"] else None
    blocks = math.prod(step.shape) // (a["channels"] * a["pixels"])
    return f"{blocks}, {a['groups']}, {a['channels']}, {a['pixels']}", blocks, weight, bias


def _norm(e: Layout, step: Operation) -> list[str]:
    sizes, blocks, weight, bias = _norm_operands(step)
    kept = e.extra[step.out] = e.room(step, 2 * blocks, "x")
    w, b = ("0" if id is None else e.place[id] for id in (weight, bias))
    eps = number(step.attributes["eps"])
    x, y = e.place[step.inputs[0]], e.place[step.out]
    return [f"psn_norm({sizes}, {eps}, {x}, {w}, {b}, {y}, {kept});"]


def _norm_pull(e: Layout, step: Operation) -> list[str]:
    sizes, _, weight, bias = _norm_operands(step)
    x, kept = step.inputs[0], e.extra[step.out]
    wanted = [id for id in (x, weight, bias) if id is not None and e.wants(id)]
    bars = ["0" if id not in wanted or id is None else e.bar[id] for id in (x, weight, bias)]
    w = "0" if weight is None else e.place[weight]
    return [
        *(line for id in wanted for line in e.begin(id)),
        f"psn_norm_pull({sizes}, {e.place[x]}, {w}, {kept}, {e.bar[step.out]}, {', '.join(bars)});",
    ]


OPERATIONS["norm"] = Emission(_norm, _norm_pull)
