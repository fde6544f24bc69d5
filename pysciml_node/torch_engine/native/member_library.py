"""The code of an ensemble: a field and a method for members abreast."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pysciml_node.replay.stages import Method
from pysciml_node.torch_engine.native.abreast import WideEmitter, abreast
from pysciml_node.torch_engine.native.emit import Emitted, Emitter
from pysciml_node.torch_engine.native.emit_method import emit_method
from pysciml_node.torch_engine.native.library import (
    _DOUBLE,
    _INTEGER,
    _POINTER,
    Code,
    _fields,
    header,
    source,
    turns,
)
from pysciml_node.torch_engine.native.text import padded
from pysciml_node.translation.export import TranslatedModule
from pysciml_node.translation.program import Program

COUNTS = 7
"""Numbers that the loop leaves of each member: `ACCEPTED` to `FIRST` of src/members.h."""

# The bytes of a sweep's memory with which members still go abreast: about what a core keeps near.
_MOST_MEMORY = 1 << 20
_VECTOR = 64
# The bytes of steps that the workers of a library keep for the next solve.
_MOST_RESTING = 1 << 24


class MembersRequest(ctypes.Structure):
    """`Many` of src/members.h."""

    _fields_ = (
        *_fields(_POINTER, "t0 t1 shift factor stops marks saves rtol atol u0 packed own"),
        *_fields(_INTEGER, "span_stride scale_stride tolerance_stride save_stride start_stride"),
        *_fields(_INTEGER, "members stop_count mark_count save_count control max_steps driven"),
        ("threads", _INTEGER),
        *_fields(_DOUBLE, "dt0 dtmin dtmax"),
        ("beta", _DOUBLE * 3),
        *_fields(_DOUBLE, "gamma qmin qmax seconds"),
        *_fields(_POINTER, "last saved memory places counts"),
        *_fields(_INTEGER, "memory_stride next room"),
        ("workers", _POINTER),
    )


class MembersSweepRequest(ctypes.Structure):
    """`Back` of src/members_sweep.h."""

    _fields_ = (
        *_fields(_POINTER, "t0 t1 marks steps places u0 packed ends own offsets counts"),
        *_fields(_POINTER, "saved_bar ends_bar last_bar start_bar packed_bar own_bar costs"),
        *_fields(_INTEGER, "span_stride start_stride mark_count save_count members chunk threads"),
        ("seconds", _DOUBLE),
        ("memory", _POINTER),
        *_fields(_INTEGER, "memory_stride next"),
        ("workers", _POINTER),
    )


class MemberLibrary(Code):
    """Native code of a program and a method for the members of an ensemble.

    Args:
        program: the field of one member.
        own: the parameters that each member has for itself.
        method: the Runge-Kutta method; its dtype is that of the state.
        dtype: of the state.

    Attributes:
        size: entries of a member's state.
        abreast: how many members step at once.
        cost: multiplications of an evaluation of one member.
        pulled: of each parameter, whether a gradient goes to it.
        steps: of a member of the last solve, about: room for as many is made at first.
        resting: workers of earlier solves by their number, with room for steps.
    """

    def __init__(
        self, program: Program, own: frozenset[int], method: Method, dtype: torch.dtype
    ) -> None:
        self.size = sum(math.prod(shape) for _, shape in program.state)
        self._method, self.steps = method, 16
        self.resting: dict[int, list[int]] = {}
        width = _VECTOR // dtype.itemsize
        wide = abreast(program, own, width)
        emitter: Emitter | None = None if wide is None else WideEmitter(wide, own, width)
        emitted = None if emitter is None else emitter.emit()
        if emitter is None or self._memory(emitter)[1] * dtype.itemsize > _MOST_MEMORY:
            emitter = Emitter(program, own, 1)
            emitted = emitter.emit()
        assert emitted is not None
        self.abreast = emitter.abreast
        self.cost = emitted.cost // self.abreast
        self.march_memory, self.sweep_memory = self._memory(emitter)
        self.scratch = padded(emitter.bars.size)
        self.pulled = program.pulled
        shared = [p for p in program.parameters if p.id not in own]
        self.places = [
            (offset, math.prod(p.shape)) for p, offset in zip(shared, emitted.offsets, strict=True)
        ]
        super().__init__(dtype, self._text(emitter, emitted, dtype), emitted.packed, _CALLS)

    @contextmanager
    def workers(self, request: MembersRequest) -> Iterator[None]:
        """Workers for a solve, which rest afterwards; those of one that is interrupted go."""
        resting = self.resting.setdefault(request.threads, [])
        with contextlib.suppress(IndexError):
            request.workers = resting.pop()
        try:
            yield
            if not resting:
                most = _MOST_RESTING // (request.threads * self.abreast)
                self.loaded.members_rest(ctypes.byref(request), most)
                resting.append(request.workers)
                request.workers = None
        finally:
            self.loaded.members_release(ctypes.byref(request))

    def _memory(self, emitter: Emitter) -> tuple[int, int]:
        """Entries of a worker's memory, of the loop and of the sweep."""
        stages, width = self._method.all_stages, emitter.abreast
        row, time_row = padded(self.size * width), padded(width)
        own, work = padded(emitter.mine.size), padded(emitter.work.size)
        march = (stages + 4) * row + (stages + 1) * time_row + own + work
        sweep = (2 * stages + 3) * row + stages * time_row + 2 * own + padded(emitter.bars.size)
        return march, sweep + stages * (2 * row + work)

    def _text(self, emitter: Emitter, emitted: Emitted, dtype: torch.dtype) -> str:
        program, own, width = emitter.program, emitter.own, emitter.abreast
        timed = any(program.time in step.inputs for step in program.operations)
        sizes = [math.prod(p.shape) // width for p in program.parameters if p.id in own]
        cost = emitted.cost + (10 * self.size + 50) * width
        places = emitter.own_offsets
        parts = (
            *(f"#include <{name}.h>" for name in ("stdlib", "pthread")),
            header(dtype, width),
            f"enum {{ TURNS = {turns(cost, self._method.all_stages)}, OWN = {len(sizes)}, "
            f"OWN_ROOM = {padded(emitter.mine.size)}, "
            f"TIMED = {int(timed)}, TIME_ROW = {padded(width)} }};",
            f"static const int OWN_SIZES[] = {{{', '.join(map(str, [*sizes, 0]))}}};",
            f"static const int OWN_PLACES[] = {{{', '.join(map(str, [*places, 0]))}}};",
            emit_method(self._method, self.size, width),
            emitted.source,
            *map(source, ("steps.h", "members.h", "members_sweep.h")),
        )
        return "\n".join(parts)


_CALLS = {
    "members_march": (_INTEGER, ctypes.POINTER(MembersRequest)),
    "members_gather": (None, ctypes.POINTER(MembersRequest), _POINTER, _POINTER, _POINTER),
    "members_release": (None, ctypes.POINTER(MembersRequest)),
    "members_rest": (None, ctypes.POINTER(MembersRequest), _INTEGER),
    "members_sweep": (_INTEGER, ctypes.POINTER(MembersSweepRequest)),
    "members_finish": (None, ctypes.POINTER(MembersSweepRequest), _POINTER),
    "members_let_go": (None, ctypes.POINTER(MembersSweepRequest)),
    "prepare": (None, _POINTER, _POINTER),
}


@functools.lru_cache(maxsize=256)
def _library(
    json: str, own: frozenset[int], tableau: int, dtype: torch.dtype
) -> list[MemberLibrary]:
    """Room for a library, found by what it is made of."""
    return []


def member_library(
    translated: TranslatedModule, own: frozenset[int], method: Method, dtype: torch.dtype
) -> MemberLibrary:
    """The library of a translated field for the members of an ensemble, made once in a process."""
    place = _library(translated.json, own, id(method.tableau), dtype)
    if not place:
        place.append(MemberLibrary(translated.program, own, method, dtype))
    return place[0]
