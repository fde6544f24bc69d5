"""The engine's door: a checked problem and options in, a solution out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pysciml_node.algorithms.adjoints import DirectAdjoint, DiscreteAdjoint, ForwardDiffSensitivity
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta, default_algorithm
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.ensembles import run_many
from pysciml_node.julia_engine.fields import (
    CallbackField,
    Field,
    ProgramField,
    TranslatedFlatField,
    field_of,
)
from pysciml_node.julia_engine.forward import Forward, place, run
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.julia_engine.stochastic import JuliaParts
from pysciml_node.julia_engine.sweeps import continuous_sweep, replayed_sweep
from pysciml_node.julia_engine.trajectory import SciMLTrajectory
from pysciml_node.julia_engine.watching import Watcher, last_step
from pysciml_node.problems.modes import in_full_precision
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.adjoint_discrete import discrete_sweep
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats, Trajectory
from pysciml_node.steps.autograd import SolveNode
from pysciml_node.steps.cotangents import Cotangents, Gradients
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.finish import build_solution
from pysciml_node.steps.record import Record, check_finite
from pysciml_node.stochastic.solve import solve_sde

NAME = "julia"


def supports(algorithm: Algorithm, options: SolveOptions) -> bool:
    """Whether this engine has the algorithm, with the controller that is asked for."""
    fixed_only = type(algorithm).__name__ in plans.FIXED_ONLY
    return plans.supports(algorithm) and not (fixed_only and options.controller.adaptive)


def refusal(problem: Problem, algorithm: Algorithm, options: SolveOptions) -> str | None:
    """Why this engine cannot run a solve as asked, with the remedy; `None` when it can."""
    name = type(algorithm).__name__
    dtype = problem.spec.real_dtype
    if not plans.supports(algorithm):
        known = "Tsit5()"
        if isinstance(problem, SDEProblem):
            known = repr(default_algorithm(problem))
        return f"{algorithm!r} is not an algorithm of the Julia engine.\n  Use {known} there."
    if dtype not in (torch.float32, torch.float64):
        return f"the Julia engine solves in float32 or float64, not in {dtype}.\n  Convert u0."
    if options.compile is True:
        return "compile=True is the torch engine's.\n  Leave it out: Julia compiles by itself."
    if isinstance(options.controller, FixedStep) and options.controller.times:
        return (
            'FixedStep(times=...) is the torch engine\'s.\n  Use engine="torch", or tstops and dt0.'
        )
    if name in plans.FIXED_ONLY and options.controller.adaptive:
        return (
            f"{name} has no error estimate in SciML.\n  Use {plans.FIXED_ONLY[name]}, or "
            'controller=FixedStep() and dt0, or engine="torch", which has one.'
        )
    if isinstance(options.adjoint, DirectAdjoint):
        return (
            "DirectAdjoint records torch's operations, and there are none in Julia.\n"
            '  Use adjoint=DiscreteAdjoint(), or engine="torch".'
        )
    if not isinstance(problem, ODEProblem):
        return None
    explicit = isinstance(algorithm, ExplicitRungeKutta)
    if problem.mass_matrix is not None and explicit:
        return f"{name} takes no mass matrix.\n  Use an implicit method, such as Rodas5P()."
    if isinstance(options.adjoint, DiscreteAdjoint | ForwardDiffSensitivity) and not explicit:
        return (
            f"{type(options.adjoint).__name__} differentiates explicit steps, which "
            f"{name} does not take.\n  Use adjoint=GaussAdjoint() or QuadratureAdjoint()."
        )
    return None


class Work:
    """One solve: its parts, and the ways to run it."""

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
        self.replayed = self.explicit and isinstance(options.adjoint, DiscreteAdjoint)
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

        def sweep(
            record: Record, states: tuple[Tensor, ...], arriving: Cotangents, with_times: bool
        ) -> Gradients:
            arguments = field, options, record, states, arriving, with_times
            if not isinstance(field, CallbackField):
                return self._sweep(*arguments)
            with field.linearizer.captured.sweep(self.replayed):
                return self._sweep(*arguments)

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
        assert self._field is not None

        def forward(u0: Tensor) -> tuple[Record, list[Tensor], Tensor]:
            return record, [u0], interpolate(times)

        options = dataclasses.replace(self.options, saveat=tuple(times), saveat_tensor=moving)
        found = self.apply(forward, self._field, [], options)
        return found[0]

    def _sweep(
        self,
        field: Field,
        options: SolveOptions,
        record: Record,
        states: tuple[Tensor, ...],
        arriving: Cotangents,
        with_times: bool,
    ) -> Gradients:
        if not self.replayed:
            assert self.solution is not None
            return continuous_sweep(
                field, self.plan, self.solution, options, record, arriving, with_times, self.stats
            )
        assert isinstance(self.algorithm, ExplicitRungeKutta)
        spec = self.problem.spec
        if isinstance(field, CallbackField):
            method = Method.of(self.algorithm.tableau, spec.dtype, spec.device)
            return discrete_sweep(
                field.linearizer, method, record, states, arriving, with_times, self.stats
            )
        tableau = plans.tableau(self.algorithm.tableau)
        return replayed_sweep(field, tableau, record, states, arriving, with_times, self.stats)


def solve(problem: Problem, algorithm: Algorithm, options: SolveOptions) -> Solution:
    """Run a checked problem; a failed solve is returned like any other.

    Raises:
        EngineUnavailable: Julia cannot be started, or lacks a package.
        JuliaError: Julia raised.
        KeyboardInterrupt: Ctrl-C stopped the solve.
    """
    runtime.start()
    problem = in_full_precision(problem, (nn.Module, JuliaField))
    if isinstance(problem, SDEProblem):
        assert isinstance(algorithm, StochasticRungeKutta)
        return solve_sde(problem, algorithm, options, NAME, JuliaParts(algorithm))
    assert isinstance(problem, ODEProblem)
    return _solution(Work(problem, algorithm, options))


def solve_many(
    problems: Sequence[Problem], algorithm: Algorithm, options: Sequence[SolveOptions]
) -> list[Solution]:
    """Run checked problems that differ in `u0` and `p` alone, over threads where these suffice.

    What calls Python, a field or an event, needs its lock, and runs one after the other.

    Args:
        problems: one or more.
        algorithm: for all.
        options: the same for all.

    Raises:
        EngineUnavailable: Julia cannot be started, or lacks a package.
        JuliaError: Julia raised.
        KeyboardInterrupt: Ctrl-C stopped the solves.
    """
    runtime.start()
    if isinstance(problems[0], SDEProblem):
        pairs = zip(problems, options, strict=True)
        return [solve(problem, algorithm, chosen) for problem, chosen in pairs]
    works = []
    for given, chosen in zip(problems, options, strict=True):
        problem = in_full_precision(given, (nn.Module, JuliaField))
        assert isinstance(problem, ODEProblem)
        works.append(Work(problem, algorithm, chosen))
    first = works[0]
    if not first.watcher.needed and not first.field.calls_python:
        for work in works[1:]:
            # A module is the same for all; the parameters of source are each member's own.
            if isinstance(first.field, ProgramField):
                work.field = first.field
        forwards = run_many(
            first.problem,
            first.options,
            first.plan,
            [work.field for work in works],
            [work.u0 for work in works],
            first.keep_solution,
        )
        for work, forward in zip(works, forwards, strict=True):
            work.forward = forward
    return [_solution(work) for work in works]


def _solution(work: Work) -> Solution:
    """Run a solve."""
    problem, algorithm, options = work.problem, work.algorithm, work.options
    field = work.field
    record, states, saved = work.node() if torch.is_grad_enabled() else work.plain()
    watched = options.controller.adaptive and options.driven == sum(problem.spec.sizes)
    check_finite(record, states, watched)
    stats, spec = work.stats, problem.spec
    stats.naccept, stats.nreject = record.naccept, record.nreject

    def load() -> tuple[Record, list[Tensor]]:
        return record, states

    trajectory: Trajectory
    if isinstance(algorithm, ExplicitRungeKutta):
        method = Method.of(algorithm.tableau, spec.dtype, spec.device)
        make_field: Callable[[ODEProblem], FlatField] = FlatField
        if isinstance(field, ProgramField):
            make_field = partial(TranslatedFlatField, field)
        trajectory = TorchTrajectory(problem, method, load, stats, options, make_field)
    else:
        trajectory = SciMLTrajectory(problem, load, stats, options, work)
    return build_solution(
        problem, algorithm, NAME, options, record, states, saved, stats, trajectory
    )
