"""Which engine runs a solve."""

from __future__ import annotations

import os
from types import ModuleType

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.errors import EngineUnavailable
from pysciml_node.problems.ode import Problem
from pysciml_node.torch_engine import engine as torch_engine

ENGINES = ("auto", "torch", "julia")
_chosen: str | None = None


def _check(name: str, source: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"{source} must be one of {', '.join(ENGINES)}, but is {name!r}.")
    return name


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
    return _check(os.environ.get("PYSCIML_NODE_ENGINE", "auto"), "PYSCIML_NODE_ENGINE")


def choose(
    name: str | None, problem: Problem, algorithm: Algorithm, options: SolveOptions
) -> ModuleType:
    """The engine for a solve: with `"auto"` torch, where it has the algorithm, and else Julia.

    Raises:
        ValueError: an unknown name.
        EngineUnavailable: the engine cannot run here, or cannot run this solve.
    """
    wanted = get_engine() if name is None else _check(name, "engine")
    reason = torch_engine.refusal(problem, algorithm, options)
    if wanted == "torch" or (wanted == "auto" and reason is None):
        if reason is not None:
            raise EngineUnavailable(reason)
        return torch_engine
    # Imported here: most programs never come this way.
    from pysciml_node.julia_engine import engine as julia_engine

    reason = julia_engine.refusal(problem, algorithm, options)
    if reason is not None:
        raise EngineUnavailable(reason)
    return julia_engine
