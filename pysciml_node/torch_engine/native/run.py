"""Runs the native loop and its sweep, in turns, so that Python hears of an interrupt."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.record import Record
from pysciml_node.steps.step import Attempt
from pysciml_node.torch_engine.native.brownian import Noise
from pysciml_node.torch_engine.native.crossing import ALIGNED, Block, aligned
from pysciml_node.torch_engine.native.departure import Departure
from pysciml_node.torch_engine.native.events import Search
from pysciml_node.torch_engine.native.library import (
    Library,
    SolveRequest,
    SweepRequest,
)
from pysciml_node.torch_engine.native.text import contiguous

RUNNING, FULL, SUCCESS, CHANGED = 0, 1, 2, 8
RETCODES = {
    SUCCESS: ReturnCode.Success,
    3: ReturnCode.MaxIters,
    4: ReturnCode.DtLessThanMin,
    5: ReturnCode.Unstable,
    7: ReturnCode.Terminated,
}
_UNDERWAY = frozenset((RUNNING, FULL, CHANGED))
_COMPLETE = frozenset(code for code, value in RETCODES.items() if value.successful)
_NO_TIMES = (0, 0, 0)
_strides = lru_cache(contiguous)


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
    """The same in one block of memory, behind the request and the parameters as they are packed.

    Attributes:
        block: the request at its start, as the solve has left it.
        departure: how the solve has begun, which says where in the block what lies.
    """

    block: Block
    departure: Departure

    @property
    def request(self) -> SolveRequest:
        """The request, in the block itself."""
        return SolveRequest.from_buffer(self.block)

    def place_in(self, request: SolveRequest, method: int) -> None:
        """Put into a request where in the block a method finds what is its own."""
        departure, start = self.departure, ctypes.addressof(request)
        own = start + aligned(self.block)
        request.tensors = start + ctypes.sizeof(SolveRequest)
        request.packed = own + departure.packed_at[method]
        request.places, request.steps = own + departure.places_at, own + departure.steps_at

    def grown(self, more: int) -> Log:
        """The same with so many more bytes behind the steps; `place_in` has to follow."""
        block = Block(len(self.block) + more)
        head = self.departure.behind
        of, to = aligned(self.block), aligned(block)
        block[:head] = self.block[:head]
        size = len(self.block) - ALIGNED
        block[to + head : to + size] = self.block[of + head : of + size]
        return Log(block, self.departure)

    def _numbers(self, at: int) -> Tensor:
        """The block as numbers, from a place on."""
        start = aligned(self.block) + at
        count = (len(self.block) - start) // 8
        return torch.frombuffer(self.block, dtype=torch.float64, count=count, offset=start)

    @property
    def steps(self) -> Tensor:
        """As those of `Notes`; what is behind the accepted ones is not set."""
        return self._numbers(self.departure.steps_at)

    @property
    def places(self) -> Tensor:
        """As those of `Notes`; what is behind the reached ones is not set."""
        return self._numbers(self.departure.places_at)[: 2 * self.departure.save_count].view(-1, 2)


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
    library, count = departure.libraries[0], departure.save_count
    assert len(parameters) == departure.parameters, "C reads as many"
    room = departure.room_after(library.lately)
    ends, last = u0.new_empty(room + 1, library.size), torch.empty_like(u0)
    saved = u0.new_empty(count, *u0.shape) if count else departure.nothing
    memory = library.take_memory(library.march_memory)
    kept, kept_room = None, 0
    if keeps:
        # As many as lately, and some more: memory that is not touched again and again costs its
        # pages.
        lately = library.lately
        kept_room = min(departure.most_kept, lately + lately // 8 + 1)
        kept = u0.new_empty(kept_room * library.slot) if kept_room else None
    block = departure.march(
        u0,
        ends,
        saved,
        last,
        memory,
        kept,
        room,
        kept_room,
        0 if library.parts is None else torch.get_num_threads(),
        *((0, 0) if search is None else (search.address, search.count)),
        0 if noise is None else ctypes.addressof(noise),
        *parameters,
    )
    if block is None:
        library.give_memory(memory)
        lying = library.lying(u0), library.all_lying(parameters)
        return fly(departure, *lying, search, on_turn, keeps, noise)
    log, relay = Log(block, departure), None
    found = SolveRequest.landed(block)
    if found[0] in _UNDERWAY or on_turn is not None:
        log, ends, relay = _onward(log, ends, memory, on_turn)
        found = SolveRequest.landed(log.block)
    status, _, _, _, _, accepted, rejected, evaluations, reached, finite = found
    retcode, attempt, event = RETCODES[status], None, None
    if relay is None:
        library.give_memory(memory)
    else:
        library, memory = relay.end(log.request)
    if status not in _COMPLETE:
        attempt = _last_attempt(library, log.request, memory, ends)
    elif retcode is ReturnCode.Terminated:
        event = log.request.found
    if (
        ends.size(0) != accepted + 1
    ):  # in place: a view would keep what is not needed of the room in sight
        ends.resize_(accepted + 1, library.size)
    if reached < count:
        saved.resize_(reached, *u0.shape)
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


def _onward(
    log: Log, ends: Tensor, memory: Tensor, on_turn: Callable[[float, float, int], None] | None
) -> tuple[Log, Tensor, _Relay | None]:
    """Go on with a solve that has only begun.

    Args:
        log: of the solve.
        ends: room for the states at the ends of its steps.
        memory: of its first method.
        on_turn: as of `fly`.

    Returns:
        The log, and the states; with more room where there was not enough. And what has had the
        methods take turns, where they have.
    """
    departure, request = log.departure, log.request
    library, status = departure.libraries[0], request.status
    relay: _Relay | None = None
    while True:
        if on_turn is not None:
            on_turn(request.t, request.last_h, request.accepted)
        if status not in _UNDERWAY:
            return log, ends, relay
        if status == FULL:
            room = request.room
            log, ends = log.grown(32 * room), _grown(ends, room)
            request = log.request
            request.ends, request.room = ends.data_ptr(), 2 * room
        elif status == CHANGED:
            relay = relay or _Relay(departure, memory)
            relay.turn(request)
            library, request.memory = relay.library, relay.memory.data_ptr()
        log.place_in(request, 0 if relay is None else relay.method)
        status = library.march(request)


def _grown(states: Tensor, more: int) -> Tensor:
    grown = states.new_empty(len(states) + more, states.shape[1])
    grown[: len(states)] = states
    return grown


def _last_attempt(
    library: Library, request: SolveRequest, memory: Tensor, ends: Tensor
) -> Attempt | None:
    if not request.last_h:
        return None
    u, u1 = library.last_states(memory)
    if request.t != request.last_t:  # It was accepted, and the loop stands at its end.
        u = ends[request.accepted - 1]
    return Attempt(request.last_t, request.last_h, u.clone(), u1.clone(), request.last_error)


@dataclass
class Swept:
    """What a native sweep returns: cotangents, and what it cost.

    Attributes:
        bars: of the parameters, flat, each in its place, by methods; of those that took steps.
        times: of the steps' starts, of their sizes, and of the saved times' places; empty where
            times need none.
        nfe: evaluations.
        nvjp: pullbacks.
        steps: replayed steps.
    """

    bars: dict[int, Tensor]
    times: list[Tensor]
    nfe: int = 0
    nvjp: int = 0
    steps: int = 0
    _last: tuple[Tensor, int] = field(init=False, repr=False)

    @property
    def start(self) -> Tensor:
        """Of the initial state, `(N,)`."""
        bars, place = self._last
        return bars[place:]

    def start_like(self, u0: Tensor) -> Tensor:
        """The same in the shape of a state: one operation of torch instead of two."""
        bars, place = self._last
        return bars.as_strided(u0.shape, _strides(u0.shape), place)

    def add(self, library: Library, method: int, bars: Tensor, counts: Sequence[int]) -> None:
        """Go back over a piece: its cotangents, those of its start last, and what it cost."""
        known = self.bars.get(method)
        self.bars[method] = bars if known is None else known + bars
        self._last = bars, library.packed_size
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
    saved, steps, last = [None if x is None else library.lying(x) for x in arriving]
    if count < flight.count:
        last = None
    times: list[Tensor] = []
    parts = 1 if library.parts is None else library.parts.count
    if with_times:
        times = [torch.zeros(parts * n, dtype=torch.float64) for n in (count, count, reached)]
    further = (
        0 if noise is None else ctypes.addressof(noise),
        *((0, 0) if parts == 1 else (torch.get_num_threads(), reached)),
        flight.log.block,
    )
    time_bars = tuple(map(Tensor.data_ptr, times)) if times else _NO_TIMES
    kept_count = 0 if kept is None else min(count, kept.numel() // library.slot)
    swept, at, before = Swept({}, times), reached - 1, (saved if reached else None, steps)
    for method, first, behind in reversed(flight.pieces(count)):
        library = departure.libraries[method]
        bars = ends.new_empty(library.packed_size + library.size)
        memory = library.take_memory(library.sweep_memory)
        block = departure.sweep(method)(
            *(ends, *before, last, bars, *time_bars, memory, kept),
            *(behind, first, behind, at, kept_count, *further),
        )
        assert block is not None, "all of them lie as C reads them"
        at, _, _, live, _, *counts, status = SweepRequest.swept(block)
        if status == RUNNING:
            request = SweepRequest.from_buffer(block)
            while library.sweep(request) == RUNNING:
                pass
            at, _, _, live, _, *counts, status = SweepRequest.swept(block)
        library.give_memory(memory)
        swept.add(library, method, bars, counts)
        # What has arrived goes on to the steps before.
        last = swept.start if live and first else None
    if times:
        whole = (flight.count, flight.count, flight.reached)
        swept.times = [
            torch.nn.functional.pad(x[: len(x) // parts], (0, n - len(x) // parts))
            for x, n in zip(times, whole, strict=True)
        ]
    return swept
