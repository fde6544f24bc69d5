"""Which engine runs a solve."""

from __future__ import annotations

import os
from types import ModuleType

from pysciml_node.adjoints import Adjoint
from pysciml_node.algorithms import Algorithm
from pysciml_node.errors import EngineUnavailable
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


def choose(name: str | None, algorithm: Algorithm, adjoint: Adjoint) -> ModuleType:
    """The engine for a solve.

    Raises:
        ValueError: an unknown name.
        EngineUnavailable: the engine cannot run here, or lacks the algorithm.
    """
    wanted = get_engine() if name is None else _check(name, "engine")
    if wanted == "julia":
        raise EngineUnavailable(
            'engine="julia" is not part of this version.\n  Use engine="torch" (or "auto").'
        )
    if not torch_engine.supports(algorithm):
        raise EngineUnavailable(
            f"{algorithm!r} is not an algorithm of the torch engine.\n"
            "  Use one of its explicit Runge-Kutta methods, such as Tsit5()."
        )
    return torch_engine
