"""The engine's door: a checked problem and options in, a solution out."""

from __future__ import annotations

import torch
from torch import nn

from pysciml_node.algorithms.adjoints import DirectAdjoint, DiscreteAdjoint, ForwardDiffSensitivity
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta, usual_algorithm
from pysciml_node.algorithms.switching import SwitchingMethod
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.flight import PreparedSolve
from pysciml_node.julia_engine.members.solve import solve_together
from pysciml_node.julia_engine.prepared import prepare
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.solve import ODESolve
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.julia_engine.stochastic import JuliaParts
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.modes import in_full_precision
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.members import ListedMembers, Members
from pysciml_node.solutions.solution import Solution
from pysciml_node.stochastic.solve import SDESolve

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
    if problem.mass_matrix is not None and (explicit or isinstance(algorithm, SwitchingMethod)):
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
        return SDESolve(problem, algorithm, options, NAME, JuliaParts(algorithm)).solution()
    assert isinstance(problem, ODEProblem)
    ready = prepare(problem, algorithm, options)
    if ready is not None:
        return PreparedSolve(problem, algorithm, options, NAME, ready).solution()
    return ODESolve(problem, algorithm, options, NAME).solution()


def solve_members(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> Members:
    """Run the members of a checked ensemble, by one call into Julia where that can be.

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
    together = solve_together(ensemble, algorithm, options, NAME)
    if together is not None:
        return together
    solutions = [
        solve(problem, algorithm, options.of(m)) for m, problem in enumerate(ensemble.members())
    ]
    return ListedMembers(tuple(solutions), options.times)
