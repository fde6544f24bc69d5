"""The engine's door: a checked problem and options in, a solution out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import (
    BacksolveAdjoint,
    ForwardDiffSensitivity,
    QuadratureAdjoint,
)
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.implicit import ImplicitMethod
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.algorithms.switching import OneStepMethod, SwitchingMethod, linsolve_of
from pysciml_node.errors import CompileError
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.members.stacked import MembersUpToEvents, StackedMembers
from pysciml_node.solutions.members import ListedMembers, Members
from pysciml_node.solutions.solution import Solution
from pysciml_node.stochastic.solve import SDESolve
from pysciml_node.tableaus import RosenbrockTableau
from pysciml_node.torch_engine.members.engine import batches, solve_batch
from pysciml_node.torch_engine.solve import ODESolve

NAME = "torch"
# A Jacobian of more entries takes longer than Krylov methods would: 2048 rows are 34 MB.
LARGEST_IMPLICIT = 2048
_METHODS = (ExplicitRungeKutta, ImplicitMethod, StochasticRungeKutta)
_IMPLICIT = (ImplicitMethod, SwitchingMethod)
_JULIA_ADJOINTS = (QuadratureAdjoint, ForwardDiffSensitivity)


def supports(algorithm: Algorithm, options: SolveOptions) -> bool:
    """Whether this engine has the algorithm, with any controller."""
    del options
    if isinstance(algorithm, SwitchingMethod):
        return algorithm.embedded
    return isinstance(algorithm, _METHODS)


def refusal(problem: Problem, algorithm: Algorithm, options: SolveOptions) -> str | None:
    """Why this engine cannot run a solve as asked, with the remedy; `None` when it can."""
    if not supports(algorithm, options):
        return (
            f"{algorithm!r} is not an algorithm of the torch engine.\n"
            '  Use engine="julia", or Tsit5(), and Rodas5P() for stiff problems.'
        )
    if isinstance(algorithm, _IMPLICIT):
        return _refusal_implicit(problem, algorithm, options)
    if isinstance(problem, ODEProblem) and problem.mass_matrix is not None:
        return "mass matrices need an implicit method.\n  Use Rodas5P()."
    if isinstance(options.adjoint, _JULIA_ADJOINTS):
        return (
            f"{type(options.adjoint).__name__} is an adjoint of the Julia engine.\n"
            '  Use engine="julia", or adjoint=DiscreteAdjoint().'
        )
    return None


def _refusal_implicit(
    problem: Problem, algorithm: ImplicitMethod | SwitchingMethod, options: SolveOptions
) -> str | None:
    """Why this engine cannot take an implicit method, with the remedy; `None` when it can."""
    name, size = type(algorithm).__name__, sum(problem.spec.sizes)
    adjoint = type(options.adjoint).__name__
    if isinstance(options.adjoint, _JULIA_ADJOINTS):
        return (
            f"{adjoint} is an adjoint of the Julia engine.\n"
            '  Use engine="julia", or adjoint=DiscreteAdjoint().'
        )
    if isinstance(options.adjoint, BacksolveAdjoint):
        return (
            f"{adjoint} solves the equation of {name} backward in time, where what decays fast "
            "grows fast.\n"
            "  Use adjoint=DiscreteAdjoint() or GaussAdjoint()."
        )
    if problem.spec.dtype.is_complex:
        return (
            f"{name} takes real states on the torch engine, but u0 is {problem.spec.dtype}.\n"
            '  Use torch.view_as_real, or engine="julia".'
        )
    if size > LARGEST_IMPLICIT:
        if linsolve_of(algorithm, size) is None:
            return (
                f"{name} solves dense linear systems on the torch engine, up to {LARGEST_IMPLICIT} "
                f"entries, but u0 has {size}.\n"
                "  Use KenCarp4() or TRBDF2(), which need no matrix, FBDF() on the Julia engine, "
                "or an EnsembleProblem of its rows."
            )
        if not options.adjoint.discrete:
            return (
                f"{adjoint} solves dense linear systems on the torch engine, up to "
                f"{LARGEST_IMPLICIT} entries, but u0 has {size}.\n"
                '  Use adjoint=DiscreteAdjoint(), or engine="julia".'
            )
    mass = problem.mass
    if mass is not None and not options.adjoint.discrete and _singular(mass):
        return (
            f"{adjoint} takes a singular mass matrix on the Julia engine only.\n"
            '  Use adjoint=DiscreteAdjoint(), or engine="julia".'
        )
    rosenbrock = all(isinstance(x, RosenbrockTableau) for x in algorithm.tableaus)
    if mass is not None and not rosenbrock:
        return (
            f'{name} takes no mass matrix on the torch engine.\n  Use Rodas5P(), or engine="julia".'
        )
    return None


def _singular(mass: Tensor) -> bool:
    """Whether a matrix has no inverse that could be relied on."""
    condition: Tensor = torch.linalg.cond(mass, 1)
    return not float(condition) < 0.01 / torch.finfo(mass.dtype).eps


def solve(problem: Problem, algorithm: Algorithm, options: SolveOptions) -> Solution:
    """Run a checked problem; a failed solve is returned like any other."""
    if options.compile:
        solution = _native()(problem, algorithm, options, NAME)
        if solution is not None:
            return solution
    if isinstance(problem, SDEProblem):
        assert isinstance(algorithm, StochasticRungeKutta)
        return SDESolve(problem, algorithm, options, NAME).solution()
    assert isinstance(problem, ODEProblem)
    assert isinstance(algorithm, OneStepMethod)
    return ODESolve(problem, algorithm, options, NAME).solution()


def solve_again(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions
) -> Solution | None:
    """Run a native solve that was before but for its state and numbers; `None` where it was not.

    The problem is as it was given: torch is in none of the modes in which it would be another one.
    """
    return _native_again()(problem, algorithm, options, NAME)


@cache
def _native() -> Callable[[Problem, Algorithm, SolveOptions, str], Solution | None]:
    """Native solves: emitters and translation are imported when a solve asks for them."""
    from pysciml_node.torch_engine.native.attempt import attempt_native

    return attempt_native


@cache
def _native_again() -> Callable[[ODEProblem, Algorithm, SolveOptions, str], Solution | None]:
    from pysciml_node.torch_engine.native.at_once import solve_again

    return solve_again


def solve_members(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> Members:
    """Run the members of a checked ensemble: in one batch where that can be, or one by one."""
    if options.common.compile:
        from pysciml_node.torch_engine.native.attempt import attempt_native_members

        native = attempt_native_members(ensemble, algorithm, options, NAME)
        if native is not None:
            return native
    # A chunk of one goes back, and counts its evaluations, as it would among others.
    several = len(ensemble) > 1 or not options.common.adjoint.discrete
    if options.common.compile is not True and several:
        batch = _in_batch(ensemble, algorithm, options)
        if batch is not None:
            return batch
    solutions = [
        solve(problem, algorithm, options.of(m)) for m, problem in enumerate(ensemble.members())
    ]
    return ListedMembers(tuple(solutions), options.times)


def solve_in_batch(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> MembersUpToEvents | None:
    """Run the members at once, each up to its first event; `None` where that cannot be.

    With `compile` they are native. What has no native code for members is left to solves of one
    member each, which have it or say what it is.
    """
    if options.common.compile:
        from pysciml_node.torch_engine.native.attempt import attempt_native_members

        try:
            native = attempt_native_members(ensemble, algorithm, options, NAME)
        except CompileError:
            return None
        if native is not None:
            return native
    return _in_batch(ensemble, algorithm, options)


def _in_batch(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> StackedMembers | None:
    if not batches(ensemble, algorithm, options):
        return None
    return solve_batch(ensemble, algorithm, options)
