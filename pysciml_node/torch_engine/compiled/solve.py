"""One compiled solve: the graphs for its shapes, its buffers, and its node in autograd's graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pysciml_node.steps.autograd import first_derivative
from pysciml_node.tableaus.base import Tableau
from pysciml_node.torch_engine.compiled import graphs
from pysciml_node.torch_engine.compiled.build import Graph

# A buffer holds this many steps; a solve that needs more goes on in another. The number is the
# graph's own: sizes that vary are passed to it as numbers one by one, which costs time.
_ROWS = 64
# No buffer takes more memory than this, unless it held fewer than `_FEWEST_ROWS`.
_BUFFER_BYTES = 2**28
_FEWEST_ROWS = 8


def evaluate(f: Any, t: Tensor, u: Tensor, leaves: Sequence[Tensor], p_spec: Any) -> Tensor:
    """The field at `(t, u)`, the leaves of `p` put back into their structure."""
    arguments = (t, u) if p_spec is None else (t, u, pytree.tree_unflatten(leaves, p_spec))
    out: Tensor = f(*arguments)
    return out


def _tensors_of(f: Any) -> dict[str, Tensor]:
    """A module's parameters and buffers by name."""
    if not isinstance(f, torch.nn.Module):
        return {}
    return {**dict(f.named_parameters()), **dict(f.named_buffers())}


def _inside(
    f: Any, tensors: dict[str, Tensor], t: Tensor, u: Tensor, leaves: Sequence[Tensor], p_spec: Any
) -> Tensor:
    """Evaluate a field inside a compiled loop, with its tensors replaced.

    All that the field sees are views made here: what it derives from them (`self.weight.T`) would
    otherwise be computed outside of the loop, which refuses inputs that share memory.
    """
    views = {name: x.view_as(x) for name, x in tensors.items()}

    def call(*arguments: Any) -> Any:
        return torch.func.functional_call(f, views, arguments) if views else f(*arguments)

    return evaluate(call, t, u, leaves, p_spec)


def as_input(x: Tensor) -> Tensor:
    """A tensor of `p`, or a parameter, as a graph takes it.

    The compiler looks into tensors without dimensions and relies on what it finds (not NaN): they
    get one.
    """
    x = x.detach()
    return x.reshape(1) if x.ndim == 0 else x.contiguous()


def _shaped(leaves: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Undo `as_input`, inside a compiled function; these are views, see `_inside`."""
    return [x.view(shape) for x, shape in zip(leaves, shapes, strict=True)]


def _merge(wanted: Sequence[bool], moving: Sequence[Any], constant: Sequence[Any]) -> list[Any]:
    """The leaves of `p` in order, from those that require gradients and those that do not."""
    sources = {True: iter(moving), False: iter(constant)}
    return [next(sources[w]) for w in wanted]


class Layout:
    """The compiled graphs for one choice of shapes.

    Args:
        tableau: the method.
        names: parameters of the field that receive gradients.
        p_spec: structure of `p`, or `None`.
        p_shapes: shapes of the leaves of `p`.
        wanted: for each leaf of `p`, whether it receives a gradient.
        device: where the solve runs.
    """

    def __init__(
        self,
        tableau: Tableau,
        names: tuple[str, ...],
        p_spec: Any,
        p_shapes: tuple[torch.Size, ...],
        wanted: tuple[bool, ...],
        device: torch.device,
    ) -> None:
        self.stepper = graphs.Stepper(tableau)
        self.names, self.p_spec, self.p_shapes = names, p_spec, p_shapes
        self.wanted, self.device = wanted, device

    @functools.cached_property
    def basis(self) -> Tensor:
        """See `Stepper.basis`."""
        return self.stepper.basis(self.device)

    @functools.cached_property
    def forward(self) -> Graph:
        """`(field, leaves of p, arguments of forward_graph) -> (control, u)`."""
        stepper, p_spec, p_shapes = self.stepper, self.p_spec, self.p_shapes

        def solve(field: Any, leaves: tuple[Tensor, ...], *rest: Any) -> Any:
            tensors = _tensors_of(field)

            def derivative(t: Tensor, u: Tensor) -> Tensor:
                return _inside(field, tensors, t, u, _shaped(leaves, p_shapes), p_spec)

            return graphs.forward_graph(stepper, derivative, *rest)

        return Graph(solve, self.device)

    @functools.cached_property
    def backward(self) -> Graph:
        """`(field, constant leaves of p, arguments of backward_graph) -> its results`."""
        return self._replay()

    @functools.cached_property
    def backward_with_states(self) -> Graph:
        """The same where the states of the steps have cotangents, which is another graph."""
        return self._replay()

    def _replay(self) -> Graph:
        stepper, names, wanted = self.stepper, self.names, self.wanted
        p_spec, p_shapes = self.p_spec, self.p_shapes

        def replay(field: Any, leaves: tuple[Tensor, ...], *rest: Any) -> Any:
            tensors = _tensors_of(field)

            def derivative(t: Tensor, u: Tensor, *inputs: Tensor) -> Tensor:
                of_p = _merge(wanted, inputs[len(names) :], leaves)
                moving = {
                    name: x.view(tensors[name].shape)
                    for name, x in zip(names, inputs[: len(names)], strict=True)
                }
                return _inside(field, {**tensors, **moving}, t, u, _shaped(of_p, p_shapes), p_spec)

            return graphs.backward_graph(stepper, derivative, *rest)

        return Graph(replay, self.device)


class Solve:
    """One solve: what its graphs are called with, and what they leave behind."""

    def __init__(
        self,
        layout: Layout,
        f: Any,
        values: list[float],
        saveat: Tensor | None,
        leaves: list[Tensor],
        keep_states: bool,
    ) -> None:
        self.layout, self.f, self.saveat, self.keep_states = layout, f, saveat, keep_states
        self.control = values[: graphs.CONTROL_LENGTH]
        self.settings = values[graphs.CONTROL_LENGTH :]
        self.leaves = tuple(as_input(x) for x in leaves)
        self.steps: list[tuple[int, Tensor]] = []
        self.evaluations = 0
        self.on_backward: Callable[[], None] | None = None

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Run to the end; returns the last state, the saved states, the steps' states."""
        layout, saveat, shape = self.layout, self.saveat, u.shape
        used = len(layout.stepper.dense_stages)
        bytes_of_row = u.numel() * u.element_size() * (1 if saveat is None else used)
        rows = min(_ROWS, max(_FEWEST_ROWS, _BUFFER_BYTES // max(1, bytes_of_row)))
        states = u.new_empty((rows, *shape))
        saved: Tensor | None = None
        dense: Tensor | None = None
        if saveat is not None:
            saved = u.new_empty((len(saveat), *shape))
            dense = u.new_empty((rows, used, *shape))
        kept: list[Tensor] = []
        while True:
            before = self.control
            offset = self.settings[graphs.OFFSET] = before[graphs.ACCEPTED]
            values = torch.tensor([*before, *self.settings], dtype=torch.float64, device=u.device)
            steps = torch.empty((rows, 4), dtype=torch.float64, device=u.device)
            control, u = layout.forward(
                self.f, self.leaves, u, values, steps, states, saveat, saved, dense
            )
            # The one host read of a solve (of a buffer, where one does not do).
            self.control = control.tolist()
            self.steps.append((int(self.control[graphs.ACCEPTED] - offset), steps))
            self._count(before)
            running = self.control[graphs.STATUS] == graphs.RUNNING
            if self.keep_states:
                kept.append(states)
                if running:
                    states = torch.empty_like(states)
            if not running:
                return u, saved, kept

    def _count(self, before: list[float]) -> None:
        stepper = self.layout.stepper
        fresh = math.isnan(before[graphs.SIZE])
        accepted = self.control[graphs.ACCEPTED] - before[graphs.ACCEPTED]
        attempts = accepted + self.control[graphs.REJECTED] - before[graphs.REJECTED]
        per_attempt = stepper.tableau.stages - 1
        if self.saveat is not None and not stepper.first_stage_follows():
            per_attempt += len(stepper.tableau.interpolant.c)
        ends = 0 if stepper.tableau.fsal else accepted
        self.evaluations += int(1 + fresh + attempts * per_attempt + ends)

    @property
    def evaluations_backward(self) -> int:
        """Evaluations of one backward sweep."""
        stepper = self.layout.stepper
        extra = len(stepper.tableau.interpolant.c) if self.saveat is not None else 0
        return sum(rows for rows, _ in self.steps) * (stepper.tableau.stages + extra)

    def backward(
        self,
        inputs: tuple[Tensor, ...],
        states: Sequence[Tensor],
        cotangent: Tensor,
        cotangent_saved: Tensor | None,
        cotangent_states: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Replay all steps; returns the gradients of the first state and of `inputs`."""
        layout, saveat = self.layout, self.saveat
        constants = tuple(x for x, w in zip(self.leaves, layout.wanted, strict=True) if not w)
        direction = self.settings[graphs.DIRECTION]
        next_save = float(self._passed())
        with_states = any(x is not None for x in cotangent_states)
        graph = layout.backward_with_states if with_states else layout.backward
        totals: list[Tensor] = []
        for n in reversed(range(len(self.steps))):
            rows, steps = self.steps[n]
            if rows == 0:
                continue
            of_states: Tensor | None = None
            if with_states:
                given = cotangent_states[n]
                of_states = torch.zeros_like(states[n]) if given is None else given.contiguous()
            values = torch.tensor(
                [rows, direction, n == 0, next_save], dtype=torch.float64, device=cotangent.device
            )
            saves, cotangent, found = graph(
                self.f,
                constants,
                values,
                steps,
                states[n],
                saveat,
                None if saveat is None else layout.basis,
                cotangent,
                cotangent_saved,
                of_states,
                inputs,
            )
            if n > 0 and saveat is not None:
                next_save = saves.item()
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else [*found]
        return cotangent, totals

    def _passed(self) -> int:
        """How many of the saved times were reached."""
        if self.saveat is None:
            return 0
        if self.control[graphs.STATUS] == graphs.SUCCESS:
            return len(self.saveat)
        sign, t = self.settings[graphs.DIRECTION], self.control[graphs.TIME]
        return int((self.saveat * sign <= t * sign).sum())


class SolveNode(torch.autograd.Function):
    """A compiled solve as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, solve: Solve, u0: Tensor, *inputs: Tensor) -> Any:
        """Solve; returns the last state, the saved states and the steps' states."""
        ctx.set_materialize_grads(False)
        u1, saved, states = solve.forward(u0.detach())
        ctx.solve = solve
        ctx.save_for_backward(*inputs, *states)
        return (u1, saved, *states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Replay the solve."""
        with torch.no_grad():
            gradients = SolveNode._replay(ctx, *cotangents)
        return (None, *first_derivative(gradients, ctx.saved_tensors))

    @staticmethod
    def _replay(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the first state and of the inputs."""
        solve: Solve = ctx.solve
        of_end, of_saved, *of_states = cotangents
        split = len(ctx.saved_tensors) - len(solve.steps)
        given, states = ctx.saved_tensors[:split], ctx.saved_tensors[split:]
        inputs = tuple(as_input(x) for x in given)
        of_end = torch.zeros_like(states[0][0]) if of_end is None else of_end.contiguous()
        if solve.saveat is not None:
            shape = (len(solve.saveat), *of_end.shape)
            of_saved = of_end.new_zeros(shape) if of_saved is None else of_saved.contiguous()
        of_u0, of_inputs = solve.backward(inputs, states, of_end, of_saved, of_states)
        if solve.on_backward is not None:
            solve.on_backward()
        if not of_inputs:
            return (of_u0, *(None for _ in inputs))
        return (of_u0, *(g.view(x.shape) for g, x in zip(of_inputs, given, strict=True)))
