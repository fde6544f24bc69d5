"""A solve as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.modes import are_ordinary, ordinary_modes, uncompiled
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.record import Outcome

Sweep = Callable[[BackwardPass], Gradients]
Pull = Callable[..., tuple[Tensor | None, ...]]
Forward = Callable[[Tensor], Outcome]
HandOn = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None] | None]
"""What arrives at the values whose graphs were kept, of what arrives at the ends of all steps;
`None` where a sweep has to see to it."""
Times = tuple[object, object, Tensor | None]
"""Start, end and saved times; those that are tensors may receive gradients."""


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def graph_is_retained() -> bool:
    """Whether the backward pass that runs may run once more; where torch does not say, it may."""
    return _keeps_graph is None or bool(_keeps_graph())


def saved_tensors_stay() -> bool:
    """Whether tensors saved for backward stay where they are.

    Inside a checkpoint, or torch's `save_on_cpu`, they do not.
    """
    return _top_hooks is not None and _top_hooks(False) is None


class _Refusing(torch.autograd.Function):
    """A function whose derivative is refused: gradients, which have none of their own."""

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        raise _refusal()


def _refusal() -> RuntimeError:
    return RuntimeError(
        "a second derivative through a solve was asked for, and this adjoint, or the time of "
        "an event, gives only the first.\n"
        "  Use adjoint=DirectAdjoint(), and at=... for events; of drop-in functions odeint or "
        "sdeint."
    )


class _FirstDerivative(_Refusing):
    """Passes gradients on."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(count: int, *gradients_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.clone() for gradient in gradients_and_sources[:count])


class _Pulled(_Refusing):
    """A backward sweep, which `torch.vmap` takes row by row."""

    @staticmethod
    @override
    def forward(pull: Pull, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return pull(*cotangents)

    @staticmethod
    @override
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], pull: Pull, *cotangents: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        def again(*row: Tensor | None) -> tuple[Tensor | None, ...]:
            # Where transforms are nested, a row is a batch of the outer one.
            pulled: tuple[Tensor | None, ...] = _Pulled.apply(pull, *row)  # type: ignore[no-untyped-call]
            return pulled

        columns = _row_by_row(again, info.batch_size, in_dims[1:], cotangents)
        return columns, tuple(None if column is None else 0 for column in columns)


def _row_by_row(
    pull: Pull,
    size: int,
    dims: Sequence[int | None],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients with a leading batch, from cotangents with a batch at `dims`."""
    rows = [
        pull(
            *(
                x if x is None or dim is None else x.select(dim, i)
                for x, dim in zip(cotangents, dims, strict=True)
            )
        )
        for i in range(size)
    ]
    return tuple(_stacked(column) for column in zip(*rows, strict=True))


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Gradients of one input as a batch, where any row has one."""
    like = next((row for row in rows if row is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if row is None else row for row in rows])


_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _is_legacy_batch(x: Tensor | None) -> bool:
    return x is not None and _is_legacy_batched(x)


def _by_legacy_rows(pull: Pull, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The batches of `autograd.grad(is_grads_batched=True)`, which are no transform's."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    whole: list[Tensor | None] = []
    dims: list[int | None] = []
    size = 0
    for x in cotangents:
        batched = _is_legacy_batch(x)
        if x is not None and batched:
            x = torch._remove_batch_dim(x, level, 0, 0)
            size = x.shape[0]
        whole.append(x)
        dims.append(0 if batched else None)
    return tuple(
        None if column is None else torch._add_batch_dim(column, 0, level)
        for column in _row_by_row(pull, size, dims, whole)
    )


def is_recorded(cotangents: Sequence[Tensor | None]) -> bool:
    """Whether a sweep runs in a transform or a mode, or where a graph of it is made."""
    for x in cotangents:  # in short: every sweep asks
        if x is not None and _is_legacy_batched(x):
            return True
    active = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    return active or not are_ordinary()


def pulled(
    pull: Pull, inputs: tuple[Tensor | None, ...], *cotangents: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients from cotangents, row by row where there is a batch of them; first derivatives.

    Args:
        pull: gradients of a solve's inputs from cotangents of its outputs. It runs in ordinary
            modes, and without a graph.
        inputs: what they depend on, the first on the device of the solve.
        cotangents: as `backward` was given them.
    """
    if not is_recorded(cotangents):
        return pull(*cotangents)
    transformed = torch._C._are_functorch_transforms_active()
    batched = any(map(_is_legacy_batch, cotangents))
    first = inputs[0]
    assert first is not None
    place = first.device

    def sweep(*row: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), ordinary_modes(place):
            return pull(*row)

    if transformed:
        found: tuple[Tensor | None, ...] = _Pulled.apply(sweep, *cotangents)  # type: ignore[no-untyped-call]
        return first_derivative(found, *inputs, *cotangents)
    if batched:
        # The graph of these batches is that of the tensors inside.
        return _by_legacy_rows(
            lambda *row: first_derivative(sweep(*row), *inputs, *row), cotangents
        )
    if torch.is_grad_enabled() and _are_places(cotangents):
        raise _refusal()
    return first_derivative(sweep(*cotangents), *inputs, *cotangents)


def _are_places(cotangents: Sequence[Tensor | None]) -> bool:
    """Whether cotangents are there to be differentiated in: zeros, as `functional.jvp` has them.

    What a sweep leaves out for them would have no mark.
    """
    given = [x for x in cotangents if x is not None]
    return any(x.requires_grad for x in given) and not any(bool(x.any()) for x in given)


def first_derivative(
    gradients: tuple[Tensor | None, ...], *sources: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Mark gradients so that differentiating them raises, where a graph of them is being made.

    `once_differentiable` of torch lets it pass as zero where the cotangents are constants, as those
    of a loss that is linear in the state are.

    Args:
        gradients: what a backward sweep returns.
        *sources: what they depend on: the inputs, and the cotangents, which a derivative in forward
            mode by two backward passes differentiates in.
    """
    if not torch.is_grad_enabled():
        return gradients
    given = [gradient for gradient in gradients if gradient is not None]
    known = [x for x in sources if x is not None]
    marked = iter(_FirstDerivative.apply(len(given), *given, *known))  # type: ignore[no-untyped-call]
    return tuple(None if gradient is None else next(marked) for gradient in gradients)


@dataclass(slots=True)
class _Call:
    """A solve as its node runs it: all that is no tensor, and what it has left."""

    run: Forward
    sweep: Sweep
    watched: bool
    saves: bool
    count: int  # of the inputs, behind which are the values whose graphs were kept
    hand_on: HandOn | None
    outcome: Outcome | None = None


class SolveNode(torch.autograd.Function):
    """Runs a forward solve and, in backward, the sweep of its adjoint.

    The outputs are the saved states `(saved, N)` followed by the states at the ends of the steps,
    each a tensor of its own, so that a cotangent is materialised only where there is one. The
    step states are kept by `save_for_backward`, as outputs must be (no reference cycle). So are the
    inputs, where torch is to notice that one of them has been changed in place; a sweep that looks
    at every evaluation notices it by itself, and only for those that the field uses.

    Behind the inputs come values whose graphs were kept. A sweep may hand its cotangents to them,
    for torch to go on with.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        call: _Call,
        u0: Tensor,
        t0: Tensor | None,
        t1: Tensor | None,
        saveat: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        inputs, ctx.kept = inputs[: call.count], len(inputs) - call.count
        call.outcome = outcome = call.run(u0)
        states = outcome.states
        ctx.record, ctx.sweep, ctx.hand_on = outcome.record, call.sweep, call.hand_on
        ctx.count = len(states)
        ctx.asked = 0 if saveat is None else len(saveat)
        ctx.inputs = inputs if call.watched else ()
        saved_inputs = () if call.watched else inputs
        ctx.save_for_backward(u0, *states[1:], t0, t1, saveat, *saved_inputs)
        ctx.set_materialize_grads(False)
        return (outcome.saved if call.saves else None, *states[1:])

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        given = [x for x in cotangents if x is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        goes_on = not is_recorded(given)
        if goes_on and ctx.hand_on is not None and cotangents[0] is None:
            through = ctx.hand_on(cotangents[1:])
            if through is not None:
                return (*(None,) * (len(ctx.needs_input_grad) - len(through)), *through)
        # Read once: a checkpoint that saves nothing recomputes them, and gives them once.
        kept = ctx.saved_tensors
        states, sources = kept[: ctx.count], (*kept[ctx.count :], *ctx.inputs)
        # A failed solve may have been cut back to its last good state.
        states = states[: len(ctx.record.times)]
        wanted = ctx.needs_input_grad[2:5]

        def pull(saved: Tensor | None, *at_steps: Tensor | None) -> tuple[Tensor | None, ...]:
            backward = BackwardPass(
                record=ctx.record,
                states=states,
                saved=saved,
                at_steps=[None, *at_steps[: len(states) - 1]],
                with_times=any(wanted),
                goes_on=goes_on,
            )
            gradients = ctx.sweep(backward)
            if gradients.saveat is not None and len(gradients.saveat) < ctx.asked:
                # Times that the solve did not reach.
                missing = ctx.asked - len(gradients.saveat)
                gradients.saveat = torch.cat(
                    (gradients.saveat, gradients.saveat.new_zeros(missing))
                )
            times: list[Tensor | None] = [None, None, None]
            if backward.with_times:
                given = gradients.t0, gradients.t1, gradients.saveat
                times = [
                    gradient.reshape(time.shape) if gradient is not None and needed else None
                    for gradient, time, needed in zip(given, sources, wanted, strict=False)
                ]
            kept = gradients.kept or [None] * ctx.kept
            return (gradients.u0, *times, *gradients.inputs, *kept)

        if goes_on:
            return (None, *pull(*cotangents))
        return (None, *pulled(pull, (states[0], *sources), *cotangents))


# Without what torch does for its transforms, which no such node goes through.
_in_graph: Callable[..., Any] = super(torch.autograd.Function, SolveNode).apply
_alive: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead


def as_node(
    run: Forward,
    sweep: Sweep,
    u0: Tensor,
    inputs: Sequence[Tensor],
    times: Times = (None, None, None),
    watched: bool = True,
    saves: bool = True,
    kept: Sequence[Tensor] = (),
    hand_on: HandOn | None = None,
) -> Outcome:
    """Run a solve as one node of the graph, its backward a sweep.

    Args:
        run: solves forward from a state that needs no gradients.
        sweep: pulls cotangents back.
        u0: what is stepped, at the start, `(N,)`.
        inputs: everything else that receives gradients.
        times: of the solve.
        watched: whether the sweep notices by itself that inputs were changed in place.
        saves: whether the states at other times than the ends of the steps are asked for.
        kept: values whose graphs lead from the state and the inputs to the steps.
        hand_on: in place of a sweep, where these are the ends of all steps.

    Returns:
        What the solve leaves, as the graph has it.
    """
    call = _Call(run, sweep, watched, saves, len(inputs), hand_on)
    moving = [t if isinstance(t, Tensor) else None for t in times]
    transformed = torch._C._are_functorch_transforms_active()
    apply: Callable[..., Any] = SolveNode.apply if transformed else _in_graph
    # Tensors that a transform has left behind are what was inside.
    saved, *states = apply(call, _alive(u0), *moving, *map(_alive, (*inputs, *kept)))
    assert call.outcome is not None
    return Outcome(
        call.outcome.record, [u0, *states], call.outcome.saved if saved is None else saved
    )
