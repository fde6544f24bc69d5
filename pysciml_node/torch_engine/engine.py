"""The engine's door: a checked problem and options in, a solution out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pysciml_node.adjoints import DirectAdjoint, DiscreteAdjoint, _ContinuousAdjoint
from pysciml_node.algorithms import Algorithm, ExplicitRungeKutta
from pysciml_node.options import SolveOptions
from pysciml_node.problem import ODEProblem
from pysciml_node.progress import step_listener
from pysciml_node.solution import ReturnCode, Solution, Stats
from pysciml_node.torch_engine.adjoint_continuous import backward_controller, continuous_sweep
from pysciml_node.torch_engine.adjoint_discrete import Cotangents, Gradients, discrete_sweep
from pysciml_node.torch_engine.autograd import SolveNode
from pysciml_node.torch_engine.compiled_engine import can_compile, solve_compiled
from pysciml_node.torch_engine.event_search import EventSearch
from pysciml_node.torch_engine.field import DifferentiableField, FlatField
from pysciml_node.torch_engine.march import March, MarchOptions
from pysciml_node.torch_engine.norms import Tolerance
from pysciml_node.torch_engine.record import Record, follow
from pysciml_node.torch_engine.stages import Method, Stages
from pysciml_node.torch_engine.trajectory import TorchTrajectory
from pysciml_node.torch_engine.vectors import RecordedVectors, vectors_like

NAME = "torch"


def supports(algorithm: Algorithm) -> bool:
    """Whether this engine has the algorithm."""
    return isinstance(algorithm, ExplicitRungeKutta)


class _Solve:
    """One solve: its parts, made once, and the ways to run it."""

    def __init__(
        self, problem: ODEProblem, algorithm: ExplicitRungeKutta, options: SolveOptions
    ) -> None:
        self.problem, self.options = problem, options
        spec = problem.spec
        self.method = Method.of(algorithm.tableau, spec.dtype, spec.device)
        self.u0 = spec.flatten(problem.u0)
        self.stats = Stats()

    def march(
        self, stages: Stages, u0: Tensor, k0: Tensor | None, times: tuple[Tensor, Tensor] | None
    ) -> tuple[Record, list[Tensor], Tensor]:
        """Run the time loop and keep what the options ask for."""
        options, problem = self.options, self.problem
        march = March(
            stages,
            u0,
            problem.t0,
            problem.t1,
            MarchOptions(
                controller=options.controller,
                tolerance=Tolerance(options.rtol, options.atol, options.driven),
                max_steps=options.max_steps,
                dt0=options.dt0,
                dtmin=options.dtmin,
                dtmax=options.dtmax,
                tstops=options.tstops,
                time_tensors=times,
            ),
            k=k0,
        )
        search = EventSearch(options.events, problem) if options.events else None
        with step_listener(options.progress, problem) as on_step:
            found = follow(march, options.saveat or (), options.saveat_tensor, search, on_step)
        if search is not None:
            found[0].event = search.found
        return found

    @property
    def marks(self) -> tuple[float, ...]:
        return (self.problem.t0, *self.options.tstops, self.problem.t1)

    def stages(self, field: FlatField) -> Stages:
        """Stages that are not recorded."""
        vectors = vectors_like(self.u0, self.method.all_stages)
        return Stages(self.method, field, self.marks, vectors)

    def plain(self) -> tuple[Record, list[Tensor], Tensor]:
        """Without gradients."""
        field = FlatField(self.problem)
        stages = self.stages(field)
        found = self.march(stages, self.u0, None, None)
        self.stats.nfe = field.nfe
        return found

    def direct(self) -> tuple[Record, list[Tensor], Tensor]:
        """Every operation recorded by autograd."""
        field = FlatField(self.problem)
        stages = Stages(self.method, field, self.marks, RecordedVectors())
        times = None
        if _wants_time_gradient(self.problem, self.options):
            t0, t1 = (
                t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
                for t in self.problem.tspan
            )
            times = (t0.to(self.method.nodes), t1.to(self.method.nodes))
        found = self.march(stages, self.u0, None, times)
        self.stats.nfe = field.nfe
        return found

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

        def run(u0: Tensor) -> tuple[Record, list[Tensor], Tensor]:
            found = self.march(self.stages(field.field), u0, field.k0, None)
            self.stats.nfe = field.nfe
            return found

        stats, method, adjoint = self.stats, self.method, options.adjoint

        def sweep(
            record: Record, states: tuple[Tensor, ...], arriving: Cotangents, with_times: bool
        ) -> Gradients:
            if isinstance(adjoint, DiscreteAdjoint):
                return discrete_sweep(field, method, record, states, arriving, with_times, stats)
            assert isinstance(adjoint, _ContinuousAdjoint)
            return continuous_sweep(
                field,
                method,
                record,
                states,
                arriving,
                adjoint,
                backward_controller(options.controller),
                adjoint.rtol or _tightest(options.rtol),
                adjoint.atol or _tightest(options.atol),
                adjoint.max_steps or options.max_steps,
                with_times,
                stats,
            )

        keep: list[Record] = []
        t0, t1 = (t if isinstance(t, Tensor) else None for t in problem.tspan)
        saved, *states = SolveNode.apply(  # type: ignore[no-untyped-call]
            run, sweep, keep, self.u0, t0, t1, options.saveat_tensor, *field.inputs
        )
        return keep[0], [self.u0, *states], saved


def _tightest(tolerance: float | Tensor) -> float:
    if not isinstance(tolerance, Tensor):
        return tolerance
    return float(tolerance[torch.isfinite(tolerance)].min())


def _wants_time_gradient(problem: ODEProblem, options: SolveOptions) -> bool:
    times = [*problem.tspan, options.saveat_tensor]
    return any(isinstance(t, Tensor) and t.requires_grad for t in times)


def solve(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> Solution:
    """Run a checked problem; a failed solve is returned like any other."""
    assert isinstance(algorithm, ExplicitRungeKutta)
    if options.compile and can_compile():
        return solve_compiled(problem, algorithm, options, NAME)
    work = _Solve(problem, algorithm, options)
    if not torch.is_grad_enabled():
        record, states, saved = work.plain()
    elif isinstance(options.adjoint, DirectAdjoint):
        record, states, saved = work.direct()
    else:
        record, states, saved = work.node()
    return _solution(work, algorithm, record, states, saved)


def _solution(
    work: _Solve,
    algorithm: ExplicitRungeKutta,
    record: Record,
    states: list[Tensor],
    saved: Tensor,
) -> Solution:
    problem, options, spec = work.problem, work.options, work.problem.spec
    stats = work.stats
    _check_finite(record, states, options)
    stats.naccept, stats.nreject = record.naccept, record.nreject
    trajectory = TorchTrajectory(problem, work.method, lambda: (record, states), stats, options)
    if options.saveat is None:
        t = problem.time_tensor(record.times)
    elif options.saveat_tensor is not None:
        t = options.saveat_tensor[: record.saved].to(work.method.nodes)
    else:
        t = problem.time_tensor(list(options.saveat[: record.saved]))
    return Solution(
        problem=problem,
        algorithm=algorithm,
        engine=NAME,
        retcode=record.retcode,
        stats=stats,
        t=t,
        u1=spec.unflatten(states[-1]),
        trajectory=trajectory,
        make_states=_make_states(
            spec.unflatten, trajectory, None if options.saveat is None else saved[: record.saved]
        ),
        event=record.event,
    )


def _make_states(
    unflatten: Callable[[Tensor], object], trajectory: TorchTrajectory, saved: Tensor | None
) -> Callable[[], object]:
    # Stacking the steps' states copies them: only when somebody looks.
    return lambda: unflatten(trajectory.states() if saved is None else saved)


def _check_finite(record: Record, states: list[Tensor], options: SolveOptions) -> None:
    """Fixed steps see no error estimate: look once, at the end, for what has gone wrong."""
    if options.controller.adaptive or not record.retcode.successful:
        return
    if math.isfinite(float(states[-1].detach().abs().sum())):
        return
    # u0 stays, whatever it is.
    good = next((n for n, u in enumerate(states) if n and not bool(torch.isfinite(u).all())), None)
    if good is None:
        return
    record.retcode = ReturnCode.Unstable
    record.truncate(good)
    del states[good:]
