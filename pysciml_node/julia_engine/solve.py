"""One solve in Julia: forward, as a node of the graph, and its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.adjoints import DiscreteAdjoint, ForwardDiffSensitivity
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.called import CallbackField, field_of
from pysciml_node.julia_engine.departure import Departure, departure_of
from pysciml_node.julia_engine.fields import FieldInJulia, ODEField, ProgramField
from pysciml_node.julia_engine.forward import Forward, Tally, moving_ends, place, run
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.julia_engine.sweeps import KeptSolutions, continuous_sweep, replayed_sweep
from pysciml_node.julia_engine.trajectory import SciMLTrajectory
from pysciml_node.julia_engine.watching import Watcher, last_step
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.adjoint_discrete import discrete_sweep
from pysciml_node.replay.end_times import complete_times, lacks_ends
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import ReturnCode, Solution, Trajectory
from pysciml_node.steps.autograd import as_node
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.finish import Solve
from pysciml_node.steps.record import Kept, Outcome, Record
from pysciml_node.steps.surroundings import Surroundings

Load = Callable[[], tuple[Record, list[Tensor]]]


class ODESolve(Solve):
    """One solve of an ordinary equation: its parts, and the ways to run it.

    Attributes:
        solution_in_julia: SciML's own solution, where it is kept.
        field: the right-hand side.
        recorded: whether what is read off the solve has gradients.
    """

    problem: ODEProblem
    _tally: Tally

    def __init__(
        self, problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, engine: str
    ) -> None:
        if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "the Julia engine cannot run inside a torch.func transform.\n"
                '  Use engine="torch" with adjoint=DirectAdjoint() there.'
            )
        super().__init__(problem, algorithm, options, engine)
        # A copy: it is read again by the sweep.
        self.u0 = problem.spec.flatten(problem.u0).clone()
        watched = options.events or options.progress
        self.watcher = Watcher(problem, options) if watched else None
        self.explicit = isinstance(algorithm, ExplicitRungeKutta)
        # The stages of explicit methods are replayed by the tableau; others need SciML's own.
        discrete = isinstance(options.adjoint, DiscreteAdjoint | ForwardDiffSensitivity)
        self.replayed = self.explicit and discrete
        self.recorded = torch.is_grad_enabled()
        keep = not (self.replayed if self.recorded else self.explicit)
        self.departure = departure_of(problem, algorithm, options, keep)
        self.solution_in_julia: Handle | None = None
        self.make_field: Callable[[ODEProblem], FlatField] = FlatField
        self._see: Callable[[], Surroundings] | None = None

    @cached_property
    def field(self) -> ODEField:
        """The right-hand side, made when it is first asked for."""
        return field_of(self.problem, self.u0, self.recorded, implicit=not self.explicit)

    @cached_property
    def fixed(self) -> bool:
        """Whether the ends receive gradients that explicit steps do not have."""
        if (
            not self.explicit
            or not torch.is_grad_enabled()
            or isinstance(self.problem.f, JuliaField)
        ):
            return False
        return lacks_ends(self.problem, self._methods[0], self.u0)

    @property
    def _compares(self) -> bool:
        """Whether the sweep of a field that is called back finds that it has changed.

        Only the replay in torch compares what it evaluates with what the solve found.
        """
        return isinstance(self.options.adjoint, DiscreteAdjoint)

    @property
    def _methods(self) -> tuple[Method, ...]:
        """Those of explicit steps."""
        assert isinstance(self.algorithm, ExplicitRungeKutta)
        spec = self.problem.spec
        return Method.all_of(self.algorithm.tableaus, spec.dtype, spec.device)

    @cached_property
    def surroundings(self) -> Surroundings | None:
        """What a translated field could reach when it was solved."""
        return None if self._see is None else self._see()

    @override
    def run(self) -> Outcome:
        load, saved, _ = self._flown()
        return Outcome(*load(), saved)

    @override
    def solution(self) -> Solution:
        load, saved, u1 = self._flown()
        # Where nothing looks at the steps they stay as they are. Of a field that is called back the
        # surroundings are looked through now.
        sound = self._tally.finite or self.watched
        if not sound or self.watcher is not None or self._see is None or not self.explicit:
            return self.looked_through(Outcome(*load(), saved))
        tally, spec, options = self._tally, self.problem.spec, self.options
        self.stats.naccept, self.stats.nreject = tally.steps, tally.nreject
        parts: dict[str, Any] = {
            "problem": self.problem,
            "algorithm": self.algorithm,
            "engine": self.engine,
            "retcode": tally.retcode,
            "stats": self.stats,
            "u1": spec.unflatten(u1),
            "event": None,
        }
        if options.saveat is not None:
            parts["saved"] = spec.unflatten(saved)
        if options.saveat_tensor is not None:
            parts["t"] = self.times(len(saved), ())
        return in_parts(Solution, partial(self._part, load, len(saved)), parts)

    def _part(self, load: Load, reached: int, name: str) -> Any:
        """The trajectory for a solution, or the times of its states."""
        if name == "states":
            return torch.stack(load()[1])
        if name == "trajectory":
            return self._trajectory(load)
        return self.times(reached, () if self.options.saveat is not None else load()[0].times)

    def _flown(self) -> tuple[Load, Tensor, Tensor]:
        """Solve: what gives the steps and their states, the saved states, and the last one."""
        field = self.field
        if isinstance(field, FieldInJulia):
            self.make_field = field.flat
        if isinstance(field, ProgramField):
            self._see = field.see
        if not self.recorded:
            forward = self._fly(field, self.u0)
            if isinstance(field, CallbackField) and not self.explicit:
                field.settle()
            return forward, forward.saved, forward.last
        # Looked at here: a node's forward pass has no gradients.
        _ = self.fixed
        if isinstance(field, CallbackField) and not self._compares:
            field.remember()
        outcome = self.node(partial(self.forward, field), field, self.options)
        if isinstance(field, CallbackField):
            # Here alone: what changes before dense output is asked for is not the solve's doing.
            field.settle()
        return Kept(outcome.record, outcome.states), outcome.saved, outcome.states[-1]

    @override
    def trajectory(self, outcome: Outcome) -> Trajectory:
        return self._trajectory(Kept(outcome.record, outcome.states))

    def _trajectory(self, load: Load) -> Trajectory:
        if not isinstance(self.algorithm, ExplicitRungeKutta):
            return SciMLTrajectory(self.problem, load, self.stats, self.options, self)
        return TorchTrajectory(
            self.problem,
            self._methods,
            load,
            self.stats,
            self.options,
            self.make_field,
            self.surroundings,
            rounded_times=True,
        )

    def forward(self, field: ODEField, u0: Tensor) -> Outcome:
        """Solve forward, ending at the first event."""
        forward = self._fly(field, u0)
        forward.record.fixed = self.fixed
        return Outcome(*forward(), forward.saved)

    def _fly(self, field: ODEField, u0: Tensor) -> Forward:
        parameters = field.parameters()
        solve = partial(run, self.departure, self.problem, field, u0, parameters)
        if self.watcher is None:
            forward = solve()
        else:
            with self.watcher:
                forward = solve(self.watcher)
            if self.watcher.event is not None:
                self._end_at_event(self.watcher, forward, field, parameters)
        self.stats.nfe += forward.tally.nfe
        # Not the states: with a graph they hold on to this solve.
        self.solution_in_julia, self._tally = forward.solution, forward.tally
        return forward

    def _end_at_event(
        self, watcher: Watcher, forward: Forward, field: ODEField, parameters: Tensor
    ) -> None:
        """Take the last step again, so that the state at the event is a step's own result."""
        record, end = forward.record, watcher.t
        start = record.times[-2]
        saveat = [t for t in self.options.saveat or () if self.problem.direction * (end - t) >= 0]
        inside = tuple(saveat[record.saved :])
        options = last_step(self.options, end - start, inside)
        problem = self.problem.part(start, end)
        departure = Departure(problem, self.algorithm, options, keep_solution=False)
        last = run(departure, problem, field, forward.states[-2], parameters)
        forward.saved = torch.cat([forward.saved, last.saved])
        forward.states[-1] = last.states[-1]
        self.stats.nfe += last.tally.nfe
        record.times[-1], record.sizes[-1] = end, end - start
        record.stops[-1] = None
        record.event, record.saved = watcher.event, len(saveat)
        record.retcode = ReturnCode.Terminated
        record.inside.clear()
        record.at_end.clear()
        place(record, saveat, moving_ends(self.problem, self.options.saveat_tensor))

    def node(
        self, forward: Callable[[Tensor], Outcome], field: ODEField, options: SolveOptions
    ) -> Outcome:
        """Record a solve as one node of the graph, its backward the sweep of the adjoint."""

        def sweep(backward: BackwardPass) -> Gradients:
            if not isinstance(field, CallbackField):
                return self._sweep(field, options, backward)
            prepared = field.linearizer
            with prepared.captured.sweep(self._compares, later=prepared.later(backward)):
                gradients = self._sweep(field, options, backward)
                if not self._compares:
                    field.expect_unchanged()
                return gradients

        times = (*self.problem.tspan, options.saveat_tensor)
        return as_node(forward, sweep, self.u0, field.inputs, times, watched=False)

    def dense(
        self,
        record: Record,
        times: list[float],
        moving: Tensor | None,
        interpolate: Callable[[list[float]], Tensor],
    ) -> Tensor:
        """Dense output as a node of its own, with a sweep of its own.

        Args:
            record: the steps, and where the times lie in them.
            times: in the order of integration.
            moving: the same as a tensor, where they receive gradients.
            interpolate: dense output without gradients.
        """
        if not self.recorded:
            # Solved without gradients: there is nothing to pass them on to.
            return interpolate(times)

        def forward(u0: Tensor) -> Outcome:
            return Outcome(record, [u0], interpolate(times))

        options = dataclasses.replace(self.options, saveat=tuple(times), saveat_tensor=moving)
        return self.node(forward, self.field, options).saved

    def _sweep(self, field: ODEField, options: SolveOptions, backward: BackwardPass) -> Gradients:
        """The sweep of the solve's adjoint."""
        if not self.replayed:
            solution = self.solution_in_julia
            assert solution is not None
            kept = KeptSolutions(
                self.departure.plan,
                [solution],
                options,
                self.problem.mass_matrix,
                field.parameters().numel(),
                not field.calls_python,
            )
            return continuous_sweep(kept, field, backward, self.stats)
        gradients = self._replayed(field, options, backward)
        if backward.with_times and backward.record.fixed:
            complete_times(gradients, self.problem, field.flat(self.problem), backward, ends=True)
        return gradients

    def _replayed(
        self, field: ODEField, options: SolveOptions, backward: BackwardPass
    ) -> Gradients:
        """The sweep over explicit steps."""
        assert isinstance(self.algorithm, ExplicitRungeKutta)
        forward = isinstance(options.adjoint, ForwardDiffSensitivity)
        if isinstance(field, CallbackField) and not forward:
            return discrete_sweep(field.linearizer, self._methods, backward, self.stats)
        tableau = plans.tableau(self.algorithm.tableau)
        return replayed_sweep(field, tableau, backward, self.stats, forward)
