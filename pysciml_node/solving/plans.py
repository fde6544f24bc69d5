"""Plans: what a call of `solve` comes to, worked out once for equal calls."""

from __future__ import annotations

import contextlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from math import copysign
from operator import is_
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
from pysciml_node.translation import repeated


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


class _Given(NamedTuple):
    """What was given for a plan. Values that are equal, and of the same kinds, come to the same.

    Attributes:
        plan: the plan.
        values: the algorithm and the options; of a list or a dict a copy.
        kinds: theirs.
        rows: which of them are lists, tuples and dicts, of floating-point numbers.
        names: of the options.
        spec: structure of the state.
        engine: that was asked for.
        start: of the interval.
        end: of it.
    """

    # In the order of repeat.c.
    plan: Plan
    values: list[Any]
    kinds: tuple[type, ...]
    rows: tuple[bool, ...]
    names: tuple[str, ...]
    spec: StateSpec
    engine: str
    start: float
    end: float

    def is_for(self, problem: ODEProblem, asked: str, names: tuple[str, ...]) -> bool:
        """Whether it was given for options of these names, and for a state of the structure over
        the interval."""
        if self.spec is not problem.spec or self.names != names or self.engine != asked:
            return False
        return _ENDS(self.start, self.end) == _ENDS(*problem.tspan)

    def equals(self, values: list[Any], kinds: tuple[type, ...]) -> bool:
        """Whether values are these."""
        if kinds != self.kinds:
            return False
        for value, known, listed in zip(values, self.values, self.rows, strict=True):
            # What is no number may not be compared.
            if listed and not _are_floats(_listed(value), _listed(known)):
                return False
        return values == self.values


_KNOWN: OrderedDict[Any, Plan] = OrderedDict()
"""Plans by what was given and for which problem: see `_key`."""

_LATELY: list[_Given] = []
"""What they were found by lately: C goes through it too."""

_MOST_KNOWN, _MOST_RECENT, _MOST_ALIKE = 256, 64, 8

_FLOAT = frozenset((float,))
_LISTED = frozenset((list, tuple, dict, Tensor, np.ndarray))

_ROWS = frozenset((list, tuple, dict))

_CHANGING = frozenset((list, dict))

_SINGLE = {bool, int, float, str, type(None), type(USUAL)}
"""Kinds of values that plans are found by; those of algorithms and their parts join them."""

_ENDS = struct.Struct("dd").pack


def _are_plain(kinds: Sequence[type]) -> bool:
    """Whether values of these kinds say all that a plan depends on."""
    others = {kind for kind in kinds if kind not in _SINGLE and kind is not tuple}
    if not all(map(_is_own, others)):
        return False
    _SINGLE.update(others)
    return True


def _is_own(kind: type) -> bool:
    """Whether it is one of this package's algorithms, or of their parts.

    A class that is derived from one may hold more than what it is compared by.
    """
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return own and issubclass(kind, Controller | Adjoint | Algorithm)


def _key(problem: Problem, algorithm: Algorithm | None, given: dict[str, Any]) -> Any:
    """What a plan depends on; `None` where it is more than the values themselves."""
    kind: Any = None
    if type(problem) is SDEProblem:
        kind = problem.noise, problem.interpretation
    elif type(problem) is not ODEProblem or problem.mass_matrix is not None:
        return None
    values: Sequence[Any] = (algorithm, *given.values())
    # 1 and True are equal, and only one of them is a number of steps.
    kinds = tuple(map(type, values))
    if not _SINGLE.issuperset(kinds):
        entries = _all_entries(algorithm, given, kind is not None)
        if entries is None:
            return None
        values, kinds = entries, tuple(map(type, entries))
    # As bits: 0.0 and -0.0 are equal, and the one may lie beyond an end of the other.
    ends = _ENDS(*ends_of(problem))
    asked = given.get("engine") or engines.get_engine()
    return (kinds, tuple(given), kind, asked, id(problem.spec), ends, *values)


def _alike(problem: Problem, given: dict[str, Any]) -> list[_Given] | None:
    """What was given lately for such a problem; `None` where a plan depends on more."""
    if type(problem) is not ODEProblem or problem.mass_matrix is not None:
        return None
    t0, t1 = problem.tspan
    if not type(t0) is type(t1) is float:
        return None
    asked, names = given.get("engine") or engines.get_engine(), tuple(given)
    return [x for x in _LATELY if x.is_for(problem, asked, names)]


def _all_entries(
    algorithm: Algorithm | None, given: dict[str, Any], stochastic: bool
) -> list[Any] | None:
    """The values by which a plan is found where some of them may change."""
    values: list[Any] = [algorithm]
    for name, value in given.items():
        if type(value) in _LISTED:
            entries = _entries(name, value)
            if entries is None:
                return None
            values.append(entries)
        elif not (name == "generator" and stochastic and isinstance(value, torch.Generator)):
            values.append(value)  # a generator gives each solve another seed
    return values


def _entries(name: str, listed: Any) -> tuple[Any, ...] | None:
    """A list, a dict or an array by its entries, for it may change; `None` where they are more."""
    kind: Any = type(listed)
    if kind is Tensor or kind is np.ndarray:
        if name != "saveat" or listed.ndim != 1 or not (kind is np.ndarray or _is_numbers(listed)):
            return None
        # Its precision is how far beyond the ends times may be.
        kind, listed = (kind, listed.dtype), listed.tolist()
    elif kind is dict:  # a tolerance for each part of a state
        kind = kind, *listed
    listed = _listed(listed)
    if not _FLOAT.issuperset(map(type, listed)) or _has_negative_zero(listed):
        return None
    return (kind, *listed)


def _listed(row: Any) -> Any:
    """The entries of a list, of a tuple, or of a dict."""
    return [*row.values()] if type(row) is dict else row


def _is_numbers(x: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory."""
    ordinary = x.device.type == "cpu" and x.layout is torch.strided and not moves(x)
    return ordinary and not torch._C._are_functorch_transforms_active()


def _are_floats(listed: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether numbers that are equal to those of before, which were floats, are the same ones."""
    if len(listed) == len(before) and all(map(is_, listed, before)):
        return True
    return _FLOAT.issuperset(map(type, listed)) and not _has_negative_zero(listed)


def _has_negative_zero(times: Sequence[float]) -> bool:
    """Whether there is a zero that is equal to zero, and yet another time."""
    return 0.0 in times and any(copysign(1.0, t) < 0 for t in times if t == 0)


def _keep(
    plan: Plan, problem: Problem, given: dict[str, Any], values: list[Any], alike: list[_Given]
) -> None:
    """Have later solves find a plan by what was given for this one."""
    kinds = tuple(map(type, values))
    others = sum(kinds[0] is x.kinds[0] for x in alike)
    # Those that come and go, as sizes of steps may, are found by the key alone.
    if others >= _MOST_ALIKE or not all(kind in _SINGLE or kind in _ROWS for kind in kinds):
        return
    if len(_LATELY) >= _MOST_RECENT:
        _LATELY.clear()
    rows = tuple(kind in _ROWS for kind in kinds)
    copies = [x.copy() if type(x) in _CHANGING else x for x in values]
    asked = given.get("engine") or engines.get_engine()
    what = tuple(given), problem.spec, asked, *ends_of(problem)
    _LATELY.append(_Given(plan, copies, kinds, rows, *what))


def recent_plan(
    problem: Problem, algorithm: Algorithm | None, given: dict[str, Any]
) -> Plan | None:
    """The plan of a solve that is one of the last ones but for its state and its field.

    Args:
        problem: what is solved.
        algorithm: as it was given.
        given: the options, likewise.
    """
    if repeated.recall is not None and type(problem) is ODEProblem and problem.mass_matrix is None:
        asked = given.get("engine") or engines.get_engine()
        plan: Plan | None = repeated.recall(_LATELY, problem.__dict__, algorithm, given, asked)
        if plan is not None:
            return plan
    return _among(_alike(problem, given) or (), [algorithm, *given.values()])


def _among(alike: Sequence[_Given], values: list[Any]) -> Plan | None:
    """The plan that the same was given for."""
    kinds = tuple(map(type, values)) if alike else ()
    return next((before.plan for before in alike if before.equals(values, kinds)), None)


def plan_of(
    problem: Problem, algorithm: Algorithm | None, given: dict[str, Any], usual: dict[str, Any]
) -> Plan:
    """The plan of a solve: its arguments checked, and an engine chosen; once for equal ones.

    Args:
        problem: what is solved.
        algorithm: as it was given.
        given: the options, likewise.
        usual: what those are that an engine is told, where they were not given.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: one is out of range, or does not go with another.
        EngineUnavailable: the engine cannot run here, or cannot run this solve.
        MethodUnavailable: the engine has no such method.
    """
    alike, values = _alike(problem, given), [algorithm, *given.values()]
    known = _among(alike or (), values)
    if known is not None:
        return known
    key = _key(problem, algorithm, given)
    try:
        known = None if key is None else _KNOWN.get(key)
    except TypeError:  # one of them has no hash
        key = known = None
    if known is None:
        engine = given.get("engine")
        algorithm = check_algorithm(problem, algorithm)
        asked = {name: given.get(name, value) for name, value in usual.items()}
        options = check_options(problem, algorithm, **asked)
        chosen, options = engines.choose(engine, problem, algorithm, options)
        known = Plan(algorithm, options, chosen, problem.spec)
        # Whether Julia is there is asked each time, where nobody has named it.
        named = (engines.get_engine() if engine is None else engine) == chosen.NAME
        if key is not None and _are_plain(key[0]) and (chosen.NAME == "torch" or named):
            _KNOWN[key] = known
            while len(_KNOWN) > _MOST_KNOWN:
                with contextlib.suppress(KeyError):
                    _KNOWN.popitem(last=False)
    if alike is not None and key is not None and key in _KNOWN:
        _keep(known, problem, given, values, alike)
    return known
