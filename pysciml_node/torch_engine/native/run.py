"""Runs the native loop and its sweep, in turns, so that Python hears of an interrupt."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.step import Attempt
from pysciml_node.torch_engine.native.brownian import Noise
from pysciml_node.torch_engine.native.crossing import Block, PullBack
from pysciml_node.torch_engine.native.departure import Departure
from pysciml_node.torch_engine.native.events import Search
from pysciml_node.torch_engine.native.flight import Flight, Log, States
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
    lately = library.lately
    kept_room = departure.kept_room(lately) if keeps else 0
    room = departure.room_after(lately)
    ends, last = u0.new_empty(room + 1, library.size), torch.empty_like(u0)
    saved = u0.new_empty(count, *u0.shape) if count else departure.nothing
    kept = u0.new_empty(kept_room * library.slot) if kept_room else None
    memory = library.take_memory(library.march_memory)
    block = departure.march(
        u0,
        ends,
        saved,
        last,
        memory,
        kept,
        room,
        kept_room,
        library.threads,
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
    flight = flight_of(log, found)
    accepted, reached = flight.count, flight.reached
    if relay is None:
        library.give_memory(memory)
    else:
        flight.changes = relay.changes
        library, memory = relay.end(log.request)
    if found[0] not in _COMPLETE:
        flight.attempt = _last_attempt(library, log.request, memory, ends)
    elif flight.retcode is ReturnCode.Terminated:
        flight.event = log.request.found
    if (
        ends.size(0) != accepted + 1
    ):  # in place: a view would keep what is not needed of the room in sight
        ends.resize_(accepted + 1, library.size)
    if reached < count:
        saved.resize_(reached, *u0.shape)
    departure.libraries[0].lately = accepted
    flight.kept, flight.kept_room = kept, kept_room
    return flight, States(saved, ends, last)


def flight_of(log: Log, found: tuple[int, ...]) -> Flight:
    """What a solve leaves, from the log and the end of its request."""
    status, *_, accepted, rejected, evaluations, reached, finite = found
    retcode = RETCODES[status]
    return Flight(log, accepted, reached, retcode, evaluations, rejected, None, bool(finite))


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

    def start_in(self, shape: torch.Size) -> Tensor:
        """The same in the shape of a state: one operation of torch instead of two."""
        bars, place = self._last
        return bars.as_strided(shape, _strides(shape), place)

    def add(self, library: Library, method: int, bars: Tensor, counts: Sequence[int]) -> None:
        """Go back over a piece: its cotangents, those of its start last, and what it cost."""
        known = self.bars.get(method)
        self.bars[method] = bars if known is None else known + bars
        self._last = bars, library.packed_size
        evaluations, pulls, replayed = counts
        self.nfe += evaluations
        self.nvjp += pulls
        self.steps += replayed


def pull_back(
    pull: PullBack | None,
    log: Log,
    counts: tuple[int, int],
    given: tuple[Any, ...],
    kept: tuple[Tensor | Block | None, int],
    noise: Noise | None = None,
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]] | None:
    """The gradients of a solve whose times need none, by one call of C.

    Args:
        pull: the call, if there is one.
        log: of the solve.
        counts: its accepted steps, and saved times that were reached.
        given: what the call is given first: shapes of the parts of its initial state, which
            gradients are wanted, of these and of the parameters, its states at the ends of steps
            and the parameters in a tuple, and cotangents of its `States`, of the last one those of
            its parts in a tuple.
        kept: stages of its first steps, and of how many there is room for them.
        noise: the Brownian motions of a stochastic equation, as new ones.

    Returns:
        The gradients; evaluations, pullbacks and replayed steps. `None` where `sweep_back` has to
        do it.
    """
    (count, reached), (stages, room) = counts, kept
    if pull is None:
        return None
    motions = 0 if noise is None else ctypes.addressof(noise)
    numbers = count, count, reached - 1, min(count, room), motions
    further = log.departure.libraries[0].threads, reached, log.block
    found = pull(*given, stages, *numbers, *further)
    if found is None:
        return None
    block, gradients = found
    return gradients, SweepRequest.swept(block)[5:8]


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
    motions = 0 if noise is None else ctypes.addressof(noise)
    further = motions, library.threads, reached, flight.log.block
    time_bars = tuple(map(Tensor.data_ptr, times)) if times else _NO_TIMES
    kept_count = 0 if kept is None else min(count, flight.kept_room)
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
