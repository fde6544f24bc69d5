"""A field and a method as a loaded library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from pysciml_node.replay.stages import Method
from pysciml_node.torch_engine.native.compiler import build
from pysciml_node.torch_engine.native.emit import Emitter
from pysciml_node.torch_engine.native.emit_method import emit_method
from pysciml_node.torch_engine.native.text import padded
from pysciml_node.translation.export import TranslatedModule
from pysciml_node.translation.program import Program

REALS = {torch.float32: "float", torch.float64: "double"}
"""Dtypes of states that native code has."""

_MOST_KEPT = 2
"""Memories of a library that are kept for later solves."""

_POINTER, _DOUBLE, _INTEGER = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class SolveRequest(ctypes.Structure):
    """`Solve` of src/solve.h."""

    _fields_ = (
        *_fields(_DOUBLE, "t0 t1 dt0 dtmin dtmax shift factor"),
        ("beta", _DOUBLE * 3),
        *_fields(_DOUBLE, "gamma qmin qmax"),
        *_fields(_INTEGER, "control max_steps stop_count save_count moving free driven"),
        ("mark_count", _INTEGER),
        *_fields(_POINTER, "marks stops saves rtol atol u0 packed ends saved steps places"),
        ("room", _INTEGER),
        ("memory", _POINTER),
        *_fields(_DOUBLE, "t h last_t last_h last_error"),
        ("history", _DOUBLE * 2),
        ("seconds", _DOUBLE),
        *_fields(_INTEGER, "status started known next_stop accepted rejected evaluations reached"),
    )


class SweepRequest(ctypes.Structure):
    """`Sweep` of src/solve.h."""

    _fields_ = (
        *_fields(_DOUBLE, "t0 t1 seconds"),
        ("mark_count", _INTEGER),
        ("marks", _POINTER),
        *_fields(_POINTER, "u0 ends packed steps places"),
        *_fields(_POINTER, "saved_bar ends_bar last_bar start_bar packed_bar"),
        *_fields(_POINTER, "t_bar h_bar theta_bar memory"),
        *_fields(_INTEGER, "n count q live evaluations replayed status"),
    )


def _source(name: str) -> str:
    return (files(__package__) / "src" / name).read_text(encoding="utf-8")


def header(dtype: torch.dtype) -> str:
    """What all native code of a dtype begins with: its functions and products."""
    lines = [
        *(f"#include <{name}.h>" for name in ("math", "stdint", "string", "time")),
        *(["#define PSN_DOUBLE"] if dtype is torch.float64 else []),
        f"typedef {REALS[dtype]} REAL;",
        _source("functions.h"),
        _source("products.h"),
    ]
    return "\n".join(lines)


class Library:
    """Native code of a program and a method.

    Args:
        program: the field.
        method: the Runge-Kutta method; its dtype is that of the state.
        dtype: of the state.

    Attributes:
        size: entries of the state.
        cost: multiplications of an evaluation.
    """

    def __init__(self, program: Program, method: Method, dtype: torch.dtype) -> None:
        emitter = Emitter(program)
        emitted = emitter.emit()
        self.dtype, self.cost = dtype, emitted.cost
        self.size = sum(_length(shape) for _, shape in program.state)
        self.packed_size = max(emitted.packed, 1)
        row, work, bars = padded(self.size), padded(emitter.work.size), padded(emitter.bars.size)
        stages = method.all_stages
        self._pools: dict[int, list[Tensor]] = {}
        self._stages, self._row = stages, row
        self.march_memory = (stages + 4) * row + work
        self.sweep_memory = (2 * stages + 2) * row + bars + stages * (2 * row + work)
        self.scratch = bars
        self._places = [
            (offset, _length(parameter.shape))
            for parameter, offset in zip(program.parameters, emitted.offsets, strict=True)
        ]
        # The clock is looked at after as many steps as take about a tenth of a millisecond.
        turns = max(1, min(1000, 200_000 // ((emitted.cost + 10 * self.size + 50) * stages)))
        parts = (
            header(dtype),
            f"enum {{ TURNS = {turns} }};",
            emit_method(method, self.size),
            emitted.source,
            _source("solve.h"),
        )
        self.text = "\n".join(parts)

    @cached_property
    def _loaded(self) -> ctypes.CDLL:
        library = build(self.text)
        for name, result in (("march", _INTEGER), ("sweep", _INTEGER)):
            getattr(library, name).restype = result
        library.march.argtypes = (ctypes.POINTER(SolveRequest),)
        library.sweep.argtypes = (ctypes.POINTER(SweepRequest),)
        library.prepare.argtypes = (_POINTER, _POINTER)
        library.finish.argtypes = (_POINTER, _POINTER, _POINTER)
        library.prepare.restype = library.finish.restype = None
        return library

    @contextmanager
    def memory(self, size: int) -> Iterator[Tensor]:
        """Memory for a loop or a sweep, used again by the next one."""
        pool = self._pools.setdefault(size, [])
        try:
            found = pool.pop()
        except IndexError:
            found = torch.zeros(size, dtype=self.dtype, device="cpu")
        yield found
        # A solve that was interrupted leaves its memory to the collector; few are kept.
        if len(pool) < _MOST_KEPT:
            pool.append(found)

    def march(self, request: SolveRequest) -> int:
        """Step for a while."""
        status: int = self._loaded.march(ctypes.byref(request))
        return status

    def sweep(self, request: SweepRequest) -> int:
        """Go back for a while."""
        status: int = self._loaded.sweep(ctypes.byref(request))
        return status

    def last_states(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of the last attempt, in the memory of a loop."""
        start, row = self._stages * self._row, self._row
        return memory[start : start + self.size], memory[start + 2 * row :][: self.size]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """What the field reads of its parameters."""
        packed = torch.zeros(self.packed_size, dtype=self.dtype, device="cpu")
        lying = [
            x
            if x.dtype is self.dtype and x.is_contiguous()
            else x.detach().to(self.dtype).contiguous()
            for x in tensors
        ]
        addresses = (_POINTER * len(lying))(*[x.data_ptr() for x in lying])
        self._loaded.prepare(addresses, packed.data_ptr())
        return packed

    def unpack(self, packed: Tensor, packed_bar: Tensor) -> list[Tensor]:
        """The cotangent of each parameter, flat, from that of the packed ones."""
        with self.memory(self.scratch) as scratch:
            self._loaded.finish(packed.data_ptr(), packed_bar.data_ptr(), scratch.data_ptr())
        return [packed_bar[start : start + length] for start, length in self._places]


@functools.lru_cache(maxsize=256)
def _library(json: str, tableau: int, dtype: torch.dtype) -> list[Library]:
    """Room for a library, found by what it is made of."""
    return []


def library_of(translated: TranslatedModule, method: Method, dtype: torch.dtype) -> Library:
    """The library of a translated field and a method, made once in a process."""
    place = _library(translated.json, id(method.tableau), dtype)
    if not place:
        place.append(Library(translated.program, method, dtype))
    return place[0]


def _length(shape: Sequence[int]) -> int:
    length = 1
    for n in shape:
        length *= n
    return length
