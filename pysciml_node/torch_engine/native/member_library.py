"""The code of an ensemble as a loaded library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pysciml_node.torch_engine.native.library import (
    Code,
)
from pysciml_node.torch_engine.native.member_code import (
    MemberMethod,
    MemberProgram,
    WrittenMembers,
)
from pysciml_node.torch_engine.native.structures import DOUBLE, INTEGER, POINTER, fields

COUNTS = 7
"""Numbers that the loop leaves of each member: `ACCEPTED` to `FIRST` of src/members.h."""

PAUSE = 5
"""Numbers of a member that the other method goes on with: those of `Pause` of src/members.h."""

# The bytes of steps that the workers of a library keep for the next solve.
_MOST_RESTING = 1 << 24


class AccuracyRequest(ctypes.Structure):
    """`Accuracy` of src/members.h."""

    _fields_ = (*fields(POINTER, "rtol atol"), ("stride", INTEGER))


class MembersRequest(ctypes.Structure):
    """`Many` of src/members.h."""

    _fields_ = (
        *fields(POINTER, "t0 t1 shift factor stops marks saves rtol atol u0 packed own"),
        ("accuracy", AccuracyRequest),
        ("rows", POINTER),
        *fields(INTEGER, "span_stride scale_stride tolerance_stride save_stride start_stride"),
        *fields(INTEGER, "members stop_count mark_count save_count control max_steps driven"),
        *fields(INTEGER, "free threads"),
        *fields(POINTER, "events before open spent found"),
        ("event_count", INTEGER),
        *fields(DOUBLE, "limit factor_of_turn"),
        ("patience", INTEGER),
        ("pauses", POINTER),
        *fields(DOUBLE, "dt0 dtmin dtmax"),
        ("beta", DOUBLE * 3),
        *fields(DOUBLE, "gamma qmin qmax seconds"),
        *fields(POINTER, "last saved memory places counts"),
        *fields(INTEGER, "memory_stride next room"),
        ("workers", POINTER),
    )


class MembersSweepRequest(ctypes.Structure):
    """`Back` of src/members_sweep.h."""

    _fields_ = (
        *fields(POINTER, "t0 t1 marks steps places u0 packed ends own"),
        ("accuracy", AccuracyRequest),
        *fields(POINTER, "offsets rows first behind left"),
        *fields(POINTER, "saved_bar ends_bar last_bar start_bar packed_bar own_bar"),
        *fields(POINTER, "t_bar h_bar theta_bar costs"),
        *fields(INTEGER, "span_stride start_stride mark_count save_count members chunk threads"),
        ("seconds", DOUBLE),
        ("memory", POINTER),
        *fields(INTEGER, "memory_stride next"),
        ("workers", POINTER),
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
    "members_march": (INTEGER, ctypes.POINTER(MembersRequest)),
    "members_gather": (None, ctypes.POINTER(MembersRequest), POINTER, POINTER, POINTER),
    "members_release": (None, ctypes.POINTER(MembersRequest)),
    "members_rest": (None, ctypes.POINTER(MembersRequest), INTEGER),
    "prepare": (None, POINTER, POINTER),
}
_SWEEP_CALLS: dict[str, tuple[Any, ...]] = {
    "members_sweep": (INTEGER, ctypes.POINTER(MembersSweepRequest)),
    "members_finish": (None, ctypes.POINTER(MembersSweepRequest), POINTER),
    "members_let_go": (None, ctypes.POINTER(MembersSweepRequest)),
}


@functools.lru_cache(maxsize=256)
def _library(
    json: str, own: tuple[tuple[str, frozenset[int]], ...], tableau: int, dtype: torch.dtype
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
    programs = {"": field, **how.further}
    own = tuple((suffix, one.own) for suffix, one in programs.items())
    place = _library(json, own, id(how.method.tableau), dtype)
    if not place:
        # No gradients flow through what steps are solved with.
        pulled = tuple(
            is_pulled and suffix != "_given"
            for suffix, one in programs.items()
            for is_pulled in one.program.pulled
        )
        written = WrittenMembers(field, how, dtype)
        place.append(MemberLibrary(written, pulled, how.sweeps, dtype))
    return place[0]
