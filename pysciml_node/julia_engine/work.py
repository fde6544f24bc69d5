"""One solve in Julia: forward, as a node of the graph, and its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DiscreteAdjoint, ForwardDiffSensitivity
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.fields import CallbackField, Field, field_of
from pysciml_node.julia_engine.forward import Forward, place, run
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.sweeps import KeptSolution, continuous_sweep, replayed_sweep
from pysciml_node.julia_engine.watching import Watcher, last_step
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.adjoint_discrete import discrete_sweep
from pysciml_node.replay.stages import Method
from pysciml_node.solutions.solution import ReturnCode, Stats
from pysciml_node.steps.autograd import SolveNode
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.record import Record


class Work:
    """One solve of an ordinary equation: its parts, and the ways to run it."""

    def __init__(self, problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> None:
        if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "the Julia engine cannot run inside a torch.func transform.\n"
                '  Use engine="torch" with adjoint=DirectAdjoint() there.'
            )
        self.problem, self.algorithm, self.options = problem, algorithm, options
        self.u0 = problem.spec.flatten(problem.u0)
        self.stats = Stats()
        self.watcher = Watcher(problem, options)
        self.explicit = isinstance(algorithm, ExplicitRungeKutta)
        # The stages of explicit methods are replayed by the tableau; others need SciML's own.
        discrete = isinstance(options.adjoint, DiscreteAdjoint | ForwardDiffSensitivity)
        self.replayed = self.explicit and discrete
        keep = not (self.replayed if torch.is_grad_enabled() else self.explicit)
        self.keep_solution = keep
        self.plan = plans.plan(algorithm, options, problem.spec.dtype, self.u0.numel(), keep)
        self.solution: Handle | None = None
        self.forward: Forward | None = None
        self._field: Field | None = None

    @property
    def field(self) -> Field:
        """The right-hand side, made when it is first asked for."""
        if self._field is None:
            self._field = field_of(
                self.problem, self.u0, torch.is_grad_enabled(), implicit=not self.explicit
            )
        return self._field

    @field.setter
    def field(self, field: Field) -> None:
        self._field = field

    def run(self, field: Field, u0: Tensor) -> Forward:
        """Solve forward, ending at the first event, unless that has been done beforehand."""
        found, self.forward = self.forward or self._run(field, u0), None
        self.solution = found.solution
        self.stats.nfe += found.nfe
        return found

    def _run(self, field: Field, u0: Tensor) -> Forward:
        parameters = field.parameters()
        observer = self.watcher if self.watcher.needed else None
        with self.watcher:
            found = run(
                self.problem,
                self.options,
                self.plan,
                field,
                u0,
                parameters,
                self.keep_solution,
                observer,
            )
        if self.watcher.event is not None:
            self._end_at_event(found, field, parameters)
        return found

    def _end_at_event(self, found: Forward, field: Field, parameters: Tensor) -> None:
        """Take the last step again, so that the state at the event is a step's own result."""
        record, end = found.record, self.watcher.t
        start = record.times[-2]
        saveat = [t for t in self.options.saveat or () if self.problem.direction * (end - t) >= 0]
        inside = tuple(saveat[record.saved :])
        options = last_step(self.options, end - start, inside)
        problem = dataclasses.replace(self.problem, tspan=(start, end))
        plan = plans.plan(self.algorithm, options, problem.spec.dtype, self.u0.numel(), False)
        last = run(problem, options, plan, field, found.states[-2], parameters, False)
        found.saved = torch.cat([found.saved, last.saved])
        found.states[-1] = last.states[-1]
        found.nfe += last.nfe
        record.times[-1], record.sizes[-1] = end, end - start
        record.stops[-1] = None
        record.event, record.saved = self.watcher.event, len(saveat)
        record.retcode = ReturnCode.Terminated
        record.inside.clear()
        record.at_end.clear()
        place(record, saveat, self.options.saveat_tensor is not None, self.problem)

    def plain(self) -> tuple[Record, list[Tensor], Tensor]:
        """Without gradients."""
        found = self.run(self.field, self.u0)
        self._field = None
        return found.record, found.states, found.saved

    def node(self) -> tuple[Record, list[Tensor], Tensor]:
        """As one node of the graph, its backward the sweep of the adjoint."""
        field = self.field

        def forward(u0: Tensor) -> tuple[Record, list[Tensor], Tensor]:
            found = self.run(field, u0)
            return found.record, found.states, found.saved

        keep: list[Record] = []
        saved, *states = self.apply(forward, field, keep, self.options)
        return keep[0], [self.u0, *states], saved

    def apply(
        self,
        forward: Callable[[Tensor], tuple[Record, list[Tensor], Tensor]],
        field: Field,
        keep: list[Record],
        options: SolveOptions,
    ) -> tuple[Tensor, ...]:
        """Record a solve in the graph."""

        def sweep(backward: BackwardPass) -> Gradients:
            if not isinstance(field, CallbackField):
                return self._sweep(field, options, backward)
            # Only the replay in torch compares what it evaluates with what the solve found.
            compares = isinstance(options.adjoint, DiscreteAdjoint)
            with field.linearizer.captured.sweep(compares):
                return self._sweep(field, options, backward)

        t0, t1 = (t if isinstance(t, Tensor) else None for t in self.problem.tspan)
        found: tuple[Tensor, ...] = SolveNode.apply(  # type: ignore[no-untyped-call]
            forward, sweep, keep, self.u0, t0, t1, options.saveat_tensor, False, *field.inputs
        )
        if isinstance(field, CallbackField):
            field.linearizer.captured.settle()
        return found

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
        if self._field is None:
            # Solved without gradients: there is nothing to pass them on to.
            return interpolate(times)

        def forward(u0: Tensor) -> tuple[Record, list[Tensor], Tensor]:
            return record, [u0], interpolate(times)

        options = dataclasses.replace(self.options, saveat=tuple(times), saveat_tensor=moving)
        found = self.apply(forward, self._field, [], options)
        return found[0]

    def _sweep(self, field: Field, options: SolveOptions, backward: BackwardPass) -> Gradients:
        """The sweep of the solve's adjoint."""
        if not self.replayed:
            assert self.solution is not None
            kept = KeptSolution(field, self.plan, self.solution, options, self.problem.mass_matrix)
            return continuous_sweep(kept, backward, self.stats)
        assert isinstance(self.algorithm, ExplicitRungeKutta)
        spec = self.problem.spec
        forward = isinstance(options.adjoint, ForwardDiffSensitivity)
        if isinstance(field, CallbackField) and not forward:
            method = Method.of(self.algorithm.tableau, spec.dtype, spec.device)
            return discrete_sweep(field.linearizer, method, backward, self.stats)
        tableau = plans.tableau(self.algorithm.tableau)
        return replayed_sweep(field, tableau, backward, self.stats, forward)
