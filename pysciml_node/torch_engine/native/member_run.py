"""Runs the native loop over members and its sweep, in turns: Python hears of an interrupt."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import Array, MemberOptions, SolveOptions
from pysciml_node.replay.members.moving import StepMoves
from pysciml_node.replay.members.stacked import MemberSteps
from pysciml_node.replay.newton import Accuracy
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.torch_engine.native.departure import TURN, set_control
from pysciml_node.torch_engine.native.events import MembersSearch
from pysciml_node.torch_engine.native.library import addresses
from pysciml_node.torch_engine.native.member_library import (
    COUNTS,
    MemberLibrary,
    MembersRequest,
    MembersSweepRequest,
)
from pysciml_node.torch_engine.native.run import RUNNING

ACCEPTED, REJECTED, EVALUATIONS, REACHED, CODE = range(5)
_OUT_OF_MEMORY = 6
_LESS_MEMORY = "Solve fewer members at a time, or with larger tolerances."
_MOST_THREADS = 256
# Members of a chunk of the sweep, at least, and chunks, at most: whatever the threads are.
_LEAST_CHUNK, _MOST_CHUNKS = 64, 64


@dataclass(frozen=True)
class Scales:
    """Tolerances of members as C reads them; one row for all, or one for each.

    Attributes:
        shift: `atol / rtol`, where both are one number for a member; else `None`.
        factor: what turns norms into the root-mean-square.
        rtol: by entries, where `shift` is `None`.
        atol: likewise.
    """

    shift: Array | None
    factor: Array
    rtol: Tensor | None = None
    atol: Tensor | None = None

    @staticmethod
    def of(options: SolveOptions, rtol: Tensor | None, atol: Tensor | None, like: Tensor) -> Scales:
        """The tolerances of a solve.

        Args:
            options: what the members share.
            rtol: their own, `(M, N)` or `(M, 1)`, or `None`.
            atol: likewise.
            like: the initial states `(M, N)`.
        """
        tolerances = options.tolerances
        driven = tolerances.driven
        if rtol is None and atol is None:
            common = ErrorNorm(tolerances)
            if common.shift is not None:
                return Scales(np.array([common.shift]), np.array([common.factor]))
        rows = tuple(
            torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
            for given in (
                tolerances.rtol if rtol is None else rtol,
                tolerances.atol if atol is None else atol,
            )
        )
        if all(row.ndim == 0 or row.shape[-1] == 1 for row in rows):
            r, a = (row.reshape(-1).expand(len(like)) for row in rows)
            if bool((r > 1e-9).all()) and bool((a <= r * 1e9).all()):
                return Scales((a / r).numpy(), (1 / (math.sqrt(driven) * r)).numpy())
        r, a = (row.expand(len(like), like.shape[1]).contiguous() for row in rows)
        counted = torch.isfinite(a[:, :driven]).sum(1).clamp(min=1)
        return Scales(None, (1 / counted.double().sqrt()).numpy(), r.to(like), a.to(like))


@dataclass(frozen=True)
class Missing:
    """What Newton's iteration may leave missing, as C reads it; one row for all, or one for each.

    Attributes:
        rtol: by entries, `(1, N)` or `(M, N)`.
        atol: likewise.
    """

    rtol: Tensor
    atol: Tensor

    @staticmethod
    def of(options: MemberOptions, like: Tensor) -> Missing:
        """That of a solve.

        Args:
            options: of the members.
            like: the initial states `(M, N)`.
        """
        accuracy = Accuracy.of_members(options, like.dtype, like.shape[1])
        rtol, atol = (
            torch.as_tensor(x, dtype=like.dtype, device="cpu").detach()
            for x in (accuracy.rtol, accuracy.atol)
        )
        rows = len(like) if max(rtol.ndim, atol.ndim) > 1 else 1
        rtol, atol = (x.expand(rows, like.shape[1]).contiguous() for x in (rtol, atol))
        return Missing(rtol, atol)

    def put(self, request: MembersRequest | MembersSweepRequest) -> None:
        """Write it into a request."""
        accuracy = request.accuracy
        accuracy.rtol, accuracy.atol = self.rtol.data_ptr(), self.atol.data_ptr()
        accuracy.stride = _stride(self.rtol, self.rtol.shape[1])


@dataclass(frozen=True)
class Passengers:
    """What the members of a solve start with.

    Attributes:
        u0: flat initial states `(M, N)`, detached and contiguous.
        t0: starts of their intervals, `(M,)`, or `(1,)` where they share it.
        t1: ends.
        saveat: times to be saved, `(M, T)`, `(1, T)` where they share them, or `None`.
        scales: their tolerances.
        own: the parameters that are their own, each `(M, ...)`.
        free: whether the ends of their intervals receive gradients.
        spent: attempts that each has made before, `(M,)`, or `None`.
        missing: of a method whose stages an iteration finds.
    """

    u0: Tensor
    t0: Array
    t1: Array
    saveat: Array | None
    scales: Scales
    own: Sequence[Tensor]

    free: bool = False
    spent: Array | None = None
    missing: Missing | None = None

    @property
    def times(self) -> int:
        """How many times are saved."""
        return 0 if self.saveat is None else self.saveat.shape[1]


@dataclass(frozen=True)
class Flights:
    """What a native solve of many members leaves.

    Attributes:
        passengers: what it was given.
        packed: the shared parameters as the field reads them.
        marks: where the field jumps.
        ends: states at the ends of the accepted steps, member after member, `(P, N)`.
        steps: end, size, error, and the stop or -1 of each, `(P, 4)`.
        offsets: where each member's steps begin, `(M + 1,)`.
        saved: states at the saved times, NaN where they were not reached, `(M, T, N)`.
        places: of each its step and its place in it, or the state that it is and NaN, `(M, T, 2)`.
        counts: of each member, `(M, COUNTS)`.
        last: the state that each got to, `(M, N)`.
    """

    passengers: Passengers
    packed: Tensor
    marks: Array
    ends: Tensor
    steps: Tensor
    offsets: Array
    saved: Tensor
    places: Tensor
    counts: Array
    last: Tensor

    @cached_property
    def accepted(self) -> MemberSteps:
        """The steps as the rest of the package reads them."""
        ends, sizes, errors, stops = self.steps.numpy().T
        t0 = np.broadcast_to(self.passengers.t0, len(self.counts))
        starts, counts = np.roll(ends, 1), np.diff(self.offsets)
        moved = counts > 0
        starts[self.offsets[:-1][moved]] = t0[moved]
        return MemberSteps(self.offsets, starts, sizes, ends, errors, stops.astype(np.int64))


def _address(x: Array | Tensor | None) -> int | None:
    if isinstance(x, Tensor):
        return x.data_ptr()
    address: int | None = None if x is None else x.__array_interface__["data"][0]
    return address


def _stride(x: Array | Tensor | None, step: int = 1) -> int:
    """Entries from one member's row to the next; 0 where all share one."""
    return 0 if x is None or len(x) == 1 else step


def threads_for(abreast: int, members: int) -> int:
    """Workers: as many as torch has, but each with something to do.

    Args:
        abreast: how many members step at once.
        members: of all.
    """
    most = max(1, members // (2 * abreast))
    return min(torch.get_num_threads(), most, _MOST_THREADS)


def chunk_of(members: int) -> int:
    """How many members of a sweep are summed by themselves, whatever the threads are."""
    return max(_LEAST_CHUNK, -(-members // _MOST_CHUNKS))


def fly_members(
    library: MemberLibrary,
    passengers: Passengers,
    options: SolveOptions,
    error_order: float,
    packed: Tensor,
    search: MembersSearch | None = None,
) -> Flights:
    """Solve forward.

    Args:
        library: the field and the method.
        passengers: the members.
        options: what they share.
        error_order: of the method, for the controller.
        packed: the shared parameters.
        search: the events that are looked for in the steps.

    Raises:
        MemoryError: there is none left for the steps.
    """
    u0, scales, times = passengers.u0, passengers.scales, passengers.times
    members, size = u0.shape
    stops = np.array(sorted(options.landings(1)), dtype=np.float64)
    marks = np.array(options.tstops, dtype=np.float64)
    saved, last = u0.new_empty((members, times, size)), torch.empty_like(u0)
    places = torch.empty((members, times, 2), dtype=torch.float64, device="cpu")
    counts = np.zeros((members, COUNTS), dtype=np.int64)
    own, threads = addresses(passengers.own), threads_for(library.abreast, members)
    request = MembersRequest(
        span_stride=_stride(passengers.t0),
        scale_stride=_stride(scales.factor),
        tolerance_stride=_stride(scales.rtol, size),
        save_stride=_stride(passengers.saveat, times),
        start_stride=size,
        members=members,
        stop_count=len(stops),
        mark_count=len(marks),
        save_count=times,
        max_steps=options.max_steps,
        driven=options.tolerances.driven,
        free=passengers.free,
        threads=threads,
        dt0=math.nan if options.dt0 is None else options.dt0,
        dtmin=options.dtmin,
        dtmax=options.dtmax,
        seconds=TURN,
        own=ctypes.addressof(own),
        memory_stride=library.march_memory,
        room=library.steps * (4 + members // (threads * library.abreast)),
    )
    for name, value in (
        *(("t0", passengers.t0), ("t1", passengers.t1), ("saves", passengers.saveat)),
        *(("shift", scales.shift), ("factor", scales.factor)),
        *(("rtol", scales.rtol), ("atol", scales.atol), ("stops", stops), ("marks", marks)),
        *(("u0", u0), ("packed", packed), ("last", last), ("saved", saved)),
        *(("places", places), ("counts", counts), ("spent", passengers.spent)),
    ):
        setattr(request, name, _address(value))
    if search is not None:
        request.event_count = search.count
        request.events = search.requests(threads, library.abreast)
        for name in ("before", "open", "found"):
            setattr(request, name, _address(getattr(search, name)))
    if passengers.missing is not None:
        passengers.missing.put(request)
    set_control(request, options.controller, error_order)
    loaded = library.loaded
    memory = library.take_memory(library.march_memory * threads)
    with library.workers(request):
        request.memory = memory.data_ptr()
        while (status := loaded.members_march(ctypes.byref(request))) == RUNNING:
            pass
        if status == _OUT_OF_MEMORY or (counts[:, CODE] == _OUT_OF_MEMORY).any():
            raise MemoryError(
                f"there is no memory left for the steps of {members} members.\n  {_LESS_MEMORY}"
            )
        offsets = np.zeros(members + 1, dtype=np.int64)
        np.cumsum(counts[:, ACCEPTED], out=offsets[1:])
        library.steps = 1 + int(offsets[-1] * 1.1) // members
        ends = u0.new_empty((int(offsets[-1]), size))
        steps = torch.empty((len(ends), 4), dtype=torch.float64, device="cpu")
        loaded.members_gather(
            ctypes.byref(request), offsets.ctypes.data, ends.data_ptr(), steps.data_ptr()
        )
    library.give_memory(memory)
    return Flights(passengers, packed, marks, ends, steps, offsets, saved, places, counts, last)


@dataclass(frozen=True)
class SweptMembers:
    """What a native sweep of many members returns.

    Attributes:
        u0: cotangents of the initial states `(M, N)`.
        own: of the members' own parameters, flat, each `(M, n)`.
        shared: of the shared parameters, flat.
        spans: of the intervals, `(M, 2)` in float64; `None` where they need none.
        costs: evaluations and replayed steps of each member, `(M, 2)`.
    """

    u0: Tensor
    own: list[Tensor]
    shared: list[Tensor]
    spans: Tensor | None
    costs: Array


def sweep_members(
    library: MemberLibrary,
    flights: Flights,
    saved_bar: Tensor | None,
    ends_bar: Tensor | None,
    last_bar: Tensor | None,
) -> SweptMembers:
    """Pull the cotangents of a solve back to its inputs.

    Args:
        library: the field and the method.
        flights: the solve.
        saved_bar: cotangents of the saved states.
        ends_bar: of the states at the ends of the steps.
        last_bar: of the last of these, once more.
    """
    passengers = flights.passengers
    u0 = passengers.u0
    members, size = u0.shape
    bars = [None if x is None else x.to(u0).contiguous() for x in (saved_bar, ends_bar, last_bar)]
    chunk = chunk_of(members)
    packed_bar = torch.zeros((-(-members // chunk), library.packed_size), dtype=u0.dtype)
    start_bar = torch.empty_like(u0)
    own_bars = [u0.new_empty((members, x.numel() // members)) for x in passengers.own]
    costs = np.zeros((members, 2), dtype=np.int64)
    steps = len(flights.steps)
    moves = [np.zeros(n) for n in (steps, steps, members * passengers.times)]
    own, own_places = addresses(passengers.own), addresses(own_bars)
    threads = min(threads_for(library.abreast, members), len(packed_bar))
    request = MembersSweepRequest(
        span_stride=_stride(passengers.t0),
        start_stride=size,
        mark_count=len(flights.marks),
        save_count=passengers.times,
        members=members,
        chunk=chunk,
        threads=threads,
        seconds=TURN,
        own=ctypes.addressof(own),
        own_bar=ctypes.addressof(own_places),
        memory_stride=library.sweep_memory,
    )
    for name, value in (
        *(("t0", passengers.t0), ("t1", passengers.t1), ("marks", flights.marks)),
        *(("steps", flights.steps), ("places", flights.places), ("u0", u0)),
        *(("packed", flights.packed), ("ends", flights.ends), ("offsets", flights.offsets)),
        *(("counts", flights.counts), ("saved_bar", bars[0] if passengers.times else None)),
        *(("ends_bar", bars[1]), ("last_bar", bars[2]), ("start_bar", start_bar)),
        *(("packed_bar", packed_bar), ("costs", costs)),
    ):
        setattr(request, name, _address(value))
    if passengers.missing is not None:
        passengers.missing.put(request)
    if passengers.free:
        for name, places in zip(("t_bar", "h_bar", "theta_bar"), moves, strict=True):
            setattr(request, name, _address(places))
    loaded = library.loaded
    memory = library.take_memory(library.sweep_memory * threads)
    request.memory = memory.data_ptr()
    try:
        while (status := loaded.members_sweep(ctypes.byref(request))) == RUNNING:
            pass
        if status == _OUT_OF_MEMORY:
            raise MemoryError(
                f"there is no memory left for a sweep over {members} members.\n  {_LESS_MEMORY}"
            )
        loaded.members_finish(ctypes.byref(request), memory.data_ptr())
    finally:
        loaded.members_let_go(ctypes.byref(request))
    library.give_memory(memory)
    total = packed_bar[0]
    shared = [total[start : start + length] for start, length in library.places]
    spans = _spans_bar(flights, *moves) if passengers.free else None
    return SweptMembers(start_bar, own_bars, shared, spans, costs)


def _spans_bar(flights: Flights, t_bar: Array, h_bar: Array, theta_bar: Array) -> Tensor:
    """Cotangents of the intervals, `(M, 2)`, from those of steps and of places in them.

    Args:
        flights: the solve.
        t_bar: of the starts of the steps, `(P,)`.
        h_bar: of their sizes, `(P,)`.
        theta_bar: of the places of saved states, `(M T,)`.
    """
    steps, members = flights.accepted, len(flights.counts)
    places = flights.places.numpy().reshape(-1, 2)
    inside = np.flatnonzero((theta_bar != 0) & ~np.isnan(places[:, 1]))
    if len(inside):
        theta = places[inside, 1]
        of = steps.offsets[inside // flights.passengers.times] + places[inside, 0].astype(np.int64)
        # theta = (s - t) / h
        along = theta_bar[inside] / steps.sizes[of]
        np.subtract.at(t_bar, of, along)
        np.subtract.at(h_bar, of, along * theta)
    moves = StepMoves.of(steps, np.broadcast_to(flights.passengers.t1, members))
    start = np.where(moves.free, t_bar - np.where(moves.lands, h_bar, 0.0), 0.0)
    columns = start, np.where(moves.last, h_bar, 0.0)
    sums = [np.bincount(moves.rows, column, members) for column in columns]
    return torch.from_numpy(np.stack(sums, axis=1))
