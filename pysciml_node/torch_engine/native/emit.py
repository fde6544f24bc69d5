"""Programs as C: the field, its vector-Jacobian product, and the packing of its parameters.

Values live in four places: the state (argument of the field), the derivative (its result), the
field's own memory `w`, kept for the pullback, and the packed parameters `P`, which also hold what
depends on nothing but parameters and so is computed once a solve. Cotangents have places of the
same names: `u_bar`, `k_bar`, `z`, `D`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pysciml_node.errors import UnsupportedModule
from pysciml_node.torch_engine.native.operations import OPERATIONS
from pysciml_node.torch_engine.native.text import PAD, number, padded, whole
from pysciml_node.translation.program import Operation, Program


@dataclass
class Region:
    """Memory that is handed out in pieces."""

    name: str
    size: int = 0

    def take(self, count: int) -> str:
        """A pointer to room for `count` entries and a vector more."""
        start = self.size
        self.size += padded(count)
        return f"({self.name} + {start})"


@dataclass
class Packing:
    """A weight in the layout of a product: `(outputs, inputs)` by rows, or turned."""

    offset: int
    rows: int
    columns: int
    stride: int
    turned: bool
    weight: int
    trained: bool = False


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


@dataclass
class Emitter:
    """Goes through a program once forward and once backward.

    Args:
        program: what is emitted.
    """

    program: Program
    work: Region = field(default_factory=lambda: Region("w"))
    bars: Region = field(default_factory=lambda: Region("z"))
    packed: Region = field(default_factory=lambda: Region("P"))
    cost: int = 0

    def __post_init__(self) -> None:
        program = self.program
        self.sizes: dict[int, int] = {}
        self.place: dict[int, str] = {}
        self.bar: dict[int, str] = {}
        self.fixed: set[int] = set()  # values that depend on parameters alone
        self.active: set[int] = set()  # values that cotangents go to
        self.started: set[int] = set()  # cotangents that have been written
        self.packings: dict[tuple[int, bool], Packing] = {}
        self.extra: dict[int, str] = {}  # what an operation keeps besides its result
        self.constants: list[str] = []
        self.offsets: list[int] = []
        self._sources()
        self.single = len(program.state) == 1
        for step in program.operations:
            self._result(step)

    def _sources(self) -> None:
        program = self.program
        self.place[program.time], self.sizes[program.time] = "time", 1
        self.bar[program.time] = "time_bar"
        self.active.add(program.time)
        offset = 0
        for id, shape in program.state:
            self.sizes[id] = math.prod(shape)
            self.place[id] = f"(u + {offset})"
            # Parts lie without room between them: their cotangents are gathered elsewhere.
            self.bar[id] = "u_bar" if len(program.state) == 1 else self.bars.take(self.sizes[id])
            offset += self.sizes[id]
            self.active.add(id)
        for parameter in program.parameters:
            self.sizes[parameter.id] = math.prod(parameter.shape)
            self.offsets.append(self.packed.size)
            self.place[parameter.id] = self.packed.take(self.sizes[parameter.id])
            self.bar[parameter.id] = self.place[parameter.id].replace("P", "D")
            self.fixed.add(parameter.id)
            if parameter.trained:
                self.active.add(parameter.id)
        for id, value in program.constants:
            self.sizes[id] = 1
            self.place[id] = f"c{id}"
            self.constants.append(f"static const REAL c{id}[{PAD}] = {{{number(value)}}};")
            self.fixed.add(id)

    def _result(self, step: Operation) -> None:
        size = self.sizes[step.out] = math.prod(step.shape)
        if all(id in self.fixed for id in step.inputs) and step.out not in self.program.outputs:
            self.fixed.add(step.out)
            self.place[step.out] = self.packed.take(size)
            self.bar[step.out] = self.place[step.out].replace("P", "D")
        elif step.out in self.program.outputs and self.single:
            self.place[step.out], self.bar[step.out] = "k", "k_bar"
        else:
            self.place[step.out] = self.work.take(size)
            self.bar[step.out] = self.bars.take(size)
        if any(id in self.active for id in step.inputs):
            self.active.add(step.out)

    # Helpers of the operations -----------------------------------------------------------------

    def count(self, size: int, exact: bool = False) -> int:
        """Entries that a loop over whole buffers goes through, their padding included."""
        return size if exact or size <= PAD // 2 else whole(size)

    def begin(self, id: int) -> list[str]:
        """Make a cotangent ready to be added to."""
        if id in self.fixed or id in self.started or id == self.program.time:
            return []
        self.started.add(id)
        return [f"memset({self.bar[id]}, 0, {self.sizes[id]} * sizeof(REAL));"]

    def add_to(self, id: int, size: int, value: Callable[[str], str], exact: bool) -> list[str]:
        """Add to a cotangent entry by entry, or write it for the first time."""
        known = id in self.fixed or id in self.started or id == self.program.time
        self.started.add(id)
        sign = "+=" if known else "="
        # In the packed parameters and at the ends of parts the padding is somebody else's.
        count = self.count(size, exact or id in self.fixed or id == self.program.time)
        return [
            "#pragma omp simd",
            f"for (int i = 0; i < {count}; i++) {self.bar[id]}[i] {sign} {value('i')};",
        ]

    def wants(self, id: int) -> bool:
        """Whether a value's cotangent is needed."""
        return id in self.active

    # The whole ---------------------------------------------------------------------------------

    def emit(self) -> Emitted:
        """All functions of the field."""
        program = self.program
        body: list[str] = []
        once: list[str] = []
        for step in program.operations:
            if step.op not in OPERATIONS:
                raise UnsupportedModule(
                    f"the operation {step.op!r} has no native code.", operation=step.op
                )
            lines = OPERATIONS[step.op].forward(self, step)
            (once if step.out in self.fixed else body).extend(lines)
        backward = self._backward(body_only=True)
        early = self._backward(body_only=False)
        return Emitted(
            self._text(body, once, backward, early), self.offsets, self.packed.size, self.cost
        )

    def _backward(self, body_only: bool) -> list[str]:
        program = self.program
        self.started |= set(program.outputs)
        lines: list[str] = []
        for step in reversed(program.operations):
            if (step.out in self.fixed) == body_only or not self.wants(step.out):
                continue
            if body_only and step.out not in self.started:
                continue
            lines += OPERATIONS[step.op].pullback(self, step)
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

    def _text(self, body: list[str], once: list[str], backward: list[str], early: list[str]) -> str:
        program = self.program
        tensors = [
            f"memcpy(P + {offset}, tensors[{i}], {math.prod(p.shape)} * sizeof(REAL));"
            for i, (p, offset) in enumerate(zip(program.parameters, self.offsets, strict=True))
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
        out, back = self._outputs()
        arguments = "const REAL *u, const REAL *P, {k}REAL *k, {w}REAL *w"
        functions = [
            (
                "static void field(REAL t, const REAL *u, const REAL *P, REAL *k, REAL *w)",
                [f"REAL time[{PAD}] = {{t}};", "(void)time;", *body, *out],
            ),
            (
                "static void pull(REAL t, "
                + arguments.format(k="const ", w="const ")
                + ", REAL *k_bar, REAL *u_bar, REAL *time_bar, REAL *D, REAL *z)",
                [
                    f"REAL time[{PAD}] = {{t}};",
                    "(void)time;",
                    *back,
                    *backward,
                    *self._state_bars(),
                ],
            ),
            (
                "static void pack(const REAL *const *tensors, REAL *P)",
                [*tensors, *once, *packs],
            ),
            ("static void unpack(const REAL *P, REAL *D, REAL *z)", [*unpacks, *early]),
        ]
        text = [
            f"enum {{ WORK = {padded(self.work.size)}, BARS = {padded(self.bars.size)} }};",
            *self.constants,
        ]
        for head, lines in functions:
            text += ["", f"{head} {{", *(f"  {line}" for line in lines), "}"]
        return "\n".join(text) + "\n"
