"""Numbers and loops as C text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

Shape = tuple[int, ...]

_SIMD = "#pragma omp simd"

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


def wide(name: str, count: int) -> str:
    """The name of a number of entries; several times as many may be more than an `int` counts."""
    return f"#define {name} INT64_C({count})"


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
        _SIMD,
        f"{lines[-1]} {target}[{indices[0]}] {sign} {value(indices)};",
    ]


_ENTRIES = re.compile(r"for \(int i = 0; i < (\d+); i\+\+\) (.*)")


COTANGENT = r"\(z \+ \d+\)"
"""The places of the cotangents of values: none is read after its pullback."""


def fused(lines: Sequence[str], passing: Collection[str]) -> list[str]:
    """Loops over as many entries `i`, one after the other, as one: they read each other's at `i`.

    Args:
        lines: of a function.
        passing: patterns of the names of arrays that nothing reads after these lines. Where one
            loop alone does, the entries need no array.
    """
    names = re.compile("|".join(passing) or "(?!)")
    loops: list[tuple[str, list[str]]] = []  # entries and statements; or a line alone
    for line in lines:
        this = _ENTRIES.fullmatch(line)
        simd = this and loops and loops[-1] == (_SIMD, [])
        if not (this and simd):
            loops.append((line, []))
            continue
        loops.pop()
        if loops and loops[-1][0] == this[1]:
            loops[-1][1].append(this[2])
        else:
            loops.append((this[1], [this[2]]))
    used = Counter(names.findall("\n".join(lines)))
    out: list[str] = []
    for head, statements in loops:
        if statements:
            body = " ".join(_without_arrays(statements, names, used))
            out += [_SIMD, f"for (int i = 0; i < {head}; i++) {{ {body} }}"]
        else:
            out.append(head)
    return out


def _without_arrays(statements: list[str], names: re.Pattern[str], used: Counter[str]) -> list[str]:
    """The statements of a loop, in which entries that no other reads are variables."""
    text = "\n".join(statements)
    for number, (name, count) in enumerate(Counter(names.findall(text)).items()):
        first = re.search(rf"^{re.escape(name)}\[i\] = ", text, re.MULTILINE)
        if first and count == used[name] and text.find(name) == first.start():
            text = text.replace(f"{name}[i]", f"x{number}_")
            text = text.replace(f"x{number}_ = ", f"REAL x{number}_ = ", 1)
    return text.split("\n")
