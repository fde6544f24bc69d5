"""Gradients of event times by the implicit function theorem, for any engine and adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override

from pysciml_node.problems.event import Event
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.solutions.solution import Solution
from pysciml_node.steps.apart import apart
from pysciml_node.steps.autograd import first_derivative
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.guard import guard
from pysciml_node.steps.surroundings import Surroundings


class _NewtonShift(torch.autograd.Function):
    """`-g / (dg/dt)` at a root of `g`: zero, with the derivative of the root."""

    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(value, slope)
        return torch.zeros_like(value)

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        value, slope = ctx.saved_tensors
        with torch.no_grad():
            # Where there is no slope, `_UnknownShift` takes the cotangent.
            pulled = torch.where(slope == 0, 0.0, -cotangents[0] / slope)
        # One Newton step has the first derivative of the root, and not its second.
        return (*first_derivative((pulled,), value, *cotangents), None)


class _UnknownShift(torch.autograd.Function):
    """Zero, where conditions have roots whose derivatives are not known."""

    @staticmethod
    @override
    def forward(ctx: Any, t: Tensor, u: Tensor, unknown: Tensor) -> Tensor:
        ctx.save_for_backward(unknown)
        return torch.zeros_like(t)

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (unknown,) = ctx.saved_tensors
        if unknown.ndim and not bool((unknown & (cotangents[0] != 0)).any()):
            return None, None, None
        raise RuntimeError(
            "the time of an event has no known derivative where its condition has no slope: it is "
            "a comparison, detached or constant there.\n"
            "  Use a condition that crosses zero, such as u - 0.5 for u > 0.5, or detach the time "
            "and the state of the event."
        )


def differentiable_event(solution: Solution, event: Event, tstops: tuple[float, ...]) -> None:
    """Set `event_t`, and let `u1` move with it.

    With `g(t, u(t)) = 0` at the event, `dt = -dg / (dg/dt + dg/du . f)`; `u1` moves along `f`.

    Args:
        solution: stopped by `event`; changed in place.
        event: the event.
        tstops: times the solver had to step to.

    Raises:
        RuntimeError: derivatives of another kind than reverse mode are being taken.
    """
    problem = solution.problem
    assert isinstance(problem, ODEProblem)
    spec = problem.spec
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a solve was stopped by an event inside a transform of torch.func or forward-mode "
            "differentiation, and times of events have derivatives in reverse mode alone.\n"
            "  Take the gradient by backward() or torch.autograd.grad."
        )
    t = problem.time_tensor([solution.trajectory.times[-1]])[0]
    if not torch.is_grad_enabled():
        solution.event_t = t
        return
    t = _moving(t, solution, tstops)
    u = spec.flatten(solution.u1)
    with torch.no_grad():
        rate = FlatField(problem)(t, u)
        if problem.mass is not None:
            # Of a singular matrix this is not finite, and the check of the slope says so.
            rate = torch.linalg.solve_ex(problem.mass, rate).result
    solution.stats.nfe += 1
    shift = root_shift(lambda time, state: event.value(time, spec.unflatten(state)), t, u, rate)
    guard((shift,), Surroundings({"condition": event.condition}), (t, u))
    solution.event_t = t + shift
    solution.u1 = spec.unflatten(u + rate * shift)


def root_shift(
    condition: Callable[[Tensor, Tensor], Tensor], t: Tensor, u: Tensor, rate: Tensor
) -> Tensor:
    """Zero, with the derivative of the time at which a condition has its root.

    Args:
        condition: `g(t, u)`, one real number; or one for each member.
        t: the time of the root; or `(L,)`.
        u: the state there, flat or not; or `(L, N)`.
        rate: its derivative in time.
    """
    time = t.detach().requires_grad_()
    state = u.detach().requires_grad_()
    g = condition(time, state)
    dg_dt, dg_du = None, None
    if g.requires_grad:
        dg_dt, dg_du = torch.autograd.grad(g.sum(), (time, state), allow_unused=True)
    slope = torch.zeros_like(time)
    if dg_du is not None:
        slope = slope + (dg_du.conj() * rate).reshape(*t.shape, -1).sum(-1).real
    if dg_dt is not None:
        slope = slope + dg_dt
    shift, unknown = torch.zeros_like(time), slope == 0
    if not bool(unknown.all()):
        # Of one number the shape may be another: `(1,)` for a network.
        with apart("an event's condition", (t, u)):
            value = condition(t, u).reshape(t.shape)
        shift = _NewtonShift.apply(value, slope.detach())  # type: ignore[no-untyped-call]
    if bool(unknown.any()):
        shift = shift + _UnknownShift.apply(t, u, unknown)  # type: ignore[no-untyped-call]
    return shift


def _moving(t: Tensor, solution: Solution, tstops: tuple[float, ...]) -> Tensor:
    """The end of the last step as it moves with `t0`: the free steps keep their sizes.

    A stop that lies before it fixes it.
    """
    start = solution.problem.tspan[0]
    length = abs(solution.trajectory.times[-1] - solution.problem.t0)
    record = getattr(solution.trajectory, "record", None)
    fixed = record is not None and record.fixed
    if (
        fixed
        or not isinstance(start, Tensor)
        or any(abs(stop - solution.problem.t0) <= length for stop in tstops)
    ):
        return t
    return t + (start - start.detach()).to(t)
