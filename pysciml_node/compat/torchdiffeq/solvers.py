"""`SOLVERS`: the methods by name, one's own among them, and how the classes are run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.compat.torchdiffeq.control import CALLBACKS
from pysciml_node.compat.torchdiffeq.explicit import ExplicitSteps
from pysciml_node.compat.torchdiffeq.methods import ADAPTIVE, FIXED
from pysciml_node.compat.torchdiffeq.multistep import AdamsBashforth, AdamsBashforthMoulton
from pysciml_node.compat.torchdiffeq.normal import Normal, normalize
from pysciml_node.compat.torchdiffeq.scipy_solver import ScipyWrapperODESolver
from pysciml_node.errors import PsnWarning
from pysciml_node.problems.modes import uncompiled
from pysciml_node.steps.event_gradient import root_shift


class EngineMethod:
    """A method that this package's engine runs: `odeint` takes it by name, not as a class."""

    name: str

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} is not made by hand: this package's engine runs it.\n"
            f'  Call odeint(func, y0, t, method="{self.name}").'
        )

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """The callbacks that are called."""
        return set(CALLBACKS if cls.name in ADAPTIVE else CALLBACKS[:1])


# Names of classes, where they are not the method's own with a capital letter.
_CLASSES = {
    "dopri8": "Dopri8Solver",
    "dopri5": "Dopri5Solver",
    "tsit5": "Tsit5Solver",
    "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2",
    "adaptive_heun": "AdaptiveHeunSolver",
    "euler": "Euler",
    "midpoint": "Midpoint",
    "heun2": "Heun2",
    "heun3": "Heun3",
    "rk4": "RK4",
    "implicit_euler": "ImplicitEuler",
    "implicit_midpoint": "ImplicitMidpoint",
    "trapezoid": "Trapezoid",
    "radauIIA3": "RadauIIA3",
    "gl4": "GaussLegendre4",
    "radauIIA5": "RadauIIA5",
    "gl6": "GaussLegendre6",
    "sdirk2": "SDIRK2",
    "trbdf2": "TRBDF2",
}
_EXPLICIT = ("euler", "midpoint", "heun2", "heun3", "rk4")


def _class_of(name: str) -> type[Any]:
    """The class that stands for a method."""
    if name in _EXPLICIT:
        tableau = FIXED[name].tableau  # type: ignore[attr-defined]
        return type(_CLASSES[name], (ExplicitSteps,), {"order": tableau.order, "tableau": tableau})
    algorithm = ADAPTIVE.get(name) or FIXED[name]
    order = algorithm.tableau.order  # type: ignore[attr-defined]
    return type(_CLASSES[name], (EngineMethod,), {"name": name, "order": order})


SOLVERS: dict[str, type[Any]] = {name: _class_of(name) for name in _CLASSES} | {
    "explicit_adams": AdamsBashforth,
    "implicit_adams": AdamsBashforthMoulton,
    "fixed_adams": AdamsBashforthMoulton,
    "scipy_solver": ScipyWrapperODESolver,
}
_OURS = {name: SOLVERS[name] for name in _CLASSES}


def class_to_run(
    method: str | None, options: Mapping[str, Any] | None, event: bool = False
) -> type[Any] | None:
    """The class that runs a method; `None` where the engine does.

    Those that the engine has too it runs where an event or one of its adjoints is asked for; but an
    event on `options["interp"] = "cubic"` is found on that, as there.

    Raises:
        ValueError: there is no such method.
    """
    name = "dopri5" if method is None else method
    solver = SOLVERS.get(name)
    if solver is None:
        raise ValueError(
            f"method must be one of {', '.join(SOLVERS)}, but is {method!r}.\n"
            f"  {checks.did_you_mean(name, SOLVERS) or 'Leave it out for dopri5.'}"
        )
    given = options or {}
    asked = given.get("adjoint") is not None or (event and given.get("interp") != "cubic")
    engine = solver is _OURS.get(name) and (asked or name not in _EXPLICIT)
    return None if engine else solver


@uncompiled
def run(
    solver: type[Any],
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str,
    options: Mapping[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
) -> Any:
    """Solve by a class with torchdiffeq's interface; returns what `odeint` does."""
    call = normalize(func, y0, t, rtol, atol, options, event_fn)
    unheard = {name for name in CALLBACKS if hasattr(func, name)} - solver.valid_callbacks()
    if unheard:
        warnings.warn(
            f"Solver {method!r} does not support callbacks {', '.join(sorted(unheard))}.",
            PsnWarning,
            stacklevel=2,
        )
    made = solver(func=call.func, y0=call.y0, rtol=call.rtol, atol=call.atol, **call.options)
    if call.event_fn is None:
        return _shaped(call, made.integrate(call.t), len(call.t))
    if not hasattr(made, "integrate_until_event"):
        raise ValueError(
            f"method {method!r} finds no events.\n  Use dopri5, or a method with fixed steps."
        )
    time, states = made.integrate_until_event(call.t[0], call.event_fn)
    time, last = moved(call.func, call.event_fn, time, states[-1])
    states = torch.stack((states[0], last))
    time = time.to(t)
    return (-time if call.reversed else time), _shaped(call, states, 2)


def _shaped(call: Normal, states: Tensor, count: int) -> Any:
    batched = torch._C._are_functorch_transforms_active()
    if not batched and not bool(torch.isfinite(states[-1].detach()).all()):
        raise RuntimeError(
            f"the state is not finite at t={float(call.t[-1]):.6g}.\n"
            "  Take smaller steps, or look for what is not finite in the field."
        )
    return states if call.layout is None else call.layout.state(states, (count,))


def moved(
    func: Callable[..., Tensor],
    condition: Callable[[Tensor, Tensor], Tensor],
    t: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """The time and the state of an event with their derivatives, by the implicit function theorem.

    With `g(t, y(t)) = 0`: `dt = -dg / (dg/dt + dg/dy . f)`, and `y` moves along `f`.

    Args:
        func: the field.
        condition: `g`.
        t: the event's time.
        y: the state there.
    """
    if not torch.is_grad_enabled():
        return t, y
    with torch.no_grad():
        rate = func(t, y)
    shift = root_shift(condition, t, y, rate)
    return t + shift, y + rate * shift.to(rate.dtype.to_real())
