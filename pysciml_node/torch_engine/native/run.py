"""Runs the native loop and its sweep, in turns, so that Python hears of an interrupt."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.record import Record
from pysciml_node.steps.step import Attempt
from pysciml_node.torch_engine.native.brownian import Noise
from pysciml_node.torch_engine.native.departure import Departure
from pysciml_node.torch_engine.native.events import Search
from pysciml_node.torch_engine.native.library import (
    Library,
    SolveRequest,
    addresses,
)

RUNNING, FULL, SUCCESS, CHANGED = 0, 1, 2, 8
RETCODES = {
    SUCCESS: ReturnCode.Success,
    3: ReturnCode.MaxIters,
    4: ReturnCode.DtLessThanMin,
    5: ReturnCode.Unstable,
    7: ReturnCode.Terminated,
}
_COMPLETE = frozenset(code for code, value in RETCODES.items() if value.successful)
_NO_TIMES = (0, 0, 0)


class States(NamedTuple):
    """The states that a native solve leaves, with their graph where there is one.

    Attributes:
        saved: at the saved times that were reached, `(saved, N)` or as the initial one was given.
        ends: the initial one, and those at the ends of the accepted steps, `(n + 1, N)`; of a
            member the latter alone.
        last: the one that it got to, likewise `(N,)`.
    """

    saved: Tensor
    ends: Tensor
    last: Tensor


class Notes(NamedTuple):
    """What a solve notes of its steps.

    Attributes:
        steps: end, size, error, and the stop or -1 of each.
        places: of each saved time its step and its place in it, or the state that it is and NaN.
    """

    steps: Tensor
    places: Tensor


class Log(NamedTuple):
    """The same in one block of memory, behind the packed parameters as the solve reads them.

    Attributes:
        block: in float64, whatever the parameters are.
        departure: how the solve has begun, which says where in the block what lies.
    """

    block: Tensor
    departure: Departure

    def addresses(self, method: int = 0) -> tuple[int, int, int]:
        """Where the parameters that a method packs, the steps and the places lie."""
        block, departure = self
        start = block.data_ptr()
        packed = start + 8 * departure.packed_at[method]
        return packed, start + 8 * departure.steps_at, start + 8 * departure.places_at

    @property
    def steps(self) -> Tensor:
        """As those of `Notes`; what is behind the accepted ones is not set."""
        return self.block[self.departure.steps_at :]

    @property
    def places(self) -> Tensor:
        """As those of `Notes`; what is behind the reached ones is not set."""
        return self.block[self.departure.places_at : self.departure.steps_at].view(-1, 2)


class Piece(NamedTuple):
    """Steps of one method, one after the other.

    Attributes:
        method: which of the solve's took them.
        first: the first one's number.
        behind: the number behind the last one's.
    """

    method: int
    first: int
    behind: int


@dataclass(slots=True)
class Flight:
    """What a native solve leaves besides states.

    Attributes:
        log: its steps, and the places of its saved times.
        count: accepted steps.
        reached: saved times that were reached.
        retcode: how it ended.
        nfe: evaluations.
        nreject: rejected steps.
        attempt: of a failed solve, the last attempt.
        finite: whether the last state is, and so all of them are.
        event: which one has ended it, or `None`.
        kept: the stages of its first steps, which the sweep need not take again.
        changes: of two methods that take turns, how many steps were accepted at each change.
    """

    log: Log | Notes
    count: int
    reached: int
    retcode: ReturnCode
    nfe: int
    nreject: int
    attempt: Attempt | None
    finite: bool
    event: int | None = None
    kept: Tensor | None = None
    changes: Sequence[int] = ()

    def pieces(self, count: int) -> list[Piece]:
        """The first `count` steps, by the methods that took them."""
        if not self.changes:
            return [Piece(0, 0, count)]
        found: list[Piece] = []
        for turn, (first, behind) in enumerate(itertools.pairwise((0, *self.changes, count))):
            if first < min(behind, count):
                found.append(Piece(turn % 2, first, min(behind, count)))
        return found or [Piece(0, 0, 0)]

    def good(self, ends: Tensor) -> tuple[int, int]:
        """Steps and saved times up to what is not finite: a solution has no more of them.

        Args:
            ends: states at the ends of the steps, the initial one first.
        """
        if self.finite:
            return self.count, self.reached
        finite: list[bool] = torch.isfinite(ends[1:]).all(1).tolist()
        steps = (*finite, False).index(False)
        state, inside = self.log.places[: self.reached].unbind(1)
        kept = state + (~torch.isnan(inside)).to(state) <= steps
        return steps, int(kept.sum())

    def times(self, t0: float) -> list[float]:
        """The start and the ends of the steps."""
        return [t0, *self._numbers()[::4]]

    def _numbers(self) -> list[float]:
        """Four of each step."""
        numbers: list[float] = self.log.steps.reshape(-1)[: 4 * self.count].tolist()
        return numbers

    def record(self, interval: tuple[float, float], options: SolveOptions) -> Record:
        """The steps as the rest of the package reads them."""
        numbers, (t0, t1) = self._numbers(), interval
        record = Record(
            times=[t0, *numbers[::4]],
            sizes=numbers[1::4],
            errors=numbers[2::4],
            stops=[None if stop < 0 else int(stop) for stop in numbers[3::4]],
            methods=[x.method for x in self.pieces(self.count) for _ in range(x.first, x.behind)],
            saved=self.reached,
            naccept=self.count,
            nreject=self.nreject,
            retcode=self.retcode,
            last=self.attempt,
            event=self.event,
            marks=(t0, *options.tstops, t1),
            t1_stop=len(options.landings(1 if t1 > t0 else -1)),
        )
        asked = options.saveat or ()
        places = self.log.places[: self.reached].tolist() if self.reached else []
        for i, (t, (place, theta)) in enumerate(zip(asked, places, strict=False)):
            if math.isnan(theta):
                record.at_end.setdefault(int(place), []).append(i)
            else:
                indices, times = record.inside.setdefault(int(place), ([], []))
                indices.append(i)
                times.append(t)
        return record


class _Relay:
    """Two methods that take turns, each in memory of its own.

    Args:
        departure: what to solve, and how.
        memory: of the first one.

    Attributes:
        method: the one that takes the steps.
        library: its code.
        memory: its memory.
        changes: as of a flight.
    """

    def __init__(self, departure: Departure, memory: Tensor) -> None:
        self.departure = departure
        self.changes: list[int] = []
        second = departure.libraries[1]
        self._memories = memory, second.take_memory(second.march_memory)
        self._attempts = 0
        self._take(0)

    def _take(self, method: int) -> None:
        self.method, self.library = method, self.departure.libraries[method]
        self.memory = self._memories[method]

    def turn(self, request: SolveRequest) -> None:
        """Let the other method go on."""
        self._take(1 - self.method)
        self.departure.turn(request, self.method)
        self.changes.append(request.accepted)
        self._attempts = request.accepted + request.rejected

    def end(self, request: SolveRequest) -> tuple[Library, Tensor]:
        """The library and the memory of the last attempt; the memory goes back to both."""
        if request.accepted + request.rejected == self._attempts:
            self._take(1 - self.method)
        for library, memory in zip(self.departure.libraries, self._memories, strict=True):
            library.give_memory(memory)
        return self.library, self.memory


def fly(
    departure: Departure,
    u0: Tensor,
    parameters: Sequence[Tensor],
    search: Search | None,
    on_turn: Callable[[float, float, int], None] | None,
    keeps: bool,
    noise: Noise | None = None,
) -> tuple[Flight, States]:
    """Solve forward.

    Args:
        departure: what to solve, and how.
        u0: the state; gradients are not taken here.
        parameters: of the field.
        search: the events that are looked for in the steps.
        on_turn: told time, size of the last step, and number of steps, now and then.
        keeps: whether the stages of steps are kept for a sweep.
        noise: the Brownian motions of a stochastic equation.
    """
    request, room, count = departure.request(), departure.room, departure.save_count
    library = departure.libraries[0]
    relay: _Relay | None = None
    u0 = library.lying(u0)
    # Torch takes numbers faster than a shape; there are rows of them in the end.
    ends, last = u0.new_empty((room + 1) * library.size), torch.empty_like(u0)
    saved = u0.new_empty(count, *u0.shape) if count else departure.nothing
    block, memory = departure.new_block(), library.take_memory(library.march_memory)
    kept, kept_room = None, 0
    if keeps:
        # As many as lately, and some more: memory that is not touched again and again costs its
        # pages.
        lately = library.lately
        kept_room = min(departure.most_kept, lately + lately // 8 + 1)
        kept = u0.new_empty(kept_room * library.slot) if kept_room else None
    lying = library.all_lying(parameters)
    tensors = addresses(lying)
    if library.parts is not None:
        request.threads = torch.get_num_threads()
    if search is not None:
        request.events, request.event_count = search.address, search.count
    if noise is not None:
        request.noise = ctypes.addressof(noise)
    status = RUNNING
    while status in (RUNNING, FULL, CHANGED):
        if status == CHANGED:
            relay = relay or _Relay(departure, memory)
            relay.turn(request)
            library, memory = relay.library, relay.memory
        elif status == FULL:
            block, ends = _grown(block, 4 * room), _grown(ends, library.size * room)
            room *= 2
        log = Log(block, departure)
        packed, steps, places = log.addresses(0 if relay is None else relay.method)
        request.put(
            u0.data_ptr(),
            ctypes.addressof(tensors),
            packed,
            ends.data_ptr(),
            saved.data_ptr(),
            last.data_ptr(),
            steps,
            places,
            memory.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            room,
            kept_room,
        )
        status = library.march(request)
        if on_turn is not None:
            on_turn(request.t, request.last_h, request.accepted)
    if relay is None:
        library.give_memory(memory)
    else:
        library, memory = relay.end(request)
    retcode, attempt = RETCODES[status], None
    if status not in _COMPLETE and request.last_h:
        attempt = _last_attempt(library, request, memory, ends)
    accepted, rejected, evaluations, reached, finite = request.counts()
    # In place: a view would keep what is not needed of the room in sight.
    ends.resize_(accepted + 1, library.size)
    if reached < count:
        saved.resize_(reached, *u0.shape)
    event = request.found if retcode is ReturnCode.Terminated else None
    departure.libraries[0].lately = accepted
    flight = Flight(
        log,
        accepted,
        reached,
        retcode,
        evaluations,
        rejected,
        attempt,
        bool(finite),
        event,
        kept,
        () if relay is None else relay.changes,
    )
    return flight, States(saved, ends, last)


def _grown(entries: Tensor, more: int) -> Tensor:
    grown = entries.new_empty(len(entries) + more)
    grown[: len(entries)] = entries
    return grown


def _last_attempt(library: Library, request: SolveRequest, memory: Tensor, ends: Tensor) -> Attempt:
    u, u1 = library.last_states(memory)
    if request.t != request.last_t:  # It was accepted, and the loop stands at its end.
        before, size = request.accepted - 1, library.size
        u = ends[before * size :][:size]
    return Attempt(request.last_t, request.last_h, u.clone(), u1.clone(), request.last_error)


@dataclass
class Swept:
    """What a native sweep returns: cotangents, and what it cost.

    Attributes:
        bars: of the parameters, flat, each in its place, by methods; of those that took steps.
        start: of the initial state, `(N,)`.
        times: of the steps' starts, of their sizes, and of the saved times' places; empty where
            times need none.
        nfe: evaluations.
        nvjp: pullbacks.
        steps: replayed steps.
    """

    bars: dict[int, Tensor]
    start: Tensor
    times: list[Tensor]
    nfe: int = 0
    nvjp: int = 0
    steps: int = 0

    def add(self, library: Library, method: int, bars: Tensor, counts: Sequence[int]) -> None:
        """Go back over a piece: its cotangents, those of its start last, and what it cost."""
        known, self.start = self.bars.get(method), bars[library.packed_size :]
        self.bars[method] = bars if known is None else known + bars
        evaluations, pulls, replayed = counts
        self.nfe += evaluations
        self.nvjp += pulls
        self.steps += replayed


def sweep_back(
    flight: Flight,
    ends: Tensor,
    arriving: tuple[Tensor | None, ...],
    with_times: bool,
    noise: Noise | None = None,
) -> Swept:
    """Pull the cotangents of a solve back to its inputs.

    Args:
        flight: the solve.
        ends: its initial state, and those at the ends of its steps.
        arriving: cotangents of its `States`.
        with_times: whether the cotangents of times are wanted.
        noise: the Brownian motions of a stochastic equation, as new ones.
    """
    assert isinstance(flight.log, Log)
    departure, (count, reached) = flight.log.departure, flight.good(ends)
    library, kept = departure.libraries[0], flight.kept
    saved, steps, last = (None if x is None else library.lying(x) for x in arriving)
    if count < flight.count:
        last = None
    times: list[Tensor] = []
    parts = 1 if library.parts is None else library.parts.count
    if with_times:
        times = [flight.log.block.new_zeros(parts * n) for n in (count, count, reached)]
    swept, at = Swept({}, ends, times), reached - 1
    for method, first, behind in reversed(flight.pieces(count)):
        library, request = departure.libraries[method], departure.request_back()
        if parts > 1:
            request.threads, request.reached = torch.get_num_threads(), reached
        bars = ends.new_empty(library.packed_size + library.size)
        memory, left = library.take_memory(library.sweep_memory), bars.data_ptr()
        request.put(
            ends.data_ptr(),
            *flight.log.addresses(method),
            0 if saved is None or not reached else saved.data_ptr(),
            0 if steps is None else steps.data_ptr(),
            0 if last is None else last.data_ptr(),
            left + library.start_at,
            left,
            *(map(Tensor.data_ptr, times) if times else _NO_TIMES),
            memory.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            behind,
            first,
            behind,
            at,
            0 if kept is None else min(count, kept.numel() // library.slot),
        )
        if noise is not None:
            request.noise = ctypes.addressof(noise)
        while library.sweep(request) == RUNNING:
            pass
        library.give_memory(memory)
        swept.add(library, method, bars, request.counts())
        # What has arrived goes on to the steps before.
        last, at = swept.start if request.live else None, request.q
    if times:
        whole = (flight.count, flight.count, flight.reached)
        swept.times = [
            torch.nn.functional.pad(x[: len(x) // parts], (0, n - len(x) // parts))
            for x, n in zip(times, whole, strict=True)
        ]
    return swept
