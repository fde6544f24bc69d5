"""The engine's door: a checked problem and options in, a solution out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pysciml_node.algorithms.adjoints import DirectAdjoint, DiscreteAdjoint, ForwardDiffSensitivity
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta, usual_algorithm
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.ensembles import run_many
from pysciml_node.julia_engine.fields import ProgramField, TranslatedFlatField
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.julia_engine.stochastic import JuliaParts
from pysciml_node.julia_engine.trajectory import SciMLTrajectory
from pysciml_node.julia_engine.work import Work
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.modes import in_full_precision
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.members import ListedMembers, Members
from pysciml_node.solutions.solution import Solution, Trajectory
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
            known = usual_algorithm(problem)
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


def solve_members(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> Members:
    """Run the members of a checked ensemble, over threads where these suffice.

    What calls Python, a field or an event, needs its lock, and runs one after the other; so do
    members with times or tolerances of their own.

    Args:
        ensemble: one member or more.
        algorithm: for all.
        options: of all, and of each.

    Raises:
        EngineUnavailable: Julia cannot be started, or lacks a package.
        JuliaError: Julia raised.
        KeyboardInterrupt: Ctrl-C stopped the solves.
    """
    runtime.start()
    found = _solve_all(ensemble, algorithm, options)
    return ListedMembers(tuple(found), options.times)


def _solve_all(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> list[Solution]:
    problems = ensemble.members()
    if isinstance(problems[0], SDEProblem):
        return [solve(problem, algorithm, options.of(m)) for m, problem in enumerate(problems)]
    works = []
    for m, given in enumerate(problems):
        problem = in_full_precision(given, (nn.Module, JuliaField))
        assert isinstance(problem, ODEProblem)
        works.append(Work(problem, algorithm, options.of(m)))
    first = works[0]
    alike = ensemble.tspan is None and options.alike
    if alike and not first.watcher.needed and _threaded(works, ensemble):
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


def _threaded(works: list[Work], ensemble: EnsembleProblem) -> bool:
    """Whether one field in Julia, with parameters of each member's own, serves all of them."""
    first = works[0].field
    if isinstance(first, ProgramField) and ensemble.p is None:
        for work in works[1:]:
            work.field = first
    if first.calls_python:
        return False
    return all(work.field.handle is first.handle for work in works)


def _solution(work: Work) -> Solution:
    """Run a solve."""
    problem, algorithm, options = work.problem, work.algorithm, work.options
    field = work.field
    record, states, saved = work.node() if torch.is_grad_enabled() else work.plain()
    watched = options.controller.adaptive and options.tolerances.driven == sum(problem.spec.sizes)
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
