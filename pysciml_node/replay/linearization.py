"""A field with its derivatives, as implicit steps need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pysciml_node.replay.stages import FlatFunction

# Rows of a Jacobian that are pulled back together: their graphs share memory bandwidth, and more
# of them would only take memory.
_ROWS = 256
# Up to so many rows a batch costs more than it saves.
_FEW = 4


@dataclass(frozen=True)
class Linearization:
    """The field and its derivatives at one time and state.

    Attributes:
        value: `f(t, u)`, `(N,)`.
        jacobian: `df/du`, `(N, N)`.
        time: `df/dt`, `(N,)`, or `None` for a field that does not see time.
    """

    value: Tensor
    jacobian: Tensor
    time: Tensor | None


def linearize(
    field: FlatFunction,
    t: Tensor,
    u: Tensor,
    *,
    with_time: bool,
    recorded: bool,
    differentiable: bool,
) -> Linearization:
    """Evaluate the field with its Jacobian, by one batch of vector-Jacobian products.

    Args:
        field: the derivative as a function of time and flat state.
        t: a 0-d tensor.
        u: the state, `(N,)`.
        with_time: whether `df/dt` is wanted.
        recorded: whether autograd is to follow the value.
        differentiable: whether autograd is to follow the derivatives too.
    """
    value = None
    if recorded and not u.requires_grad:
        value = field(t, u)
        # Where nothing needs a gradient, the point below must not seem to.
        recorded = value.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        attached = recorded and u.requires_grad
        state = u if attached else u.detach().clone().requires_grad_()
        time = t if recorded and t.requires_grad else t.detach().clone().requires_grad_(with_time)
        rate = field(time, state)
        if value is None:
            value = rate if recorded else rate.detach()
        if not rate.requires_grad:
            return Linearization(value, u.new_zeros((u.numel(), u.numel())), None)
        jacobian = _jacobian(rate, state, recorded and differentiable)
        slope = _time_derivative(rate, time, recorded and differentiable) if with_time else None
    return Linearization(value, jacobian, slope)


def _jacobian(value: Tensor, state: Tensor, differentiable: bool) -> Tensor:
    """`d value / d state`, `(N, N)`."""
    basis = torch.eye(state.numel(), dtype=state.dtype, device=state.device)

    def pulled(part: Tensor, batched: bool) -> Tensor:
        rows: Tensor = torch.autograd.grad(
            value,
            state,
            part,
            is_grads_batched=batched,
            retain_graph=True,
            create_graph=differentiable,
            materialize_grads=True,
        )[0]
        return rows

    if len(basis) > _FEW:
        try:
            return torch.cat([pulled(part, batched=True) for part in torch.split(basis, _ROWS)])
        except RuntimeError:
            # Not every operation knows of batches of cotangents.
            pass
    return torch.stack([pulled(row, batched=False) for row in basis])


def _time_derivative(value: Tensor, time: Tensor, differentiable: bool) -> Tensor | None:
    """`d value / d time`: the pullback to time is linear in the cotangent; its slope is wanted."""
    cotangent = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(
        value, time, cotangent, create_graph=True, retain_graph=True, allow_unused=True
    )
    if pulled is None or not pulled.requires_grad:
        return None
    (slope,) = torch.autograd.grad(
        pulled, cotangent, create_graph=differentiable, retain_graph=True, allow_unused=True
    )
    return cast("Tensor | None", slope)
