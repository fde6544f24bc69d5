"""Runs the native loop over members, in turns: Python hears of an interrupt."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import Array, MemberOptions, SolveOptions
from pysciml_node.replay.members.stacked import MemberSteps
from pysciml_node.replay.newton import Accuracy
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.tableaus import Tableau
from pysciml_node.torch_engine.native.departure import TURN, set_control, set_turns
from pysciml_node.torch_engine.native.events import MembersSearch
from pysciml_node.torch_engine.native.library import addresses
from pysciml_node.torch_engine.native.member_library import (
    COUNTS,
    PAUSE,
    MemberLibrary,
    MembersRequest,
    MembersSweepRequest,
)
from pysciml_node.torch_engine.native.run import CHANGED, RUNNING

ACCEPTED, REJECTED, EVALUATIONS, REACHED, CODE = range(5)
OUT_OF_MEMORY = 6
LESS_MEMORY = "Solve fewer members at a time, or with larger tolerances."
_MOST_THREADS = 256


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
        accuracy.stride = stride(self.rtol, self.rtol.shape[1])


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
        packed: the shared parameters as the field reads them, for each method.
        marks: where the field jumps.
        ends: states at the ends of the accepted steps, member after member, `(P, N)`.
        steps: end, size, error, and the stop or -1 of each, `(P, 4)`.
        offsets: where each member's steps begin, `(M + 1,)`.
        saved: states at the saved times, NaN where they were not reached, `(M, T, N)`.
        places: of each its step and its place in it, or the state that it is and NaN, `(M, T, 2)`.
        counts: of each member, `(M, COUNTS)`.
        last: the state that each got to, `(M, N)`.
        turns: how many steps each had taken when the methods took turns, for the first time and so
            on, of all of those that had not ended by then; each `(M,)`.
    """

    passengers: Passengers
    packed: Sequence[Tensor]
    marks: Array
    ends: Tensor
    steps: Tensor
    offsets: Array
    saved: Tensor
    places: Tensor
    counts: Array
    last: Tensor
    turns: Sequence[Array] = ()

    @property
    def legs(self) -> list[tuple[Array, Array]]:
        """Of what one method does in its turn the first step of each member, and the one behind its
        last, `(M,)`; the methods take turns.
        """
        steps = np.diff(self.offsets)
        return list(itertools.pairwise((0 * steps, *self.turns, steps)))

    @cached_property
    def accepted(self) -> MemberSteps:
        """The steps as the rest of the package reads them."""
        ends, sizes, errors, stops = self.steps.numpy().T
        t0 = np.broadcast_to(self.passengers.t0, len(self.counts))
        starts, counts = np.roll(ends, 1), np.diff(self.offsets)
        moved = counts > 0
        starts[self.offsets[:-1][moved]] = t0[moved]
        methods = None
        if self.turns:
            number = np.arange(len(ends)) - np.repeat(self.offsets[:-1], counts)
            passed = [number >= np.repeat(taken, counts) for taken in self.turns]
            methods = np.sum(passed, axis=0) % 2
        stops = stops.astype(np.int64)
        return MemberSteps(self.offsets, starts, sizes, ends, errors, stops, methods)


def address(x: Array | Tensor | None) -> int | None:
    """Where C finds it."""
    if isinstance(x, Tensor):
        return x.data_ptr()
    address: int | None = None if x is None else x.__array_interface__["data"][0]
    return address


def stride(x: Array | Tensor | None, step: int = 1) -> int:
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


def fly_members(
    libraries: Sequence[MemberLibrary],
    tableaus: Sequence[Tableau],
    passengers: Passengers,
    options: SolveOptions,
    packed: Sequence[Tensor],
    search: MembersSearch | None = None,
) -> Flights:
    """Solve forward.

    Args:
        libraries: the field and the method, or each of two that take turns.
        tableaus: of the methods.
        passengers: the members.
        options: what they share.
        packed: the shared parameters, for each method.
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
    pauses = np.empty((members, PAUSE)) if len(libraries) > 1 else None
    own = addresses(passengers.own)
    request = MembersRequest(
        span_stride=stride(passengers.t0),
        scale_stride=stride(scales.factor),
        tolerance_stride=stride(scales.rtol, size),
        save_stride=stride(passengers.saveat, times),
        start_stride=size,
        stop_count=len(stops),
        mark_count=len(marks),
        save_count=times,
        max_steps=options.max_steps,
        driven=options.tolerances.driven,
        free=passengers.free,
        dt0=math.nan if options.dt0 is None else options.dt0,
        dtmin=options.dtmin,
        dtmax=options.dtmax,
        seconds=TURN,
        own=ctypes.addressof(own),
    )
    for name, value in (
        *(("t0", passengers.t0), ("t1", passengers.t1), ("saves", passengers.saveat)),
        *(("shift", scales.shift), ("factor", scales.factor)),
        *(("rtol", scales.rtol), ("atol", scales.atol), ("stops", stops), ("marks", marks)),
        *(("u0", u0), ("last", last), ("saved", saved), ("pauses", pauses)),
        *(("places", places), ("counts", counts), ("spent", passengers.spent)),
    ):
        setattr(request, name, address(value))
    if passengers.missing is not None:
        passengers.missing.put(request)
    parts, taken, rows, method = list[_Part](), [0 * counts[:, ACCEPTED]], np.arange(members), 0
    while len(rows):
        request.packed = packed[method].data_ptr()
        set_control(request, options.controller, tableaus[method].error_order)
        set_turns(request, method, tableaus, options.controller)
        parts.append(_march(libraries[method], request, rows, counts, search))
        taken.append(counts[:, ACCEPTED].copy())
        rows, method = np.flatnonzero(counts[:, CODE] == CHANGED), 1 - method
    ends, steps = _in_order(parts)
    offsets = np.zeros(members + 1, dtype=np.int64)
    np.cumsum(counts[:, ACCEPTED], out=offsets[1:])
    return Flights(
        passengers, packed, marks, ends, steps, offsets, saved, places, counts, last, taken[1:-1]
    )


class _Part(NamedTuple):
    """The steps that a method has taken in its turn.

    Attributes:
        of: whose each is, `(Q,)`.
        ends: states at their ends, `(Q, N)`.
        steps: as of `Flights`.
    """

    of: Array
    ends: Tensor
    steps: Tensor


def _march(
    library: MemberLibrary,
    request: MembersRequest,
    rows: Array,
    counts: Array,
    search: MembersSearch | None,
) -> _Part:
    """Step until each of some members is done, or the other method is to go on with it.

    Args:
        library: the field and the method.
        request: what it is asked.
        rows: which members, in ascending order.
        counts: numbers of all members, which are changed.
        search: the events that are looked for.

    Raises:
        MemoryError: there is none left for the steps.
    """
    members, threads = len(rows), threads_for(library.abreast, len(rows))
    before = counts[rows, ACCEPTED]
    request.rows = address(rows)
    request.members, request.next, request.threads = members, 0, threads
    request.memory_stride = library.march_memory
    request.room = library.steps * (4 + members // (threads * library.abreast))
    if search is not None:
        request.event_count = search.count
        request.events = search.requests(threads, library.abreast)
        for name in ("before", "open", "found"):
            setattr(request, name, address(getattr(search, name)))
    loaded = library.loaded
    memory = library.take_memory(library.march_memory * threads)
    with library.workers(request):
        request.memory = memory.data_ptr()
        while (status := loaded.members_march(ctypes.byref(request))) == RUNNING:
            pass
        if status == OUT_OF_MEMORY or (counts[:, CODE] == OUT_OF_MEMORY).any():
            raise MemoryError(
                f"there is no memory left for the steps of {members} members.\n  {LESS_MEMORY}"
            )
        taken = counts[rows, ACCEPTED] - before
        offsets = np.zeros(members + 1, dtype=np.int64)
        np.cumsum(taken, out=offsets[1:])
        count = int(offsets[-1])
        library.steps = 1 + int(count * 1.1) // members
        ends = torch.empty((count, library.size), dtype=library.dtype, device="cpu")
        steps = torch.empty((count, 4), dtype=torch.float64, device="cpu")
        loaded.members_gather(
            ctypes.byref(request), offsets.ctypes.data, ends.data_ptr(), steps.data_ptr()
        )
    library.give_memory(memory)
    return _Part(np.repeat(rows, taken), ends, steps)


def _in_order(parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
    """Ends and steps of all members, one after the other, from those of all turns."""
    if len(parts) == 1:
        return parts[0].ends, parts[0].steps
    order = torch.from_numpy(np.concatenate([x.of for x in parts]).argsort(kind="stable"))
    ends, steps = (torch.cat(columns)[order] for columns in list(zip(*parts, strict=True))[1:])
    return ends, steps
