"""The options that all layers take: how their equation is solved and trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint, DiscreteAdjoint
from pysciml_node.algorithms.controllers import Controller, PIController
from pysciml_node.checks import keywords
from pysciml_node.problems.event import Event
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.solving.checks import ELSEWHERE, chosen

Tolerance = float | Tensor | Sequence[Any] | Mapping[str, Any]


class SolverOptions(TypedDict, total=False):
    """The options of a layer; a layer that is made of another one hands them on as they are.

    All but the regularizers are arguments of `solve`, which has their defaults and says more.

    Args:
        rtol: relative tolerance; default 1e-6, and 1e-2 of stochastic equations.
        atol: absolute tolerance; likewise.
        regularizers: what is added to the loss in training mode.
        adjoint: how gradients are taken; default `DiscreteAdjoint()`.
        saveat: times of `solution.u`; without it the ends of the steps.
        engine: `"torch"`, `"julia"` or `"auto"`.
        dt0: size of the first step.
        dtmin: the solve fails where a step would be smaller.
        dtmax: steps are never larger.
        tstops: times that steps must end on.
        max_steps: number of steps after which the solve fails.
        controller: step size control.
        events: what is looked for along the solution.
        progress: draw a progress bar.
        throw: raise an error where the end is not reached.
        compile: run the solve as native code.
    """

    rtol: Tolerance
    atol: Tolerance
    regularizers: Sequence[Regularizer]
    adjoint: Adjoint | None
    saveat: Sequence[float] | Tensor | None
    engine: str | None
    dt0: float | None
    dtmin: float | None
    dtmax: float | None
    tstops: Sequence[float] | Tensor
    max_steps: int
    controller: Controller | None
    events: Event | Sequence[Event]
    progress: bool
    throw: bool
    compile: bool | Literal["auto"]


def check_options(layer: type, options: Mapping[str, Any], without: Iterable[str] = ()) -> None:
    """Refuse unknown options where they are given, not at the first solve.

    Args:
        layer: the class that takes them, beside arguments of its own.
        options: by name.
        without: options that this layer sets itself.

    Raises:
        TypeError: an unknown option, or one of another kind; the message says what was probably
            meant.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = {p.name for p in inspect.signature(layer).parameters.values() if p.kind in kinds}
    known = set(SolverOptions.__annotations__).difference(without)
    keywords(layer.__name__, options, sorted(known | own), ELSEWHERE)
    chosen("adjoint", options.get("adjoint"), Adjoint, DiscreteAdjoint)
    chosen("controller", options.get("controller"), Controller, PIController)
    for name in ("rtol", "atol"):
        value = options.get(name, 1.0)
        if not isinstance(value, tuple | list | Mapping):
            _check_tolerance(name, value)


def _check_tolerance(name: str, value: Any) -> None:
    if checks.as_float(value) is not None:
        checks.number(name, value, at_least=0)
    elif checks.as_tensor(value) is None:
        checks.refuse(name, "a number or a tensor", value, f"Write {name}=1e-6.")
    else:
        checks.tensor(name, value, real=True, filled=True)
