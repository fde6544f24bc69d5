"""Dense output and local estimates of a stochastic solve, on its own Brownian path."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions, without_closures
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.ode import Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.comparison import Comparison, as_solved, coarser
from pysciml_node.replay.measure import checkpointed
from pysciml_node.replay.stages import FlatFunction
from pysciml_node.solutions.solution import Explanation, Stats, StepEstimate, StopGradient
from pysciml_node.steps.explain import explain_attempt
from pysciml_node.steps.guard import guard
from pysciml_node.steps.memory import Evaluate, evaluations, some_of
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.record import Kept, Record, Recorded, check_discrete
from pysciml_node.steps.repeated import Repeated
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.stochastic.brownian import BrownianPath, Path
from pysciml_node.stochastic.fields import Fields
from pysciml_node.stochastic.march import starting_slope
from pysciml_node.stochastic.step import SDEMethod, Stepper, initial_step
from pysciml_node.stochastic.virtual_tree import Increment

# The place of fresh noise: no interval of the solve's own tree begins so late.
_FRESH = 2**40


@dataclass
class SDETrajectory(Recorded):
    """The accepted steps of a stochastic solve with their states, and what follows from them.

    Between the ends of steps the solution is a shorter step of the method, from the start of the
    step that contains the time and on the solve's Brownian path. It is continuous and has the
    method's strong order. Its averages and variances are right, which those of a straight line are
    not.
    """

    problem: SDEProblem
    stepper: Stepper
    path: Path
    load: Callable[[], tuple[Record, list[Tensor]]]
    stats: Stats
    options: SolveOptions
    surroundings: Surroundings | None = None
    # Of the solve, where a copy has another.
    precision: torch.dtype | None = None
    _fresh: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.surroundings is None:
            self.surroundings = Surroundings(Fields(self.problem).given)

    def _as_seen(self) -> AbstractContextManager[Comparison]:
        """Everything that the fields can reach as the solve saw it; compares the steps."""
        assert self.surroundings is not None
        return as_solved(self.surroundings, self.precision)

    def _repeated(self) -> Repeated:
        """What the fields can reach, before steps are taken again."""
        assert self.surroundings is not None
        return Repeated(self.surroundings, self.problem.spec.device)

    def _evaluations(self, places: Iterable[tuple[float, Tensor]]) -> Iterator[Evaluate]:
        """Evaluations of the fields at times and vectors."""
        fields, state = self._fields(), self.stepper.state
        at = ((self.problem.time_tensor([t])[0], state(vector)) for t, vector in places)
        yield from evaluations((fields.drift, fields.diffusion), at)

    def _retake(self, comparison: Comparison, n: int, stepper: Stepper) -> None:
        """Take step `n` again, to compare it: a shorter one has no stage in common with it."""
        t, end = self.record.times[n : n + 2]
        with torch.no_grad():
            again, _ = stepper.take(t, self.vectors[n].detach(), self._motion(t, end))
        self._compare(comparison, n, again)

    def _compare(self, comparison: Comparison, n: int, again: Tensor) -> None:
        """Compare the end of step `n`, taken again, with the solve's."""
        start, end = (vector.detach() for vector in self.vectors[n : n + 2])
        comparison.add(again.detach(), end, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "surroundings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def vectors(self) -> list[Tensor]:
        """The vectors that were stepped, at `times`."""
        return self._loaded[1]

    def mapped(self, states: list[Tensor], change: Callable[[Any], Any]) -> SDETrajectory:
        """The same trajectory with other vectors at `times`, and its problem changed."""
        problem: SDEProblem = change(self.problem)
        spec, method = problem.spec, self.stepper.method
        method = SDEMethod.of(method.tableau, method.delta, spec.dtype, spec.device)
        return replace(
            self,
            problem=problem,
            surroundings=None,
            stepper=Stepper(method, self.stepper.fields.of(problem)),
            load=Kept(self.record, states),
            options=without_closures(self.options),
            precision=coarser(self.precision or self.problem.spec.dtype, spec.dtype),
        )

    def states(self) -> Tensor:
        """The states at `times`, `(n + 1, N)`."""
        return self.stepper.state(torch.stack(self.vectors))

    def brownian(self, start: float, end: float) -> Any:
        """`W(end) - W(start)` of the solve's path."""
        layout = self.stepper.fields.layout
        # A copy: the path may keep its own.
        return layout.shaped(self._motion(start, end).w.clone(), self.problem)

    def _motion(self, start: float, end: float) -> Increment:
        """The path's motion, for states that may have been converted since the solve."""
        return self.path.increment(start, end).to(self.stepper.method.like)

    def _step_of(self, t: float) -> int:
        n = bisect_right(self.record.times, t) - 1
        return min(max(n, 0), len(self.record.sizes) - 1)

    def _fields(self) -> Fields:
        return Fields(self.problem)

    def _count(self, fields: Fields) -> None:
        self.stats.nfe += fields.nfe
        self.stats.nfe_diffusion += fields.nfe_diffusion

    def evaluate(self, times: Tensor) -> Tensor:
        """The solution `(m, N)` at `times` `(m,)`."""
        if times.requires_grad:
            raise ValueError(
                "the solution of an SDEProblem has no derivative in time.\n"
                "  Detach the times: sol(t.detach())."
            )
        fields = self._fields()
        stepper = Stepper(self.stepper.method, fields)
        known = {t: n for n, t in enumerate(self.record.times)}
        rows, retaken, repeated = [], set(), self._repeated()
        with self._as_seen() as comparison:
            for t in times.double().tolist():
                if t in known or not self.record.sizes:
                    vector = self.vectors[known.get(t, 0)]
                else:
                    n = self._step_of(t)
                    start = self.record.times[n]
                    motion = self._motion(start, t)
                    vector = self.vectors[n]
                    if motion.h > 0:
                        vector, _ = stepper.take(start, vector, motion)
                        if n not in retaken:
                            self._retake(comparison, n, stepper)
                            retaken.add(n)
                rows.append(stepper.state(vector))
        self._count(fields)
        found = torch.stack(rows)
        starts = ((self.record.times[n], self.vectors[n]) for n in some_of(sorted(retaken)))
        repeated.expect_same((found,), self._evaluations(starts))
        guard((found,), self.surroundings)
        return found

    def stiffness(self) -> Tensor:
        """Stiffness estimate of each accepted step, `(n,)`."""
        count = len(self.record.sizes)
        with torch.no_grad(), self._as_seen() as comparison:
            estimates = [self._replay(n, self.vectors[n], comparison)[1] for n in range(count)]
        return torch.stack(estimates) if estimates else self.stepper.method.like.new_empty(0)

    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """One step of `algorithm` from the solution at `t`, on fresh noise.

        Args:
            t: start of the step.
            algorithm: a stochastic method that serves the problem.
            stop_gradient: treat the starting state as constant. The solve knows no stage of the
                step, so `True` and `"state"` agree.
            dt: positive size of the step; default the size that a solve would try first from there.
        """
        if not isinstance(algorithm, StochasticRungeKutta):
            raise TypeError(
                f"the local step of an SDE needs a stochastic method, not {algorithm!r}.\n"
                "  Leave algorithm out to take the solve's own, or give one such as SOSRI()."
            )
        tableau = algorithm.tableau_for(self.problem)
        spec = self.problem.spec
        fields = self._fields()
        method = SDEMethod.of(tableau, algorithm.delta, spec.dtype, spec.device)
        stepper = Stepper(method, fields)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
            u = self.evaluate(torch.tensor([t], dtype=torch.float64))[0]
        norm, repeated = ErrorNorm(self.options.tolerances), self._repeated()
        span = self.problem.t1 - t
        with self._as_seen() as comparison:
            if t in self.record.times and self.record.sizes:
                # None has been taken again for the state.
                self._retake(comparison, self._step_of(t), Stepper(self.stepper.method, fields))
            if dt is None:
                with torch.no_grad():
                    start = u.detach()
                    slope = starting_slope(stepper, t, start)
                    dt = initial_step(fields, method, norm, t, start, slope, span)
            motion = self._fresh_motion(fields.layout.size, min(dt, span))
            error, stiffness, _ = _measure(stepper, norm, t, stepper.start(u), motion)
        self._count(fields)
        places = self._evaluations([(t, u), (t + motion.h, u)])
        repeated.expect_same((error, stiffness), places)
        guard((error, stiffness), self.surroundings)
        return StepEstimate(method.like.new_full((), motion.h), error, stiffness)

    def _fresh_motion(self, size: int, h: float) -> Increment:
        """Noise that the solve has not seen, new at each call and given by the solve's seed."""
        self._fresh += 1
        assert isinstance(self.path, BrownianPath)
        first, second = self.path.normals.at([(_FRESH, self._fresh)], 2 * size).view(2, size)
        motion = Increment(h, first * math.sqrt(h), second * math.sqrt(h / 12))
        return motion.to(self.stepper.method.like)

    def step_estimates(self) -> list[StepEstimate]:
        """Error and stiffness of every accepted step, differentiable in everything.

        Each step is evaluated again, and once more in backward, so no graph is kept.

        Raises:
            ValueError: the solve's adjoint is a continuous one.
        """
        check_discrete(self.options.adjoint)
        estimates, repeated = list[StepEstimate](), self._repeated()
        for n, h in enumerate(self.record.sizes):
            vector = self.vectors[n]
            if torch.is_grad_enabled():
                error, stiffness = checkpointed(self._replay_as_seen, n, vector)
            else:
                error, stiffness = self._replay_as_seen(n, vector)
            estimates.append(
                StepEstimate(self.stepper.method.like.new_full((), h), error, stiffness)
            )
        starts = some_of([*zip(self.record.times[:-1], self.vectors[:-1], strict=True)])
        values = (x for one in estimates for x in (one.error, one.stiffness))
        repeated.expect_same(values, self._evaluations(starts))
        return estimates

    def _replay_as_seen(self, n: int, vector: Tensor) -> tuple[Tensor, Tensor]:
        with self._as_seen() as comparison:
            return self._replay(n, vector, comparison)

    def _replay(self, n: int, vector: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
        """Error and stiffness of an accepted step, from the vector at its start."""
        fields = self._fields()
        norm = ErrorNorm(self.options.tolerances)
        t, end = self.record.times[n : n + 2]
        motion = self._motion(t, end)
        stepper = Stepper(self.stepper.method, fields)
        error, stiffness, again = _measure(stepper, norm, t, vector, motion)
        self._compare(comparison, n, again)
        self._count(fields)
        return error, stiffness

    def explain(self, options: SolveOptions) -> Explanation:
        """The last attempt."""
        fields = self._fields()
        rates: dict[str, FlatFunction] = {
            "drift(t0, u0)": fields.drift,
            "diffusion(t0, u0)": fields.diffusion,
        }
        start = self.states()[0]
        return Explanation(
            tuple(explain_attempt(self.record.last, start, rates, options, self.problem))
        )

    def restrict(self, problem: Problem) -> SDETrajectory:
        """Refused: integrals along a solution are for ordinary equations."""
        raise TypeError(
            "the state of an SDEProblem cannot be augmented with integrals.\n"
            "  Use LocalError, LocalStiffness, GlobalError or GlobalStiffness."
        )


def _measure(
    stepper: Stepper, norm: ErrorNorm, t: float, vector: Tensor, motion: Increment
) -> tuple[Tensor, Tensor, Tensor]:
    """Error, stiffness and end of a step."""
    end, taken = stepper.take(t, vector, motion, with_error=True)
    error = stepper.error(taken, vector, end, motion, norm)
    return error, stepper.stiffness(taken), end
