"""Where the values of a program lie in native code.

Values live in four places: the state (argument of the field), the derivative (its result), the
field's own memory `w`, kept for the pullback, and the packed parameters `P`, which also hold what
depends on nothing but parameters and so is computed once a solve. Cotangents have places of the
same names: `u_bar`, `k_bar`, `z`, `D`. Parameters that each member of an ensemble has for itself
lie in `Q`, with cotangents in `R`.

Where a field goes through its batch by some rows at a time, `row` is the first of them, counted
from the `first` row of a part where the batch is taken in parts. The values of these rows have
names, and find their places when it is known which of them the pullback reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pysciml_node.torch_engine.native.rows import Rows
from pysciml_node.torch_engine.native.text import PAD, number, padded, whole
from pysciml_node.translation.program import FLAT, Operation, Program


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
class Layout:
    """Where the values of a program and their cotangents lie, and how they are added to.

    Args:
        program: what is emitted.
        own: parameters that are each member's own.
        abreast: members that are evaluated at once, of an ensemble; 0 for a single solve.
        suffix: of all names in the emitted code, where a second program stands beside another.
        rows: what the program is cut to, where it is that of some rows of a batch.
    """

    program: Program
    own: frozenset[int] = frozenset()
    abreast: int = 0
    suffix: str = ""
    rows: Rows | None = None
    work: Region = field(default_factory=lambda: Region("w"))
    bars: Region = field(default_factory=lambda: Region("z"))
    packed: Region = field(default_factory=lambda: Region("P"))
    mine: Region = field(default_factory=lambda: Region("Q"))
    cost: int = 0

    def __post_init__(self) -> None:
        program = self.program
        self.sizes: dict[int, int] = {}
        self.place: dict[int, str] = {}
        self.bar: dict[int, str] = {}
        self.fixed: set[int] = set()  # values that depend on parameters alone
        self.active: set[int] = set()  # values that cotangents go to
        self.started: set[int] = set()  # cotangents that have been written
        self.summed: set[int] = set()  # cotangents that are added to through a whole sweep
        self.packings: dict[tuple[int, bool, bool], Packing] = {}
        self.extra: dict[int, str] = {}  # what an operation keeps besides its result
        self.named: dict[str, int] = {}  # values of some rows, with their sizes
        self.wide: frozenset[int] = self.rows.wide if self.rows else frozenset()
        self.constants: list[str] = []
        self.offsets: list[int] = []
        self.own_offsets: list[int] = []
        self._sources()
        self.single = len(program.state) == 1
        for step in program.operations:
            self._result(step)
        self._activate()

    def _sources(self) -> None:
        program = self.program
        self.place[program.time], self.sizes[program.time] = "time", max(self.abreast, 1)
        self.bar[program.time] = "time_bar"
        self.summed.add(program.time)
        self.active.add(program.time)
        offset = 0
        for id, shape in program.state:
            self.sizes[id] = math.prod(shape)
            self.place[id] = f"(u + {offset}{self.by_row(id)})"
            # Parts lie without room between them: their cotangents are gathered elsewhere.
            alone = len(program.state) == 1
            self.bar[id] = self._of_rows("u_bar", id) if alone else self.bars.take(self.sizes[id])
            offset += self.whole_size(id)
            self.active.add(id)
        for parameter in program.parameters:
            self.sizes[parameter.id] = math.prod(parameter.shape)
            self.summed.add(parameter.id)
            if parameter.id in self.own:
                self.own_offsets.append(self.mine.size)
                self.place[parameter.id] = self.mine.take(self.sizes[parameter.id])
                self.bar[parameter.id] = self.place[parameter.id].replace("Q", "R")
            else:
                self.offsets.append(self.packed.size)
                self.place[parameter.id] = self.packed.take(self.sizes[parameter.id])
                self.bar[parameter.id] = self.place[parameter.id].replace("P", "D")
                self.fixed.add(parameter.id)
            if parameter.trained:
                self.active.add(parameter.id)
            if self.rows and parameter.id in self.rows.held:
                self._hold(parameter.id)
        for id, value in program.constants:
            self.sizes[id] = 1
            self.place[id] = f"c{id}{self.suffix}"
            self.constants.append(
                f"static const REAL {self.place[id]}[{PAD}] = {{{number(value)}}};"
            )
            self.fixed.add(id)
            self.summed.add(id)

    def _result(self, step: Operation) -> None:
        size = self.sizes[step.out] = math.prod(step.shape)
        if all(id in self.fixed for id in step.inputs) and step.out not in self.program.outputs:
            self.fixed.add(step.out)
            self.summed.add(step.out)
            self.place[step.out] = self.packed.take(size)
            self.bar[step.out] = self.place[step.out].replace("P", "D")
            if self.rows and step.out in self.rows.held:
                self._hold(step.out)
        elif step.out in self.program.outputs and self.single:
            self.place[step.out] = self._of_rows("k", step.out)
            self.bar[step.out] = self._of_rows("k_bar", step.out)
        else:
            self.place[step.out] = self.room(step, size, "v")
            self.bar[step.out] = self.bars.take(size)
            if self.rows and step.out not in self.wide:
                self.summed.add(step.out)

    def room(self, step: Operation, size: int, prefix: str) -> str:
        """Where an operation keeps its result, or something beside it."""
        if step.out in self.fixed:
            return self.packed.take(size)
        if step.out not in self.wide:
            return self.work.take(size)
        name = f"{prefix}{step.out}"
        self.named[name] = padded(size)
        return name

    def whole_size(self, id: int) -> int:
        """Entries of a value of all rows that a call goes through."""
        return self.sizes[id] * (self.rows.turns if self.rows else 1)

    def by_row(self, id: int) -> str:
        """What is added to the place of a value of all rows that a call goes through."""
        return f" + {self.sizes[id] // self.rows.count} * row" if self.rows else ""

    def _of_rows(self, place: str, id: int) -> str:
        return f"({place}{self.by_row(id)})" if self.rows else place

    def _hold(self, id: int) -> None:
        """Have a value that is known before the first evaluation read by rows."""
        assert self.rows is not None
        row = "(first + row)" if self.rows.in_parts else "row"
        run = f" + {self.sizes[id] // self.rows.total} * {row})"
        self.place[id] = f"{self.place[id][:-1]}{run}"
        self.bar[id] = f"{self.bar[id][:-1]}{run}"

    def _activate(self) -> None:
        """Add the values that depend on active ones, and are followed by gradients."""
        for step in self.program.operations:
            if step.op not in FLAT and any(id in self.active for id in step.inputs):
                self.active.add(step.out)

    def count(self, size: int, exact: bool = False) -> int:
        """Entries that a loop over whole buffers goes through, their padding included."""
        return size if exact or size <= PAD // 2 else whole(size)

    def begin(self, id: int) -> list[str]:
        """Make a cotangent ready to be added to."""
        if id in self.summed or id in self.started:
            return []
        self.started.add(id)
        return [f"memset({self.bar[id]}, 0, {self.sizes[id]} * sizeof(REAL));"]

    def add_to(self, id: int, size: int, value: Callable[[str], str], exact: bool) -> list[str]:
        """Add to a cotangent entry by entry, or write it for the first time."""
        known = id in self.summed or id in self.started
        self.started.add(id)
        sign = "+=" if known else "="
        # In the packed parameters and at the ends of parts the padding is somebody else's.
        count = self.count(size, exact or id in self.fixed or id == self.program.time)
        return [
            "#pragma omp simd",
            f"for (int i = 0; i < {count}; i++) {self.bar[id]}[i] {sign} {value('i')};",
        ]

    def zero(self, id: int) -> str:
        """Set a value to zero."""
        return f"memset({self.place[id]}, 0, {self.sizes[id]} * sizeof(REAL));"

    def wants(self, id: int) -> bool:
        """Whether a value's cotangent is needed."""
        return id in self.active
