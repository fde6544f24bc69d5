"""The code of an ensemble as a loaded library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pysciml_node.torch_engine.native.library import (
    _DOUBLE,
    _INTEGER,
    _POINTER,
    Code,
    _fields,
)
from pysciml_node.torch_engine.native.member_code import (
    MemberMethod,
    MemberProgram,
    WrittenMembers,
)

COUNTS = 7
"""Numbers that the loop leaves of each member: `ACCEPTED` to `FIRST` of src/members.h."""

# The bytes of steps that the workers of a library keep for the next solve.
_MOST_RESTING = 1 << 24


class MembersRequest(ctypes.Structure):
    """`Many` of src/members.h."""

    _fields_ = (
        *_fields(_POINTER, "t0 t1 shift factor stops marks saves rtol atol u0 packed own"),
        *_fields(_INTEGER, "span_stride scale_stride tolerance_stride save_stride start_stride"),
        *_fields(_INTEGER, "members stop_count mark_count save_count control max_steps driven"),
        *_fields(_INTEGER, "free threads"),
        *_fields(_POINTER, "events before open spent found"),
        ("event_count", _INTEGER),
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
        *_fields(_POINTER, "saved_bar ends_bar last_bar start_bar packed_bar own_bar"),
        *_fields(_POINTER, "t_bar h_bar theta_bar costs"),
        *_fields(_INTEGER, "span_stride start_stride mark_count save_count members chunk threads"),
        ("seconds", _DOUBLE),
        ("memory", _POINTER),
        *_fields(_INTEGER, "memory_stride next"),
        ("workers", _POINTER),
    )


class MemberLibrary(Code):
    """Native code of a field and a method for the members of an ensemble.

    Args:
        written: both.
        pulled: of each parameter, whether a gradient goes to it.
        sweeps: whether there is code for gradients.
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
        self, written: WrittenMembers, pulled: tuple[bool, ...], sweeps: bool, dtype: torch.dtype
    ) -> None:
        self.size, self.abreast, self.cost = written.size, written.abreast, written.cost
        self.march_memory, self.sweep_memory = written.march_memory, written.sweep_memory
        self.pulled, self.places, self.steps = pulled, written.places, 16
        self.resting: dict[int, list[int]] = {}
        calls = _CALLS | (_SWEEP_CALLS if sweeps else {})
        super().__init__(dtype, written.text, written.packed, calls)

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


_CALLS: dict[str, tuple[Any, ...]] = {
    "members_march": (_INTEGER, ctypes.POINTER(MembersRequest)),
    "members_gather": (None, ctypes.POINTER(MembersRequest), _POINTER, _POINTER, _POINTER),
    "members_release": (None, ctypes.POINTER(MembersRequest)),
    "members_rest": (None, ctypes.POINTER(MembersRequest), _INTEGER),
    "prepare": (None, _POINTER, _POINTER),
}
_SWEEP_CALLS: dict[str, tuple[Any, ...]] = {
    "members_sweep": (_INTEGER, ctypes.POINTER(MembersSweepRequest)),
    "members_finish": (None, ctypes.POINTER(MembersSweepRequest), _POINTER),
    "members_let_go": (None, ctypes.POINTER(MembersSweepRequest)),
}


@functools.lru_cache(maxsize=256)
def _library(
    json: str, own: tuple[frozenset[int], ...], tableau: int, dtype: torch.dtype
) -> list[MemberLibrary]:
    """Room for a library, found by what it is made of."""
    return []


def member_library(
    json: str, field: MemberProgram, how: MemberMethod, dtype: torch.dtype
) -> MemberLibrary:
    """The library of a field and a method for the members of an ensemble, made once in a process.

    Args:
        json: all programs and the mass matrix as text.
        field: the field.
        how: the method.
        dtype: of the state.
    """
    programs = (field,) if how.pulled is None else (field, how.pulled)
    place = _library(json, tuple(one.own for one in programs), id(how.method.tableau), dtype)
    if not place:
        pulled = tuple(itertools.chain(*(one.program.pulled for one in programs)))
        written = WrittenMembers(field, how, dtype)
        place.append(MemberLibrary(written, pulled, how.sweeps, dtype))
    return place[0]
