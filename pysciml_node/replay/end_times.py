"""Gradients of the ends of the interval where a solve's own steps do not have them.

Without a mass matrix the derivative of a solution in its end is `f(t1, u1)`, and in its start
`-(du/du0) f(t0, u0)`. That of the steps is the same up to the tolerance, provided that the field
lets autograd see how it depends on time; one that detaches time, or looks values up by it, does
not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import moves
from pysciml_node.replay.linearization import linearize
from pysciml_node.replay.stages import Method
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.graph import pull_back
from pysciml_node.steps.record import Record

# Where in the interval the field is looked at: nowhere special.
_PLACE = 0.3719


def hides_time(problem: ODEProblem, method: Method, u0: Tensor) -> bool:
    """Whether autograd misses how the field depends on time: beside a finite difference."""
    field, span = FlatField(problem), problem.t1 - problem.t0
    eps = torch.finfo(method.nodes.dtype).eps
    at = method.nodes.new_tensor(problem.t0 + _PLACE * span)
    after = at + eps**0.5 * max(abs(span), abs(problem.t0), abs(problem.t1))
    u = u0.detach()
    weights = torch.linspace(0.5, 1.5, u.numel(), device=u.device, dtype=method.nodes.dtype).to(u)
    rate, pullback = _by_time(field, at, u)
    # Each entry counts by its own size: that of others must not cover what it hides.
    size = rate.abs()
    weights = weights / torch.where(size == 0, torch.ones_like(size), size)
    seen = pullback(weights)
    with torch.no_grad():
        later = field(after, u)
        change = torch.vdot(weights, later - rate).real / (after - at)
        slope = torch.zeros_like(change) if seen is None else seen.to(change)
        sizes = torch.dot(weights.abs(), later.abs() + size)
        rounding = 100 * eps * sizes / (after - at).abs()
        allowed = 0.01 * torch.maximum(change.abs(), slope.abs()) + rounding
        return bool((change - slope).abs() > allowed)


def _by_time(
    field: FlatField, t: Tensor, u: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor | None]]:
    """The field, and its pullback to the time."""
    if torch._C._are_functorch_transforms_active():
        rate, pull = torch.func.vjp(lambda t: field(t, u), t)  # type: ignore[misc]
        return rate.detach(), lambda cotangent: pull(cotangent)[0]
    with torch.enable_grad():
        time = t.detach().requires_grad_()
        value = field(time, u)
    return value.detach(), lambda cotangent: pull_back(value, (time,), cotangent, False)[0]


def lacks_ends(problem: ODEProblem, method: Method, u0: Tensor) -> bool:
    """Whether the ends receive gradients that the steps themselves do not have."""
    if problem.mass is not None or not any(map(moves, problem.tspan)):
        return False
    return hides_time(problem, method, u0)


def _slope(problem: ODEProblem, field: FlatField, t: float, u: Tensor) -> Tensor:
    """The derivative of the solution at `t`: `M u' = f`, and the algebraic equations hold on.

    Where the columns of `L` span the left null space of `M`, these are `L' f = 0`, so that
    `L' (df/du) u' = -L' df/dt`.
    """
    time, mass = problem.time_tensor([t])[0], problem.mass
    if mass is None:
        return field(time, u)
    recorded = torch.is_grad_enabled()
    line = linearize(field, time, u, with_time=True, recorded=recorded, differentiable=recorded)
    basis, sizes, _ = torch.linalg.svd(mass)
    null = basis[:, sizes <= len(mass) * torch.finfo(sizes.dtype).eps * sizes.max()]
    algebraic = null @ null.T
    change = line.value if line.time is None else line.value + line.time
    solved: Tensor = torch.linalg.solve(
        mass + algebraic @ line.jacobian, line.value - algebraic @ change
    )
    return solved


def _ends(problem: ODEProblem, record: Record) -> list[tuple[int, float, object]]:
    """The ends that the solve has reached: index of the state there, time, and what was given."""
    ends: list[tuple[int, float, object]] = [(0, problem.t0, problem.tspan[0])]
    if record.stops and record.stops[-1] == record.t1_stop:
        ends.append((len(record.sizes), problem.t1, problem.tspan[1]))
    return ends


def complete_times(
    gradients: Gradients,
    problem: ODEProblem,
    field: FlatField,
    backward: BackwardPass,
    ends: bool,
) -> None:
    """Fill in the gradients of the ends, where the steps lack them, and of times saved there.

    Args:
        gradients: of a backward sweep; changed in place.
        problem: what was solved.
        field: evaluates its derivative.
        backward: what the sweep started from.
        ends: whether the steps lack the gradients of the ends.
    """
    if gradients.saveat is not None:
        gradients.saveat = gradients.saveat.clone()
    if ends:
        gradients.t1 = None if gradients.t1 is None else torch.zeros_like(gradients.t1)
    for index, t, end in _ends(problem, backward.record):
        indices = backward.record.at_end.get(index, [])
        saved = indices and gradients.saveat is not None and not moves(end)
        if not saved and not ends:
            continue
        rate = _slope(problem, field, t, backward.states[index])
        if ends:
            entering = torch.stack([torch.zeros_like(rate), *backward.entering(index)]).sum(0)
            if index == 0:
                assert gradients.u0 is not None
                gradients.t0 = -torch.vdot(gradients.u0 - entering, rate).real
            else:
                gradients.t1 = torch.vdot(entering, rate).real
        if saved and gradients.saveat is not None and backward.saved is not None:
            for i in indices:
                gradients.saveat[i] = torch.vdot(backward.saved[i], rate).real


def at_moving_ends(
    problem: ODEProblem,
    field: FlatField,
    record: Record,
    states: list[Tensor],
    saved: Tensor,
    u0: Tensor,
    saveat: Tensor | None,
) -> Tensor:
    """The saved states, and in place the first and the last of the steps', as they move.

    Args:
        problem: what was solved.
        field: evaluates its derivative.
        record: the accepted steps.
        states: at their ends; the first is replaced by `u0`, and the last where `t1` receives a
            gradient.
        saved: the saved states `(m, N)`.
        u0: the initial state, which does not move.
        saveat: their times where those receive gradients.
    """
    rows = list(saved.unbind())
    for index, t, end in _ends(problem, record):
        indices = record.at_end.get(index, [])
        if index == 0 and record.fixed:
            states[0] = u0
        u = states[index]
        shifted = record.fixed and index > 0 and moves(end)
        own = indices and saveat is not None and not moves(end)
        if not shifted and not own:
            if index == 0 and record.fixed:
                rows[: len(indices)] = [u0] * len(indices)
            continue
        rate = _slope(problem, field, t, u)
        if shifted and isinstance(end, Tensor):
            states[index] = u + (end - end.detach()).to(rate.real.dtype).reshape(()) * rate
            for i in indices:
                rows[i] = states[index]
        elif saveat is not None:
            for i in indices:
                rows[i] = u + (saveat[i] - saveat[i].detach()).to(rate.real.dtype) * rate
    return torch.stack(rows) if rows else saved
