"""Where fixed steps lie: found by the first solve, and the same for all that differ in states.

A plan says what the steps are, whatever the state and the field make of them. So a later solve with
the same options takes the steps one after the other, with nothing to decide and nothing to note.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import StateSpec
from pysciml_node.replay.stages import FEW, FlatFunction, Method, Stages
from pysciml_node.replay.vectors import RecordedVectors, Vectors, vectors_like
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.record import Outcome, Record
from pysciml_node.steps.saver import may_thin

# Entries of a state up to which the memory of stages is kept for the next solve.
_SHORT = 2**12

# Steps, and saved times, of all timetables together: they take a few tens of megabytes.
_MOST_NOTED = 2**16

# What a timetable takes besides, in steps.
_BASE = 16

# Steps whose times are made at once.
_AT_ONCE = 64

_ENDS = struct.Struct("dd").pack


class _Step(NamedTuple):
    """A step, and the saved times in it.

    Attributes:
        t: where it begins.
        h: its signed size.
        goes_on: whether the next one begins in the same field.
        theta: of saved times inside, where in the step they lie, if there are any.
        at_end: how many saved times are its end.
    """

    t: float
    h: float
    goes_on: bool
    theta: Tensor | None
    at_end: int


class Timetable:
    """The steps of a solve that has reached its end.

    Args:
        problem: what was solved.
        algorithm: how.
        record: its steps, which nobody changes.
        method: that took them.
        marks: start, stops and end.

    Attributes:
        evaluations: how often the field is evaluated, at most.
    """

    def __init__(
        self,
        problem: ODEProblem,
        algorithm: Algorithm,
        record: Record,
        method: Method,
        marks: tuple[float, ...],
    ) -> None:
        self.method, self.marks = method, marks
        self._spec: StateSpec = problem.spec
        self._algorithm, self._ends = algorithm, _ENDS(*problem.tspan)
        self._stages = stages = Stages(method, _no_field, marks, RecordedVectors())
        # What holds the stages of solves that have run, for the next ones.
        self._spare: list[Vectors] = []
        size = sum(problem.spec.sizes)
        self._short = problem.spec.device.type == "cpu" and size <= _SHORT
        self._record, self._at_start = record, len(record.at_end.get(0, ()))
        self._nothing = method.b.tensor.new_empty((0, size))
        self._steps = [_step(record, n) for n in range(len(record.sizes))]
        # Outputs inside of steps need more stages, and the next step the last one.
        tableau, self._inside = method.tableau, bool(record.inside)
        self._count = method.all_stages if self._inside else tableau.stages - tableau.fsal
        self._end = method.rows[tableau.stages - 1] if tableau.fsal else method.b
        self.evaluations = len(self._steps) * self._count
        # The times of stages: each solve has tensors of its own for them.
        numbers = [
            stages.numbers(t, h)[: self._count]
            for t, h in zip(record.times, record.sizes, strict=False)
        ]
        self._numbers = numbers if self.evaluations <= FEW else []
        # Of more than a few they are copied, those of some steps at once.
        times = torch.tensor(numbers, dtype=method.nodes.dtype).to(method.nodes.device)
        self._times = torch.split(times.flatten(), _AT_ONCE * self._count)

    @classmethod
    def of(
        cls, problem: ODEProblem, algorithm: Algorithm, options: SolveOptions
    ) -> Timetable | None:
        """What was noted for a solve, if there was one like it."""
        table = _noted.of(options)
        if (
            table is None
            or table._spec is not problem.spec
            or table._algorithm is not algorithm
            or not type(problem.tspan[0]) is type(problem.tspan[1]) is float
            or table._ends != _ENDS(*problem.tspan)
        ):
            return None
        return table

    def solve(self, field: FlatField, u: Tensor) -> Outcome:
        """Take the steps without gradients.

        Args:
            field: that is evaluated.
            u: the state at the start, `(N,)`.
        """
        spare, lends = self._spare, self._short and _is_usual(u)
        vectors: Vectors
        try:
            vectors = (spare if lends else []).pop()
        except IndexError:
            vectors = vectors_like(u, self.method.all_stages)
        if self._inside:
            outcome = self.take(self._stages.afresh(field, vectors), u, None)
        else:
            outcome = self._in_sums(field, vectors, u)
        if lends:
            spare.append(vectors)
        return outcome

    def take_recorded(self, field: FlatFunction, u: Tensor) -> Outcome:
        """Take the steps in a graph, where no states are saved.

        Args:
            field: that is evaluated, in the state's shape.
            u: the state at the start, which need not be flat where it is one tensor.
        """
        assert not self._inside
        return self._in_sums(field, RecordedVectors(), u)

    def _in_sums(self, field: FlatFunction, vectors: Vectors, u: Tensor) -> Outcome:
        """Take the steps, inside of which no states are saved."""
        rows, end = self.method.rows, self._end
        states, saved = [u], []
        if self._at_start:
            saved.append(u.expand(self._at_start, -1))
        for step, times in zip(self._steps, self._new_times(), strict=True):
            for i, t in enumerate(times):
                argument = vectors.combine(u, step.h, rows[i]) if i else u
                vectors.put(i, field(t, argument))
                if i:
                    vectors.recycle(argument)
            u = vectors.combine(u, step.h, end)
            if step.at_end:
                saved.append(u.expand(step.at_end, -1))
            states.append(u)
        return Outcome(self._record.copy(), states, torch.cat(saved) if saved else self._nothing)

    def take(self, stages: Stages, u: Tensor, k: Tensor | None) -> Outcome:
        """Take the steps.

        Args:
            stages: of the method.
            u: the state at the start, `(N,)`.
            k: the derivative there, where it is known.
        """
        states, saved = [u], []
        if self._at_start:
            saved.append(u.expand(self._at_start, -1))
        for step, times in zip(self._steps, self._new_times(), strict=True):
            t, h, goes_on, theta, at_end = step
            stages.expect(t, h, times)
            if k is None:
                stages.start(t, h, u)
            else:
                stages.begin(k)
            u1 = stages.solution(t, h, u, with_error=False)
            if theta is not None:
                saved.append(stages.dense(t, h, u, theta))
            if at_end:
                saved.append(u1.expand(at_end, -1))
            k, u = stages.leave(goes_on), u1
            states.append(u)
        return Outcome(self._record.copy(), states, torch.cat(saved) if saved else self._nothing)

    def _new_times(self) -> Iterator[tuple[Tensor, ...]]:
        """The times of the stages of each step, as tensors that no other solve has."""
        if self._numbers:
            yield from map(self._stages.times_of, self._numbers)
            return
        for times in self._times:
            each = iter(times.clone().unbind())
            yield from zip(*[each] * self._count, strict=True)


def _is_usual(u: Tensor) -> bool:
    """Whether what is made like a state may serve another one: it is of no class, and no mode."""
    return type(u) is Tensor and not (
        torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    )


def _no_field(t: Tensor, u: Tensor) -> Tensor:
    """Stands for the field in stages that no solve takes."""
    return u


def _step(record: Record, n: int) -> _Step:
    t, h, inside = record.times[n], record.sizes[n], record.fractions(n)
    return _Step(
        t,
        h,
        record.stops[n] is None,
        torch.tensor(inside, dtype=torch.float64) if inside else None,
        len(record.at_end.get(n + 1, ())),
    )


class _Noted:
    """The timetables by their options' identity: the oldest ones go where all take too much."""

    def __init__(self) -> None:
        # Nothing here needs a lock, which could not be waited for where a weak reference ends.
        self._tables: dict[int, tuple[weakref.ref[SolveOptions], Timetable, int]] = {}

    def of(self, options: SolveOptions) -> Timetable | None:
        """What was noted for these very options."""
        noted = self._tables.get(id(options))
        return noted[1] if noted is not None and noted[0]() is options else None

    def add(self, options: SolveOptions, table: Timetable, size: int) -> None:
        """Note a timetable.

        Args:
            options: whose it is.
            table: the timetable.
            size: what it takes, in steps.
        """
        tables, key = self._tables, id(options)
        tables.pop(key, None)
        tables[key] = weakref.ref(options, lambda _: tables.pop(key, None)), table, size
        oldest_first = list(tables.items())
        total = sum(size for _, (_, _, size) in oldest_first)
        for key, (_, _, size) in oldest_first:
            if total <= _MOST_NOTED:
                break
            tables.pop(key, None)
            total -= size


_noted = _Noted()


def note_steps(
    problem: ODEProblem,
    algorithm: Algorithm,
    options: SolveOptions,
    outcome: Outcome,
    stages: Stages,
) -> None:
    """Have later solves with the same options take these steps, where they are fixed.

    Args:
        problem: what was solved.
        algorithm: how.
        options: of the solve.
        outcome: what it has left.
        stages: that took the steps.
    """
    record, states, _ = outcome
    if (
        type(options.controller) is FixedStep
        and _is_usual(states[0])
        and isinstance(algorithm, ExplicitRungeKutta)
        and not (options.events or options.progress)
        and options.saveat_tensor is None
        and type(problem.tspan[0]) is type(problem.tspan[1]) is float
        and record.retcode is ReturnCode.Success
        and not (record.thinned or (options.saveat and may_thin(states)))
    ):
        size = _BASE + len(record.sizes) + record.saved
        if size > _MOST_NOTED:
            return
        table = Timetable(problem, algorithm, record.copy(), stages.method, stages.marks)
        _noted.add(options, table, size)
