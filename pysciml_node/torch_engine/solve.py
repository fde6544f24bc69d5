"""One solve of an ordinary equation: its parts, and the ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.adjoints import (
    DirectAdjoint,
    DiscreteAdjoint,
)
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.switching import OneStepMethod, linsolve_of
from pysciml_node.problems.ode import ODEProblem, ends_of
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.adjoint_discrete import discrete_sweep
from pysciml_node.replay.end_times import (
    at_moving_ends,
    complete_times,
    lacks_ends,
)
from pysciml_node.replay.implicit import stages_for
from pysciml_node.replay.kept import KeptStages, KeptSteps, keeping, kept_sweep, memory_for
from pysciml_node.replay.newton import Accuracy
from pysciml_node.replay.stages import FlatFunction, Method, Stages
from pysciml_node.replay.trajectory import TorchTrajectory, from_moving_start
from pysciml_node.replay.vectors import RecordedVectors, vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.autograd import Times, as_node
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import DifferentiableField, FlatField
from pysciml_node.steps.finish import Solve
from pysciml_node.steps.first_graph import FirstGraph
from pysciml_node.steps.graph import Grad
from pysciml_node.steps.guard import guard
from pysciml_node.steps.loop import MarchOptions
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.overwritten import Overwritten
from pysciml_node.steps.progress import step_listener
from pysciml_node.steps.randomness import expect_repeatable
from pysciml_node.steps.record import Kept, Outcome, Record
from pysciml_node.steps.saver import Saver, follow
from pysciml_node.steps.surroundings import Glimpse, Surroundings
from pysciml_node.tableaus import ImplicitTableau
from pysciml_node.torch_engine.adjoint_continuous import continuous_sweep
from pysciml_node.torch_engine.as_before import AsBefore, note_as_usual
from pysciml_node.torch_engine.event_search import EventSearch
from pysciml_node.torch_engine.switching import march_of
from pysciml_node.torch_engine.timetable import Timetable, note_steps


class ODESolve(Solve):
    """One solve: its parts, made once, and the ways to run it."""

    problem: ODEProblem

    def __init__(
        self,
        problem: ODEProblem,
        algorithm: OneStepMethod,
        options: SolveOptions,
        engine: str,
    ) -> None:
        super().__init__(problem, algorithm, options, engine)
        spec = problem.spec
        # A copy: a field that works in place is refused, and has not changed the caller's tensor.
        self._start = spec.copied(problem.u0)
        # Whether the states of the outcome have the shape of this.
        self._keeps_shape = False
        self.surroundings: Surroundings
        self._glimpse: Glimpse | None = None
        self.stats = Stats()
        self.methods: tuple[Method, ...]
        table = self._table = Timetable.of(problem, algorithm, options)
        if table is not None:
            self.methods, self.method, self.marks = (table.method,), table.method, table.marks
            self._ends_move = self._times_move = False
            return
        linsolve = accuracy = None
        if not isinstance(algorithm, ExplicitRungeKutta):
            linsolve = linsolve_of(algorithm, sum(spec.sizes))
            accuracy = Accuracy.of(options, spec.dtype, sum(spec.sizes))
        self.methods = Method.all_of(
            algorithm.tableaus, spec.dtype, spec.device, linsolve, accuracy
        )
        # What any of them does with numbers and times.
        self.method = self.methods[0]
        # Start, stops and end.
        t0, t1 = ends_of(problem)
        self.marks = (t0, *options.tstops, t1)
        # Whether ends of the interval receive gradients, or the times that are asked for.
        self._ends_move = any(map(moves, problem.tspan))
        self._times_move = self._ends_move or moves(options.saveat_tensor)

    @cached_property
    def u0(self) -> Tensor:
        """The state at the start, `(N,)`."""
        with Grad(self._start.requires_grad):
            return self._start.view(-1)

    @override
    def last(self, states: Sequence[Tensor]) -> Any:
        return states[-1].clone() if self._keeps_shape else super().last(states)

    @override
    def vectors(self, states: list[Tensor]) -> list[Tensor]:
        if not self._keeps_shape:
            return states
        with Grad(True):
            return [x.reshape(-1) for x in states]

    @override
    def run(self) -> Outcome:
        if not recording():
            return self.plain()
        return self.direct() if isinstance(self.options.adjoint, DirectAdjoint) else self.node()

    @override
    def trajectory(self, outcome: Outcome) -> TorchTrajectory:
        glimpse = self._glimpse
        return TorchTrajectory(
            self.problem,
            self.methods,
            Kept(outcome.record, self.vectors(outcome.states)),
            self.stats,
            self.options,
            surroundings=self.surroundings if glimpse is None else glimpse.surroundings(),
        )

    @override
    def make_trajectory(self, outcome: Outcome) -> Callable[[], TorchTrajectory]:
        return partial(self.trajectory, outcome)

    def march(
        self,
        parts: Sequence[Stages],
        u0: Tensor,
        k0: Tensor | None,
        times: tuple[Tensor, Tensor] | None,
    ) -> Outcome:
        """Run the time loop and keep what the options ask for."""
        options, problem = self.options, self.problem
        landings = options.landings(1 if self.marks[-1] > self.marks[0] else -1)
        march = march_of(
            parts,
            u0,
            self.marks[0],
            self.marks[-1],
            MarchOptions(
                controller=options.controller,
                norm=ErrorNorm(options.tolerances, options.controller.norm),
                max_steps=options.max_steps,
                dt0=options.dt0,
                dtmin=options.dtmin,
                dtmax=options.dtmax,
                tstops=landings,
                time_tensors=times,
            ),
            k=k0,
        )
        saver = Saver(
            Record(times=[self.marks[0]], t1_stop=len(landings), marks=self.marks),
            u0,
            march.between,
            options.saveat or (),
            options.saveat_tensor,
            moving=self._ends_move,
        )
        search = EventSearch(options, problem, march) if options.events else None
        with step_listener(options.progress, problem) as on_step:
            kept = recording() or k0 is not None
            outcome = follow(march, saver, on_step, search, kept, self.watched)
        if search is not None:
            outcome.record.event = search.found
        return outcome

    def stages(self, field: FlatFunction, recorded: bool = False) -> list[Stages]:
        """The stages of each method; recorded ones may be differentiated twice."""
        return [
            stages_for(
                method,
                field,
                self.marks,
                RecordedVectors() if recorded else vectors_like(self.u0, method.all_stages),
                self.problem.mass,
                derivatives=2 if recorded else 1,
            )
            for method in self.methods
        ]

    def plain(self) -> Outcome:
        """Without gradients."""
        field, table = FlatField(self.problem), self._table
        if table is not None:
            self._glimpse = seen = Glimpse(field.given)
            outcome = table.solve(field, self.u0)
            self.stats.nfe = field.nfe
            seen.settle()
            return outcome
        parts = self.stages(field)
        self._watch(parts[0], field)
        outcome = self._take(parts, self.u0, None)
        self._has_run(field)
        return outcome

    def _take(self, parts: Sequence[Stages], u0: Tensor, k0: Tensor | None) -> Outcome:
        """Take the steps without a graph, as an earlier solve has found them where they are fixed.

        Args:
            parts: the stages of each method.
            u0: the initial state.
            k0: the derivative there, where it is known.
        """
        if self._table is not None:
            return self._table.take(parts[0], u0, k0)
        outcome = self.march(parts, u0, k0, None)
        note_steps(self.problem, self.algorithm, self.options, outcome, parts[0])
        return outcome

    def direct(self) -> Outcome:
        """Every operation recorded by autograd."""
        field = FlatField(self.problem)
        parts = self.stages(field, recorded=True)
        self._watch(parts[0], field)
        before = Overwritten(self.surroundings)
        times, fixed = None, self._fixed()
        if self._times_move and not fixed:
            t0, t1 = (
                t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
                for t in self.problem.tspan
            )
            times = (t0.to(self.method.nodes), t1.to(self.method.nodes))
        u0 = from_moving_start(self.problem, field, self.u0) if fixed else self.u0
        with self.surroundings.undisturbed():
            record, states, saved = self.march(parts, u0, None, times)
        record.fixed = fixed
        if fixed or self.options.saveat_tensor is not None:
            saved = at_moving_ends(
                self.problem,
                field,
                record,
                states,
                saved,
                self.u0,
                self.options.saveat_tensor,
            )
        self._has_run(field)
        start = self.method.nodes.new_tensor(self.marks[0])
        before.expect_unread((*states, saved), lambda: field(start, self.u0.detach()))
        guard((*states, saved), self.surroundings)
        return Outcome(record, states, saved)

    def _fixed(self) -> bool:
        """Whether the ends receive gradients that the steps themselves do not have."""
        return self._ends_move and lacks_ends(self.problem, self.method, self.u0)

    def _watch(self, stages: Stages, field: FlatField) -> None:
        """Look at what the field can reach; random ones are not for adaptive steps."""
        self.surroundings = Surroundings(field.given)
        field.plain = self.surroundings.plain
        if not self.options.controller.adaptive:
            return

        def first(t: Tensor, u: Tensor) -> Tensor:
            stages.field = field

            def evaluate() -> tuple[tuple[Tensor], tuple[()]]:
                return (field(t, u),), ()

            (value,), _ = expect_repeatable(
                self.surroundings, self.u0.device, evaluate, "an adaptive solve"
            )()
            return value

        stages.field = first

    def _has_run(self, field: FlatField) -> None:
        self.stats.nfe = field.nfe
        self.surroundings.settle()

    def node(self) -> Outcome:
        """As one node of the graph, its backward the sweep of the adjoint."""
        self.refuse_transforms()
        memory = self._memory()
        outcome = self._as_before(memory)
        if outcome is not None:
            return outcome
        options, problem, t_start = self.options, self.problem, self._time_of_start()
        with keeping if memory else nullcontext():
            field, kept, outcome = self._forward(memory, t_start)
        field.field.watch = None
        field.settle()
        if kept is not None:
            note_as_usual(field)
        self.surroundings, self.stats.nfe = field.surroundings, field.nfe
        outcome.record.fixed = not options.adjoint.discrete or self._fixed()
        times: Times = (None, None, None)
        if self._times_move:
            times = (*problem.tspan, options.saveat_tensor)
        if self.surroundings.written:
            kept = None  # graphs of what the field itself has changed are none of a replay
        sweep = partial(self._sweep, field, kept)
        through = [] if kept is None else kept.values(outcome.record)
        saves = options.saveat is not None
        return as_node(
            lambda _: outcome, sweep, self.u0, field.inputs, times, saves=saves, kept=through
        )

    def _time_of_start(self) -> Tensor:
        nodes = self.method.nodes
        return torch.scalar_tensor(self.marks[0], dtype=nodes.dtype, device=nodes.device)

    def _as_before(self, memory: int) -> Outcome | None:
        """The same where earlier solves were alike; `None` where this is not known."""
        table = self._table
        if table is None or not memory or self.options.saveat is not None:
            return None
        solve = AsBefore.of(self.problem, table)
        if solve is None:
            return None
        outcome = solve.run(self._start, memory)
        if outcome is None:
            return None
        self._glimpse, self.stats.nfe = solve.glimpse, solve.field.nfe
        self._keeps_shape = solve.keeps_shape

        def sweep(backward: BackwardPass) -> Gradients:
            field = solve.prepared(self._time_of_start())
            gradients = self._sweep(field, solve.kept, backward.flat())
            if gradients.u0 is not None:
                gradients.u0 = gradients.u0.view(solve.start.shape)
            return gradients

        return as_node(
            lambda _: outcome,
            sweep,
            solve.start,
            solve.inputs,
            saves=False,
            kept=solve.kept.values(outcome.record),
            hand_on=partial(solve.hand_on, self.stats),
        )

    def _forward(
        self, memory: int, t_start: Tensor
    ) -> tuple[DifferentiableField, KeptSteps | None, Outcome]:
        """Solve forward: the field, the steps that are kept in `memory` bytes, and the outcome."""
        graph = FirstGraph() if memory else None
        whole = self._start if self.problem.spec.keys is None else None
        field = DifferentiableField(self.problem, t_start, self.u0, graph, whole)
        # Before the node is made: what the field uses on the way is among its inputs.
        field.field.watch = field.captured.watch
        if not self.options.adjoint.discrete:
            field.captured.remember()
        kept = KeptSteps.of(graph, field.captured, self.u0, memory, evaluations=1)
        if kept is None or graph is None or graph.evaluation is None:
            parts = self.stages(field.field)
        else:
            ((first,), _) = graph.evaluation
            stages = KeptStages(
                self.method, field.field, field.evaluate, self.marks, first, graph.made, kept
            )
            parts = [stages]
        with Grad(False):
            outcome = self._take(parts, self.u0.detach(), field.k0)
        return field, kept, outcome

    def _memory(self) -> int:
        """The bytes that graphs of steps may take, as far as the arguments tell."""
        if (
            len(self.methods) > 1
            or isinstance(self.method.tableau, ImplicitTableau)
            or self._times_move
        ):
            return 0
        return memory_for(self.options.adjoint)

    def _sweep(
        self, field: DifferentiableField, kept: KeptSteps | None, backward: BackwardPass
    ) -> Gradients:
        """The sweep of the solve's adjoint."""
        problem, options = self.problem, self.options
        adjoint = options.adjoint
        if kept is not None:
            gradients = kept_sweep(field, self.method, backward, self.stats, kept)
            if gradients is not None:
                return gradients
        replayed = isinstance(adjoint, DiscreteAdjoint)
        with field.captured.sweep(replayed, kept is not None, field.later(backward)):
            if isinstance(adjoint, DiscreteAdjoint):
                gradients = discrete_sweep(field, self.methods, backward, self.stats, kept)
            else:
                gradients = continuous_sweep(field, self.methods, options, backward, self.stats)
            if backward.with_times:
                ends = backward.record.fixed and adjoint.discrete
                complete_times(gradients, problem, field.field, backward, ends)
        if not (self.u0.requires_grad or backward.with_times):
            field.captured.tell_of_cut_graph(gradients.inputs)
        return gradients
