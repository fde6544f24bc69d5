"""A solve as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.steps.cotangents import Cotangents, Gradients
from pysciml_node.steps.record import Record

Sweep = Callable[[Record, tuple[Tensor, ...], Cotangents, bool], Gradients]
Forward = Callable[[Tensor], tuple[Record, list[Tensor], Tensor]]


class _FirstDerivative(torch.autograd.Function):
    """Passes gradients on; their own derivative is refused."""

    @staticmethod
    @override
    def forward(ctx: Any, count: int, *gradients_and_inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.clone() for gradient in gradients_and_inputs[:count])

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "a second derivative through a solve was asked for, and this adjoint gives only the "
            "first.\n  Use adjoint=DirectAdjoint()."
        )


def first_derivative(
    gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Mark gradients so that differentiating them raises, where a graph of them is being made.

    `once_differentiable` of torch lets it pass as zero where the cotangents are constants, as those
    of a loss that is linear in the state are.

    Args:
        gradients: what a backward sweep returns.
        inputs: what they depend on.
    """
    if not torch.is_grad_enabled():
        return gradients
    given = [gradient for gradient in gradients if gradient is not None]
    sources = [x for x in inputs if x is not None]
    marked = iter(_FirstDerivative.apply(len(given), *given, *sources))  # type: ignore[no-untyped-call]
    return tuple(None if gradient is None else next(marked) for gradient in gradients)


class SolveNode(torch.autograd.Function):
    """Runs a forward solve and, in backward, the sweep of its adjoint.

    The outputs are the saved states `(saved, N)` followed by the states at the ends of the steps,
    each a tensor of its own, so that a cotangent is materialised only where there is one. The
    step states are kept by `save_for_backward`, as outputs must be (no reference cycle). So are the
    inputs, where torch is to notice that one of them has been changed in place; a sweep that looks
    at every evaluation notices it by itself, and only for those that the field uses.
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
        watched: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        record, states, saved = run(u0)
        keep.append(record)
        ctx.record, ctx.sweep = record, sweep
        ctx.count = len(states)
        ctx.inputs = inputs if watched else ()
        saved_inputs = () if watched else inputs
        ctx.save_for_backward(u0, *states[1:], t0, t1, saveat, *saved_inputs)
        ctx.set_materialize_grads(False)
        return (saved, *states[1:])

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        states = ctx.saved_tensors[: ctx.count]
        sources = (*ctx.saved_tensors[ctx.count :], *ctx.inputs)
        # A failed solve may have been cut back to its last good state.
        kept = len(ctx.record.times)
        states = states[:kept]
        arriving = Cotangents(cotangents[0], [None, *cotangents[1:kept]])
        with_times = any(ctx.needs_input_grad[4:7])
        with torch.no_grad():
            found = ctx.sweep(ctx.record, states, arriving, with_times)
            times = [
                gradient.reshape(time.shape) if gradient is not None and wanted else None
                for gradient, time, wanted in zip(
                    (found.t0, found.t1, found.saveat),
                    sources,
                    ctx.needs_input_grad[4:7],
                    strict=False,
                )
            ]
        gradients = (found.u0, *times, None, *found.inputs)
        return (None, None, None, *first_derivative(gradients, (states[0], *sources)))
