"""`solve(EnsembleProblem(...), compile=True)`: from checked members to native code and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import Array, MemberOptions, SolveOptions
from pysciml_node.algorithms.switching import OneStepMethod
from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.state import map_tensors, moves, tensors_of
from pysciml_node.replay.end_times import hides_time
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.stacked import MemberEvents, MemberSteps
from pysciml_node.replay.stages import Method
from pysciml_node.solutions.members import ListedMembers
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.tableaus import (
    DiagonallyImplicitTableau,
    ImplicitTableau,
    RosenbrockTableau,
    Tableau,
)
from pysciml_node.torch_engine.members.crossings import Crossings, Steps
from pysciml_node.torch_engine.native.engine import FlownSolve
from pysciml_node.torch_engine.native.events import MembersSearch, watched
from pysciml_node.torch_engine.native.fitting import expect_members_fitting
from pysciml_node.torch_engine.native.flight import Flight, Notes, States
from pysciml_node.torch_engine.native.member_code import MemberMethod, MemberProgram
from pysciml_node.torch_engine.native.member_library import MemberLibrary, member_library
from pysciml_node.torch_engine.native.member_run import (
    ACCEPTED,
    CODE,
    EVALUATIONS,
    REACHED,
    REJECTED,
    Flights,
    Missing,
    fly_members,
)
from pysciml_node.torch_engine.native.member_solve import MembersSolve, check_times
from pysciml_node.torch_engine.native.member_sweep import SweptMembers, sweep_members
from pysciml_node.torch_engine.native.prepared import (
    See,
    check,
    given_jacobian,
    no_code,
    refusal,
)
from pysciml_node.torch_engine.native.pulled import pulled_program
from pysciml_node.torch_engine.native.run import RETCODES
from pysciml_node.translation.export import translate
from pysciml_node.translation.first import At
from pysciml_node.translation.numbers import first_to_succeed
from pysciml_node.translation.program import Program


def _check(ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions) -> None:
    """Refuse what cannot be native whatever the field is, by name."""
    problem = cast(ODEProblem, ensemble.problem)
    check(problem, algorithm, options.common)
    if ensemble.batched:
        raise refusal("fields of a batch of members", "batched=False, and the field of one member")
    check_times((*problem.tspan, options.saveat_tensor), options)


@dataclass
class _Solve(MembersSolve):
    """That of ordinary equations."""

    libraries: Sequence[MemberLibrary]  # of the method, or of each of two that take turns
    tableaus: Sequence[Tableau]
    free: bool  # whether the ends of the intervals receive gradients

    @override
    def run(self, u0: Tensor, parameters: Sequence[Tensor]) -> Flights:
        library = self.libraries[-1]
        mine = [
            library.lying(x.detach()).clone()
            for x, own in zip(parameters, self.own, strict=True)
            if own
        ]
        passengers = self.passengers(u0, mine, library.size, self.free)
        if isinstance(self.tableaus[-1], DiagonallyImplicitTableau):
            missing = Missing.of(self.options, passengers.u0)
            passengers = dataclasses.replace(passengers, missing=missing)
        shared = [x for x, own in zip(parameters, self.own, strict=True) if not own]
        packed = [one.pack(shared[: len(one.places)]) for one in self.libraries]
        return fly_members(
            self.libraries, self.tableaus, passengers, self.options.common, packed, self.search
        )

    @override
    def sweep(self, flights: Flights, *arriving: Tensor | None) -> SweptMembers:
        return sweep_members(self.libraries, flights, *arriving)


class FlownMember(FlownSolve):
    """One member, solved with all others."""

    flight: Flight
    states: States

    @override
    def flown(self) -> tuple[Flight, States]:
        return self.flight, self.states


class _Member(FlownMember):
    """That of an ordinary equation."""

    translated = False

    @override
    def stepped(self, states: States) -> list[Tensor]:
        return [self.u0.reshape(-1), *states.ends.unbind()]


@dataclass
class NativeMembers:
    """The members of an ensemble that native code has solved.

    Args:
        solve: what was run.
        algorithm: how.
        engine: name of the engine.
        flights: what the loop left.
        tensors: the same saved states, states at the ends of the steps and last states as
            `flights` has, and the initial states, with their graph.
        surroundings: the field as the solve saw it.
    """

    # Fields of `Stats` by columns of what the loop counts, and of what sweeps cost.
    counted: ClassVar[dict[str, int]] = {
        "nfe": EVALUATIONS,
        "naccept": ACCEPTED,
        "nreject": REJECTED,
    }
    swept: ClassVar[dict[str, int]] = {"nfe_backward": 0, "nvjp": 0, "naccept_backward": 1}
    # As of members that a loop in Python has solved: see `MappedMembers`.
    thinned: ClassVar[bool] = False
    rounded_times: ClassVar[bool] = False

    solve: MembersSolve
    algorithm: Algorithm
    engine: str
    flights: Flights
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    surroundings: Surroundings
    detached: bool = False
    made: dict[int, Solution] = field(default_factory=dict)
    added: dict[str, Array] = field(default_factory=dict)

    @cached_property
    def maps_field(self) -> bool:
        """Whether `torch.vmap` maps the field over them, as it does not map every operation."""
        evaluate, (t0, _) = MembersField(self.ensemble), self.options.spans
        evaluate.given = self.reach.roots
        t, rows = torch.from_numpy(t0).to(self.u0.dtype), np.arange(len(t0))
        try:
            with torch.no_grad():
                given = t, self.u0.detach(), evaluate.parameters(rows)
                evaluate(*given)
                if evaluate.has_jacobian:
                    evaluate.jacobian(*given)
        except Exception:  # whatever vmap cannot do: each member then has estimates of its own
            return False
        return True

    @property
    def quicker_alone(self) -> bool:
        """Whether each takes all of its steps again in less time: natively, where Newton's
        iterations take most of it.
        """
        assert isinstance(self.algorithm, OneStepMethod)
        return any(isinstance(x, DiagonallyImplicitTableau) for x in self.algorithm.tableaus)

    @property
    def ensemble(self) -> EnsembleProblem:
        """What was solved."""
        return self.solve.ensemble

    @property
    def options(self) -> MemberOptions:
        """Those of all, and of each."""
        return self.solve.options

    @property
    def u0(self) -> Tensor:
        """Flat starts, `(M, N)`."""
        return self.tensors[3]

    @property
    def states(self) -> Tensor:
        """Flat states at the ends of the steps, `(P, N)`."""
        return self.tensors[1]

    @property
    def reach(self) -> Surroundings:
        """What the field can reach."""
        return self.surroundings

    @property
    def steps(self) -> MemberSteps:
        """The accepted steps."""
        return self.flights.accepted

    @property
    def reached(self) -> Array:
        """How many of the times at `saveat` each got to, `(M,)`."""
        return self.flights.counts[:, REACHED]

    @property
    def events(self) -> MemberEvents | None:
        """The events that have ended members, where any are watched."""
        search = self.solve.search
        if search is None:
            return None
        return MemberEvents(search.crossings.first, search.crossings.fired)

    @property
    def codes(self) -> Sequence[ReturnCode]:
        """How each ended."""
        return [RETCODES[code] for code in self.flights.counts[:, CODE].tolist()]

    def final(self) -> Tensor:
        """The states that they got to, `(M, N)`."""
        return self.tensors[2]

    def saved(self) -> Tensor | None:
        """The states at `saveat`, `(M, T, N)`; NaN where a member did not get to."""
        return None if self.solve.options.times is None else self.tensors[0]

    def count(self, name: str) -> Array:
        """A field of `Stats` for each member, `(M,)`, as it stands now."""
        counts: Array = np.zeros(len(self.flights.counts), dtype=np.int64)
        if name in self.counted:
            counts = self.flights.counts[:, self.counted[name]]
        elif name in self.swept:
            counts = self.solve.swept[:, self.swept[name]]
        return counts + self.added[name] if name in self.added else counts

    def add(self, name: str, counts: Array) -> None:
        """Add to a field of `Stats` of each member."""
        self.added[name] = self.added.get(name, 0) + counts

    def solution(self, m: int) -> Solution:
        """The solution of one member, made when it is asked for and kept."""
        if m not in self.made:
            made = self._make(m)
            self.made[m] = made.detach() if self.detached else made
        return self.made[m]

    def _make(self, m: int) -> Solution:
        flights, counts = self.flights, self.flights.counts[m]
        saved, ends, last, starts = self.tensors
        first, behind = flights.offsets[m : m + 2].tolist()
        reached = int(counts[REACHED])
        problem = self.solve.ensemble.member(m)
        flight = Flight(
            log=Notes(flights.steps[first:behind], flights.places[m, :reached]),
            count=behind - first,
            reached=reached,
            retcode=RETCODES[int(counts[CODE])],
            nfe=int(counts[EVALUATIONS]),
            nreject=int(counts[REJECTED]),
            attempt=None,
            finite=bool(torch.isfinite(last[m]).all()),
            event=None if self.events is None else _event(self.events.first[m]),
            changes=[int(steps[m]) for steps in flights.turns],
        )
        stats = Stats(
            **{name: int(self.count(name)[m]) for name in (*self.counted, *self.swept)},
        )
        # The field as the solve saw it, with what the member has of its own.
        seen = copy.copy(self.surroundings)
        seen.roots = {**seen.roots, "p": problem.p}
        options = self.solve.options.of(m)
        member = self.member(problem, options, lambda: seen)
        t0, t1 = self.solve.options.spans
        member.interval = float(t0[m]), float(t1[m])
        member.stats, member.flight, member.u0 = stats, flight, starts[m]
        member.states = States(saved[m, :reached], self.rows(ends, m), last[m])
        return member.solution()

    def member(self, problem: Problem, options: SolveOptions, see: See) -> FlownMember:
        """What makes the solution of one."""
        return _Member(problem, self.algorithm, options, self.engine, see)

    def rows(self, ends: Tensor, m: int) -> Tensor:
        """The states at the ends of one's steps."""
        first, behind = self.flights.offsets[m : m + 2].tolist()
        return ends[first:behind]

    def children(self) -> list[Any]:
        """The tensors with a graph."""
        return list(self.tensors)

    def replaced(self, children: list[Any]) -> NativeMembers:
        """The same with other tensors."""
        saved, ends, last, starts = children
        return dataclasses.replace(self, tensors=(saved, ends, last, starts), made={})

    def detach(self) -> NativeMembers:
        """The same without the graph."""
        detached = self.replaced([x.detach() for x in self.tensors])
        detached.detached = True
        return detached

    def __reduce__(self) -> Any:
        every = tuple(self.solution(m) for m in range(len(self.flights.counts)))
        return ListedMembers, (every, self.solve.options.times)


def _event(index: int) -> int | None:
    return None if index < 0 else int(index)


@dataclass
class _Prepared:
    """What a solve of members needs beside its numbers.

    Attributes:
        methods: which take the steps.
        libraries: the native code, with each of them.
        parameters: the tensors that it reads, the last one all of them.
        own: which of them are each member's own.
        jumps: whether operations without a derivative may hide the time.
    """

    methods: Sequence[Method]
    libraries: list[MemberLibrary]
    parameters: list[Tensor]
    own: list[bool]
    jumps: bool


def _prepare(ensemble: EnsembleProblem, algorithm: OneStepMethod) -> _Prepared:
    """The native code and what it reads."""
    problem, stacked = cast(ODEProblem, ensemble.problem), list(tensors_of(ensemble.p))
    first = map_tensors(lambda x: x[0], ensemble.p) if stacked else problem.p
    leaves = {id(x): i for i, x in enumerate(tensors_of(first))} if stacked else {}
    spec, mass = problem.spec, problem.mass
    methods = Method.all_of(algorithm.tableaus, spec.dtype, spec.device)
    try:
        translated = first_to_succeed(
            first, spec, partial(translate, problem.f, spec, first, at=At.start_of(problem))
        )
        inputs = (*tensors_of(ensemble.u0), ensemble.tspan, *stacked, *translated.parameters)
        is_rosenbrock = isinstance(methods[-1].tableau, RosenbrockTableau)
        recorded = is_rosenbrock and torch.is_grad_enabled() and any(map(moves, inputs))
        # As in Python, steps that are differentiated take the field's own Jacobian.
        back = pulled_program(problem.f, spec, translated) if recorded else None
        given = None if recorded else given_jacobian(problem, algorithm, first, translated.read)
        read, json, pulled, jac = translated.parameters, translated.json, None, None
        field, places = _member_program(translated.program, read, leaves)
        if back is not None:
            more = back.parameters(read)
            pulled, further = _member_program(back.program, more, leaves)
            read, places, json = [*read, *more], [*places, *further], json + back.json
        if given is not None:
            jac, further = _member_program(given.program, given.parameters, leaves)
            read, places = [*read, *given.parameters], [*places, *further]
            json += given.json
        json += "" if mass is None else repr(mass.tolist())
        libraries = [
            member_library(json, field, MemberMethod(x, mass, pulled, jac), spec.dtype)
            if isinstance(x.tableau, ImplicitTableau)
            else member_library(translated.json, field, MemberMethod(x), spec.dtype)
            for x in methods
        ]
    except UnsupportedModule as error:
        raise no_code(error) from error
    own = [place is not None for place in places]
    parameters = [
        x if place is None else stacked[place] for x, place in zip(read, places, strict=True)
    ]
    if given is not None:
        # No gradients flow through what steps are solved with.
        behind = len(read) - len(given.parameters)
        parameters[behind:] = [x.detach() for x in parameters[behind:]]
    return _Prepared(methods, libraries, parameters, own, translated.program.jumps)


def _member_program(
    program: Program, read: Sequence[Tensor], leaves: Mapping[int, int]
) -> tuple[MemberProgram, list[int | None]]:
    """A program, with its parameters that each member has for itself.

    Args:
        program: of one member.
        read: the tensors that it reads.
        leaves: numbers of the leaves of the first member's `p`, by their identities.

    Returns:
        The program; and of each tensor which leaf of `p` it is, or `None`.
    """
    places = [leaves.get(id(x)) for x in read]
    pairs = zip(program.parameters, places, strict=True)
    own = frozenset(parameter.id for parameter, place in pairs if place is not None)
    return MemberProgram(program, own), places


def _check_times(ensemble: EnsembleProblem, method: Method, starts: Tensor) -> None:
    """Refuse gradients of the ends of intervals that the steps of a field lack."""
    for m in {0, len(ensemble) - 1}:
        if hides_time(cast(ODEProblem, ensemble.member(m)), method, starts[m]):
            raise refusal("gradients of times for members whose field hides the time")


def _search(
    ensemble: EnsembleProblem, options: MemberOptions, starts: Tensor
) -> MembersSearch | None:
    """The events that members are watched for.

    Raises:
        CompileError: a condition has no native code.
    """
    events = options.common.events
    if not events:
        return None
    problem = cast(ODEProblem, ensemble.problem)
    try:
        every = [watched(event, problem) for event in events]
    except UnsupportedModule as error:
        raise no_code(error, "an event's condition") from error
    try:
        return MembersSearch(every, Crossings(ensemble, options, starts.detach()))
    except Exception as error:
        # Whatever vmap cannot do; what a condition itself raises, one member raises again.
        raise refusal("conditions of events that torch.vmap cannot map over members") from error


def solve_native_members(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions, engine: str
) -> NativeMembers:
    """Run the members of a checked ensemble as native code.

    Raises:
        CompileError: an option or the field has no native code, or there is no compiler.
    """
    _check(ensemble, algorithm, options)
    assert isinstance(algorithm, OneStepMethod)
    problem = cast(ODEProblem, ensemble.problem)
    starts = ensemble.starts()
    expect_members_fitting(ensemble, algorithm, options, starts)
    prepared = _prepare(ensemble, algorithm)
    free = torch.is_grad_enabled() and moves(ensemble.tspan)
    if prepared.jumps and free:
        _check_times(ensemble, prepared.methods[0], starts)
    search = _search(ensemble, options, starts)
    swept = np.zeros((len(ensemble), 2), dtype=np.int64)
    libraries, tableaus = prepared.libraries, algorithm.tableaus
    solve = _Solve(
        ensemble, options, prepared.own, swept, search, libraries[-1], libraries, tableaus, free
    )
    p = problem.p if ensemble.p is None else ensemble.p
    surroundings = Surroundings({"f": problem.f, "p": p})
    flights, tensors = solve.fly(starts, prepared.parameters)
    if search is not None:
        _note(search.crossings, flights)
    return NativeMembers(solve, algorithm, engine, flights, (*tensors, starts), surroundings)


def _note(crossings: Crossings, flights: Flights) -> None:
    """See which other conditions cross zero in the last steps of members that events have ended."""
    rows = np.flatnonzero(crossings.first >= 0)
    if not len(rows):
        return
    steps, last = flights.accepted, flights.offsets[1:][rows] - 1
    t, h, end = (column[last] for column in (steps.starts, steps.sizes, steps.ends))
    index, before = torch.from_numpy(rows), torch.from_numpy(np.maximum(last - 1, 0))
    # Those of one step begin where the member does.
    single = torch.from_numpy(steps.counts[rows] == 1).unsqueeze(1)
    u = torch.where(single, flights.passengers.u0[index], flights.ends.detach()[before])
    u1 = flights.last.detach()[index]
    crossings.note(Steps(rows, np.arange(len(rows)), t, h, end), u, u1)
