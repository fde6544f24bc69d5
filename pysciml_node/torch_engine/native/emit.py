"""Programs as C: the field, its vector-Jacobian product, and the packing of its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pysciml_node.errors import UnsupportedModule
from pysciml_node.torch_engine.native.layout import Layout
from pysciml_node.torch_engine.native.operations import OPERATIONS
from pysciml_node.torch_engine.native.text import PAD, padded


@dataclass
class Emitted:
    """A program as C.

    Attributes:
        source: the functions `field`, `pull`, `pack` and `unpack`.
        offsets: of the parameters in the packed vector.
        packed: its length.
        cost: multiplications of an evaluation.
    """

    source: str
    offsets: list[int]
    packed: int
    cost: int


class Emitter(Layout):
    """Goes through a program once forward and once backward."""

    operations: ClassVar = OPERATIONS

    def emit(self, state_alone: bool = False) -> Emitted:
        """All functions of the field.

        Args:
            state_alone: also a pullback to the state and the time alone, `pull_state`.
        """
        program = self.program
        body: list[str] = []
        once: list[str] = []
        for step in program.operations:
            if step.op not in self.operations:
                raise UnsupportedModule(
                    f"the operation {step.op!r} has no native code.", operation=step.op
                )
            lines = self.operations[step.op].forward(self, step)
            (once if step.out in self.fixed else body).extend(lines)
        _, back = outputs = self._outputs()
        pullbacks = {"pull": [*back, *self._backward(body_only=True), *self._state_bars()]}
        early = self._backward(body_only=False)
        if state_alone:
            self._follow_state()
            lines = [*back, *self._backward(body_only=True), *self._state_bars()]
            pullbacks["pull_state"] = lines
        source = self._text(body + outputs[0], once, pullbacks, early)
        return Emitted(source, self.offsets, self.packed_size, self.cost)

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

    def _backward(self, body_only: bool) -> list[str]:
        program = self.program
        self.started |= set(program.outputs)
        lines: list[str] = []
        for step in reversed(program.operations):
            if (step.out in self.fixed) == body_only or not self.wants(step.out):
                continue
            if body_only and step.out not in self.started:
                continue
            lines += self.operations[step.op].pullback(self, step)
        return lines

    def _outputs(self) -> tuple[list[str], list[str]]:
        """Parts of the derivative to their places, and of its cotangent from them."""
        if self.single:
            return [], []
        out, back, offset = [], [], 0
        for id, size in ((id, self.sizes[id]) for id in self.program.outputs):
            out.append(f"memcpy(k + {offset}, {self.place[id]}, {size} * sizeof(REAL));")
            back.append(f"memcpy({self.bar[id]}, k_bar + {offset}, {size} * sizeof(REAL));")
            offset += size
        return out, back

    def _state_bars(self) -> list[str]:
        lines, offset = [], 0
        for id, _ in self.program.state:
            size = self.sizes[id]
            if id not in self.started:
                lines.append(f"memset(u_bar + {offset}, 0, {size} * sizeof(REAL));")
            elif not self.single:
                lines.append(f"memcpy(u_bar + {offset}, {self.bar[id]}, {size} * sizeof(REAL));")
            offset += size
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
        functions = [
            (field, [*start, *body]),
            *((pull.format(name), [*start, *lines]) for name, lines in pullbacks.items()),
            (
                f"static void pack{x}(const REAL *const *tensors, REAL *P)",
                [f"memset(P, 0, PACKED{x} * sizeof(REAL));", *tensors, *once, *packs],
            ),
            (f"static void unpack{x}(const REAL *P, REAL *D, REAL *z)", [*unpacks, *early]),
        ]
        text = [
            f"enum {{ WORK{x} = {padded(self.work.size)}, BARS{x} = {padded(self.bars.size)}, "
            f"PACKED{x} = {self.packed_size} }};",
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
        return (
            f"static void field{self.suffix}({inputs.format('')})",
            f"static void {{}}{self.suffix}({inputs.format('const ')}{bars})",
            start,
        )
