"""A solve as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from pysciml_node.torch_engine.adjoint_discrete import Cotangents, Gradients
from pysciml_node.torch_engine.record import Record

Sweep = Callable[[Record, tuple[Tensor, ...], Cotangents, bool], Gradients]
Forward = Callable[[Tensor], tuple[Record, list[Tensor], Tensor]]


class SolveNode(torch.autograd.Function):
    """Runs a forward solve and, in backward, the sweep of its adjoint.

    The outputs are the saved states `(saved, N)` followed by the states at the ends of the steps,
    each a tensor of its own, so that a cotangent is materialised only where there is one. The
    step states are kept by `save_for_backward`, as outputs must be (no reference cycle).
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        run: Forward,
        sweep: Sweep,
        keep: list[Record],
        u0: Tensor,
        t0: Tensor | None,
        t1: Tensor | None,
        saveat: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        record, states, saved = run(u0)
        keep.append(record)
        ctx.record, ctx.sweep = record, sweep
        ctx.save_for_backward(u0, *states[1:])
        ctx.set_materialize_grads(False)
        return (saved, *states[1:])

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        states = ctx.saved_tensors
        arriving = Cotangents(cotangents[0], [None, *cotangents[1:]])
        with_times = any(ctx.needs_input_grad[4:7])
        found = ctx.sweep(ctx.record, states, arriving, with_times)
        return (
            None,
            None,
            None,
            found.u0,
            found.t0 if ctx.needs_input_grad[4] else None,
            found.t1 if ctx.needs_input_grad[5] else None,
            found.saveat if ctx.needs_input_grad[6] else None,
            *found.inputs,
        )
