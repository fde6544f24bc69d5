"""Dense output and local estimates of a solve, by replaying single steps."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DirectAdjoint
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.algorithms.implicit import ImplicitMethod
from pysciml_node.algorithms.options import SolveOptions, without_closures
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.comparison import Comparison, as_solved, coarser
from pysciml_node.replay.first_step import initial_step
from pysciml_node.replay.implicit import stages_for
from pysciml_node.replay.measure import checkpointed, measure_steps
from pysciml_node.replay.newton import Accuracy, left_missing
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import Real, RecordedVectors, vectors_like
from pysciml_node.solutions.solution import Explanation, Stats, StepEstimate, StopGradient
from pysciml_node.steps.explain import explain_attempt
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.guard import guard
from pysciml_node.steps.memory import Evaluate, evaluations, some_of
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.record import Kept, Record, Recorded, check_discrete
from pysciml_node.steps.repeated import Repeated
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.tableaus import ImplicitTableau


def from_moving_start(problem: ODEProblem, field: FlatField, u0: Tensor) -> Tensor:
    """The state at the start, as one at a fixed time that moves when the start does.

    Args:
        problem: what is solved, with a mass matrix that has an inverse, or none.
        field: evaluates its derivative.
        u0: the initial state `(N,)`, which does not move.
    """
    start = problem.tspan[0]
    if not isinstance(start, Tensor) or not moves(start):
        return u0
    rate = field(problem.time_tensor([problem.t0])[0], u0)
    if problem.mass is not None:
        rate = torch.linalg.solve(problem.mass, rate)
    shift = (start - start.detach()).to(u0.dtype.to_real()).reshape(())
    return u0 - shift * rate


@dataclass
class TorchTrajectory(Recorded):
    """The accepted steps of a solve with their states, and what can be had from them.

    Gradients flow through the step states, whichever adjoint produced them, and through the
    replayed step itself.
    """

    problem: ODEProblem
    methods: tuple[Method, ...]
    load: Callable[[], tuple[Record, list[Tensor]]]
    stats: Stats
    options: SolveOptions
    make_field: Callable[[ODEProblem], FlatField] = FlatField
    surroundings: Surroundings | None = None
    # Of the solve, where a copy has another.
    precision: torch.dtype | None = None
    # Whether times of the solve were as precise as its states, and not doubles.
    rounded_times: bool = False

    def __post_init__(self) -> None:
        if self.surroundings is None:
            self.surroundings = Surroundings({"f": self.problem.f, "p": self.problem.p})

    @property
    def method(self) -> Method:
        """The first of the methods, for the kind of its numbers."""
        return self.methods[0]

    def _as_seen(self) -> AbstractContextManager[Comparison]:
        """Everything that the field can reach as the solve saw it; compares the steps."""
        assert self.surroundings is not None
        return as_solved(self.surroundings, self.precision)

    def _repeated(self) -> Repeated:
        """What the field can reach, before steps are taken again."""
        assert self.surroundings is not None
        return Repeated(self.surroundings, self.problem.spec.device)

    def _evaluations(self, places: Iterable[tuple[float, Tensor]]) -> Iterator[Evaluate]:
        """Evaluations of the field as it is seen when they are asked for."""
        _, field = self._stages(self.method)
        at = ((self.problem.time_tensor([t])[0], u) for t, u in places)
        yield from evaluations((field,), at)

    def _compare(self, comparison: Comparison, n: int, stages: Stages) -> None:
        """Compare the end of step `n`, of its stages as far as they are there, with the solve's."""
        start, end = (u.detach() for u in self.flat_states[n : n + 2])
        with torch.no_grad():
            times, sizes = self.record.times, self.record.sizes
            again = stages.solution(times[n], sizes[n], start, with_error=False)
            implicit = isinstance(stages.method.tableau, ImplicitTableau)
            missing = left_missing(again.dtype) if implicit else 0.0
            late = abs(times[n] / sizes[n]) if self.rounded_times else None
            comparison.add(again, end, start, missing, late)

    def mapped(self, states: list[Tensor], change: Callable[[Any], Any]) -> TorchTrajectory:
        """The same trajectory with other states at `times`, and its problem changed."""
        problem: ODEProblem = change(self.problem)
        options = without_closures(self.options)
        return dataclasses.replace(
            self,
            problem=problem,
            methods=Method.all_of(
                [method.tableau for method in self.methods],
                problem.spec.dtype,
                problem.spec.device,
                self.method.linsolve,
                Accuracy.of(options, problem.spec.dtype, sum(problem.spec.sizes)),
            ),
            surroundings=None,
            load=Kept(self.record, states),
            options=options,
            precision=coarser(self.precision or self.problem.spec.dtype, problem.spec.dtype),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A field that lives in another process's Julia is evaluated by torch.
        return {**super().__getstate__(), "make_field": FlatField, "surroundings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def states(self) -> Tensor:
        """The states at `times`, `(n + 1, N)`."""
        return torch.stack(self.every_state)

    def _method_of(self, n: int) -> Method:
        """What took step `n`."""
        return self.methods[self.record.method_of(n)]

    def _stages(self, method: Method) -> tuple[Stages, FlatField]:
        field = self.make_field(self.problem)
        assert self.surroundings is not None
        field.given = self.surroundings.roots
        vectors = (
            RecordedVectors()
            if recording()
            else vectors_like(self.flat_states[0], method.all_stages)
        )
        return stages_for(method, field, self.record.marks, vectors, self.problem.mass, 2), field

    def step_of(self, t: float) -> int:
        """Index of the accepted step that contains `t` (the later one at a boundary)."""
        sign = self.record.direction
        n = bisect_right(self.record.times, sign * t, key=lambda x: sign * x) - 1
        return min(max(n, 0), len(self.record.sizes) - 1)

    def _moving_step(self, n: int) -> tuple[Real, Real]:
        """Start and size of step `n`, as they move with the ends of the interval.

        Free steps keep their sizes when `t0` moves, until a stop fixes where one ends.
        """
        record, problem = self.record, self.problem
        start: Real = record.times[n]
        h: Real = record.sizes[n]
        if record.fixed or not recording():
            return start, h
        t0, t1 = (
            (t - t.detach()).double().reshape(()) if isinstance(t, Tensor) and moves(t) else 0.0
            for t in problem.tspan
        )
        if isinstance(t0, Tensor) and all(stop is None for stop in record.stops[:n]):
            start = start + t0
        if record.stops[n] is not None:
            end = t1 if record.stops[n] == record.t1_stop else 0.0
            if isinstance(end, Tensor) or isinstance(start, Tensor):
                h = record.times[n + 1] + end - start
        return start, h

    def _known_states(self, n: int, moving: bool) -> dict[float, Tensor]:
        """The states at the ends of step `n` by time; a moving step has them at fixed times only.

        The ends of the interval belong to it: the states there move with them.
        """
        known = {self.record.times[n + i]: (n + i, self.every_state[n + i]) for i in (0, 1)}
        last = len(self.record.sizes)
        return {t: u for t, (i, u) in known.items() if not moving or i in (0, last)}

    def evaluate(self, times: Tensor) -> Tensor:
        """Dense output `(m, N)` at `times` `(m,)`."""
        if not self.record.sizes:
            return self.flat_states[0].expand(times.numel(), -1)
        host = times.detach().double().tolist()
        groups: dict[int, list[int]] = {}
        for i, t in enumerate(host):
            groups.setdefault(self.step_of(t), []).append(i)
        rows: list[Tensor | None] = [None] * len(host)
        repeated = self._repeated()
        with self._as_seen() as comparison:
            self._fill(comparison, rows, times, host, groups)
        found = torch.stack([row for row in rows if row is not None])
        asked = ((host[i], found[i]) for i in some_of([some[-1] for some in groups.values()]))
        repeated.expect_same((found,), self._evaluations(asked))
        guard((found,), self.surroundings)
        return found

    def _fill(
        self,
        comparison: Comparison,
        rows: list[Tensor | None],
        times: Tensor,
        host: list[float],
        groups: dict[int, list[int]],
    ) -> None:
        """Put the dense output at `times` into `rows`, step by step."""
        parts = [self._stages(method) for method in self.methods]
        for n, members in groups.items():
            u, (start, h) = self.every_state[n], self._moving_step(n)
            ends = self._known_states(n, moving=isinstance(h, Tensor) or isinstance(start, Tensor))
            inside = [i for i in members if moves(times) or host[i] not in ends]
            for i in set(members).difference(inside):
                rows[i] = ends[host[i]]
            if not inside:
                continue
            stages, field = parts[self.record.method_of(n)]
            stages.count = 0
            if n == 0 and self.record.fixed and recording():
                u = from_moving_start(self.problem, field, u)
            theta = (times[inside].double() - start) / h
            for i, row in zip(inside, stages.dense(start, h, u, theta), strict=True):
                rows[i] = row
            self._compare(comparison, n, stages)
        self.stats.nfe += sum(field.nfe for _, field in parts)

    def stiffness(self) -> Tensor:
        """Stiffness estimate of each accepted step, `(n,)`."""
        with torch.no_grad(), self._as_seen() as comparison:
            parts = [self._stages(method) for method in self.methods]
            estimates = []
            for n, h in enumerate(self.record.sizes):
                stages, _ = parts[self.record.method_of(n)]
                stages.count = 0
                estimates.append(stages.stiffness(self.record.times[n], h, self.every_state[n]))
                if stages.count:
                    self._compare(comparison, n, stages)
        self.stats.nfe += sum(field.nfe for _, field in parts)
        return torch.stack(estimates) if estimates else self.method.nodes.new_empty(0)

    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """One step of `algorithm` from the solution at `t`.

        Args:
            t: where it starts.
            algorithm: an explicit method with an embedded pair.
            stop_gradient: treat the starting state (`"state"`), and the first stage (`True`), as
                constants.
            dt: positive size of the step; default Hairer's first step from there.
        """
        if not isinstance(algorithm, ExplicitRungeKutta | ImplicitMethod):
            raise TypeError(
                f"a local step needs a method of the embedded engine, not {algorithm!r}.\n"
                "  Name one: LocalError(..., algorithm=Tsit5())."
            )
        method = Method.of(algorithm.tableau, self.problem.spec.dtype, self.problem.spec.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
            u = self._state_at(t)
        with self._as_seen():
            made = self.estimate_from(t, u, method, stop_gradient, dt)
        guard((made.error, made.stiffness), self.surroundings)
        return made

    def _state_at(self, t: float) -> Tensor:
        """The state at a time, where the step there ends as it did."""
        if t in self.record.times and self.record.sizes:
            with self._as_seen() as comparison:
                n = self.step_of(t)
                stages, field = self._stages(self._method_of(n))
                self._compare(comparison, n, stages)
                self.stats.nfe += field.nfe
        return self.evaluate(self.method.nodes.new_tensor([t], dtype=torch.float64))[0]

    def estimate_from(
        self, t: float, u: Tensor, method: Method, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """As `estimate`, from a state that is known."""
        repeated = self._repeated()
        stages, field = self._stages(method)
        norm = ErrorNorm(self.options.tolerances)
        with torch.set_grad_enabled(torch.is_grad_enabled() and stop_gradient is not True):
            k = field(stages.times(t, 0.0)[0], u)
        span = self.record.marks[-1] - t  # the problem's end may be a tensor that has moved on
        with torch.no_grad():
            if dt is None:
                h = initial_step(field, method, norm, t, u.detach(), k.detach(), span)
            else:
                h = math.copysign(min(dt, abs(span)), span)
        stages.begin(k)
        estimate = self._measure(stages, norm, t, h, u)
        self.stats.nfe += field.nfe
        places = self._evaluations([(t, u), (t + h, u)])
        repeated.expect_same((estimate.error, estimate.stiffness), places)
        return estimate

    def step_estimates(self) -> list[StepEstimate]:
        """Error and stiffness of every accepted step, differentiable with respect to all.

        Each step is evaluated again, and once more in backward, so that no graph is kept. With
        `DirectAdjoint` it is a checkpoint a step, which has higher derivatives too.

        Raises:
            ValueError: the solve's adjoint is a continuous one.
        """
        check_discrete(self.options.adjoint)
        sizes = self.record.sizes
        if not sizes:
            return []
        starts, repeated = self.every_state[: len(sizes)], self._repeated()
        if not torch.is_grad_enabled():
            with self._as_seen() as comparison:
                estimates = [self._replay(n, u, comparison) for n, u in enumerate(starts)]
        elif isinstance(self.options.adjoint, DirectAdjoint):
            estimates = [checkpointed(self._replay_as_seen, n, u) for n, u in enumerate(starts)]
        else:
            assert self.surroundings is not None
            rows = measure_steps(self._replay, starts, self.surroundings, self.precision)
            estimates = [(error, stiffness) for error, stiffness in rows]
        places = some_of([*zip(self.record.times, starts, strict=False)])
        repeated.expect_same(chain.from_iterable(estimates), self._evaluations(places))
        return [
            StepEstimate(self.method.nodes.new_tensor(h), error, stiffness)
            for h, (error, stiffness) in zip(sizes, estimates, strict=True)
        ]

    def _replay_as_seen(self, n: int, u: Tensor) -> tuple[Tensor, Tensor]:
        with self._as_seen() as comparison:
            return self._replay(n, u, comparison)

    def _replay(self, n: int, u: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
        """Error and stiffness of an accepted step from the state at its start."""
        stages, field = self._stages(self._method_of(n))
        norm = ErrorNorm(self.options.tolerances)
        estimate = self._measure(stages, norm, self.record.times[n], self.record.sizes[n], u)
        self._compare(comparison, n, stages)
        self.stats.nfe += field.nfe
        return estimate.error, estimate.stiffness

    @staticmethod
    def _measure(stages: Stages, norm: ErrorNorm, t: float, h: float, u: Tensor) -> StepEstimate:
        """One step from `u`, with the first stage evaluated already or not."""
        u1 = stages.solution(t, h, u, with_error=True)
        error = stages.error(h, u, u1, norm)
        dt = stages.method.nodes.new_tensor(h)
        return StepEstimate(dt, error, stages.stiffness(t, h, u))

    def explain(self, options: SolveOptions) -> Explanation:
        """The last attempt, and the stiffness of the last accepted step."""
        rates = {"f(t0, u0)": self.make_field(self.problem)}
        lines = explain_attempt(self.record.last, self.flat_states[0], rates, options, self.problem)
        sizes = [] if self.record.thinned else self.record.sizes
        if not sizes or not torch.isfinite(self.flat_states[-1]).all():
            return Explanation(tuple(lines))
        n, h = len(sizes) - 1, sizes[-1]
        method = self._method_of(n)
        radius = method.tableau.stability_radius
        if not radius:
            return Explanation(tuple(lines))
        with torch.no_grad():
            stages, _ = self._stages(method)
            eigenvalue = float(stages.stiffness(self.record.times[n], h, self.flat_states[n]))
        product = abs(h) * eigenvalue
        if not math.isfinite(product):
            return Explanation(tuple(lines))
        lines.append(
            f"  Stiffness estimate |lambda|*dt = {product:.2g} "
            f"(this method is stable below {radius:.3g})."
        )
        return Explanation(tuple(lines), stiff=product > 0.5 * radius)

    def restrict(self, problem: ODEProblem) -> TorchTrajectory:
        """The same trajectory for the leading part of its state, which has dynamics of its own."""
        size = sum(problem.spec.sizes)

        def load() -> tuple[Record, list[Tensor]]:
            return self.record, [u[:size] for u in self.flat_states]

        tolerances = self.options.tolerances.leading(size)
        options = dataclasses.replace(self.options, tolerances=tolerances)
        accuracy = Accuracy.of(options, problem.spec.dtype, size)
        methods = tuple(method.accurate(accuracy) for method in self.methods)
        assert self.surroundings is not None
        return TorchTrajectory(
            problem,
            methods,
            load,
            self.stats,
            options,
            # As they were then: the field may have changed by now.
            surroundings=self.surroundings.within(problem.f),
            precision=self.precision,
            rounded_times=self.rounded_times,
        )
