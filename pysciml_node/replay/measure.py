"""Measurements of every accepted step, as one node of the autograd graph.

Everything that outlives a step is written to memory taken before the first step. A checkpoint for
each step would make the graph as small. But its tensors would lie scattered among the large vectors
that each step frees, and the next step's vectors would not fit between them: the heap grew by 8
states a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from typing_extensions import override

from pysciml_node.replay.comparison import Comparison, as_solved
from pysciml_node.steps.autograd import pulled
from pysciml_node.steps.field import Accumulator
from pysciml_node.steps.first_graph import Evaluation
from pysciml_node.steps.graph import pull_back
from pysciml_node.steps.inputs import Inputs
from pysciml_node.steps.memory import later_steps
from pysciml_node.steps.surroundings import Surroundings

# From a step's number and the state at its start to numbers, each a 0-d tensor; the step's end is
# added to the comparison.
Measure = Callable[[int, Tensor, Comparison], tuple[Tensor, ...]]


def measure_steps(
    measure: Measure,
    states: Sequence[Tensor],
    surroundings: Surroundings,
    precision: torch.dtype | None,
) -> Tensor:
    """Measure each step from its start, and once more in backward, one step at a time.

    Args:
        measure: gives the numbers of a step; called without gradients, and with them in backward.
        states: at the starts of the steps, each `(N,)`.
        surroundings: the objects that `measure` can reach, as it shall see them.
        precision: as of `Comparison`.

    Returns:
        The numbers, a row for each step.

    Raises:
        RuntimeError: a step does not come out as it did; in backward also if a second derivative is
            asked for, or a step depends on a tensor that was not found before.
    """

    with as_solved(surroundings, precision) as comparison:
        first = partial(_measured, measure, 0, states[0], comparison)
        inputs = Inputs(surroundings, first, surroundings.roots["p"])
        rows = inputs.first[0].new_empty((len(states), len(inputs.first[0])))
        rows[0] = inputs.first[0]
        for n, u in enumerate(states[1:], start=1):
            with torch.set_grad_enabled(inputs.watch is not None):
                row = torch.stack(measure(n, u.detach(), comparison))
            if inputs.watch is not None:
                inputs.watch(row)
            rows[n] = row.detach()
    # What is refused above has settled nothing.
    with surroundings.as_seen():
        inputs.settle()
    measured: Tensor = _Measured.apply(  # type: ignore[no-untyped-call]
        measure, inputs, precision, rows, len(states), *states, *inputs.inputs
    )
    return measured


def _measured(measure: Measure, n: int, state: Tensor, comparison: Comparison) -> Evaluation:
    """The numbers of a step with a graph that begins at the state there."""
    start = state.detach().requires_grad_()
    with torch.enable_grad():
        return (torch.stack(measure(n, start, comparison)),), (start,)


def checkpointed(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> Any:
    """A checkpoint that runs to its end once more in backward, where steps are compared."""
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *arguments, use_reentrant=False)


class _Measured(torch.autograd.Function):
    """The measure of all steps; its backward evaluates them again."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        measure: Measure,
        inputs: Inputs,
        precision: torch.dtype | None,
        rows: Tensor,
        count: int,
        *sources: Tensor,
    ) -> Tensor:
        ctx.measure, ctx.inputs, ctx.precision = measure, inputs, precision
        ctx.sources = sources[count:]
        ctx.save_for_backward(*sources[:count])
        return rows

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        states = ctx.saved_tensors
        inputs: Inputs = ctx.inputs

        def pull(cotangent: Tensor) -> tuple[Tensor | None, ...]:
            comparison = Comparison(ctx.precision)
            later = (
                partial(_measured, ctx.measure, n, states[n], comparison)
                for n in later_steps(len(states))
            )
            with inputs.sweep(replayed=True, later=later):
                bars = _pull_back(ctx.measure, inputs, states, cotangent, comparison)
                comparison.expect_equal(inputs.suspects)
                return bars

        return (None, None, None, None, None, *pulled(pull, (*states, *ctx.sources), *cotangents))


def _pull_back(
    measure: Measure,
    inputs: Inputs,
    states: Sequence[Tensor],
    cotangent: Tensor,
    comparison: Comparison,
) -> tuple[Tensor | None, ...]:
    """Cotangents of the states, then of the inputs."""
    sums = Accumulator(inputs.leaves)
    bars = states[0].new_empty((len(states), states[0].numel()))
    state_bars: list[Tensor | None] = []
    wanted = (cotangent != 0).tolist()
    for n, u in enumerate(states):
        if not any(wanted[n]):
            state_bars.append(None)
            continue
        start = u.detach().requires_grad_()
        with torch.enable_grad():
            values = torch.stack(measure(n, start, comparison))[wanted[n]]
        if not values.requires_grad:
            state_bars.append(None)
            continue
        inputs.expect_known(values, start)
        bar, *input_bars = pull_back(values, (start, *inputs.leaves), cotangent[n][wanted[n]])
        state_bars.append(None if bar is None else bars[n].copy_(bar))
        sums.add([*input_bars])
    return (*state_bars, *sums.sums)
