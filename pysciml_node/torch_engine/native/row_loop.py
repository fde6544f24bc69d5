"""The loop of a field, and of its pullback, through the rows of a batch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pysciml_node.torch_engine.native.layout import Layout
from pysciml_node.torch_engine.native.text import COTANGENT, PAD, fused
from pysciml_node.translation.program import FLAT

# Operations whose values the pullback forms again, which is less work than to fetch them.
_CHEAP = FLAT | {
    *("identity", "affine", "square", "cube", "relu", "leaky_relu", "clamp", "abs"),
    *("add", "sub", "mul", "where", "maximum", "minimum"),
    *("view", "range", "cat", "sum", "take", "put", "pick"),
}
_NAME = re.compile(r"\b[vx]\d+\b")


class RowLoop:
    """Where the values of some rows lie while a field, or its pullback, is evaluated.

    What the pullback reads and cannot form at little cost lies in `w`, for each turn of the loop;
    all else on the stack. A part of a batch that is taken in one turn has too many values for that:
    all lie in `w`.

    Args:
        layout: of the program of these rows.
        lines: of each of its operations.
        pullback: the lines of all pullbacks.
    """

    def __init__(self, layout: Layout, lines: dict[int, list[str]], pullback: list[str]) -> None:
        assert layout.rows is not None
        self._layout, self._rows = layout, layout.rows
        at_once = self._rows.in_parts and self._rows.turns == 1
        wanted = _names(pullback)
        kept: set[str] = set()
        again: list[list[str]] = []
        for step in reversed(layout.program.operations):
            own = {name for name in layout.named if name[1:] == str(step.out)} & wanted
            if own and step.op in _CHEAP and not at_once:
                again.append(lines[step.out])
                wanted |= _names(lines[step.out])
            else:
                kept |= own
        self._again = [line for lines in reversed(again) for line in lines]
        self._kept = [name for name in layout.named if at_once or name in kept]
        self._first = layout.work.size
        self._room = sum(layout.named[name] for name in self._kept)
        layout.work.size += self._rows.turns * self._room

    def field(self, lines: list[str]) -> list[str]:
        """The loop of the field."""
        return self._loop(lines, "REAL", [])

    def pullback(self, lines: list[str]) -> list[str]:
        """The loop of a pullback."""
        return self._loop([*self._again, *lines], "const REAL", [COTANGENT])

    def _loop(self, lines: list[str], kind: str, passing: list[str]) -> list[str]:
        count = self._rows.count
        sizes = self._layout.named
        own = [rf"\b{name}\b" for name in sizes if name not in self._kept]
        lines = fused(lines, [*passing, *own])
        read = _names(lines)
        stacked = [name for name in sizes if name in read and name not in self._kept]
        room = sum(sizes[name] for name in stacked)
        return [
            f"REAL s[{max(room, PAD)}] __attribute__((aligned(64)));",
            f"for (int row = 0; row < {self._rows.part}; row += {count}) {{",
            f"{kind} *v = w + {self._first} + row / {count} * {self._room};",
            *_places(self._kept, sizes, f"{kind} *", "v"),
            *_places(stacked, sizes, "REAL *", "s"),
            *lines,
            "}",
        ]


def _names(lines: Iterable[str]) -> set[str]:
    return set(_NAME.findall("\n".join(lines)))


def _places(names: list[str], sizes: dict[str, int], kind: str, base: str) -> list[str]:
    lines, offset = [], 0
    for name in names:
        lines.append(f"{kind}{name} = {base} + {offset};")
        offset += sizes[name]
    return lines
