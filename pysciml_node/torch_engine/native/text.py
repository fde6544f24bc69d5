"""Numbers and loops as C text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]

PAD = 16
"""Entries to a multiple of which buffers are padded: the widest vector's, in single precision."""


def padded(count: int) -> int:
    """Room for `count` entries and one more vector, in whole vectors."""
    return (count + PAD + PAD - 1) // PAD * PAD


def whole(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return (count + PAD - 1) // PAD * PAD


def number(value: float) -> str:
    """A number of the state's type."""
    if math.isnan(value):
        return "(REAL)NAN"
    if math.isinf(value):
        return "(REAL)INFINITY" if value > 0 else "-(REAL)INFINITY"
    return f"(REAL){float(value)!r}" if value >= 0 else f"(REAL)({float(value)!r})"


def contiguous(shape: Sequence[int]) -> Shape:
    """Strides of an array by rows."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def broadcast_strides(shape: Shape, to: Shape) -> Shape:
    """Strides of an array by rows, repeated to another shape."""
    strides = contiguous(shape)
    lead = len(to) - len(shape)
    return (0,) * lead + tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))


def _merged(shape: Shape, strides: Sequence[Shape]) -> tuple[list[int], list[list[int]]]:
    """The same loops, with neighbouring ones joined where all operands allow it."""
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, n in enumerate(shape):
        if n == 1:
            continue
        joins = bool(sizes) and all(
            step[-1] == stride[d] * n for step, stride in zip(steps, strides, strict=True)
        )
        if joins:
            sizes[-1] *= n
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[d]
        else:
            sizes.append(n)
            for step, stride in zip(steps, strides, strict=True):
                step.append(stride[d])
    return sizes, steps


def _index(steps: Sequence[int], depth: int) -> str:
    terms = [f"i{d}" if s == 1 else f"{s} * i{d}" for d, s in enumerate(steps[:depth]) if s != 0]
    return " + ".join(terms) or "0"


def loops(
    shape: Shape,
    strides: Sequence[Shape],
    target: str,
    value: Callable[[Sequence[str]], str],
    accumulate: bool,
) -> list[str]:
    """Nested loops over `shape` that write `target`, the first operand.

    Args:
        shape: of the loops.
        strides: of each operand; the first belongs to `target`.
        target: name of the array that is written.
        value: from the indices of the operands to what is written.
        accumulate: add to the target. Where its strides vanish, sums are formed in a variable.
    """
    sizes, steps = _merged(shape, strides)
    depth = len(sizes)
    lines = [f"for (int i{d} = 0; i{d} < {n}; i{d}++)" for d, n in enumerate(sizes)]
    indices = [_index(step, depth) for step in steps]
    if not lines:
        sign = "+=" if accumulate else "="
        return [f"{target}[0] {sign} {value(indices)};"]
    if accumulate and steps[0][-1] == 0:
        outer, inner = lines[:-1], lines[-1]
        place = _index(steps[0], depth - 1)
        return [
            *outer,
            "{ REAL sum = 0;",
            "#pragma omp simd reduction(+ : sum)",
            f"{inner} sum += {value(indices)};",
            f"{target}[{place}] += sum; }}",
        ]
    sign = "+=" if accumulate else "="
    return [
        *lines[:-1],
        "#pragma omp simd",
        f"{lines[-1]} {target}[{indices[0]}] {sign} {value(indices)};",
    ]
