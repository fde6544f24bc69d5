"""Runs the native loop over the members of a stochastic equation, and its sweep, in turns."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import Array, MemberOptions
from pysciml_node.stochastic.march import root_length
from pysciml_node.torch_engine.native.departure import TURN, set_control
from pysciml_node.torch_engine.native.library import (
    Library,
    SolveRequest,
    addresses,
)
from pysciml_node.torch_engine.native.member_run import (
    ACCEPTED,
    Flights,
    Passengers,
    threads_for,
)
from pysciml_node.torch_engine.native.member_sweep import SweptMembers, chunk_of
from pysciml_node.torch_engine.native.run import RUNNING
from pysciml_node.torch_engine.native.structures import DOUBLE, INTEGER, POINTER, fields
from pysciml_node.torch_engine.native.text import whole

OF_DIFFUSION = 7
_COUNTS = 9
_OUT_OF_MEMORY = 6
_NO_MEMORY = "there is no memory left for {} {} members.\n  Solve fewer members at a time."
# Rows of steps and states that a worker has room for at first.
_FIRST_ROOM = 1 << 12


class CrewRequest(ctypes.Structure):
    """`Crew` of src/stochastic_members.h."""

    _fields_ = (
        *fields(POINTER, "t0 t1 length seeds tensors own starts sizes rows"),
        *fields(INTEGER, "groups parameters save_count threads memory_stride next"),
        *fields(POINTER, "packed memory"),
    )


class WalkRequest(ctypes.Structure):
    """`Walk` of src/stochastic_members.h."""

    _fields_ = (
        ("crew", CrewRequest),
        ("base", SolveRequest),
        *fields(POINTER, "dt0 shift factor stops saves rtol atol u0"),
        *fields(INTEGER, "tolerance_stride save_stride stop_count room"),
        *fields(POINTER, "last saved places counts workers"),
    )


class ReturnRequest(ctypes.Structure):
    """`Return` of src/stochastic_members.h."""

    _fields_ = (
        ("crew", CrewRequest),
        ("seconds", DOUBLE),
        *fields(POINTER, "steps places ends saved_bar ends_bar last_bar"),
        *fields(POINTER, "offsets counts start_bar packed_bar own_bar costs"),
        *fields(INTEGER, "chunk longest"),
        ("workers", POINTER),
    )


_OF_WALK, _OF_RETURN = ctypes.POINTER(WalkRequest), ctypes.POINTER(ReturnRequest)
CALLS: dict[str, tuple[Any, ...]] = {
    "prepare": (None, POINTER, POINTER),
    "members_march": (INTEGER, _OF_WALK),
    "members_gather": (None, _OF_WALK, INTEGER, POINTER, POINTER, POINTER),
    "members_release": (None, _OF_WALK),
    "members_sweep": (INTEGER, _OF_RETURN),
    "members_finish": (None, _OF_RETURN),
    "members_let_go": (None, _OF_RETURN),
}


@dataclass(frozen=True)
class Crew:
    """The members of a stochastic equation: their paths, and the parameters that they read.

    Attributes:
        library: both functions and the method.
        options: of all, and of each.
        parameters: of the code, those of each member's own `(M, ...)`.
        own: which of them are each member's own.
    """

    library: Library
    options: MemberOptions
    parameters: list[Tensor]
    own: list[bool]

    def groups(self, counts: Array) -> Array:
        """Members that go abreast, `(G, abreast)`: those of equal counts, whose steps are the same.

        Members that are there to fill a group are written as `~m`.
        """
        width, groups = self.library.abreast, []
        for count in np.unique(counts):
            members = np.flatnonzero(counts == count)
            filling = np.full(-len(members) % width, ~members[-1])
            groups.append(np.concatenate((members, filling)).reshape(-1, width))
        return np.concatenate(groups).astype(np.int64)

    @contextmanager
    def request(self, rows: Array, threads: int, memory_size: int) -> Iterator[CrewRequest]:
        """The part of a request that the loop and its sweep have in common.

        Args:
            rows: the members of each group.
            threads: how many.
            memory_size: entries that each needs beside packed parameters.
        """
        options, library = self.options, self.library
        t0, t1 = (np.ascontiguousarray(x, dtype=np.float64) for x in options.spans)
        spans, which = np.unique(t1 - t0, return_inverse=True)
        length = np.array([root_length(x, options.common) for x in spans.tolist()])[which]
        seeds = np.array(options.seeds, dtype=np.uint64)
        sizes = [
            size if own else 0 for (_, size), own in zip(library.places, self.own, strict=True)
        ]
        own, tensors = np.array([*sizes, 0], dtype=np.int64), addresses(self.parameters)
        places = np.array([*library.places, (0, 0)], dtype=np.int64).T.copy()
        packed = None if any(self.own) else library.pack(self.parameters)
        stride = memory_size + 2 * whole(library.packed_size)
        memory = library.take_memory(stride * threads)
        yield CrewRequest(
            *(x.ctypes.data for x in (t0, t1, length, seeds)),
            ctypes.addressof(tensors),
            own.ctypes.data,
            *(x.ctypes.data for x in places),
            rows.ctypes.data,
            len(rows),
            len(self.own),
            options.times or 0,
            threads,
            stride,
            0,
            None if packed is None else packed.data_ptr(),
            memory.data_ptr(),
        )
        library.give_memory(memory)

    def fly(self, passengers: Passengers, error_order: float) -> Flights:
        """Solve forward.

        Args:
            passengers: the members.
            error_order: of the method, for the controller.

        Raises:
            MemoryError: there is none left for the steps.
        """
        library, options, common = self.library, self.options, self.options.common
        u0, scales = passengers.u0, passengers.scales
        saveat, times = passengers.saveat, passengers.times
        members, size = u0.shape
        rows = self.groups(np.zeros(members))
        threads = threads_for(library.abreast, members)
        span = options.spans[1] - options.spans[0]
        dt0 = np.minimum(span, math.nan if common.dt0 is None else common.dt0)
        stops = np.array(sorted(common.landings(1)), dtype=np.float64)
        shift, factor = (
            np.ascontiguousarray(np.broadcast_to(np.float64(-1.0) if x is None else x, members))
            for x in (scales.shift, scales.factor)
        )
        saved, last = u0.new_empty((members, times, size)), torch.empty_like(u0)
        places = torch.empty((members, times, 2), dtype=torch.float64, device="cpu")
        counts = np.zeros((members, _COUNTS), dtype=np.int64)
        base = SolveRequest(
            dtmin=common.dtmin,
            dtmax=common.dtmax,
            max_steps=common.max_steps,
            driven=common.tolerances.driven,
            seconds=TURN,
        )
        base.history[:] = set_control(base, common.controller, error_order)
        loaded = library.loaded
        with self.request(rows, threads, library.march_memory) as crew:
            request = WalkRequest(
                crew=crew,
                base=base,
                dt0=dt0.ctypes.data,
                shift=shift.ctypes.data,
                factor=factor.ctypes.data,
                stops=stops.ctypes.data,
                saves=None if saveat is None else saveat.ctypes.data,
                rtol=None if scales.rtol is None else scales.rtol.data_ptr(),
                atol=None if scales.atol is None else scales.atol.data_ptr(),
                u0=u0.data_ptr(),
                tolerance_stride=0 if scales.rtol is None else scales.rtol.shape[1],
                save_stride=0 if saveat is None or len(saveat) == 1 else times,
                stop_count=len(stops),
                room=_FIRST_ROOM,
                last=last.data_ptr(),
                saved=saved.data_ptr(),
                places=places.data_ptr(),
                counts=counts.ctypes.data,
            )
            try:
                while (status := loaded.members_march(ctypes.byref(request))) == RUNNING:
                    pass
                if status == _OUT_OF_MEMORY:
                    raise MemoryError(_NO_MEMORY.format("the steps of", members))
                offsets = np.zeros(members + 1, dtype=np.int64)
                np.cumsum(counts[:, ACCEPTED], out=offsets[1:])
                taken = int(offsets[-1])
                ends = u0.new_empty((taken + members, size))
                steps = torch.empty((taken, 4), dtype=torch.float64, device="cpu")
                loaded.members_gather(
                    ctypes.byref(request),
                    members,
                    offsets.ctypes.data,
                    ends.data_ptr(),
                    steps.data_ptr(),
                )
            finally:
                loaded.members_release(ctypes.byref(request))
        marks = np.empty(0)
        return Flights(passengers, (), marks, ends, steps, offsets, saved, places, counts, last)

    def sweep(self, flights: Flights, *arriving: Tensor | None) -> SweptMembers:
        """Pull the cotangents of a solve back to its inputs.

        Args:
            flights: the solve.
            arriving: cotangents of its saved states, of those at the ends of steps and of the last.
        """
        library, u0 = self.library, flights.passengers.u0
        members = len(u0)
        saved, ends, last = (None if x is None else x.to(u0).contiguous() for x in arriving)
        taken = flights.counts[:, ACCEPTED]
        rows = self.groups(taken if library.abreast > 1 else np.zeros(members))
        chunk = -(-chunk_of(members) // library.abreast)
        packed_bar = u0.new_zeros((-(-len(rows) // chunk), library.packed_size))
        start_bar = torch.empty_like(u0)
        own_bars = [
            u0.new_empty((members, size))
            for (_, size), own in zip(library.places, self.own, strict=True)
            if own
        ]
        own_bar, costs = addresses(own_bars), np.zeros((members, 3), dtype=np.int64)
        threads = min(threads_for(library.abreast, members), len(packed_bar))
        loaded = library.loaded
        with self.request(rows, threads, library.sweep_memory) as crew:
            request = ReturnRequest(
                crew=crew,
                seconds=TURN,
                steps=flights.steps.data_ptr(),
                places=flights.places.data_ptr(),
                ends=flights.ends.data_ptr(),
                saved_bar=None if saved is None or not saved.numel() else saved.data_ptr(),
                ends_bar=None if ends is None else ends.data_ptr(),
                last_bar=None if last is None else last.data_ptr(),
                offsets=flights.offsets.ctypes.data,
                counts=flights.counts.ctypes.data,
                start_bar=start_bar.data_ptr(),
                packed_bar=packed_bar.data_ptr(),
                own_bar=ctypes.addressof(own_bar),
                costs=costs.ctypes.data,
                chunk=chunk,
                longest=int(taken.max()),
            )
            try:
                while (status := loaded.members_sweep(ctypes.byref(request))) == RUNNING:
                    pass
                if status == _OUT_OF_MEMORY:
                    raise MemoryError(_NO_MEMORY.format("a sweep over", members))
                loaded.members_finish(ctypes.byref(request))
            finally:
                loaded.members_let_go(ctypes.byref(request))
        total = packed_bar[0]
        shared = [
            total[start : start + size]
            for (start, size), own in zip(library.places, self.own, strict=True)
            if not own
        ]
        return SweptMembers(start_bar, own_bars, shared, None, costs)
