"""Which engine runs a solve."""

from __future__ import annotations

import os
from typing import Protocol

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.errors import EngineUnavailable, MethodUnavailable
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import Problem
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.solution import Solution
from pysciml_node.torch_engine import engine as torch_engine
from pysciml_node.torch_engine.native.library import cross_in_c


class Engine(Protocol):
    """What an engine is: a module with these names.

    Attributes:
        NAME: by which solves ask for it.
    """

    NAME: str

    def supports(self, algorithm: Algorithm, options: SolveOptions) -> bool:
        """Whether it has the algorithm, with the controller that is asked for."""

    def refusal(self, problem: Problem, algorithm: Algorithm, options: SolveOptions) -> str | None:
        """Why it cannot run a solve as asked, with the remedy; `None` when it can."""

    def solve(self, problem: Problem, algorithm: Algorithm, options: SolveOptions) -> Solution:
        """Run a checked problem; a failed solve is returned like any other."""

    def solve_members(
        self, ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
    ) -> Members:
        """Run the members of a checked ensemble; those that fail are returned like any other."""


ENGINES = ("auto", "torch", "julia")
_VARIABLE = "PYSCIML_NODE_ENGINE"
_ENCODED = os.environ.encodekey(_VARIABLE)
_chosen: str | None = None


def _check(name: str, source: str) -> str:
    return checks.choice(source, name, ENGINES)


def set_engine(name: str | None) -> None:
    """Fix the engine for this process; `None` takes the choice back.

    Raises:
        ValueError: an unknown name.
    """
    global _chosen
    _chosen = None if name is None else _check(name, "the engine")


def get_engine() -> str:
    """The engine `solve` uses when none is named: `set_engine`'s, the environment's, or auto."""
    if _chosen is not None:
        return _chosen
    # Every solve asks; the environment takes a microsecond to say that it has no such name.
    kept = getattr(os.environ, "_data", None)
    if kept is not None and _ENCODED not in kept:
        return "auto"
    return _check(os.environ.get(_VARIABLE, "auto"), _VARIABLE)


def named(name: str) -> Engine:
    """The engine of a name, which may not be able to run here."""
    if name == torch_engine.NAME:
        return torch_engine
    # Imported here: most programs never come this way.
    from pysciml_node.julia_engine import engine as julia_engine

    return julia_engine


def choose(
    name: str | None, problem: Problem, algorithm: Algorithm, options: SolveOptions
) -> tuple[Engine, SolveOptions]:
    """The engine for a solve, and the options there.

    With `"auto"` it is torch where torch can run the solve as asked, and else Julia, which has no
    `compile=True`.

    Raises:
        ValueError: an unknown name.
        EngineUnavailable: the engine cannot run here, or cannot run this solve.
        MethodUnavailable: the engine has no such method.
    """
    wanted = get_engine() if name is None else _check(name, "engine")
    against_torch = None
    if wanted != "julia":
        against_torch = torch_engine.refusal(problem, algorithm, options)
        if wanted == "torch" or against_torch is None or options.compile is True:
            return _expect(torch_engine, against_torch, algorithm, options), options
    julia = named("julia")
    options = algorithm.options_on(julia.NAME, options)
    chosen = _expect(julia, julia.refusal(problem, algorithm, options), algorithm, options)
    if against_torch is not None:
        _expect_julia(against_torch)
    cross_in_c()
    return chosen, options


def _expect_julia(against_torch: str) -> None:
    """Say why Julia is needed where nobody has asked for it, and it cannot start."""
    from pysciml_node.julia_engine.process import runtime

    missing = runtime.unavailable_reason()
    if missing is not None:
        raise EngineUnavailable(f"{against_torch}\n  Julia cannot run here: {missing}")


def _expect(
    engine: Engine, reason: str | None, algorithm: Algorithm, options: SolveOptions
) -> Engine:
    """An engine, unless there is a reason against it."""
    if reason is None:
        return engine
    missing = not engine.supports(algorithm, options)
    raise (MethodUnavailable if missing else EngineUnavailable)(reason)
