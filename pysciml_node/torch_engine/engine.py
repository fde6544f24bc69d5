"""The engine's door: a checked problem and options in, a solution out."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import (
    DirectAdjoint,
    DiscreteAdjoint,
    ForwardDiffSensitivity,
    QuadratureAdjoint,
)
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.implicit import ImplicitMethod
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.adjoint_discrete import discrete_sweep
from pysciml_node.replay.implicit import stages_for
from pysciml_node.replay.stages import FlatFunction, Method, Stages
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.replay.vectors import RecordedVectors, vectors_like
from pysciml_node.solutions.members import ListedMembers, Members
from pysciml_node.solutions.solution import Solution, Stats
from pysciml_node.steps.autograd import SolveNode
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import DifferentiableField, FlatField
from pysciml_node.steps.finish import build_solution
from pysciml_node.steps.loop import MarchOptions
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.progress import step_listener
from pysciml_node.steps.randomness import expect_repeatable
from pysciml_node.steps.record import Record, check_finite
from pysciml_node.steps.saver import Outcome, Saver, follow
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.stochastic.solve import Parts, solve_sde
from pysciml_node.tableaus import CoupledTableau, DiagonallyImplicitTableau
from pysciml_node.torch_engine.adjoint_continuous import continuous_sweep
from pysciml_node.torch_engine.end_times import (
    at_moving_ends,
    complete_times,
    from_moving_start,
    hides_time,
    requires,
)
from pysciml_node.torch_engine.event_search import EventSearch
from pysciml_node.torch_engine.march import March
from pysciml_node.torch_engine.members.engine import batches, solve_batch
from pysciml_node.torch_engine.native.engine import attempt_native
from pysciml_node.torch_engine.native.members import attempt_native_members

NAME = "torch"
# A Jacobian of more entries takes longer than Krylov methods would: 2048 rows are 34 MB.
LARGEST_IMPLICIT = 2048


def supports(algorithm: Algorithm, options: SolveOptions) -> bool:
    """Whether this engine has the algorithm, with any controller."""
    del options
    return isinstance(algorithm, ExplicitRungeKutta | ImplicitMethod | StochasticRungeKutta)


def refusal(problem: Problem, algorithm: Algorithm, options: SolveOptions) -> str | None:
    """Why this engine cannot run a solve as asked, with the remedy; `None` when it can."""
    if not supports(algorithm, options):
        return (
            f"{algorithm!r} is not an algorithm of the torch engine.\n"
            '  Use engine="julia", or an explicit Runge-Kutta method such as Tsit5().'
        )
    if isinstance(algorithm, ImplicitMethod):
        return _refusal_implicit(problem, algorithm, options)
    if isinstance(problem, ODEProblem) and problem.mass_matrix is not None:
        return "mass matrices need an implicit method.\n  Use Rodas5P()."
    if isinstance(options.adjoint, QuadratureAdjoint | ForwardDiffSensitivity):
        return (
            f"{type(options.adjoint).__name__} is an adjoint of the Julia engine.\n"
            '  Use engine="julia", or adjoint=DiscreteAdjoint().'
        )
    return None


def _refusal_implicit(
    problem: Problem, algorithm: ImplicitMethod, options: SolveOptions
) -> str | None:
    """Why this engine cannot take an implicit method, with the remedy; `None` when it can."""
    name, size = type(algorithm).__name__, sum(problem.spec.sizes)
    if not isinstance(options.adjoint, DiscreteAdjoint | DirectAdjoint):
        return (
            f"{type(options.adjoint).__name__} of {name} is an adjoint of the Julia engine.\n"
            '  Use adjoint=DiscreteAdjoint(), or engine="julia".'
        )
    if problem.spec.dtype.is_complex:
        return (
            f"{name} takes real states on the torch engine, but u0 is {problem.spec.dtype}.\n"
            '  Use torch.view_as_real, or engine="julia".'
        )
    if size > LARGEST_IMPLICIT:
        return (
            f"{name} solves dense linear systems on the torch engine, up to {LARGEST_IMPLICIT} "
            f"entries, but u0 has {size}.\n"
            '  Use engine="julia" (FBDF() for large systems), or an EnsembleProblem of its rows.'
        )
    mass = isinstance(problem, ODEProblem) and problem.mass_matrix is not None
    if mass and isinstance(algorithm.tableau, DiagonallyImplicitTableau | CoupledTableau):
        return (
            f'{name} takes no mass matrix on the torch engine.\n  Use Rodas5P(), or engine="julia".'
        )
    if options.compile is True:
        return (
            f"compile=True is for explicit methods, but the algorithm is {name}.\n  Leave it out."
        )
    return None


class _Solve:
    """One solve: its parts, made once, and the ways to run it."""

    def __init__(
        self,
        problem: ODEProblem,
        algorithm: ExplicitRungeKutta | ImplicitMethod,
        options: SolveOptions,
    ) -> None:
        self.problem, self.options = problem, options
        spec = problem.spec
        self.method = Method.of(algorithm.tableau, spec.dtype, spec.device)
        # A copy: a field that works in place is refused, and has not changed the caller's tensor.
        self.u0 = spec.flatten(problem.u0).clone()
        self.stats = Stats()
        self.surroundings: Surroundings

    def march(
        self, stages: Stages, u0: Tensor, k0: Tensor | None, times: tuple[Tensor, Tensor] | None
    ) -> Outcome:
        """Run the time loop and keep what the options ask for."""
        options, problem = self.options, self.problem
        landings = options.landings(problem.direction)
        march = March(
            stages,
            u0,
            problem.t0,
            problem.t1,
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
            Record(times=[problem.t0], t1_stop=len(landings), marks=self.marks),
            u0,
            march.between,
            options.saveat or (),
            options.saveat_tensor,
            moving=any(moves(t) for t in problem.tspan),
        )
        search = EventSearch(options, problem, stages) if options.events else None
        kept = recording() or k0 is not None
        with step_listener(options.progress, problem) as on_step:
            outcome = follow(march, saver, on_step, search, recorded=kept)
        if search is not None:
            outcome.record.event = search.found
        return outcome

    @property
    def marks(self) -> tuple[float, ...]:
        return (self.problem.t0, *self.options.tstops, self.problem.t1)

    def stages(self, field: FlatFunction) -> Stages:
        """Stages that are not recorded."""
        vectors = vectors_like(self.u0, self.method.all_stages)
        return stages_for(self.method, field, self.marks, vectors, self.problem.mass)

    def plain(self) -> tuple[Record, list[Tensor], Tensor]:
        """Without gradients."""
        field = FlatField(self.problem)
        stages = self.stages(field)
        self._watch(stages, field)
        found = self.march(stages, self.u0, None, None)
        self._has_run(field)
        return found

    def direct(self) -> tuple[Record, list[Tensor], Tensor]:
        """Every operation recorded by autograd."""
        field = FlatField(self.problem)
        stages = stages_for(
            self.method, field, self.marks, RecordedVectors(), self.problem.mass, derivatives=2
        )
        self._watch(stages, field)
        times, fixed = None, self._fixed()
        if _wants_time_gradient(self.problem, self.options) and not fixed:
            t0, t1 = (
                t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
                for t in self.problem.tspan
            )
            times = (t0.to(self.method.nodes), t1.to(self.method.nodes))
        u0 = from_moving_start(self.problem, field, self.u0) if fixed else self.u0
        with self.surroundings.undisturbed():
            record, states, saved = self.march(stages, u0, None, times)
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
        return record, states, saved

    def _fixed(self) -> bool:
        """Whether the ends receive gradients that the steps themselves do not have."""
        problem = self.problem
        if problem.mass is not None or not any(map(requires, problem.tspan)):
            return False
        return hides_time(problem, self.method, self.u0)

    def _watch(self, stages: Stages, field: FlatField) -> None:
        """Look at what the field can reach; random ones are not for adaptive steps."""
        self.surroundings = Surroundings(field.given)
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

    def node(self) -> tuple[Record, list[Tensor], Tensor]:
        """As one node of the graph, its backward the sweep of the adjoint."""
        options, problem = self.options, self.problem
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{type(options.adjoint).__name__} cannot run inside a torch.func transform.\n"
                "  Use adjoint=DirectAdjoint() there."
            )
        t_start = self.method.nodes.new_tensor(problem.t0)
        field = DifferentiableField(problem, t_start, self.u0)
        # Before the node is made: what the field uses on the way is among its inputs.
        field.field.watch = field.captured.watch
        with torch.no_grad():
            found = self.march(self.stages(field.field), self.u0.detach(), field.k0, None)
        field.field.watch = None
        field.captured.settle()
        self.surroundings, self.stats.nfe = field.surroundings, field.nfe
        found[0].fixed = not options.adjoint.discrete or self._fixed()
        keep: list[Record] = []
        t0, t1 = (t if isinstance(t, Tensor) else None for t in problem.tspan)
        saved, *states = SolveNode.apply(  # type: ignore[no-untyped-call]
            lambda _: found,
            partial(self._sweep, field),
            keep,
            self.u0,
            t0,
            t1,
            options.saveat_tensor,
            True,
            *field.inputs,
        )
        return keep[0], [self.u0, *states], saved

    def _sweep(self, field: DifferentiableField, backward: BackwardPass) -> Gradients:
        """The sweep of the solve's adjoint."""
        problem, options = self.problem, self.options
        adjoint = options.adjoint
        with field.captured.sweep(replayed=isinstance(adjoint, DiscreteAdjoint)):
            if isinstance(adjoint, DiscreteAdjoint):
                gradients = discrete_sweep(field, self.method, backward, self.stats)
            else:
                gradients = continuous_sweep(field, self.method, options, backward, self.stats)
            if backward.with_times and problem.mass is None:
                ends = backward.record.fixed and adjoint.discrete
                complete_times(gradients, problem, field.field, backward, ends)
        return gradients


def _wants_time_gradient(problem: ODEProblem, options: SolveOptions) -> bool:
    times = [*problem.tspan, options.saveat_tensor]
    return any(moves(t) for t in times)


def solve(problem: Problem, algorithm: Algorithm, options: SolveOptions) -> Solution:
    """Run a checked problem; a failed solve is returned like any other."""
    if isinstance(problem, SDEProblem):
        assert isinstance(algorithm, StochasticRungeKutta)
        return solve_sde(problem, algorithm, options, NAME, Parts())
    assert isinstance(problem, ODEProblem)
    assert isinstance(algorithm, ExplicitRungeKutta | ImplicitMethod)
    if options.compile:
        solution = attempt_native(problem, algorithm, options, NAME)
        if solution is not None:
            return solution
    work = _Solve(problem, algorithm, options)
    if not recording():
        record, states, saved = work.plain()
    elif isinstance(options.adjoint, DirectAdjoint):
        record, states, saved = work.direct()
    else:
        record, states, saved = work.node()
    control, every = options.controller, options.tolerances.driven == sum(problem.spec.sizes)
    watched = control.adaptive and control.norm is None and every
    check_finite(record, states, watched)
    work.stats.naccept, work.stats.nreject = record.naccept, record.nreject
    trajectory = TorchTrajectory(
        problem,
        work.method,
        lambda: (record, states),
        work.stats,
        options,
        surroundings=work.surroundings,
    )
    return build_solution(
        problem, algorithm, NAME, options, record, states, saved, work.stats, trajectory
    )


def solve_members(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> Members:
    """Run the members of a checked ensemble: in one batch where that can be, or one by one."""
    if options.common.compile:
        native = attempt_native_members(ensemble, algorithm, options, NAME)
        if native is not None:
            return native
    if options.common.compile is not True and batches(ensemble, algorithm, options):
        found = solve_batch(ensemble, algorithm, options)
        if found is not None:
            return found
    solutions = [
        solve(problem, algorithm, options.of(m)) for m, problem in enumerate(ensemble.members())
    ]
    return ListedMembers(tuple(solutions), options.times)
