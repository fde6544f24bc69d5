"""How a solve is run, told to Julia once and then named by a handle."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms import Algorithm, ExplicitRungeKutta
from pysciml_node.controllers import Controller, IController, PIController, PIDController
from pysciml_node.julia_engine import runtime
from pysciml_node.julia_engine.buffers import CODES, pointer
from pysciml_node.julia_engine.handles import Handle
from pysciml_node.options import SolveOptions
from pysciml_node.sciml_algorithms import SciMLAlgorithm
from pysciml_node.torch_engine.tableaus import Tableau

_LOW_ORDER, _VERNER = "OrdinaryDiffEqLowOrderRK", "OrdinaryDiffEqVerner"
_PACKAGES = {
    **dict.fromkeys(("Euler", "Midpoint", "Heun", "Ralston", "BS3", "RK4", "DP5"), _LOW_ORDER),
    "Tsit5": "OrdinaryDiffEqTsit5",
    "DP8": "OrdinaryDiffEqHighOrderRK",
    "Vern7": _VERNER,
    "Vern9": _VERNER,
}
FIXED_ONLY = ("Euler",)
"""Methods that have no error estimate in SciML."""

_LAZY = re.compile(r"(Auto)?Vern[6-9]\(")

_plans: dict[tuple[Any, ...], Handle] = {}
_tableaus: dict[int, Handle] = {}


def expression_of(algorithm: Algorithm, keep_solution: bool) -> tuple[str, tuple[str, ...]]:
    """How Julia makes an algorithm, and the packages with the names for it.

    Verner's methods evaluate the stages of dense output when it is asked for, which the adjoints of
    SciMLSensitivity do not do: where the solution is kept they are evaluated at once.
    """
    if isinstance(algorithm, SciMLAlgorithm):
        expression, packages = algorithm.expression, algorithm.packages
    else:
        name = type(algorithm).__name__
        expression, packages = f"{name}()", (_PACKAGES[name],)
    if keep_solution and _LAZY.match(expression):
        separator = "" if expression.endswith("()") and expression.count("(") == 1 else "; "
        expression = f"{expression[:-1]}{separator}lazy = false)"
    return expression, packages


def supports(algorithm: Algorithm) -> bool:
    """Whether the Julia engine has the algorithm."""
    if isinstance(algorithm, ExplicitRungeKutta):
        return type(algorithm).__name__ in _PACKAGES
    return isinstance(algorithm, SciMLAlgorithm)


def _controller(controller: Controller, algorithm: Algorithm) -> dict[str, Any] | None:
    """Name and coefficients, those that follow from the method's order filled in."""
    if not isinstance(controller, IController | PIController | PIDController):
        return None
    options = dataclasses.asdict(controller)
    if isinstance(controller, PIController):
        if isinstance(algorithm, ExplicitRungeKutta):
            error_order = algorithm.tableau.error_order
            options["beta1"], options["beta2"] = controller.exponents(error_order)
        else:
            options = {key: value for key, value in options.items() if value is not None}
    return {"name": type(controller).__name__, "options": options}


def plan(
    algorithm: Algorithm,
    options: SolveOptions,
    dtype: torch.dtype,
    size: int,
    keep_solution: bool,
) -> Handle:
    """The handle of a plan, made once for equal descriptions.

    Args:
        algorithm: of this engine.
        options: of the solve.
        dtype: of the state.
        size: length of the flat state.
        keep_solution: whether the solve keeps SciML's solution.
    """
    numbers = isinstance(options.rtol, float) and isinstance(options.atol, float)
    limits = (options.dtmin, options.dtmax, options.max_steps)
    key = (algorithm, options.controller, options.rtol, options.atol, options.driven, *limits)
    if not numbers:
        return _make(algorithm, options, dtype, size, keep_solution)
    found = _plans.get((*key, dtype, keep_solution))
    if found is None:
        found = _make(algorithm, options, dtype, size, keep_solution)
        _plans[(*key, dtype, keep_solution)] = found
    return found


def _make(
    algorithm: Algorithm,
    options: SolveOptions,
    dtype: torch.dtype,
    size: int,
    keep_solution: bool,
) -> Handle:
    real = dtype.to_real()
    parts = 2 if dtype.is_complex else 1
    rtol, atol = (_full(tolerance, size, real) for tolerance in (options.rtol, options.atol))
    vectors: list[Tensor] = []
    if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
        vectors = [
            value.repeat_interleave(parts)
            if isinstance(value, Tensor)
            else torch.full((size * parts,), value, dtype=real)
            for value in (rtol, atol)
        ]
    counted = int(torch.isfinite(atol).sum()) if isinstance(atol, Tensor) else options.driven
    expression, packages = expression_of(algorithm, keep_solution)
    description = json.dumps(
        {
            "dtype": CODES[real],
            "algorithm": expression,
            "packages": packages,
            "adaptive": options.controller.adaptive,
            "controller": _controller(options.controller, algorithm),
            "rtol": None if vectors else rtol,
            "atol": None if vectors else atol,
            "driven": parts * options.driven,
            "counted": parts * counted,
            "dtmin": options.dtmin,
            "dtmax": None if math.isinf(options.dtmax) else options.dtmax,
            "max_steps": options.max_steps,
        }
    )
    runtime.require(*packages)
    made = runtime.call(
        "make_plan",
        description,
        *(pointer(vector) for vector in vectors or (None, None)),
        size * parts if vectors else 0,
    )
    return Handle(made)


def _full(value: float | Tensor, size: int, dtype: torch.dtype) -> float | Tensor:
    """A tolerance for the whole state; entries behind the driven ones never count."""
    if not isinstance(value, Tensor):
        return value
    value = value.to("cpu", dtype)
    return torch.cat([value, value.new_ones(size - value.numel())])


def tableau(method: Tableau) -> Handle:
    """The handle of a method's coefficients, for the discrete adjoint."""
    if id(method) not in _tableaus:
        extra = method.interpolant
        description = {
            "c": method.c + extra.c,
            "a": method.a + extra.a,
            "b": method.b,
            "fsal": method.fsal,
            "weights": extra.weights,
        }
        _tableaus[id(method)] = Handle(runtime.call("make_tableau", json.dumps(description)))
    return _tableaus[id(method)]
