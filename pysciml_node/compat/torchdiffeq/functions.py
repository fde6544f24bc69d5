"""`odeint`, `odeint_event` and `odeint_dense`; see the package's docstring for what differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import DirectAdjoint
from pysciml_node.compat.torchdiffeq.arguments import check_call, check_time
from pysciml_node.compat.torchdiffeq.plan import (
    Options,
    Tolerances,
    as_time,
    check_times,
    make_plan,
)
from pysciml_node.compat.torchdiffeq.solvers import class_to_run, run

Dense = Callable[[float | Tensor], Any]


def odeint(
    func: Callable[..., Any],
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Tolerances = 1e-7,
    atol: Tolerances = 1e-9,
    method: str | None = None,
    options: Options | None = None,
    event_fn: Callable[..., Tensor] | None = None,
) -> Any:
    """Solve `dy/dt = func(t, y)`, `y(t[0]) = y0`, and differentiate through the solver.

    Gradients reach everything that `func` uses, `y0` and `t`, by `DirectAdjoint`: every operation
    of the solve is recorded, so that double backward works and `func` is called no more often than
    the forward solve needs. `options=dict(adjoint=pysciml_node.DiscreteAdjoint())` keeps one state
    a step instead of all stages, and evaluates stages again in backward.

    Args:
        func: the vector field, `func(t, y)`; `t` is a 0-d tensor of the state's real dtype.
        y0: initial state, a tensor of any shape or a tuple of tensors of one dtype.
        t: times of the output, `(T,)`, strictly increasing or decreasing; the first is that of
            `y0`. With `event_fn`: two times, of which the second only gives the direction.
        rtol: relative tolerance: a number, a tensor that broadcasts to `y0`, or for a tuple state
            one such for each part.
        atol: absolute tolerance, likewise.
        method: adaptive `"dopri5"` (the default), `"dopri8"`, `"tsit5"`, `"bosh3"`,
            `"fehlberg2"`, `"adaptive_heun"`; or another name in `SOLVERS`, with fixed steps.
        options: of the adaptive methods `first_step`, `min_step`, `max_step`, `max_num_steps` (of
            one output interval, default 100,000), `step_t` (times to step to), `jump_t` (times
            where `func` jumps), `safety`, `ifactor`, `dfactor`, `dtype` (times are kept in double
            precision whatever it is); of the others `step_size` or `grid_constructor` (default:
            one step from each time to the next), `perturb` (call `func` just inside each step
            instead of at its ends), `interp`; of all `adjoint`, one of this package.
        event_fn: stop where one of the entries of the tensor `event_fn(t, y)` changes sign.

    Returns:
        The states, `(T, *y0.shape)`, or a tuple of such. With `event_fn`: the time of the event
        and the states at `t[0]` and there, `(2, *y0.shape)`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown method or option, or an argument out of range.
        SolverFailure: the last time (or an event) was not reached.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat.torchdiffeq import odeint
        >>> t = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
        >>> y = odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t)
        >>> torch.allclose(y[:, 0], torch.exp(-t))
        True
    """
    check_call(func, y0, method, options)
    event = event_fn is not None
    if event:
        checks.function("event_fn", event_fn, "t", "y")
    solver = class_to_run(method, options, event)
    if solver is not None:
        check_times(t, event)
        return run(solver, func, y0, t, rtol, atol, method or "dopri5", options, event_fn)
    plan = make_plan(func, y0, t, rtol, atol, method, options, DirectAdjoint(), event=event)
    return plan.until_event(event_fn) if event_fn is not None else plan.at_times()


def odeint_event(
    func: Callable[..., Any],
    y0: Tensor | tuple[Tensor, ...],
    t0: Tensor | float,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """Solve from `t0` until `event_fn(t, y)` changes sign.

    The time of the event and the state there are differentiable by the implicit function theorem.

    Args:
        func: as in `odeint`.
        y0: as in `odeint`.
        t0: time of `y0`.
        event_fn: real tensor of any shape; the first of its entries to change sign stops the solve.
        reverse_time: solve toward smaller times.
        odeint_interface: `odeint` or `odeint_adjoint`.
        kwargs: their further arguments.

    Returns:
        The time of the event, and the states at `t0` and there, `(2, *y0.shape)`.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat.torchdiffeq import odeint_event
        >>> drop = lambda t, y: (y[1], -torch.ones_like(y[1]))  # height and speed under gravity 1
        >>> state = (torch.tensor(2.0), torch.tensor(0.0))
        >>> time, _ = odeint_event(drop, state, 0.0, event_fn=lambda t, y: y[0])
        >>> round(time.item(), 4)
        2.0

    Reference: R. T. Q. Chen, B. Amos, M. Nickel, arXiv 2011.03902.
    """
    check_call(func, y0, None, None)
    checks.function("event_fn", event_fn, "t", "y")
    checks.function("odeint_interface", odeint_interface, "func", "y0", "t")
    reverse_time = checks.flag("reverse_time", reverse_time)
    start = as_time(check_time("t0", t0), y0).reshape(1)
    other = start.detach() + (-1.0 if reverse_time else 1.0)
    return odeint_interface(func, y0, torch.cat((start, other)), event_fn=event_fn, **kwargs)


def odeint_dense(
    func: Callable[..., Any],
    y0: Tensor | tuple[Tensor, ...],
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: Tolerances = 1e-7,
    atol: Tolerances = 1e-9,
    method: str | None = None,
    options: Options | None = None,
) -> Dense:
    """Solve over `[t0, t1]` and return the solution as a function of time.

    Args:
        func: as in `odeint`.
        y0: as in `odeint`.
        t0: time of `y0`.
        t1: the other end.
        rtol: as in `odeint`.
        atol: as in `odeint`.
        method: as in `odeint`; a fixed-step method needs `options["step_size"]`, or takes one step.
        options: as in `odeint`, but for `jump_t`.

    Returns:
        A function of a time, or of times `(m,)`, in the interval (both ends included), that returns
        the state there (with a leading `m`).

    Raises:
        ValueError: as in `odeint`; and for `jump_t`.
    """
    check_call(func, y0, method, options)
    if options and options.get("jump_t") is not None:
        raise ValueError(
            'options["jump_t"] is not supported by odeint_dense.\n'
            '  Use options["step_t"], or call odeint_dense between the jumps.'
        )
    both = (check_time("t0", t0), check_time("t1", t1))
    ends = torch.stack([as_time(t, y0) for t in both])
    if bool(ends[0] == ends[1]):
        raise ValueError(
            f"t0 and t1 must be two different times, but both are {float(ends[0])}.\n"
            "  The state at t0 is y0 itself: no solve is needed."
        )
    plan = make_plan(func, y0, ends, rtol, atol, method, options, DirectAdjoint())
    ((solution, _),) = plan.pieces(plan.end, ())
    return solution
