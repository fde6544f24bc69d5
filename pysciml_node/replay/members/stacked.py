"""Members whose steps and states stand in common tensors; single solutions on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.implicit import ImplicitMethod
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.problems.ensemble import Array, EnsembleProblem, OfOne
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.state import map_tensors
from pysciml_node.replay.newton import Accuracy
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.portable import mapped_problem, portable_problem
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats, Trajectory
from pysciml_node.steps.memory import LATER
from pysciml_node.steps.record import Kept, Record
from pysciml_node.steps.step import Attempt
from pysciml_node.steps.surroundings import Surroundings


@dataclass
class MemberSteps:
    """The accepted steps of all members, member after member, `P` of them.

    Attributes:
        offsets: the steps of member `m` are `offsets[m]` to `offsets[m + 1]`; `(M + 1,)`.
        starts: their starts, `(P,)` in float64.
        sizes: their signed sizes, `(P,)`.
        ends: their ends, `(P,)`.
        errors: their scaled errors, `(P,)`; NaN for fixed steps.
        stops: which of its member's stops each ends on, or -1, `(P,)`.
        methods: which of two methods that take turns took each, `(P,)`; `None` with one.
    """

    offsets: Array
    starts: Array
    sizes: Array
    ends: Array
    errors: Array
    stops: Array
    methods: Array | None = None

    @property
    def counts(self) -> Array:
        """How many steps each member has taken, `(M,)`."""
        return np.diff(self.offsets)

    def of(self, m: int) -> slice:
        """Where the steps of a member stand."""
        return slice(int(self.offsets[m]), int(self.offsets[m + 1]))

    def later_starts(self, t0: Array, u0: Tensor, states: Tensor) -> Iterator[tuple[Array, Tensor]]:
        """Times `(M,)` and states `(M, N)` at which some steps of all begin, but for the first.

        Args:
            t0: starts of the intervals, `(M,)`.
            u0: states there, `(M, N)`.
            states: at the ends of the steps, `(P, N)`.
        """
        for part in range(1, LATER + 1):
            number = np.minimum(part * self.counts // LATER, self.counts - 1)
            members = np.flatnonzero(number > 0)
            if len(members):
                steps = (self.offsets[:-1] + number)[members]
                t = t0.copy()
                t[members] = self.starts[steps]
                into, of = (torch.from_numpy(x).to(u0.device) for x in (members, steps - 1))
                yield t, u0.index_copy(0, into, states.index_select(0, of))

    def first(self, counts: Array) -> tuple[MemberSteps, Array]:
        """The first steps of each member, as many as `counts` says, and their places in all."""
        places = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(self.offsets, counts, strict=False)]
        )
        columns = (self.starts, self.sizes, self.ends, self.errors, self.stops)
        offsets = np.concatenate(([0], np.cumsum(counts)))
        return MemberSteps(offsets, *(column[places] for column in columns)), places


def good_steps(
    steps: MemberSteps, states: Tensor, codes: list[ReturnCode], thinned: bool = False
) -> Array | None:
    """How many steps of each member lead to finite states; `None` where all do.

    Args:
        steps: where no error estimate has watched all of the state.
        states: at their ends, `(P, N)`; where they are thinned the last of each member.
        codes: how each ended; changed in place.
        thinned: whether only the last states are there, which tell not where it went wrong.
    """
    if not len(states):
        return None
    finite = torch.isfinite(states.detach()).all(1).cpu().numpy()
    counts = steps.counts
    ends = np.arange(len(counts)) if thinned else np.maximum(steps.offsets[1:] - 1, 0)
    bad = np.flatnonzero(~finite[ends] & (counts > 0))
    kept = counts.copy()
    for m in bad:
        if codes[m].successful or codes[m] is ReturnCode.Unstable:
            codes[m] = ReturnCode.Unstable
            if not thinned:
                kept[m] = int(np.argmin(finite[steps.of(int(m))]))
    return kept if len(bad) and not thinned else None


@dataclass
class MemberEvents:
    """The events that have ended members.

    Attributes:
        first: the one that has ended each, or -1, `(M,)`.
        fired: all whose conditions cross zero there, `(M, E)`.
    """

    first: Array
    fired: Array


class MembersUpToEvents(Members, Protocol):
    """Members that have been solved at once, each up to its first event."""

    @property
    def events(self) -> MemberEvents | None:
        """The events that have ended them, where any are watched."""

    @property
    def steps(self) -> MemberSteps:
        """Their accepted steps."""

    @property
    def reached(self) -> Array:
        """How many of the times at `saveat` each got to, `(M,)`."""

    def add(self, name: str, counts: Array) -> None:
        """Add to a field of `Stats` of each member."""


@dataclass
class StackedMembers:
    """The results of members that an engine has solved in one batch.

    Attributes:
        ensemble: what was solved.
        algorithm: how.
        engine: name of the engine.
        options: of all, and of each.
        codes: how each ended.
        columns: the fields of `Stats` for each, `(M,)`.
        steps: the accepted steps.
        u0: flat starts, `(M, N)`.
        states: flat states at the ends of the steps, `(P, N)`; where they are thinned the last of
            each member, `(M, N)`.
        at_times: states at `saveat`, `(M, T, N)`, NaN where a member did not get to; or `None`.
        reached: how many of these times each got to, `(M,)`.
        surroundings: what the field can reach.
        thinned: whether only the last state of each member is kept.
        failures: the last attempts of failed members, by member.
        events: that have ended members, where any are watched.
        detached: whether gradients have been left behind.
        rounded_times: whether times are as precise as states, and not doubles.
        maps_field: whether `torch.vmap` maps the field over them.
        quicker_alone: as of `MappedMembers`.
    """

    rounded_times: ClassVar[bool] = False
    maps_field: ClassVar[bool] = True
    quicker_alone: ClassVar[bool] = False

    ensemble: EnsembleProblem
    algorithm: Algorithm
    engine: str
    options: MemberOptions
    codes: Sequence[ReturnCode]
    columns: dict[str, Array]
    steps: MemberSteps
    u0: Tensor
    states: Tensor
    at_times: Tensor | None
    reached: Array
    surroundings: Surroundings | None
    thinned: bool = False
    failures: dict[int, Attempt] = field(default_factory=dict)
    events: MemberEvents | None = None
    detached: bool = False
    _made: dict[int, Solution] = field(default_factory=dict, init=False)

    def final(self) -> Tensor:
        """The states that they got to, `(M, N)`."""
        return self.state(self._last())

    def _last(self) -> Tensor:
        if self.thinned:
            return self.states
        last = torch.from_numpy(self.steps.offsets[1:] - 1).to(self.u0.device)
        stuck = self.steps.counts == 0
        if not stuck.any():
            return self.states.index_select(0, last)
        # Those that have taken no step are where they started.
        places = np.where(stuck, np.arange(len(stuck)), len(stuck) + self.steps.offsets[1:] - 1)
        index = torch.from_numpy(places).to(self.u0.device)
        return torch.cat((self.u0, self.states)).index_select(0, index)

    def state(self, stepped: Tensor) -> Tensor:
        """The flat states in what was stepped."""
        return stepped

    def saved(self) -> Tensor | None:
        """The states at `saveat`, `(M, T, N)`; NaN where a member did not get to."""
        return None if self.at_times is None else self.state(self.at_times)

    def count(self, name: str) -> Array:
        """A field of `Stats` for each member, `(M,)`, as it stands now."""
        column = self.columns.get(name)
        counts = np.zeros(len(self.codes), np.int64) if column is None else column.copy()
        for m, solution in self._made.items():
            counts[m] = getattr(solution.stats, name)
        return counts

    def add(self, name: str, counts: Array) -> None:
        """Add to a field of `Stats` of each member."""
        self.columns[name] = self.columns.get(name, 0) + counts
        for m, solution in self._made.items():
            stats = solution.stats
            setattr(stats, name, getattr(stats, name) + int(counts[m]))

    def solution(self, m: int) -> Solution:
        """The solution of one member, made when it is asked for and kept."""
        if m not in self._made:
            self._made[m] = self._make(m)
        return self._made[m]

    def _make(self, m: int) -> Solution:
        problem, options, steps = self.ensemble.member(m), self.options.of(m), self.steps
        spec, own = problem.spec, steps.of(m)
        stats = Stats(**{name: int(column[m]) for name, column in self.columns.items()})
        landings = options.landings(problem.direction)
        t0, t1 = (float(ends[m]) for ends in self.options.spans)
        record = Record(
            times=[t0, *steps.ends[own].tolist()],
            sizes=steps.sizes[own].tolist(),
            errors=steps.errors[own].tolist(),
            stops=[None if stop < 0 else stop for stop in steps.stops[own].tolist()],
            saved=int(self.reached[m]),
            naccept=stats.naccept,
            nreject=stats.nreject,
            retcode=self.codes[m],
            last=self.failures.get(m),
            marks=(t0, *options.tstops, t1),
            t1_stop=len(landings),
            thinned=self.thinned and len(steps.sizes[own]) > 1,
            # In the continuous equation no step moves with the ends of the interval.
            fixed=not options.adjoint.discrete,
        )
        if self.events is not None and self.events.first[m] >= 0:
            record.event = int(self.events.first[m])
        start, ends = self._pieces
        states = [start[m], *(ends[m].unbind() if len(record.sizes) else ())]
        reach = OfMember(self.reach, m, self.ensemble)
        trajectory = self.trajectory(m, problem, Kept(record, states), stats, options, reach)
        return Solution(
            problem=problem,
            algorithm=self.algorithm,
            engine=self.engine,
            retcode=self.codes[m],
            stats=stats,
            t=self._times(m, problem, record),
            # A copy: whoever changes it in place does not change the steps.
            u1=spec.unflatten(self.state(states[-1]).clone()),
            trajectory=trajectory,
            saved=None
            if self.at_times is None
            else spec.unflatten(self.state(self.at_times[m, : record.saved])),
            detached=self.detached,
        )

    def trajectory(
        self,
        m: int,
        problem: Problem,
        kept: Kept,
        stats: Stats,
        options: SolveOptions,
        surroundings: Surroundings,
    ) -> Trajectory:
        """The steps of one member, with dense output."""
        assert isinstance(problem, ODEProblem)
        assert isinstance(self.algorithm, ExplicitRungeKutta | ImplicitMethod)
        spec, tableaus = problem.spec, self.algorithm.tableaus
        accuracy = Accuracy.of(options, spec.dtype, sum(spec.sizes))
        methods = Method.all_of(tableaus, spec.dtype, spec.device, accuracy=accuracy)
        return TorchTrajectory(
            problem,
            methods,
            kept,
            stats,
            options,
            surroundings=surroundings,
            rounded_times=self.rounded_times,
        )

    @cached_property
    def _pieces(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Starts and step states of each: one node of the graph for all, not one for each."""
        counts = [1] * len(self.codes) if self.thinned else self.steps.counts.tolist()
        return self.u0.unbind(), torch.split(self.states, counts)

    def _times(self, m: int, problem: Problem, record: Record) -> Tensor:
        """The times of a member's `u`."""
        if self.at_times is None:
            return problem.time_tensor(record.times)
        saveat = self.options.of(m).saveat or ()
        return problem.time_tensor(list(saveat[: record.saved]))

    @property
    def reach(self) -> Surroundings:
        """What the field can reach."""
        if self.surroundings is None:
            problem, p = self.ensemble.problem, self.ensemble.p
            functions = roots_of(problem)
            self.surroundings = Surroundings({**functions, "p": problem.p if p is None else p})
        return self.surroundings

    def children(self) -> list[Any]:
        """The tensors."""
        return [self.u0, self.states, self.at_times]

    def replaced(self, children: list[Any]) -> StackedMembers:
        """The same with other tensors."""
        u0, states, at_times = children
        return dataclasses.replace(self, u0=u0, states=states, at_times=at_times)

    def detach(self) -> StackedMembers:
        """The same without the graph."""
        changes = {
            name: map_tensors(Tensor.detach, getattr(self.ensemble, name))
            for name in ("u0", "p", "tspan")
        }
        problem = mapped_problem(self.ensemble.problem, Tensor.detach)
        ensemble = dataclasses.replace(self.ensemble, problem=problem, **changes)
        copy = self.replaced([map_tensors(Tensor.detach, x) for x in self.children()])
        return dataclasses.replace(copy, ensemble=ensemble, surroundings=None, detached=True)

    def __getstate__(self) -> dict[str, Any]:
        # The pieces are made again when somebody looks.
        copy = self.detach()
        copy.ensemble = dataclasses.replace(
            copy.ensemble, problem=portable_problem(copy.ensemble.problem)
        )
        return copy.__dict__


class OfMember(Surroundings):
    """What the field of one member can reach: the same as that of all, with its own `p`.

    Args:
        whole: of all members.
        m: which member.
        ensemble: says whether members have parameters of their own.
    """

    def __init__(self, whole: Surroundings, m: int, ensemble: EnsembleProblem) -> None:
        self.__dict__.update({k: v for k, v in whole.__dict__.items() if k != "roots"})
        self._whole, self._m, self._ensemble = whole, m, ensemble

    @property
    def roots(self) -> dict[str, Any]:  # type: ignore[override]
        """The field and the parameters of the member, as they stand now."""
        roots = dict(self._whole.roots)
        own = self._ensemble.p is not None
        if own:
            roots["p"] = map_tensors(lambda x: x[self._m], roots["p"])
        if self._ensemble.batched:
            roots["f"] = OfOne(roots["f"], own)
        return roots


def roots_of(problem: Problem) -> dict[str, Any]:
    """The functions of a problem by the names that fields read them by."""
    found: dict[str, Any] = {"f": getattr(problem, problem.functions[0])}
    return {**found, **{name: getattr(problem, name) for name in problem.functions[1:]}}
