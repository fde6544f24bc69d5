"""Programs as C: the field, its vector-Jacobian product, and the packing of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from pysciml_node.errors import UnsupportedModule
from pysciml_node.torch_engine.native.compiler import APART
from pysciml_node.torch_engine.native.elementwise import JUMPS
from pysciml_node.torch_engine.native.layout import Layout
from pysciml_node.torch_engine.native.operations import OPERATIONS
from pysciml_node.torch_engine.native.parts import Parts, split
from pysciml_node.torch_engine.native.row_loop import RowLoop
from pysciml_node.torch_engine.native.rows import Rows, by_rows, without_repetitions
from pysciml_node.torch_engine.native.text import COTANGENT, PAD, fused, padded, wide
from pysciml_node.translation.program import Operation, Program


@dataclass
class Emitted:
    """A program as C.

    Attributes:
        source: the functions `field`, `pull`, `pack` and `unpack`.
        offsets: of the parameters in the packed vector.
        packed: its length.
        cost: multiplications of an evaluation.
        shared: those among them that are not of any row, where the field goes through rows.
    """

    source: str
    offsets: list[int]
    packed: int
    cost: int
    shared: int


# Bytes of values and cotangents that the nearest cache holds; those of weights that stay there
# beside them, more or less; the rows that are taken at once, and bytes of their values, which lie
# on the stack.
_NEAR, _MOST_WEIGHTS = 1 << 15, 1 << 16
_FEWEST_ROWS, _MOST_ROWS, _MOST_STACK = 6, 16, 1 << 17
# Of parts of a batch: rows, at least, where the weights have more bytes than that; multiplications
# that take as long as an entry of a value; and the share of an evaluation, at most, that is done
# again for each.
_LEAST_ROWS, _FEW_WEIGHTS, _ENTRY, _SHARE = 32, 1 << 13, 4, 50


class Emitter(Layout):
    """Goes through a program once forward and once backward."""

    operations: ClassVar = OPERATIONS

    def emit(self, state_alone: bool = False) -> Emitted:
        """All functions of the field.

        Args:
            state_alone: also a pullback to the state and the time alone, `pull_state`.
        """
        lines: dict[int, list[str]] = {}
        shared = 0
        for step in self.program.operations:
            spent = self.cost
            if step.op not in self.operations:
                raise UnsupportedModule(
                    f"the operation {step.op!r} has no native code.", operation=step.op
                )
            lines[step.out] = self.operations[step.op].forward(self, step)
            shared += self._is_shared(step) * (self.cost - spent)
        outputs, back = self._outputs()
        pullbacks = {"pull": self._pullback(back)}
        early = self._backward(self._is_early)
        if state_alone:
            self._follow_state()
            pullbacks["pull_state"] = self._pullback(back)
        once, before, within = (
            [line for step in self.program.operations if kind(step) for line in lines[step.out]]
            for kind in (self._is_early, self._is_shared, self._has_rows)
        )
        within += outputs
        if self.rows is not None:
            loop = RowLoop(self, lines, [line for part in pullbacks.values() for line in part[1]])
            within = loop.field(within)
            pullbacks = {
                name: (first, loop.pullback(inner), last)
                for name, (first, inner, last) in pullbacks.items()
            }
            self.cost = shared + (self.cost - shared) * self.rows.total // self.rows.count
        else:
            within = fused(within, ())
            pullbacks = {
                name: (first, fused(inner, [COTANGENT]), last)
                for name, (first, inner, last) in pullbacks.items()
            }
        joined = {name: [*a, *b, *c] for name, (a, b, c) in pullbacks.items()}
        source = self._text([*before, *within], once, joined, early)
        if any(step.op in JUMPS for step in self.program.operations):
            source = f"{APART}\n{source}"
        return Emitted(source, self.offsets, self.packed_size, self.cost, shared)

    def _is_early(self, step: Operation) -> bool:
        """Whether an operation depends on parameters alone, and is evaluated once a solve."""
        return step.out in self.fixed

    def _has_rows(self, step: Operation) -> bool:
        """Whether it is evaluated in the loop through the rows, where there is one."""
        return not self._is_early(step) and (self.rows is None or step.out in self.wide)

    def _is_shared(self, step: Operation) -> bool:
        """Whether it is evaluated before that loop, for all rows."""
        return not (self._is_early(step) or self._has_rows(step))

    def _pullback(self, back: list[str]) -> tuple[list[str], list[str], list[str]]:
        """What a pullback does before the loop through the rows, in it, and afterwards."""
        shared = [
            x.out for x in self.program.operations if self._is_shared(x) and self.wants(x.out)
        ]
        zeros = [f"memset({self.bar[id]}, 0, {self.sizes[id]} * sizeof(REAL));" for id in shared]
        self.started |= {*self.program.outputs, *shared}
        within = [*back, *self._backward(self._has_rows), *self._state_bars()]
        return zeros, within, self._backward(self._is_shared)

    def _follow_state(self) -> None:
        """Begin a pullback without the cotangents of parameters."""
        program = self.program
        self.started = set()
        self.active = {program.time, *(id for id, _ in program.state)}
        self._activate()

    @property
    def packed_size(self) -> int:
        """Length of the packed vector."""
        return max(self.packed.size, 1)

    def _backward(self, of: Callable[[Operation], bool]) -> list[str]:
        """The pullbacks of some operations, the last first, as far as cotangents get to them."""
        lines: list[str] = []
        for step in reversed(self.program.operations):
            reached = self._is_early(step) or step.out in self.started
            if of(step) and self.wants(step.out) and reached:
                lines += self.operations[step.op].pullback(self, step)
        return lines

    def _outputs(self) -> tuple[list[str], list[str]]:
        """Parts of the derivative to their places, and of its cotangent from them."""
        if self.single:
            return [], []
        out, back, offset = [], [], 0
        for id in self.program.outputs:
            start, size = f"{offset}{self.by_row(id)}", self.sizes[id]
            out.append(f"memcpy(k + {start}, {self.place[id]}, {size} * sizeof(REAL));")
            back.append(f"memcpy({self.bar[id]}, k_bar + {start}, {size} * sizeof(REAL));")
            offset += self.whole_size(id)
        return out, back

    def _state_bars(self) -> list[str]:
        lines, offset = [], 0
        for id, _ in self.program.state:
            start, size = f"{offset}{self.by_row(id)}", self.sizes[id]
            if id not in self.started:
                lines.append(f"memset(u_bar + {start}, 0, {size} * sizeof(REAL));")
            elif not self.single:
                lines.append(f"memcpy(u_bar + {start}, {self.bar[id]}, {size} * sizeof(REAL));")
            offset += self.whole_size(id)
        return lines

    def _text(
        self, body: list[str], once: list[str], pullbacks: dict[str, list[str]], early: list[str]
    ) -> str:
        shared = [p for p in self.program.parameters if p.id not in self.own]
        tensors = [
            f"memcpy(P + {offset}, tensors[{i}], {math.prod(p.shape)} * sizeof(REAL));"
            for i, (p, offset) in enumerate(zip(shared, self.offsets, strict=True))
        ]
        packs = [
            f"psn_pack({p.rows}, {p.columns}, {self.place[p.weight]}, {p.stride}, "
            f"{int(p.turned)}, P + {p.offset});"
            for p in self.packings.values()
        ]
        unpacks = [
            f"psn_unpack({p.rows}, {p.columns}, D + {p.offset}, {p.stride}, {int(p.turned)}, "
            f"{self.bar[p.weight]});"
            for p in self.packings.values()
            if p.trained
        ]
        x = self.suffix
        field, pull, start = self._heads()
        # What is read by rows in the loop is made whole, from the first one on.
        first = ["enum { row = 0, first = 0 };"] if self.rows else []
        functions = [
            (field, [*start, *body]),
            *((pull.format(name), [*start, *lines]) for name, lines in pullbacks.items()),
            (
                f"static void pack{x}(const REAL *const *tensors, REAL *P)",
                [*first, f"memset(P, 0, PACKED{x} * sizeof(REAL));", *tensors, *once, *packs],
            ),
            (f"static void unpack{x}(const REAL *P, REAL *D, REAL *z)", [*first, *unpacks, *early]),
        ]
        text = [
            wide(f"WORK{x}", padded(self.work.size)),
            wide(f"BARS{x}", padded(self.bars.size)),
            f"enum {{ PACKED{x} = {self.packed_size} }};",
            *self.constants,
        ]
        for head, lines in functions:
            text += ["", f"{head} {{", *(f"  {line}" for line in lines), "}"]
        return "\n".join(text) + "\n"

    def _heads(self) -> tuple[str, str, list[str]]:
        """Heads of the field and its pullback, and the lines that both begin with."""
        if self.abreast:
            inputs = "const REAL *restrict time, const REAL *restrict u, const REAL *restrict P, "
            inputs += "const REAL *restrict Q, {0}REAL *restrict k, {0}REAL *restrict w"
            names = ("k_bar", "u_bar", "time_bar", "D", "R", "z")
            bars = "".join(f", REAL *restrict {x}" for x in names)
            start = []
        else:
            inputs = "REAL t, const REAL *u, const REAL *P, {0}REAL *k, {0}REAL *w"
            bars = "".join(f", REAL *{x}" for x in ("k_bar", "u_bar", "time_bar", "D", "z"))
            start = [f"REAL time[{PAD}] = {{t}};", "(void)time;"]
        end = self.suffix
        if self.rows and self.rows.in_parts:
            end, inputs = "_in", f"int first, {inputs}"
        return (
            f"static void field{end}({inputs.format('')})",
            f"static void {{}}{end}({inputs.format('const ')}{bars})",
            start,
        )


class Chosen(NamedTuple):
    """A field's code as it suits the field and its batch.

    Attributes:
        emitter: what it was made by.
        emitted: the code.
        parts: how the batch is taken in parts, where it is.
    """

    emitter: Emitter
    emitted: Emitted
    parts: Parts | None = None


def whole_or_by_rows(
    program: Program, dtype: torch.dtype, stages: int = 0, suffix: str = ""
) -> Chosen:
    """A field's code, which goes through its batch by some rows where that is of use.

    Rows that depend on each other are taken at once, as are values and cotangents that the nearest
    cache holds anyway, and rows that are long. Large weights would be fetched again for each of the
    parts.

    Args:
        program: the field.
        dtype: of its state.
        stages: evaluations of a step, of a solve that may take its batch in parts; else 0.
        suffix: of all names in the code.
    """
    program = without_repetitions(program)
    emitter = Emitter(program, suffix=suffix)
    whole = Chosen(emitter, emitter.emit())
    rows = by_rows(program)
    used = (emitter.work.size + emitter.bars.size) * dtype.itemsize
    if rows is None:
        return whole
    weights = sum(p.rows * p.columns for p in emitter.packings.values()) * dtype.itemsize
    at_once = used <= _NEAR or weights > _MOST_WEIGHTS
    most = 0 if at_once else min(_MOST_ROWS, _MOST_STACK * rows.total // used)
    turns = range(_FEWEST_ROWS, most + 1)
    work = stages * (whole.emitted.cost + _ENTRY * emitter.work.size)
    least = 1 if weights <= _FEW_WEIGHTS else _LEAST_ROWS
    # The cotangents of the parameters, which each part has, take no more room than all else.
    room = stages * used // (emitter.packed_size * dtype.itemsize)
    parts = split(_widths(program), rows.total, work, turns, min(rows.total // least, room))
    if parts is not None:
        chosen = _cut(by_rows(program, parts.turn, parts.rows), suffix, parts)
        if chosen is not None:
            return chosen
    counts = [n for n in turns if rows.total % n == 0]
    return _cut(by_rows(program, counts[-1]), suffix) or whole if counts else whole


def _widths(program: Program) -> tuple[int, ...]:
    return tuple(math.prod(shape[1:]) for _, shape in program.state)


def _cut(rows: Rows | None, suffix: str, parts: Parts | None = None) -> Chosen | None:
    """The code of some rows; `None` where each part would do too much again that is of no row."""
    if rows is None:
        return None
    emitter = Emitter(rows.program, suffix=suffix, rows=rows)
    emitted = emitter.emit()
    if parts is not None and _SHARE * (parts.count - 1) * emitted.shared > emitted.cost:
        return None
    return Chosen(emitter, emitted, parts)
