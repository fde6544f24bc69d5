"""How a native solve begins: what solves of the same options have in common, worked out once."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import (
    Controller,
    FixedStep,
    IController,
    PIController,
    PIDController,
)
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem, ends_of
from pysciml_node.problems.state import StateSpec
from pysciml_node.replay.newton import Accuracy
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.record import first_room
from pysciml_node.tableaus import Tableau
from pysciml_node.tableaus.stochastic import SDETableau
from pysciml_node.torch_engine.native.crossing import (
    BEHIND,
    GIVEN_TO_STEPS,
    IN_REQUEST,
    Call,
    Hole,
    Left,
    PullBack,
    Result,
    TakeSteps,
    call_of,
    first_behind,
    pull_of,
    steps_of,
)
from pysciml_node.torch_engine.native.library import Library, SolveRequest, SweepRequest
from pysciml_node.torch_engine.switching import FACTOR, MOST_SMOOTH, MOST_STIFF, SHARE

# Seconds after which the loop comes back to Python, which looks for Ctrl-C then.
TURN = 0.05
# Bytes of stages that are kept. The system takes larger blocks back at once (glibc's greatest
# M_MMAP_THRESHOLD is 32 MiB), and new pages take longer than to evaluate the stages again.
_MOST_KEPT = 31 << 20
GIVEN = (
    *("u0", "ends", "saved", "final", "memory", "kept", "room", "kept_room"),
    *("threads", "events", "event_count", "noise"),
)
"""What a loop is given, by the names of its request."""

GIVEN_BACK = (
    *("ends", "saved_bar", "ends_bar", "last_bar", "packed_bar", "t_bar", "h_bar", "theta_bar"),
    *("memory", "kept", "n", "first", "count", "q", "kept_count", "noise", "threads", "reached"),
)
"""What a sweep is given, likewise; cotangents of the initial state go behind the packed ones."""

GIVEN_AT_ONCE = (
    *("ends", "saved_bar", "ends_bar", "last_bar", "memory", "kept"),
    *("n", "count", "q", "kept_count", "noise", "threads", "reached"),
)
"""What a whole sweep is given of these, where there is one method and times need no gradients."""

# Those of them that are made for the call.
_OWN = frozenset(("ends", "saved", "final", "memory", "kept"))
_OWN_BACK = frozenset(("memory", "kept", "packed_bar"))

# What a whole sweep has laid out for C by itself.
_COTANGENTS = frozenset(("saved_bar", "ends_bar", "last_bar"))

# Bytes of steps and states that room is made for behind a request.
_MOST_AT_ONCE = 1 << 18

# Departures that are kept of a library.
_MOST_DEPARTURES = 16


def set_control(request: Any, controller: Controller, error_order: float) -> tuple[float, float]:
    """Put a controller into a request of one solve, or of members.

    Returns:
        The errors that it takes for those before the first step.
    """
    if isinstance(controller, PIController | IController):
        request.control = 1
        request.beta[0], request.beta[1] = controller.exponents(error_order)
        request.gamma, request.qmin, request.qmax = (
            controller.gamma,
            controller.qmin,
            controller.qmax,
        )
        return 1e-4, 1.0
    if isinstance(controller, PIDController):
        k = error_order + 1
        request.control = 2
        for i, beta in enumerate((controller.beta1, controller.beta2, controller.beta3)):
            request.beta[i] = beta / k
        request.gamma = controller.safety
        return 1.0, 1.0
    assert isinstance(controller, FixedStep)
    request.control = 0
    return 1.0, 1.0


def set_turns(
    request: Any, method: int, tableaus: Sequence[Tableau | SDETableau], controller: Controller
) -> None:
    """Put into a request, of one solve or of members, when the other method is to go on.

    Args:
        request: of steps of one method, alone or of two that take turns.
        method: which of them takes the steps.
        tableaus: theirs, the explicit one's first.
        controller: of the sizes.
    """
    if len(tableaus) == 1:
        return
    radius = tableaus[0].stability_radius
    assert radius is not None
    factor = FACTOR if controller.adaptive else 1.0
    request.limit = SHARE * radius
    request.patience, request.factor_of_turn = (
        (-MOST_SMOOTH - 1, 1 / factor) if method else (MOST_STIFF + 1, factor)
    )


class Departure:
    """What solves of the same options begin with: a request that lacks only its tensors.

    Args:
        libraries: the field and the method, or each of two that take turns.
        problem: for the interval.
        options: of the solve.
        tableaus: of the methods.

    Attributes:
        libraries: as given.
        marks: tstops, for C.
        room: steps that room is made for at first.
        most_kept: steps whose stages may be kept for the sweep.
        save_count: saved times.
        parameters: how many tensors the code reads.
        behind: where what is behind the request and their addresses begins, as `packed_at`.
        nothing: the saved states of a solve that saves none, `(0, N)`.
        packed_at: where the parameters that each method packs begin in a block, in bytes from the
            first address in it that is aligned.
        places_at: where the places of saved times do.
        steps_at: where the steps do.
    """

    def __init__(
        self,
        libraries: Sequence[Library],
        problem: Problem,
        options: SolveOptions,
        tableaus: Sequence[Tableau | SDETableau],
    ) -> None:
        library = libraries[0]
        self.libraries, self._tableaus = libraries, tableaus
        self.options, self.free = options, _ends_move(problem)
        t0, t1 = self.interval = ends_of(problem)
        landings, times = (*options.landings(problem.direction), t1), options.saveat or ()
        self.marks = (ctypes.c_double * len(options.tstops))(*options.tstops)
        self._stops = (ctypes.c_double * len(landings))(*landings)
        self._saves = (ctypes.c_double * max(len(times), 1))(*times)
        self.room = first_room(library.size)
        self._alike = isinstance(options.controller, FixedStep)
        self.most_kept = _most_kept(library, options) if len(libraries) == 1 else 0
        self.save_count = len(times)
        self.nothing = torch.empty((0, library.size), dtype=library.dtype, device="cpu")
        self.parameters = max(len(x.places) for x in libraries)
        self.behind = first_behind(ctypes.sizeof(SolveRequest) + 8 * self.parameters)
        sizes = [-(-x.packed_size * library.dtype.itemsize // 8) * 8 for x in libraries]
        *self.packed_at, self.places_at = itertools.accumulate(sizes, initial=self.behind)
        self.steps_at = self.places_at + 16 * len(times)
        self._request = request = SolveRequest(
            t0=t0,
            t1=t1,
            dt0=math.nan if options.dt0 is None else options.dt0,
            dtmin=options.dtmin,
            dtmax=options.dtmax,
            max_steps=options.max_steps,
            mark_count=len(self.marks),
            stop_count=len(landings),
            save_count=len(times),
            moving=options.saveat_tensor is not None,
            free=self.free,
            marks=ctypes.addressof(self.marks),
            stops=ctypes.addressof(self._stops),
            saves=ctypes.addressof(self._saves),
            seconds=TURN,
        )
        self._sweeps: dict[int, Call] = {}
        self.turn(request, 0)
        self._tolerances = self._set_tolerances(library.dtype)
        accuracy = Accuracy.of(options, library.dtype, library.size)
        for name, value in (("rtol", accuracy.rtol), ("atol", accuracy.atol)):
            if isinstance(value, Tensor):
                row = value.detach().to("cpu", library.dtype).contiguous()
                setattr(request.accuracy, f"{name}s", row.data_ptr())
                self._tolerances += (row,)
            else:
                setattr(request.accuracy, name, value)
        self._way_back = SweepRequest(
            t0=t0,
            t1=t1,
            seconds=TURN,
            mark_count=len(self.marks),
            marks=ctypes.addressof(self.marks),
            accuracy=request.accuracy,
        )

    def turn(self, request: SolveRequest, method: int) -> None:
        """Let a method take the steps, the other one in its turn."""
        tableau, controller = self._tableaus[method], self.options.controller
        request.history[:] = set_control(request, controller, tableau.error_order)
        set_turns(request, method, self._tableaus, controller)

    def _set_tolerances(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Put the tolerances into the request; returns what has to be kept alive."""
        norm, request = ErrorNorm(self.options.tolerances), self._request
        request.driven, request.factor = norm.size, norm.factor
        request.shift = -1.0 if norm.shift is None else norm.shift
        if norm.shift is not None:
            return ()
        rows = tuple(
            torch.as_tensor(x, dtype=dtype, device="cpu").detach().expand(norm.size).contiguous()
            for x in (norm.rtol, norm.atol)
        )
        request.rtol, request.atol = (row.data_ptr() for row in rows)
        return rows

    @property
    def lasting(self) -> bool:
        """Whether other solves may depart in the same way: nothing of this one alone is in it."""
        options, tolerances = self.options, self.options.tolerances
        given = options.saveat_tensor, tolerances.rtol, tolerances.atol
        return not (options.events or any(isinstance(x, Tensor) for x in given))

    def serves(self, problem: Problem, options: SolveOptions) -> bool:
        """Whether it is how a solve departs."""
        if self.options is not options:
            return False
        t0, t1 = problem.tspan
        if type(t0) is type(t1) is float:
            return self.interval == (t0, t1) and not self.free
        return self.interval == ends_of(problem) and self.free == _ends_move(problem)

    def kept_room(self, lately: int) -> int:
        """Steps whose stages are kept for a sweep, where the solve before took so many.

        They are as many and some more: memory that is not touched again and again costs its pages.
        """
        return min(self.most_kept, lately + lately // 8 + 1)

    def room_after(self, steps: int) -> int:
        """Steps that room is made for where the solve before took so many."""
        return steps if self._alike and 0 < steps <= self.room else self.room

    @cached_property
    def march(self) -> Call:
        """The loop of the first method, which is given what `GIVEN` names, and the parameters.

        The addresses of these are behind the request, and then what the method packs of them, the
        places of saved times, and the steps.
        """
        library = self.libraries[0]
        own, holes = self.steps_at - self.behind + 32 * self.room, self._holes(GIVEN)
        return call_of(library.loaded.march, self._start(), library.dtype, holes, own)

    def _holes(self, names: Sequence[str]) -> list[Hole]:
        """What a loop lacks, which is given what these name, and the parameters."""
        size = ctypes.sizeof(SolveRequest)
        return [
            *[Hole(getattr(SolveRequest, x).offset, i, own=x in _OWN) for i, x in enumerate(names)],
            *[Hole(size + 8 * i, len(names) + i) for i in range(self.parameters)],
            Hole(SolveRequest.tensors.offset, IN_REQUEST, size),
            Hole(SolveRequest.packed.offset, BEHIND, self.packed_at[0]),
            Hole(SolveRequest.places.offset, BEHIND, self.places_at),
            Hole(SolveRequest.steps.offset, BEHIND, self.steps_at),
        ]

    def room_at_once(self, lately: int) -> int:
        """Steps that room is made for where C gives back what is too much; 0 if that is too large.

        Args:
            lately: steps of the solve before.
        """
        library = self.libraries[0]
        room = 2 * lately + 8 if lately else self.room
        return room if room * (32 + library.size * library.dtype.itemsize) <= _MOST_AT_ONCE else 0

    def ends_at(self, steps: int) -> int:
        """Where in a block the states at the ends of so many steps begin, if they are there too."""
        return first_behind(self.steps_at + 32 * steps)

    def steps_of(self, spec: StateSpec) -> TakeSteps | None:
        """The loop of a solve that ends well, with the states at the ends in its block.

        It is `None` of two methods.

        Args:
            spec: structure of the state.
        """
        library, options = self.libraries[0], self.options
        if len(self.libraries) > 1 or not self.lasting or options.progress:
            return None
        item, parts = library.dtype.itemsize, [tuple(shape) for shape in spec.shapes]
        shape = parts[0] if spec.keys is None else (library.size,)
        left = Left(
            status=SolveRequest.status.offset,
            finite=SolveRequest.finite.offset,
            accepted=SolveRequest.accepted.offset,
            first=SolveRequest.u0.offset,
            last=SolveRequest.final.offset,
            ends=SolveRequest.ends.offset,
            room=SolveRequest.room.offset,
            steps=self.steps_at,
            entries=library.size,
            row=library.size * item,
            slot=library.slot * item,
        )
        return steps_of(
            library.loaded.march,
            self._start(),
            library.dtype,
            self._holes(GIVEN_TO_STEPS),
            self.steps_at - self.behind,
            left,
            library.memories(library.march_memory),
            parts,
            (self.save_count, *shape) if self.save_count else None,
        )

    def _start(self) -> bytes:
        """The request, with places for the addresses of parameters."""
        return bytes(self._request) + bytes(8 * self.parameters)

    def sweep(self, method: int) -> Call:
        """The sweep of a method, which is given what `GIVEN_BACK` names, and the log."""
        known = self._sweeps.get(method)
        if known is None:
            library, log = self.libraries[method], len(GIVEN_BACK)
            holes = [
                *_holes_back(GIVEN_BACK),
                Hole(
                    SweepRequest.start_bar.offset,
                    GIVEN_BACK.index("packed_bar"),
                    library.start_at,
                    own=True,
                ),
                Hole(SweepRequest.packed.offset, log, self.packed_at[method]),
                Hole(SweepRequest.places.offset, log, self.places_at),
                Hole(SweepRequest.steps.offset, log, self.steps_at),
            ]
            start = bytes(self._way_back)
            known = call_of(library.loaded.sweep, start, library.dtype, holes)
            self._sweeps[method] = known
        return known

    @cached_property
    def pull(self) -> PullBack | None:
        """As `pull_in`, of a state in one piece."""
        return self.pull_in((self.libraries[0].size,))

    def pull_in(self, sizes: Sequence[int]) -> PullBack | None:
        """The whole sweep of a solve whose times need no gradients; `None` of two methods.

        Beside what `pull_of` says, it is given what `GIVEN_AT_ONCE` names, but for memory.

        Args:
            sizes: of the parts of a state.
        """
        library, log = self.libraries[0], len(GIVEN_AT_ONCE)
        if len(self.libraries) > 1:
            return None
        start, size = bytes(self._way_back), library.dtype.itemsize
        bars = first_behind(len(start))
        holes = [
            *_holes_back(GIVEN_AT_ONCE, _COTANGENTS),
            Hole(SweepRequest.packed_bar.offset, BEHIND, bars),
            Hole(SweepRequest.start_bar.offset, BEHIND, bars + library.start_at),
            Hole(SweepRequest.packed.offset, log, self.packed_at[0]),
            Hole(SweepRequest.places.offset, log, self.places_at),
            Hole(SweepRequest.steps.offset, log, self.steps_at),
        ]
        starts = itertools.accumulate(sizes[:-1], initial=library.packed_size)
        results = [
            Result(log + 1 + i, bars + size * first, size * length)
            for i, (first, length) in enumerate([*zip(starts, sizes, strict=True), *library.places])
        ]
        return pull_of(
            library.loaded.sweep,
            start,
            library.dtype,
            holes,
            size * (library.packed_size + library.size),
            results,
            library.memories(library.sweep_memory),
            [
                tuple(shape) if pulled else None
                for shape, pulled in zip(library.shapes, library.pulled, strict=True)
            ],
        )

    def request(self) -> SolveRequest:
        """A request of a solve's own."""
        return SolveRequest.from_buffer_copy(self._request)

    def request_back(self) -> SweepRequest:
        """One of its backward sweep."""
        return SweepRequest.from_buffer_copy(self._way_back)


def _holes_back(names: Sequence[str], own: frozenset[str] = frozenset()) -> Iterator[Hole]:
    """What a sweep lacks, by the names of its request, in the order in which it is given."""
    for i, name in enumerate(names):
        yield Hole(getattr(SweepRequest, name).offset, i, own=name in _OWN_BACK or name in own)


def _most_kept(library: Library, options: SolveOptions) -> int:
    """Steps whose stages may be kept for the sweep."""
    allowed = min(getattr(options.adjoint, "memory", 0), _MOST_KEPT)
    return allowed // (library.slot * library.dtype.itemsize) if library.slot else 0


def _ends_move(problem: Problem) -> bool:
    """Whether an end of the interval receives a gradient."""
    t0, t1 = problem.tspan
    return (isinstance(t0, Tensor) and t0.requires_grad) or (
        isinstance(t1, Tensor) and t1.requires_grad
    )


def departure_of(
    libraries: Sequence[Library],
    problem: Problem,
    options: SolveOptions,
    tableaus: Sequence[Tableau | SDETableau],
) -> Departure:
    """How a solve departs, worked out once for options that are the same object."""
    known: dict[tuple[int, ...], Departure] = libraries[0].departures
    way = (id(options), *map(id, libraries[1:]))
    departure = known.get(way)
    if departure is None or not departure.serves(problem, options):
        departure = Departure(libraries, problem, options, tableaus)
        if departure.lasting:
            if len(known) >= _MOST_DEPARTURES:
                known.clear()
            known[way] = departure
    return departure
