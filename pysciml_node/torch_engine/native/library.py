"""A field and a method as a loaded library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from pysciml_node.errors import CompileError
from pysciml_node.replay.stages import Method
from pysciml_node.torch_engine.native import crossing
from pysciml_node.torch_engine.native.compiler import build
from pysciml_node.torch_engine.native.emit import Emitter, whole_or_by_rows
from pysciml_node.torch_engine.native.emit_method import emit_estimates, emit_method
from pysciml_node.torch_engine.native.parts import Parts
from pysciml_node.torch_engine.native.structures import DOUBLE, INTEGER, POINTER, fields
from pysciml_node.torch_engine.native.text import contiguous, padded
from pysciml_node.translation import again, repeated
from pysciml_node.translation.entries import Settled
from pysciml_node.translation.program import Parameter, Program

REALS = {torch.float32: "float", torch.float64: "double"}
"""Dtypes of states that native code has."""

LOOP = ("codes.h", "parts.h", "steps.h", "event.h", "control.h", "solve.h", "events.h")
"""Files of src/ that the loop of every method for ordinary equations is made of."""

SWEEP = ("sweep.h", "dense_sweep.h", "taken_sweep.h")
"""Those that its discrete adjoint, and that of single steps, are made of."""

TAKEN_AGAIN: dict[str, tuple[Any, ...]] = dict.fromkeys(("take", "pull_back"), (INTEGER, POINTER))
"""What takes single steps again, and pulls their cotangents back."""

_LOOP_IN_PARTS = ("codes.h", "team.h", "parts.h", "steps.h", "event.h", "control.h", "solve.h")


def packed_together(counts: Mapping[str, int], still: Collection[str] = ()) -> str:
    """The packing of the parameters of programs, one after the other.

    Args:
        counts: how many each packs, by the suffix of its names.
        still: programs whose parameters receive no gradients.
    """
    start, packs, unpacks, before = "0", list[str](), list[str](), 0
    for suffix, count in counts.items():
        packs.append(f"  pack{suffix}(tensors + {before}, P + {start});")
        if suffix not in still:
            unpacks.append(f"  unpack{suffix}(P + {start}, D + {start}, z);")
        start, before = f"{start} + PACKED{suffix}", before + count
    return "\n".join(
        (
            "",
            f"enum {{ ALL_PACKED = {start} }};",
            "",
            "static void pack_all(const REAL *const *tensors, REAL *P) {",
            *packs,
            "}",
            "",
            "static void unpack_all(const REAL *P, REAL *D, REAL *z) {",
            *unpacks,
            "}",
            "",
        )
    )


_MOST_KEPT = 2
"""Memories of a library that are kept for later solves."""


_MANY = 64
"""Places that are too many to keep arrays of them."""


_LYING, _LANDED, _SWEPT, _COST = map(struct.Struct, ("10P2q", "10q", "14P5q", "9q"))


class AccuracyRequest(ctypes.Structure):
    """`Accuracy` of src/control.h."""

    _fields_ = (*fields(DOUBLE, "rtol atol"), *fields(POINTER, "rtols atols"))


class SolveRequest(ctypes.Structure):
    """`Solve` of src/control.h."""

    _fields_ = (
        *fields(DOUBLE, "t0 t1 dt0 dtmin dtmax shift factor"),
        ("beta", DOUBLE * 3),
        *fields(DOUBLE, "gamma qmin qmax"),
        *fields(INTEGER, "control max_steps stop_count save_count moving free driven"),
        ("mark_count", INTEGER),
        *fields(POINTER, "marks stops saves rtol atol"),
        ("accuracy", AccuracyRequest),
        *fields(POINTER, "u0 tensors packed ends saved final steps places memory kept"),
        *fields(INTEGER, "room kept_room"),
        ("events", POINTER),
        *fields(INTEGER, "event_count found"),
        ("noise", POINTER),
        *fields(DOUBLE, "limit factor_of_turn"),
        *fields(INTEGER, "patience run"),
        *fields(DOUBLE, "t h last_t last_h last_error eigenvalue"),
        ("history", DOUBLE * 2),
        ("seconds", DOUBLE),
        *fields(INTEGER, "status started known linearized next_stop"),
        *fields(INTEGER, "accepted rejected evaluations reached finite"),
        ("k", POINTER),
        ("threads", INTEGER),
        ("team", POINTER),
    )

    def put(self, *places: int) -> None:
        """Set the fields from `u0` to `kept_room`; all at once, for each takes its time."""
        _LYING.pack_into(self, SolveRequest.u0.offset, *places)

    @classmethod
    def landed(cls, block: bytearray) -> tuple[int, ...]:
        """The fields from `status` to `finite` of a request at the start of a block."""
        return _LANDED.unpack_from(block, _STATUS)


class SweepRequest(ctypes.Structure):
    """`Sweep` of src/sweep.h."""

    _fields_ = (
        *fields(DOUBLE, "t0 t1 seconds"),
        ("mark_count", INTEGER),
        *fields(POINTER, "marks"),
        ("accuracy", AccuracyRequest),
        *fields(POINTER, "noise"),
        *fields(POINTER, "ends packed steps places"),
        *fields(POINTER, "saved_bar ends_bar last_bar start_bar packed_bar"),
        *fields(POINTER, "t_bar h_bar theta_bar memory kept"),
        *fields(INTEGER, "n first count q kept_count started live shared"),
        *fields(INTEGER, "evaluations pulls replayed status reached threads"),
        ("team", POINTER),
    )

    def put(self, *places: int) -> None:
        """Set the fields from `ends` to `kept_count`."""
        _SWEPT.pack_into(self, SweepRequest.ends.offset, *places)

    @classmethod
    def swept(cls, block: bytearray) -> tuple[int, ...]:
        """The fields from `q` to `status` of a request at the start of a block."""
        return _COST.unpack_from(block, cls.q.offset)


_STATUS: int = SolveRequest.status.offset
# Each solve asks for it, and ctypes takes its time.

_SOURCES = {x.name: x.read_text(encoding="utf-8") for x in (files(__package__) / "src").iterdir()}
"""The files of src/, read at once: a package that is exchanged while a process runs has others."""


def source(name: str) -> str:
    """A file of src/."""
    return _SOURCES[name]


def header(dtype: torch.dtype, abreast: int = 0) -> str:
    """What all native code of a dtype begins with: its functions and products."""
    lines = [
        *(f"#include <{name}.h>" for name in ("math", "stdint", "string", "time")),
        *([f"#define ABREAST {abreast}"] if abreast else []),
        *(["#define PSN_DOUBLE"] if dtype is torch.float64 else []),
        f"typedef {REALS[dtype]} REAL;",
        source("functions.h"),
        source("products.h"),
    ]
    return "\n".join(lines)


@functools.cache
def cross_in_c() -> None:
    """Have C look again at what fields reach, fill requests, and find solves, from now on."""
    with contextlib.suppress(CompileError):
        again.use(build(again.source()))
        crossing.use(build(source("crossing.c")))
        repeated.use(build(repeated.source()))


class Code(Settled):
    """Emitted code that is compiled when it is first called, with memory that is used again.

    Args:
        dtype: of the state.
        text: the code.
        packed_size: entries of the packed parameters.
        calls: the names that it gives, with their result and their arguments.
    """

    def __init__(
        self, dtype: torch.dtype, text: str, packed_size: int, calls: dict[str, tuple[Any, ...]]
    ) -> None:
        self.dtype, self.text, self.packed_size = dtype, text, packed_size
        self._calls = calls
        self._loaded: ctypes.CDLL | None = None
        self._pools: defaultdict[int, list[Tensor]] = defaultdict(list)

    @property
    def loaded(self) -> ctypes.CDLL:
        """The compiled code."""
        # No lock: threads may do it twice, but a process that forks would leave it closed.
        if self._loaded is None:
            library = build(self.text)
            cross_in_c()
            for name, (result, *arguments) in self._calls.items():
                call = getattr(library, name)
                call.restype, call.argtypes = result, arguments
            self._loaded = library
        return self._loaded

    def memories(self, size: int) -> list[Tensor]:
        """The memory of a size that is in no use."""
        return self._pools[size]

    def take_memory(self, size: int) -> Tensor:
        """Memory for a loop or a sweep, which is used again by a later one."""
        try:
            return self._pools[size].pop()
        except LookupError:
            return torch.zeros(size, dtype=self.dtype, device="cpu")

    def give_memory(self, block: Tensor) -> None:
        """Give it back; a solve that was interrupted leaves its memory to the collector."""
        pool = self._pools[block.numel()]
        if len(pool) < _MOST_KEPT:
            pool.append(block)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """What the field reads of its parameters."""
        packed = torch.empty(self.packed_size, dtype=self.dtype)
        lying = self.all_lying(tensors)  # C reads those that are made here too
        self.loaded.prepare(addresses(lying), packed.data_ptr())
        return packed

    def all_lying(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors as C reads them; themselves, where they are."""
        dtype = self.dtype
        for x in tensors:
            if x.dtype is not dtype or not x.is_contiguous() or x.is_neg():
                return [self.lying(x) for x in tensors]
        return tensors

    def lying(self, x: Tensor) -> Tensor:
        """A tensor as C reads it."""
        if x.dtype is self.dtype and not x.is_neg():
            return x if x.is_contiguous() else x.contiguous()
        return x.detach().to(self.dtype).resolve_neg().contiguous()


def addresses(tensors: Sequence[Tensor]) -> Any:
    """Where tensors lie, as an array of C that is only read."""
    make = _array if len(tensors) < _MANY else _array.__wrapped__
    return make(*map(Tensor.data_ptr, tensors))


@functools.lru_cache(maxsize=64)
def _array(*places: int) -> Any:
    """One for the same places: parameters stay where they are."""
    return (POINTER * len(places))(*places)


def turns(cost: int, stages: int) -> int:
    """Steps after which the clock is looked at: about a tenth of a millisecond of them.

    Args:
        cost: of an evaluation, in multiplications.
        stages: evaluations of a step.
    """
    return max(1, min(1000, 200_000 // (cost * stages)))


@dataclass(frozen=True)
class Written:
    """A field and a method as C.

    Attributes:
        text: what is particular to them, for the files of src/.
        size: entries of the state.
        cost: multiplications of an evaluation.
        stages: evaluations of a step.
        packed: length of the packed parameters.
        march_memory: entries of the loop's memory.
        sweep_memory: of the sweep's; 0 where there is none.
        slot: of a step whose stages are kept for the sweep; 0 where they are not.
        ends: where start and end of the last attempt lie in the loop's memory.
        parameters: each with its offset in the packed ones, and whether a gradient goes to it.
        parts: how the batch is taken in parts, where it is.
        calls: further names that it gives, with their result and their arguments.
        abreast: how many solves go abreast in it, where several do.
    """

    text: str
    size: int
    cost: int
    stages: int
    packed: int
    march_memory: int
    sweep_memory: int
    slot: int
    ends: tuple[int, int]
    parameters: list[tuple[Parameter, int, bool]]
    parts: Parts | None = None
    calls: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    abreast: int = 0


def write_explicit(program: Program, method: Method, in_parts: bool = True) -> Written:
    """The code of a field for an explicit method.

    Args:
        program: the field.
        method: the method.
        in_parts: whether a batch may be taken in parts; not in a loop that looks for events.
    """
    stages = method.all_stages
    emitter, emitted, parts = whole_or_by_rows(
        program, method.nodes.dtype, stages if in_parts else 0
    )
    size, loop = size_of(program), LOOP
    march, sweep = memory_of(method, size, emitter)
    if parts is not None:
        size, loop = parts.rows * sum(parts.widths), _LOOP_IN_PARTS
        march, sweep = memory_of(method, size, emitter)
        march *= parts.count
        sweep = parts.count * (sweep + padded(size) + emitted.packed)
    slot = stages * (2 * padded(size) + padded(emitter.work.size))
    text = (
        emit_method(method, size),
        emit_estimates(method, method.nodes.dtype),
        *([] if parts is None else [parts.definitions]),
        emitted.source,
        packed_together({"": len(program.parameters)}),
        *map(source, (*loop, "explicit.h", "taken.h", *SWEEP, "explicit_sweep.h")),
    )
    rows = zip(program.parameters, emitted.offsets, program.pulled, strict=True)
    return Written(
        "\n".join(text), size_of(program), emitted.cost, stages, emitted.packed, march, sweep,
        slot * (1 if parts is None else parts.count), ends_of_attempt(method, size), list(rows),
        parts, TAKEN_AGAIN,
    )  # fmt: skip


def ends_of_attempt(method: Method, size: int) -> tuple[int, int]:
    """Where src/solve.h has start and end of the last attempt."""
    first = method.all_stages * padded(size)
    return first, first + 2 * padded(size)


def memory_of(method: Method, size: int, emitter: Emitter) -> tuple[int, int]:
    """Entries that src/solve.h and src/sweep.h need."""
    row, work, bars = padded(size), padded(emitter.work.size), padded(emitter.bars.size)
    stages = method.all_stages
    return (stages + 4) * row + work, (2 * stages + 3) * row + bars + stages * (2 * row + work)


def size_of(program: Program) -> int:
    """Entries of a program's state."""
    return sum(math.prod(shape) for _, shape in program.state)


class Library(Code):
    """Native code of a field and a method.

    Args:
        written: both.
        dtype: of the state.

    Attributes:
        size: entries of the state.
        cost: multiplications of an evaluation.
        slot: entries of a step whose stages are kept for the sweep.
        start_at: bytes in front of the cotangent of the initial state, behind the parameters'.
        pulled: of each parameter, whether a gradient goes to it.
        shapes: theirs.
        places: where each parameter begins in the packed ones, and its length.
        parts: how the batch is taken in parts, where it is.
        abreast: how many solves go abreast.
        departures: how solves of it begin, by their options.
        lately: accepted steps of the last one.
    """

    def __init__(self, written: Written, dtype: torch.dtype) -> None:
        self.cost, self.size, self.parts = written.cost, written.size, written.parts
        self._ends = written.ends
        self.march_memory, self.sweep_memory = written.march_memory, written.sweep_memory
        self.slot, self.abreast = written.slot, max(written.abreast, 1)
        self.start_at = written.packed * dtype.itemsize
        self.departures: dict[tuple[int, ...], Any] = {}
        self.lately = 0
        self.pulled = tuple(pulled for *_, pulled in written.parameters)
        self.shapes = [p.shape for p, *_ in written.parameters]
        self.places = [(start, math.prod(p.shape)) for p, start, _ in written.parameters]
        self._places = [
            (pulled, parameter.shape, contiguous(parameter.shape), offset)
            for parameter, offset, pulled in written.parameters
        ]
        cost = turns(written.cost + 10 * written.size + 50, written.stages)
        text = "\n".join(
            (header(dtype, written.abreast), f"enum {{ TURNS = {cost} }};", written.text)
        )
        calls: dict[str, tuple[Any, ...]] = {"march": (INTEGER, POINTER), **written.calls}
        if written.sweep_memory:
            calls["sweep"] = (INTEGER, POINTER)
        super().__init__(dtype, text, written.packed, calls)

    @property
    def threads(self) -> int:
        """How many may take parts."""
        return 0 if self.parts is None else torch.get_num_threads()

    def march(self, request: SolveRequest) -> int:
        """Step for a while."""
        status: int = self.loaded.march(ctypes.addressof(request))
        return status

    def sweep(self, request: SweepRequest) -> int:
        """Go back for a while."""
        status: int = self.loaded.sweep(ctypes.addressof(request))
        return status

    def take(self, request: Any) -> int:
        """Take single steps again for a while."""
        status: int = self.loaded.take(ctypes.addressof(request))
        return status

    def pull_back(self, request: Any) -> int:
        """Go back through them for a while."""
        status: int = self.loaded.pull_back(ctypes.addressof(request))
        return status

    def last_states(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of the last attempt, in the memory of a loop."""
        parts = self.parts
        if parts is None:
            start, end = (memory[place : place + self.size] for place in self._ends)
            return start, end
        size, blocks = parts.rows * sum(parts.widths), memory.view(parts.count, -1)
        start, end = (parts.joined(blocks[:, place : place + size]) for place in self._ends)
        return start, end

    def cotangents(
        self, packed_bar: Tensor, of: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The cotangents of the parameters that are wanted, or `None`, in their shapes and dtypes.

        Args:
            packed_bar: of all, flat, each in its place.
            of: the parameters.
            wanted: which of them.
        """
        bars: list[Tensor | None] = []
        for x, needed, place in zip(of, wanted, self._places, strict=True):
            bar = None
            pulled, shape, strides, offset = place
            if needed and pulled and x is not None:
                bar = packed_bar.as_strided(shape, strides, offset)
                if x.dtype is not self.dtype:
                    bar = bar.to(x)
            bars.append(bar)
        return bars


@functools.lru_cache(maxsize=256)
def _library(made_of: Hashable, tableau: int, dtype: torch.dtype) -> list[Library]:
    """Room for a library, found by what it is made of."""
    return []


def library_of(
    made_of: Hashable, tableau: object, dtype: torch.dtype, write: Callable[[], Written]
) -> Library:
    """The library of programs and a method, made once in a process.

    Args:
        made_of: the programs as text, and what else the code depends on.
        tableau: of the method; it lives as long as the process.
        dtype: of the state.
        write: emits them.
    """
    place = _library(made_of, id(tableau), dtype)
    if not place:
        place.append(Library(write(), dtype))
    return place[0]
