"""A batched solve as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.modes import uncompiled
from pysciml_node.steps.autograd import pulled

# From starts, states, and the cotangents of saved and of step states to those of the starts, of the
# intervals where they are wanted, and of all inputs.
Sweep = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor | None, ...]]


class MembersNode(torch.autograd.Function):
    """Gives the states that a batched solve has found; its backward is the sweep over all members.

    The outputs are the states at `saveat`, `(M, T, N)` or `None`, and those at the ends of the
    steps, `(P, N)`. As `SolveNode` it keeps the inputs where the sweep does not notice by itself
    that one of them was changed in place.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        sweep: Sweep,
        solved: tuple[Tensor | None, Tensor],
        watched: bool,
        u0: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        ctx.sweep, ctx.inputs = sweep, inputs if watched else ()
        ctx.save_for_backward(u0, solved[1], *(() if watched else inputs))
        ctx.set_materialize_grads(False)
        return solved

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        u0, states, *inputs = ctx.saved_tensors

        def pull(saved: Tensor | None, at_steps: Tensor | None) -> tuple[Tensor | None, ...]:
            gradients: tuple[Tensor | None, ...] = ctx.sweep(u0, states, saved, at_steps)
            return gradients

        return (None, None, None, *pulled(pull, (u0, *ctx.inputs, *inputs), *cotangents))
