"""Runs the native sweep over members, in turns: Python hears of an interrupt."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import Array
from pysciml_node.replay.members.moving import StepMoves
from pysciml_node.torch_engine.native.departure import TURN
from pysciml_node.torch_engine.native.library import addresses
from pysciml_node.torch_engine.native.member_library import MemberLibrary, MembersSweepRequest
from pysciml_node.torch_engine.native.member_run import (
    ACCEPTED,
    LESS_MEMORY,
    OUT_OF_MEMORY,
    REACHED,
    Flights,
    address,
    stride,
    threads_for,
)
from pysciml_node.torch_engine.native.run import RUNNING

# Members of a chunk of the sweep, at least, and chunks, at most: whatever the threads are.
_LEAST_CHUNK, _MOST_CHUNKS = 64, 64


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


def chunk_of(members: int) -> int:
    """How many members of a sweep are summed by themselves, whatever the threads are."""
    return max(_LEAST_CHUNK, -(-members // _MOST_CHUNKS))


def sweep_members(
    libraries: Sequence[MemberLibrary],
    flights: Flights,
    saved_bar: Tensor | None,
    ends_bar: Tensor | None,
    last_bar: Tensor | None,
) -> SweptMembers:
    """Pull the cotangents of a solve back to its inputs.

    Args:
        libraries: the field and the method, or each of two that take turns.
        flights: the solve.
        saved_bar: cotangents of the saved states.
        ends_bar: of the states at the ends of the steps.
        last_bar: of the last of these, once more.
    """
    passengers = flights.passengers
    u0 = passengers.u0
    members, size = u0.shape
    bars = [None if x is None else x.to(u0).contiguous() for x in (saved_bar, ends_bar, last_bar)]
    start_bar = torch.zeros_like(u0)
    own_bars = [u0.new_zeros((members, x.numel() // members)) for x in passengers.own]
    costs = np.zeros((members, 2), dtype=np.int64)
    left = np.zeros((members, 2), dtype=np.int64)
    left[:, 0] = flights.counts[:, REACHED]
    steps = len(flights.steps)
    moves = [np.zeros(n) for n in (steps, steps, members * passengers.times)]
    own, own_places = addresses(passengers.own), addresses(own_bars)
    request = MembersSweepRequest(
        span_stride=stride(passengers.t0),
        start_stride=size,
        mark_count=len(flights.marks),
        save_count=passengers.times,
        seconds=TURN,
        own=ctypes.addressof(own),
        own_bar=ctypes.addressof(own_places),
    )
    for name, value in (
        *(("t0", passengers.t0), ("t1", passengers.t1), ("marks", flights.marks)),
        *(("steps", flights.steps), ("places", flights.places), ("u0", u0)),
        *(("ends", flights.ends), ("offsets", flights.offsets), ("left", left)),
        *(("saved_bar", bars[0] if passengers.times else None), ("start_bar", start_bar)),
        *(("ends_bar", bars[1]), ("last_bar", bars[2]), ("costs", costs)),
    ):
        setattr(request, name, address(value))
    if passengers.missing is not None:
        passengers.missing.put(request)
    if passengers.free:
        for name, places in zip(("t_bar", "h_bar", "theta_bar"), moves, strict=True):
            setattr(request, name, address(places))
    shared: list[Tensor] = []
    for turn, (first, behind) in reversed(list(enumerate(flights.legs))):
        mine = behind > first
        if turn == 0:
            mine |= flights.counts[:, ACCEPTED] == 0
        rows = np.flatnonzero(mine)
        if len(rows):
            library, packed = libraries[turn % 2], flights.packed[turn % 2]
            shared = _sums(shared, _sweep(library, request, packed, rows, first, behind))
    shared += [u0.new_zeros(length) for _, length in libraries[-1].places[len(shared) :]]
    spans = _spans_bar(flights, *moves) if passengers.free else None
    return SweptMembers(start_bar, own_bars, shared, spans, costs)


def _sums(some: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Sums of cotangents of parameters, of which an implicit method has some more."""
    fewer, more = sorted((some, others), key=len)
    for x, y in zip(more, fewer, strict=False):
        x += y
    return more


def _sweep(
    library: MemberLibrary,
    request: MembersSweepRequest,
    packed: Tensor,
    rows: Array,
    first: Array,
    behind: Array,
) -> list[Tensor]:
    """Go back through what a method has done in its turn; returns the shared cotangents.

    Args:
        library: the field and the method.
        request: what it is asked.
        packed: the shared parameters as it reads them.
        rows: members with steps in that turn.
        first: the first of these steps of each member.
        behind: the one behind the last of them.

    Raises:
        MemoryError: there is none left.
    """
    members, chunk = len(rows), chunk_of(len(rows))
    packed_bar = torch.zeros((-(-members // chunk), library.packed_size), dtype=library.dtype)
    threads = min(threads_for(library.abreast, members), len(packed_bar))
    request.members, request.chunk, request.threads, request.next = members, chunk, threads, 0
    for name, value in (
        *(("rows", rows), ("first", first), ("behind", behind)),
        *(("packed", packed), ("packed_bar", packed_bar)),
    ):
        setattr(request, name, address(value))
    loaded = library.loaded
    memory = library.take_memory(library.sweep_memory * threads)
    request.memory, request.memory_stride = memory.data_ptr(), library.sweep_memory
    try:
        while (status := loaded.members_sweep(ctypes.byref(request))) == RUNNING:
            pass
        if status == OUT_OF_MEMORY:
            raise MemoryError(
                f"there is no memory left for a sweep over {members} members.\n  {LESS_MEMORY}"
            )
        loaded.members_finish(ctypes.byref(request), memory.data_ptr())
    finally:
        loaded.members_let_go(ctypes.byref(request))
    library.give_memory(memory)
    total = packed_bar[0]
    return [total[start : start + length] for start, length in library.places]


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
