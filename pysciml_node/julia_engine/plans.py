"""Plans of solves: Julia gets each once, and knows it by a handle from then on."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import Controller, IController, PIController, PIDController
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.sciml import SciMLAlgorithm
from pysciml_node.algorithms.stochastic import (
    EM,
    EulerHeun,
    ReversibleHeun,
    RKMil,
    StochasticRungeKutta,
    StratonovichMidpoint,
)
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import CODES
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.tableaus import Tableau
from pysciml_node.tableaus.stochastic import Stage
from pysciml_node.translation.recent import Recent

_LOW_ORDER, _VERNER = "OrdinaryDiffEqLowOrderRK", "OrdinaryDiffEqVerner"
_PACKAGES = {
    **dict.fromkeys(("Euler", "Midpoint", "Heun", "Ralston", "BS3", "RK4", "DP5"), _LOW_ORDER),
    "Tsit5": "OrdinaryDiffEqTsit5",
    "DP8": "OrdinaryDiffEqHighOrderRK",
    "Vern7": _VERNER,
    "Vern9": _VERNER,
}
FIXED_ONLY = {"Euler": "Tsit5()", "EM": "LambaEM()"}
"""Methods that have no error estimate in SciML, and replacements for them."""

_LAZY = re.compile(r"((Auto)?Vern[6-9]|RKV76IIa|BS5)\(")

_plans: Recent[tuple[Any, ...], Handle] = Recent(256)
# The coefficients are kept too: as long as they live, no others can have their identity.
_tableaus: Recent[int, tuple[object, Handle]] = Recent(256)


def expression_of(algorithm: Algorithm, keep_solution: bool) -> tuple[str, tuple[str, ...]]:
    """The Julia expression of an algorithm, and the packages that export its names.

    Verner's methods and `BS5` evaluate the stages of dense output on demand, by what the field has
    become, and the adjoints of SciMLSensitivity do not evaluate them. So they are evaluated at once
    where the solution is kept.
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
    if isinstance(algorithm, StochasticRungeKutta):
        return not isinstance(algorithm, ReversibleHeun | StratonovichMidpoint)
    return isinstance(algorithm, SciMLAlgorithm)


@dataclass(frozen=True)
class _Solver:
    """An algorithm as Julia makes it.

    Args:
        expression: Julia code.
        packages: export its names, and are loaded beforehand.
        error_order: order of its embedded solution, where Python knows it.
        first_factor: whether the first step may grow by more than the others.
    """

    expression: str
    packages: tuple[str, ...]
    error_order: float | None = None
    first_factor: bool = True


@functools.cache
def _solver_of(algorithm: Algorithm, keep_solution: bool) -> _Solver:
    expression, packages = expression_of(algorithm, keep_solution)
    order = algorithm.tableau.error_order if isinstance(algorithm, ExplicitRungeKutta) else None
    return _Solver(expression, packages, order)


def _stochastic_solver(
    algorithm: StochasticRungeKutta, problem: SDEProblem, adaptive: bool
) -> _Solver:
    name = type(algorithm).__name__
    expression, packages = f"{name}()", ["StochasticDiffEq"]
    if isinstance(algorithm, EM):
        # SciML's default is the split step, which is another method.
        expression = f"{name}(false)"
    elif isinstance(algorithm, EulerHeun) and adaptive:
        expression = "LambaEulerHeun()"
    elif isinstance(algorithm, RKMil) and problem.interpretation == "stratonovich":
        packages.append("SciMLBase")
        expression = "RKMil(interpretation = SciMLBase.AlgorithmInterpretation.Stratonovich)"
    order = algorithm.tableau_for(problem).error_order
    return _Solver(expression, tuple(packages), order, first_factor=False)


def _controller(controller: Controller, solver: _Solver) -> dict[str, Any] | None:
    """Name and coefficients, including those that follow from the method's order."""
    if not isinstance(controller, IController | PIController | PIDController):
        return None
    options = dataclasses.asdict(controller)
    if isinstance(controller, PIController):
        if solver.error_order is not None:
            options["beta1"], options["beta2"] = controller.exponents(solver.error_order)
        else:
            options = {key: value for key, value in options.items() if value is not None}
    if not solver.first_factor and not isinstance(controller, PIDController):
        options["qmax_first_step"] = options["qmax"]
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
    return _plan_once(_solver_of(algorithm, keep_solution), options, dtype, size)


def stochastic_plan(
    problem: SDEProblem, algorithm: StochasticRungeKutta, options: SolveOptions
) -> Handle:
    """The handle of a plan for a stochastic equation, made once for equal descriptions.

    Args:
        problem: the problem to solve.
        algorithm: of this engine.
        options: of the solve.
    """
    solver = _stochastic_solver(algorithm, problem, options.controller.adaptive)
    return _plan_once(solver, options, problem.spec.dtype, sum(problem.spec.sizes))


def _plan_once(solver: _Solver, options: SolveOptions, dtype: torch.dtype, size: int) -> Handle:
    tolerances = options.tolerances
    if isinstance(tolerances.rtol, Tensor) or isinstance(tolerances.atol, Tensor):
        return _make(solver, options, dtype, size)
    limits = (options.dtmin, options.dtmax, options.max_steps)
    key = (solver, options.controller, tolerances, *limits, dtype)
    handle = _plans.get(key)
    if handle is None:
        handle = _plans[key] = _make(solver, options, dtype, size)
    return handle


def _make(solver: _Solver, options: SolveOptions, dtype: torch.dtype, size: int) -> Handle:
    real = dtype.to_real()
    parts = 2 if dtype.is_complex else 1
    tolerances = options.tolerances
    rtol, atol = (_full(value, size, real) for value in (tolerances.rtol, tolerances.atol))
    vectors: list[Tensor] = []
    if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
        # SciML divides by them in fast arithmetic, where infinity makes NaN of vectors in single
        # precision. By this number an error becomes as good as zero.
        largest = torch.finfo(real).max / 1024
        vectors = [
            value.clamp(max=largest).repeat_interleave(parts)
            if isinstance(value, Tensor)
            else torch.full((size * parts,), value, dtype=real)
            for value in (rtol, atol)
        ]
    counted = int(torch.isfinite(atol).sum()) if isinstance(atol, Tensor) else tolerances.driven
    description = json.dumps(
        {
            "dtype": CODES[real],
            "algorithm": solver.expression,
            "packages": solver.packages,
            "adaptive": options.controller.adaptive,
            "controller": _controller(options.controller, solver),
            "rtol": None if vectors else rtol,
            "atol": None if vectors else atol,
            "driven": parts * tolerances.driven,
            "counted": parts * counted,
            "dtmin": options.dtmin,
            "dtmax": None if math.isinf(options.dtmax) else options.dtmax,
            "max_steps": options.max_steps,
        }
    )
    runtime.require(*(name for name in solver.packages if name != "SciMLBase"))
    relative, absolute = vectors or (None, None)
    n = size * parts if vectors else 0
    return Handle(enter("make_plan", json=description, rtol=relative, atol=absolute, n=n))


def _full(value: float | Tensor, size: int, dtype: torch.dtype) -> float | Tensor:
    """A tolerance for the whole state; entries behind the driven ones never count."""
    if not isinstance(value, Tensor):
        return value
    value = value.to("cpu", dtype)
    return torch.cat([value, value.new_ones(size - value.numel())])


def tableau(method: Tableau) -> Handle:
    """The handle of a method's coefficients, for the discrete adjoint."""
    known = _tableaus.get(id(method))
    if known is not None:
        return known[1]
    extra = method.interpolant
    description = {
        "c": method.c + extra.c,
        "a": method.a + extra.a,
        "b": method.b,
        "fsal": method.fsal,
        "weights": extra.weights,
    }
    handle = Handle(enter("make_tableau", json=json.dumps(description)))
    _tableaus[id(method)] = (method, handle)
    return handle


def stochastic_method(method: SDEMethod) -> Handle:
    """The handle of a stochastic method's coefficients, for its discrete adjoint."""
    known = _tableaus.get(id(method.tableau))
    if known is not None:
        return known[1]
    drift, diffusion = method.needed
    count = max(len(drift), len(diffusion))

    def described(stages: list[Stage | None]) -> list[dict[str, Any] | None]:
        padded = [*stages, *[None] * (count - len(stages))]
        return [None if s is None else dataclasses.asdict(s) for s in padded]

    description = {
        "drift": described(drift),
        "diffusion": described(diffusion),
        "alpha": method.tableau.alpha[:count],
        "beta": [(kind, weights[:count]) for kind, weights in method.tableau.beta],
    }
    handle = Handle(enter("make_sde_method", json=json.dumps(description)))
    _tableaus[id(method.tableau)] = (method.tableau, handle)
    return handle
