"""The engine's door: native code for a solve or members, or the reason why there is none."""

from __future__ import annotations

import warnings

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.errors import CompileError, PsnWarning
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.solution import Solution
from pysciml_node.torch_engine.native.engine import NativeSolve
from pysciml_node.torch_engine.native.members import NativeMembers, solve_native_members
from pysciml_node.torch_engine.native.path_members import solve_native_paths
from pysciml_node.torch_engine.native.prepared import check_classes
from pysciml_node.torch_engine.native.stochastic import NativeSDESolve

_told: set[str] = set()


def say_why_not(error: CompileError) -> None:
    """With `compile="auto"`, say once why a solve has no native code; it goes on without."""
    reason = str(error).partition("\n")[0]
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"{reason}\n  The solve goes on without native code, as others like it will.",
            PsnWarning,
            stacklevel=6,
        )


def attempt_native(
    problem: Problem, algorithm: Algorithm, options: SolveOptions, engine: str
) -> Solution | None:
    """The solution of native code; `None` where there is none, with `compile="auto"`.

    Raises:
        CompileError: with `compile=True`, as `NativeSolve`.
    """
    try:
        check_classes(problem.u0)
        if isinstance(problem, SDEProblem):
            assert isinstance(algorithm, StochasticRungeKutta)
            return NativeSDESolve(problem, algorithm, options, engine).solution()
        assert isinstance(problem, ODEProblem)
        return NativeSolve(problem, algorithm, options, engine).solution()
    except CompileError as error:
        if options.compile != "auto":
            raise
        say_why_not(error)
    return None


def attempt_native_members(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions, engine: str
) -> NativeMembers | None:
    """The members that native code has solved; `None` as `attempt_native`.

    Raises:
        CompileError: with `compile=True`, as `solve_native_members`.
    """
    try:
        check_classes(ensemble.problem.u0, ensemble.u0, ensemble.p)
        if isinstance(ensemble.problem, SDEProblem):
            assert isinstance(algorithm, StochasticRungeKutta)
            return solve_native_paths(ensemble, algorithm, options, engine)
        return solve_native_members(ensemble, algorithm, options, engine)
    except CompileError as error:
        if options.common.compile != "auto":
            raise
        say_why_not(error)
    return None
