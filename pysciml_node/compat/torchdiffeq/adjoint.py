"""`odeint_adjoint`: which backward pass its arguments ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import DiscreteAdjoint
from pysciml_node.compat.torchdiffeq.arguments import check_backward, check_call
from pysciml_node.compat.torchdiffeq.backsolve import Backsolve, BackwardSolve
from pysciml_node.compat.torchdiffeq.control import ADJOINT_CALLBACKS
from pysciml_node.compat.torchdiffeq.functions import odeint
from pysciml_node.compat.torchdiffeq.methods import ADAPTIVE
from pysciml_node.compat.torchdiffeq.plan import Options, Tolerances, check_times, make_plan
from pysciml_node.compat.torchdiffeq.solvers import class_to_run
from pysciml_node.compat.torchdiffeq.states import Fitted, promoted
from pysciml_node.problems.modes import solvable, uncompiled
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import recording
from pysciml_node.steps.chosen import ForThese


@uncompiled
def odeint_adjoint(
    func: Callable[..., Any],
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Tolerances = 1e-7,
    atol: Tolerances = 1e-9,
    method: str | None = None,
    options: Options | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Tolerances | None = None,
    adjoint_atol: Tolerances | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Options | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """`odeint` that keeps one state a step, and evaluates `func` again in backward.

    An adaptive solve whose backward pass is left as it is has `DiscreteAdjoint`: each accepted step
    is taken again and differentiated, which gives the exact gradient of what was computed, in one
    sweep for all output times and without rejected steps. `adjoint_options=dict(norm="seminorm")`
    asks for what holds there anyway: the parameters' gradients drive no step.

    Any other `adjoint_*` argument, a method of fixed steps, and callbacks of the backward pass ask
    for torchdiffeq's own: the state, its adjoint and the parameters' gradients are solved backward
    from each output time to the one before, by `adjoint_method` with `adjoint_options`. There,
    absolute tolerances are relative to the size of the cotangents: the gradient of `c L` is `c`
    times that of `L`.

    Args:
        func: as in `odeint`; need not be a module: whatever it is found to use at `(t[0], y0)`
            receives gradients.
        y0: as in `odeint`.
        t: as in `odeint`.
        rtol: as in `odeint`.
        atol: as in `odeint`.
        method: as in `odeint`.
        options: as in `odeint`; `adjoint`, one of this package, replaces all of the above.
        event_fn: as in `odeint`.
        adjoint_rtol: relative tolerance of the backward solve; default `rtol`.
        adjoint_atol: absolute tolerance of the backward solve; default `atol`.
        adjoint_method: default `method`.
        adjoint_options: default `options` without their `norm`. `norm` is a function of
            `(dL/dt, y, dL/dy, *dL/dparams)`, of a tuple state `(dL/dt, *y, *dL/dy, *dL/dparams)`.
        adjoint_params: the tensors that receive gradients, beside `y0` and `t`; default all that
            `func` uses.

    Returns:
        As `odeint`; the result allows one backward pass, not a second derivative.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown method, or an argument out of range.
        SolverFailure: the last time (or an event) was not reached.

    Reference: Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366.
    """
    check_call(func, y0, method, options)
    if adjoint_method is not None:
        checks.text("adjoint_method", adjoint_method)
    params = check_backward(adjoint_rtol, adjoint_atol, adjoint_options, adjoint_params)
    if event_fn is not None:
        checks.function("event_fn", event_fn, "t", "y")
    backward = BackwardSolve.of(
        rtol, atol, method, options, adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options
    )
    own = class_to_run(method, options, event_fn is not None) is not None
    class_to_run(backward.method, None)
    chosen = (options or {}).get("adjoint")
    first = list(_parameters(func)) if params is None else params
    if chosen is not None and (own or backward.asked):
        raise ValueError(
            'options["adjoint"] cannot be combined with adjoint arguments, and needs a method that '
            f"this package's engine runs, but method is {method!r}.\n"
            "  Put tolerances into it, as in BacksolveAdjoint(rtol=1e-4, atol=1e-4)."
        )
    told = any(hasattr(func, name) for name in ADJOINT_CALLBACKS)
    replayed = not (own or backward.asked or told) and (method or "dopri5") in ADAPTIVE
    if chosen is not None or replayed:
        plan = make_plan(
            func,
            y0,
            t,
            rtol,
            atol,
            method,
            options,
            DiscreteAdjoint(memory=0),
            event=event_fn is not None,
            params=params,
        )
        states = plan.until_event(event_fn) if event_fn is not None else plan.at_times()
        return _with_zeros(states, first)

    def solve(y: Any, times: Tensor) -> Any:
        return odeint(
            func,
            y,
            times,
            rtol=rtol,
            atol=atol,
            method=method,
            options=options,
            event_fn=event_fn,
        )

    check_times(t, event_fn is not None)
    if len(t) == 1 or not recording():
        return solve(y0, t)
    y0, times = promoted(y0), t.tolist()
    field: Callable[..., Any] = Fitted(func, y0)
    if params is not None:
        field = ForThese(field, params)
    problem = ODEProblem(field, y0, (times[0], times[-1]))
    with solvable(problem, forward_mode=False) as ready:
        states = Backsolve(func, ready, t, solve, backward, first).run(event_fn)
    return _with_zeros(states, first)


def _parameters(func: Any) -> Iterable[Tensor]:
    return func.parameters() if isinstance(func, torch.nn.Module) else ()


class _Zeros(torch.autograd.Function):
    """Passes a tensor on, and gives parameters a gradient of zero."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.like = params
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        # Of no memory: entries that are all one.
        return (*cotangents, *(p.new_zeros(()).expand_as(p) for p in ctx.like))


def _with_zeros(states: Any, params: Iterable[Tensor]) -> Any:
    """A result in whose backward pass every parameter has a gradient, used or not, as there."""
    needed = [p for p in params if p.requires_grad]
    if not needed or not recording():
        return states
    if isinstance(states, Tensor):
        zeroed: Tensor = _Zeros.apply(states, *needed)  # type: ignore[no-untyped-call]
        return zeroed
    return tuple(_with_zeros(part, needed) for part in states)
