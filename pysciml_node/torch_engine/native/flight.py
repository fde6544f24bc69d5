"""What a native solve leaves: its states, and what it notes of its steps."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.record import Record, finite_part
from pysciml_node.steps.step import Attempt
from pysciml_node.torch_engine.native.crossing import ALIGNED, Block, aligned
from pysciml_node.torch_engine.native.departure import Departure
from pysciml_node.torch_engine.native.library import SolveRequest


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

    def ends(self, count: int) -> Tensor:
        """The initial state and those at the ends of so many steps, where they are in the block."""
        library = self.departure.libraries[0]
        start = aligned(self.block) + self.departure.ends_at(count)
        size, dtype = (count + 1) * library.size, library.dtype
        states = torch.frombuffer(self.block, dtype=dtype, count=size, offset=start)
        return states.view(count + 1, library.size)

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
        kept_room: of how many steps there is room for them.
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
    kept: Tensor | Block | None = None
    kept_room: int = 0
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
        """As `finite_part`, which is asked where something is not.

        Args:
            ends: states at the ends of the steps, the initial one first.
        """
        if self.finite:
            return self.count, self.reached
        return finite_part(ends, self.log.places[: self.reached].tolist())

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
        if self.reached:
            record.place(options.saveat or (), self.log.places[: self.reached].tolist())
        return record
