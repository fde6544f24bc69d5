"""The code of an ensemble: a field and a method for members abreast, as C."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pysciml_node.replay.stages import Method
from pysciml_node.tableaus import ImplicitTableau, RosenbrockTableau
from pysciml_node.torch_engine.native.abreast import WideEmitter, abreast
from pysciml_node.torch_engine.native.emit import Emitted, Emitter
from pysciml_node.torch_engine.native.emit_implicit import emit_implicit
from pysciml_node.torch_engine.native.emit_method import emit_alike, emit_method
from pysciml_node.torch_engine.native.library import (
    header,
    packed_together,
    size_of,
    source,
    turns,
)
from pysciml_node.torch_engine.native.text import padded
from pysciml_node.translation.program import Program

# The bytes of a sweep's memory with which members still go abreast: about what a core keeps near.
_MOST_MEMORY = 1 << 20
_VECTOR = 64


@dataclass(frozen=True)
class MemberProgram:
    """A program of one member.

    Attributes:
        program: the program.
        own: its parameters that each member has for itself.
    """

    program: Program
    own: frozenset[int]


@dataclass(frozen=True)
class MemberMethod:
    """How members step.

    Attributes:
        method: the method.
        mass: the mass matrix; `None` stands for the identity.
        pulled: the field's pullback, for gradients of a Rosenbrock method; `None` for others, and
            for the loop alone.
        given: the Jacobian that the problem brings, for steps that need no pullback.
    """

    method: Method
    mass: Tensor | None = None
    pulled: MemberProgram | None = None
    given: MemberProgram | None = None

    @property
    def is_implicit(self) -> bool:
        """Whether its steps solve linear systems."""
        return isinstance(self.method.tableau, ImplicitTableau)

    @property
    def kind(self) -> str:
        """What the files of its steps are named after."""
        if not self.is_implicit:
            return "explicit"
        return "rosenbrock" if isinstance(self.method.tableau, RosenbrockTableau) else "diagonal"

    @property
    def linearizations(self) -> tuple[int, int]:
        """How many a step holds, and how many its adjoint does."""
        return {"explicit": (0, 0), "rosenbrock": (1, 1), "diagonal": (2, self.method.stages)}[
            self.kind
        ]

    @property
    def further(self) -> dict[str, MemberProgram]:
        """What it has beside the field, by the suffix of the names in the code; one at the most."""
        both = {"_pulled": self.pulled, "_given": self.given}
        return {suffix: one for suffix, one in both.items() if one is not None}

    @property
    def sweeps(self) -> bool:
        """Whether there is code for gradients."""
        return self.kind != "rosenbrock" or self.pulled is not None


@dataclass
class _Emission:
    """A program for members abreast, as C."""

    emitter: Emitter
    emitted: Emitted

    @property
    def own_sizes(self) -> list[int]:
        """Entries of each parameter that a member has for itself."""
        program, own = self.emitter.program, self.emitter.own
        width = self.emitter.abreast
        return [math.prod(p.shape) // width for p in program.parameters if p.id in own]

    def places(self, start: int) -> list[tuple[int, int]]:
        """Where each shared parameter begins in the packed ones, and its length.

        Args:
            start: where those of this program begin.
        """
        shared = [p for p in self.emitter.program.parameters if p.id not in self.emitter.own]
        rows = zip(shared, self.emitted.offsets, strict=True)
        return [(start + offset, math.prod(p.shape)) for p, offset in rows]


class WrittenMembers:
    """A field and a method for members abreast, as C.

    Args:
        field: the field.
        how: the method.
        dtype: of the state.

    Attributes:
        text: the code.
        size: entries of a member's state.
        abreast: how many members step at once.
        cost: multiplications of an evaluation of one member.
        packed: length of the packed parameters.
        march_memory: entries of a worker's memory in the loop.
        sweep_memory: likewise in the sweep; 0 where there is none.
        places: where each shared parameter begins in the packed ones, and its length.
    """

    def __init__(self, field: MemberProgram, how: MemberMethod, dtype: torch.dtype) -> None:
        self._how, self.size = how, size_of(field.program)
        programs = {"": field, **how.further}
        wide = self._emit(programs, _VECTOR // dtype.itemsize)
        if wide is None or max(self._memory(wide)) * dtype.itemsize > _MOST_MEMORY:
            wide = self._emit(programs, 1)
        assert wide is not None
        first = wide[""]
        self.abreast = first.emitter.abreast
        self.cost = first.emitted.cost // self.abreast
        self.march_memory, self.sweep_memory = self._memory(wide)
        self.packed, self.places = 0, list[tuple[int, int]]()
        for one in wide.values():
            self.places += one.places(self.packed)
            self.packed += one.emitted.packed
        self.text = "\n".join((header(dtype, self.abreast), *self._parts(wide)))

    def _emit(
        self, programs: Mapping[str, MemberProgram], width: int
    ) -> dict[str, _Emission] | None:
        """The programs as C; `None` where they have no such form."""
        emissions = {}
        for suffix, one in programs.items():
            emitter = Emitter(one.program, one.own, width, suffix)
            if width > 1:
                program = abreast(one.program, one.own, width)
                if program is None:
                    return None
                emitter = WideEmitter(program, one.own, width, suffix)
            state_alone = self._how.is_implicit and not suffix
            emissions[suffix] = _Emission(emitter, emitter.emit(state_alone))
        return emissions

    def _memory(self, emissions: Mapping[str, _Emission]) -> tuple[int, int]:
        """Entries of a worker's memory, of the loop and of the sweep."""
        emitter = emissions[""].emitter
        size, width, stages = self.size, emitter.abreast, self._how.method.all_stages
        row, time_row = padded(size * width), padded(width)
        own = sum(padded(one.emitter.mine.size) for one in emissions.values())
        work, bars = padded(emitter.work.size), padded(emitter.bars.size)
        march = (stages + 4) * row + (stages + 1) * time_row + own + work
        sweep = (2 * stages + 3) * row + stages * time_row + 2 * own + bars
        sweep += stages * (2 * row + work)
        if self._how.is_implicit:
            linear = 2 * padded(size * size * width) + 5 * row + _given_work(emissions)
            held, held_back = self._how.linearizations
            march += bars + held * linear
            sweep += 2 * stages * row + held_back * linear
        if "_pulled" in emissions:
            other = emissions["_pulled"].emitter
            sweep += 4 * self._point(width) + padded(other.work.size) + padded(other.bars.size)
        return march, sweep if self._how.sweeps else 0

    def _packed(self, emissions: Mapping[str, _Emission], width: int) -> str:
        """The packing of the parameters that members share."""
        counts = {suffix: len(one.places(0)) for suffix, one in emissions.items()}
        text = packed_together(counts, ("_given",))
        return f"{text}enum {{ POINT_ROW = {self._point(width)} }};\n"

    def _given(self, emissions: Mapping[str, _Emission]) -> list[str]:
        """What steps by a Jacobian that the problem brings have beside its program."""
        lines, first = [f"enum {{ GIVEN_WORK = {_given_work(emissions)} }};"], emissions[""]
        if "_given" in emissions:
            lines.append(f"#define WITH_GIVEN\nenum {{ GIVEN_AT = {first.emitted.packed} }};")
        return lines

    def _point(self, width: int) -> int:
        return padded((2 * self.size + 1) * width)

    def _parts(self, emissions: Mapping[str, _Emission]) -> list[str]:
        how, width = self._how, self.abreast
        first = emissions[""]
        program = first.emitter.program
        cost = first.emitted.cost + (10 * self.size + 50) * width
        loop = ["codes.h", "team.h", "steps.h", "event.h", "members.h", "members_control.h"]
        sweep = ["members_sweep.h"] if how.sweeps else []
        method = emit_method(how.method, self.size, width)
        alike = emit_alike(how.method, how.method.nodes.dtype)
        if how.is_implicit:
            cost += self.size * first.emitted.cost + self.size**3 // 3 * width
            method = emit_implicit(how.method, self.size, how.mass, width)
            loop.append("members_linear.h")
            sweep += ["members_linear_sweep.h"] if how.sweeps else []
        loop += [f"members_{how.kind}.h", "members_events.h", "members_turns.h"]
        loop += ["workers.h", "members_calls.h"]
        sweep += [f"members_{how.kind}_sweep.h"] if how.sweeps else []
        return [
            "#include <stdlib.h>",
            f"enum {{ TURNS = {turns(cost, how.method.all_stages)}, "
            f"TIMED = {int(program.reads_time)}, TIME_ROW = {padded(width)} }};",
            *_own(emissions),
            method,
            alike,
            *(one.emitted.source for one in emissions.values()),
            *self._given(emissions),
            self._packed(emissions, width),
            *map(source, [*loop, *sweep]),
        ]


def _given_work(emissions: Mapping[str, _Emission]) -> int:
    """Entries for the values of a Jacobian that the problem brings."""
    return padded(emissions["_given"].emitter.work.size) if "_given" in emissions else 0


def _own(emissions: Mapping[str, _Emission]) -> list[str]:
    """Where the parameters lie that are each member's own, those of all programs."""
    sizes: list[int] = []
    places: list[int] = []
    starts = [0]
    for one in emissions.values():
        sizes += one.own_sizes
        places += [starts[-1] + place for place in one.emitter.own_offsets]
        starts.append(starts[-1] + padded(one.emitter.mine.size))
    return [
        f"enum {{ OWN = {len(sizes)}, OWN_ROOM = {starts[-1]}, OWN_FIRST = {starts[1]} }};",
        f"static const int OWN_SIZES[] = {{{', '.join(map(str, [*sizes, 0]))}}};",
        f"static const int OWN_PLACES[] = {{{', '.join(map(str, [*places, 0]))}}};",
    ]
