"""Plans: what a call of `solve` comes to, worked out once for equal calls."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from math import copysign
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import Adjoint
from pysciml_node.algorithms.controllers import Controller
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import ODEProblem, Problem, ends_of
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import StateSpec, moves
from pysciml_node.solving import engines
from pysciml_node.solving.checks import USUAL, check_algorithm, check_options


class Plan(NamedTuple):
    """How a problem is solved.

    Attributes:
        algorithm: that was given, or the problem's usual one.
        options: complete and checked, as the engine takes them.
        engine: runs it.
        spec: structure of the state; it is kept, so that its identity is not given out again.
    """

    algorithm: Algorithm
    options: SolveOptions
    engine: engines.Engine
    spec: StateSpec


_KNOWN: OrderedDict[Any, Plan] = OrderedDict()
"""Plans by what was given and for which problem: see `_key`."""

_MOST_KNOWN = 256

_FLOAT, _LISTS, _ARRAYS = frozenset((float,)), (list, tuple), (Tensor, np.ndarray)

_PLAIN = {bool, int, float, str, tuple, type(None), type(USUAL)}
"""Kinds of values that plans may be found by; those of algorithms and their parts join them."""


def _are_plain(kinds: Sequence[type]) -> bool:
    """Whether values of these kinds say all that a plan depends on."""
    if not _PLAIN.issuperset(kinds):
        if not all(kind in _PLAIN or _is_own(kind) for kind in kinds):
            return False
        _PLAIN.update(kinds)
    return True


def _is_own(kind: type) -> bool:
    """Whether it is one of this package's algorithms, or of their parts.

    A class that is derived from one may hold more than what it is compared by.
    """
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return own and issubclass(kind, Controller | Adjoint | Algorithm)


def _key(
    problem: Problem, algorithm: Algorithm | None, engine: str | None, given: dict[str, Any]
) -> Any:
    """What a plan depends on; `None` where it is more than the values themselves."""
    kind: Any = None
    if type(problem) is SDEProblem:
        kind = problem.noise, problem.interpretation
        generator = given["generator"]
        if generator is None or isinstance(generator, torch.Generator):
            given = {**given, "generator": None}  # it gives each solve another seed
    elif type(problem) is not ODEProblem or problem.mass_matrix is not None:
        return None
    t0, t1 = ends_of(problem)
    saveat = given["saveat"]
    if type(saveat) in _ARRAYS:
        if saveat.ndim != 1 or (type(saveat) is Tensor and not _is_numbers(saveat)):
            return None
        # By its entries, for it may change; its precision is how far beyond the ends they may be.
        kind = kind, type(saveat), saveat.dtype
        given = {**given, "saveat": saveat.tolist()}
    for name in ("rtol", "atol", "saveat", "tstops", "events"):
        listed = given[name]
        if type(listed) is dict and listed:  # a tolerance for each part of a state
            kind, listed = (kind, name, *listed), [*listed.values()]
        if type(listed) in _LISTS and listed:
            if not _FLOAT.issuperset(map(type, listed)) or _has_negative_zero(listed):
                return None
            given = {**given, name: (len(listed), *listed)}
    # 1 and True are equal, and only one of them is a number of steps.
    values = algorithm, engines.get_engine() if engine is None else engine, *given.values()
    kinds = tuple(map(type, values))
    return (kinds, kind, id(problem.spec), t0, t1, copysign(1.0, t0), copysign(1.0, t1), values)


def _is_numbers(x: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory."""
    ordinary = x.device.type == "cpu" and x.layout is torch.strided and not moves(x)
    return ordinary and not torch._C._are_functorch_transforms_active()


def _has_negative_zero(times: Sequence[float]) -> bool:
    """Whether there is a zero that is equal to zero, and yet another time."""
    return 0.0 in times and any(copysign(1.0, t) < 0 for t in times if t == 0)


def plan_of(
    problem: Problem, algorithm: Algorithm | None, engine: str | None, given: dict[str, Any]
) -> Plan:
    """The plan of a solve: its arguments checked, and an engine chosen; once for equal ones.

    Args:
        problem: what is solved.
        algorithm: as it was given.
        engine: its name, as it was given.
        given: the options, likewise.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: one is out of range, or does not go with another.
        EngineUnavailable: the engine cannot run here, or cannot run this solve.
        MethodUnavailable: the engine has no such method.
    """
    key = _key(problem, algorithm, engine, given)
    try:
        known = None if key is None else _KNOWN.get(key)
    except TypeError:  # one of them has no hash
        key = known = None
    if known is None:
        algorithm = check_algorithm(problem, algorithm)
        options = check_options(problem, algorithm, **given)
        chosen, options = engines.choose(engine, problem, algorithm, options)
        known = Plan(algorithm, options, chosen, problem.spec)
        # Whether Julia is there is asked each time, where nobody has named it.
        named = (engines.get_engine() if engine is None else engine) == chosen.NAME
        if key is not None and _are_plain(key[0]) and (chosen.NAME == "torch" or named):
            _KNOWN[key] = known
            while len(_KNOWN) > _MOST_KNOWN:
                with contextlib.suppress(KeyError):
                    _KNOWN.popitem(last=False)
    return known
