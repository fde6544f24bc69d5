"""What is read off every accepted step, as one node of the autograd graph.

All that outlives a step is written to memory taken before the first one. With a checkpoint a step
the graph is as small, but what it leaves alive lies scattered among the large vectors that each
step frees, and the next step's do not fit between: the heap grew by 8 states a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.steps.autograd import first_derivative
from pysciml_node.steps.field import Accumulator, expect_known, graph_leaves

# From a step's number and the state at its start to numbers, each a 0-d tensor.
Measure = Callable[[int, Tensor], tuple[Tensor, ...]]


def measure_steps(
    measure: Measure, states: Sequence[Tensor], outer: Sequence[Tensor], inner: Sequence[Tensor]
) -> Tensor:
    """Measure each step from its own start, and once more in backward, one step at a time.

    Args:
        measure: what is read off a step; called without gradients, and with them in backward.
        states: at the starts of the steps, each `(N,)`.
        outer: tensors that receive gradients.
        inner: leaves that stand for them inside `measure`. Other leaves that it is found to depend
            on receive theirs too.

    Returns:
        What was measured, a row for each step.

    Raises:
        RuntimeError: in backward, when a second derivative is asked for, or when a step depends on
            a tensor that the first one did not.
    """
    start = states[0].detach().requires_grad_()
    known = {id(start), *(id(x) for x in inner)}
    with torch.enable_grad():
        first = torch.stack(measure(0, start))
    captured = [x for x in graph_leaves(first) if id(x) not in known]
    leaves = [*inner, *{id(x): x for x in captured}.values()]
    found: Tensor = _Measured.apply(  # type: ignore[no-untyped-call]
        measure, first.detach(), leaves, len(states), *states, *outer, *leaves[len(inner) :]
    )
    return found


class _Measured(torch.autograd.Function):
    """The measure of all steps; its backward evaluates them again."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        measure: Measure,
        first: Tensor,
        leaves: list[Tensor],
        count: int,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.measure, ctx.leaves, ctx.count = measure, leaves, count
        ctx.save_for_backward(*inputs)
        found = first.new_empty((count, len(first)))
        found[0] = first
        for n, u in enumerate(inputs[1:count], start=1):
            torch.stack(measure(n, u), out=found[n])
        return found

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        (cotangent,) = cotangents
        states, sources = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        sums = Accumulator(ctx.leaves)
        bars = states[0].new_empty((ctx.count, states[0].numel()))
        state_bars: list[Tensor | None] = []
        wanted = (cotangent != 0).tolist()
        for n, u in enumerate(states):
            if not any(wanted[n]):
                state_bars.append(None)
                continue
            start = u.detach().requires_grad_()
            with torch.enable_grad():
                found = torch.stack(ctx.measure(n, start))[wanted[n]]
            if not found.requires_grad:
                state_bars.append(None)
                continue
            expect_known(found, (start, *ctx.leaves))
            bar, *others = torch.autograd.grad(
                found,
                (start, *ctx.leaves),
                cotangent[n][wanted[n]],
                # Parts of the graph may be the caller's own (a captured tensor that is no leaf).
                retain_graph=True,
                allow_unused=True,
            )
            state_bars.append(None if bar is None else bars[n].copy_(bar))
            sums.add([*others])
        gradients = (*state_bars, *sums.sums)
        return (None, None, None, None, *first_derivative(gradients, (*states, *sources)))
