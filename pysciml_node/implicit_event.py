"""Gradients of event times by the implicit function theorem, for any engine and adjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from pysciml_node.events import Event
from pysciml_node.solution import Solution
from pysciml_node.torch_engine.field import FlatField


def differentiable_event(
    solution: Solution, event: Event, keep_graph: bool, tstops: tuple[float, ...]
) -> None:
    """Set `event_t`, and let `u1` move with it.

    With `g(t, u(t)) = 0` at the event, `dt = -dg / (dg/dt + dg/du . f)`: one Newton step, whose
    value is nearly nothing and whose derivative is the event time's. `u1` then moves along `f`.

    Args:
        solution: stopped by `event`; changed in place.
        event: the event.
        keep_graph: allow double backward through the correction.
        tstops: times the solver had to step to.
    """
    problem = solution.problem
    spec = problem.spec
    t = problem.time_tensor([solution.trajectory.times[-1]])[0]
    if not torch.is_grad_enabled():
        solution.event_t = t
        return
    t = _moving(t, solution, tstops)
    u = spec.flatten(solution.u1)
    field = FlatField(problem)
    with torch.enable_grad():
        time = t.detach().requires_grad_()
        state = u.detach().requires_grad_()
        g = event.condition(time, spec.unflatten(state))
        dg_dt, dg_du = torch.autograd.grad(g, (time, state), allow_unused=True)
    rate = field(t, u if keep_graph else u.detach())
    solution.stats.nfe += 1
    slope = torch.zeros_like(t)
    if dg_du is not None:
        slope = slope + torch.vdot(dg_du.conj() if dg_du.is_complex() else dg_du, rate).real
    if dg_dt is not None:
        slope = slope + dg_dt
    value: Tensor = event.condition(t, spec.unflatten(u))
    shift = -(value - value.detach()) / slope.detach()
    solution.event_t = t + shift
    solution.u1 = spec.unflatten(u + rate.detach() * shift)


def _moving(t: Tensor, solution: Solution, tstops: tuple[float, ...]) -> Tensor:
    """The end of the last step as it moves with `t0`: the free steps keep their sizes.

    A stop that lies before it fixes it.
    """
    start = solution.problem.tspan[0]
    length = abs(solution.trajectory.times[-1] - solution.problem.t0)
    if not isinstance(start, Tensor) or any(
        abs(stop - solution.problem.t0) <= length for stop in tstops
    ):
        return t
    return t + (start - start.detach()).to(t)
