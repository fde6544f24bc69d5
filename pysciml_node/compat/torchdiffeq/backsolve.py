"""The backward solve that the `adjoint_*` arguments of `odeint_adjoint` describe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysciml_node.compat.torchdiffeq.control import ADJOINT_CALLBACKS, CALLBACKS
from pysciml_node.compat.torchdiffeq.functions import odeint
from pysciml_node.compat.torchdiffeq.plan import Options, Tolerances
from pysciml_node.compat.torchdiffeq.solvers import moved
from pysciml_node.compat.torchdiffeq.states import Layout, mixed, rms
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.steps.autograd import as_node
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import DifferentiableField
from pysciml_node.steps.memory import evaluations
from pysciml_node.steps.record import Outcome, Record


@dataclass(frozen=True)
class BackwardSolve:
    """How the backward solve is run.

    Attributes:
        rtol: relative tolerance, like `odeint`'s.
        atol: absolute tolerance, likewise.
        method: its method.
        options: their options, without a norm.
        norm: a norm that was given for it: a function, or `"seminorm"`.
        state_norm: the norm of the forward solve, where one was given.
        perturb: whether the field is not to be seen at the ends of steps.
        asked: whether anything was given that another backward pass would not do.
    """

    rtol: Tolerances
    atol: Tolerances
    method: str | None
    options: dict[str, Any]
    norm: Any
    state_norm: Callable[[Any], Any] | None
    perturb: bool
    asked: bool

    @classmethod
    def of(
        cls,
        rtol: Tolerances,
        atol: Tolerances,
        method: str | None,
        options: Options | None,
        adjoint_rtol: Tolerances | None,
        adjoint_atol: Tolerances | None,
        adjoint_method: str | None,
        adjoint_options: Options | None,
    ) -> BackwardSolve:
        """From the arguments of `odeint_adjoint`.

        Raises:
            ValueError: another method without options of its own.
        """
        forward = dict(options or {})
        differs = adjoint_method not in (None, method or "dopri5")
        if differs and options is not None and adjoint_options is None:
            raise ValueError(
                f"adjoint_method={adjoint_method!r} is not the method of the forward solve, whose "
                "options may not be its own.\n  Give adjoint_options, if only {}."
            )
        given = dict(forward if adjoint_options is None else adjoint_options)
        norm = given.pop("norm", None) if adjoint_options is not None else None
        given.pop("norm", None)
        given.pop("adjoint", None)
        others = any(key not in forward or forward[key] is not given[key] for key in given)
        asked = (
            others
            or differs
            or callable(norm)
            or not _same(adjoint_rtol, rtol)
            or not _same(adjoint_atol, atol)
        )
        return cls(
            rtol=rtol if adjoint_rtol is None else adjoint_rtol,
            atol=atol if adjoint_atol is None else adjoint_atol,
            method=adjoint_method or method,
            options=given,
            norm=norm,
            state_norm=forward.get("norm"),
            perturb=bool(forward.get("perturb")),
            asked=asked,
        )


def _same(value: Tolerances | None, other: Tolerances) -> bool:
    """Whether a tolerance of the backward solve is that of the forward solve."""
    if value is None or value is other:
        return True
    return isinstance(value, int | float) and isinstance(other, int | float) and value == other


class Backsolve:
    """A forward solve as one node of the graph, its backward pass a solve of the adjoint equation.

    Args:
        func: the field.
        problem: the field as it is solved, and the initial state.
        t: the output times.
        solve: runs the forward solve from a state over times.
        backward: how the backward solve is run.
        params: tensors that receive gradients; others that the field uses follow them.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        problem: ODEProblem,
        t: Tensor,
        solve: Callable[[Any, Tensor], Any],
        backward: BackwardSolve,
        params: Sequence[Tensor],
    ) -> None:
        self.func, self.t, self.solve, self.backward = func, t, solve, backward
        self.problem = problem
        self.layout = Layout.of(problem.u0)
        self.u0 = problem.spec.flatten(problem.u0).clone()
        start = problem.time_tensor([problem.t0])[0]
        if backward.perturb:
            start = torch.nextafter(start, start + problem.direction)
        self.field = DifferentiableField(problem, start, self.u0)
        known = {id(x): i for i, x in enumerate(self.field.inputs)}
        # The gradients in the order that norms and callbacks expect: that of the parameters. Those
        # that the field does not use are among them, and stay zero.
        self.order = [known.get(id(x)) for x in params if x.requires_grad]
        self.order += [i for i in known.values() if i not in self.order]
        self.unused = [x for x in params if x.requires_grad and id(x) not in known]

    def run(self, event_fn: Callable[..., Tensor] | None) -> Any:
        """The states at the output times; with `event_fn` its time, and the states there."""
        times, kept = self.t.detach(), []

        def forward(u: Tensor) -> Outcome:
            solved = self.solve(self.layout.state(self.u0.detach()), times)
            if event_fn is not None:
                event_t, solved = solved
                kept.append(torch.stack((times[0], event_t)))
            else:
                kept.append(times)
            parts = (solved,) if self.layout.single else solved
            rows = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
            # Not the node's own output, which would hold on to the node.
            kept.append(rows.detach().clone())
            return Outcome(Record(times=[self.problem.t0]), [self.u0], rows)

        def sweep(arrived: BackwardPass) -> Gradients:
            places = zip(kept[0][1:].unbind(), kept[1][1:], strict=True)
            later = evaluations((self.field.field,), places)
            with self.field.captured.sweep(replayed=False, later=later):
                return self._sweep(kept[0], kept[1], arrived.saved, arrived.with_times)

        self.field.captured.remember()
        moving = self.t if self.t.requires_grad else None
        rows = as_node(forward, sweep, self.u0, self.field.inputs, (None, None, moving)).saved
        self.field.settle()
        if event_fn is None:
            return self.layout.state(rows, (len(rows),))
        return self._at_event(event_fn, kept[0][1], rows)

    def _at_event(self, event_fn: Callable[..., Tensor], time: Tensor, rows: Tensor) -> Any:
        """The event's time and the states, which move with it."""
        start = self.layout.state(rows[0].detach())
        with torch.no_grad():
            signs = torch.sign(event_fn(self.t[0].detach(), start))

        def condition(t: Tensor, u: Tensor) -> Tensor:
            return torch.min(event_fn(t, self.layout.state(u)) * signs)

        time, last = moved(self.field.field, condition, time, rows[1])
        states = torch.stack((rows[0], last))
        return time.to(self.t), self.layout.state(states, (2,))

    def _sweep(
        self, times: Tensor, rows: Tensor, arriving: Tensor | None, with_times: bool
    ) -> Gradients:
        cotangents = torch.zeros_like(rows) if arriving is None else arriving
        largest = float(cotangents.abs().max())
        unit = largest if 0 < largest < math.inf else 1.0
        leaves = self.field.leaves
        moving = torch.zeros(len(times), dtype=torch.float64, device=rows.device)
        if largest == 0 or not math.isfinite(largest):
            value = 0.0 if largest == 0 else math.nan
            filled: list[Tensor | None] = [torch.full_like(leaf, value) for leaf in leaves]
            saveat = torch.full_like(moving, value) if with_times else None
            return Gradients(u0=torch.full_like(rows[0], value), inputs=filled, saveat=saveat)
        cotangents = cotangents / unit
        shape = self.layout.shapes[0] if self.layout.single else rows[0].shape
        augmented = _Augmented(self, with_times, shape)
        costate, along_time = cotangents[-1], moving.new_zeros(())
        sums = augmented.zeros()
        for i in range(len(times) - 1, 0, -1):
            if with_times:
                rate = self.field.field(times[i].to(rows.dtype.to_real()), rows[i])
                moving[i] = torch.vdot(cotangents[i], rate).real
                along_time = along_time - moving[i]
            start = (along_time.to(rows), rows[i].view(shape), costate.view(shape), *sums)
            # From one output to the one before; the state is the forward solve's at each.
            ended = augmented.solve(start, times[i - 1 : i + 1].flip(0))
            along_time, _, costate, *sums = (part[-1] for part in ended)
            along_time = along_time.real.to(moving.dtype)
            costate = costate.reshape(-1) + cotangents[i - 1]
        moving[0] = along_time
        if len(times) != len(self.t) or not torch.equal(times, self.t.detach()):
            # The time of an event has its gradient by another way.
            moving[1:] = 0.0
        return Gradients(
            u0=costate * unit,
            inputs=augmented.by_leaf(sums, unit),
            saveat=moving * unit if with_times else None,
        )


class _Augmented:
    """The right-hand side of the backward solve: `(dL/dt, y, dL/dy, *dL/dparams)`."""

    def __init__(self, owner: Backsolve, with_times: bool, shape: torch.Size) -> None:
        self.owner, self.with_times, self.shape = owner, with_times, shape
        for name, backward_name in zip(CALLBACKS, ADJOINT_CALLBACKS, strict=True):
            if hasattr(owner.func, backward_name):
                setattr(self, name, getattr(owner.func, backward_name))

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The derivative."""
        owner = self.owner
        _, y, costate, *sums = state
        # An implicit method differentiates this itself.
        if y.requires_grad:
            value, pulled, along_time, leaves = self._differentiable(t, y, costate)
        else:
            line = owner.field.linearize(t, y.reshape(-1), time_gradient=self.with_times)
            pulled, along_time, leaves = line.vjp(-costate.reshape(-1))
            value = line.value
        gradients = [None if i is None else leaves[i] for i in owner.order]
        return (
            torch.zeros_like(state[0]) if along_time is None else along_time,
            value.view(self.shape),
            torch.zeros_like(y) if pulled is None else pulled.view(self.shape),
            *(
                torch.zeros_like(total) if gradient is None else gradient
                for gradient, total in zip(gradients, sums, strict=True)
            ),
        )

    def _differentiable(
        self, t: Tensor, y: Tensor, costate: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
        """The field's value and its vector-Jacobian product, with their graph."""
        field, time = self.owner.field, t.detach().requires_grad_(self.with_times)
        value = field.field(time, y.reshape(-1))
        wanted = [y, *([time] if self.with_times else []), *field.leaves]
        products: list[Tensor | None] = [None] * len(wanted)
        if value.requires_grad:
            products = list(
                torch.autograd.grad(
                    value, wanted, -costate.reshape(-1), create_graph=True, allow_unused=True
                )
            )
        pulled = products.pop(0)
        return value, pulled, products.pop(0) if self.with_times else None, products

    def zeros(self) -> list[Tensor]:
        """The gradients at the start: none."""
        unused = iter(self.owner.unused)
        leaves = self.owner.field.leaves
        return [
            torch.zeros_like(next(unused) if i is None else leaves[i]) for i in self.owner.order
        ]

    def by_leaf(self, sums: Sequence[Tensor], unit: float) -> list[Tensor | None]:
        """The gradients of the field's inputs, in their order."""
        leaves = self.owner.field.leaves
        gradients: list[Tensor | None] = [None] * len(leaves)
        for i, total in zip(self.owner.order, sums, strict=True):
            if i is not None:
                part = total if leaves[i].is_complex() else total.real
                gradients[i] = (part * unit).to(leaves[i].dtype)
        return gradients

    def solve(self, start: tuple[Tensor, ...], times: Tensor) -> tuple[Tensor, ...]:
        """The state at both of two times."""
        backward = self.owner.backward
        count = len(start) - 3
        states: tuple[Tensor, ...] = odeint(
            self,
            start,
            times,
            rtol=self._tolerance(backward.rtol, count),
            atol=self._tolerance(backward.atol, count),
            method=backward.method,
            options=backward.options | {"norm": self._norm},
        )
        return states

    def _tolerance(self, tolerance: Tolerances, count: int) -> Any:
        """A tolerance of the state, for what is solved beside it the tightest of its parts'."""
        if isinstance(tolerance, int | float):
            return tolerance
        if isinstance(tolerance, Tensor) and tolerance.ndim == 0:
            return float(tolerance)
        layout = self.owner.layout
        given = (tolerance,) if layout.single else tolerance
        parts = tuple(
            torch.as_tensor(part, dtype=torch.float64).expand(shape)
            for part, shape in zip(given, layout.shapes, strict=True)
        )
        flat = layout.flat(parts[0] if layout.single else parts)
        tightest, shaped = float(flat.min()), flat.view(self.shape)
        return (tightest, shaped, shaped, *[tightest] * count)

    def _norm(self, state: tuple[Tensor, ...]) -> Any:
        backward, layout = self.owner.backward, self.owner.layout
        along_time, y, costate, *params = state
        if callable(backward.norm):
            if layout.single:
                return backward.norm(state)
            inner = (*layout.state(y), *layout.state(costate))
            return backward.norm((along_time, *inner, *params))
        of_state: Callable[[Any], Any] = backward.state_norm or (rms if layout.single else mixed)
        if not layout.single:
            y, costate = layout.state(y), layout.state(costate)
        norms: list[Tensor | float] = [along_time.abs(), of_state(y), of_state(costate)]
        if backward.norm != "seminorm":
            norms.append(mixed(params))
        sizes = [torch.as_tensor(norm).abs().to(along_time.real) for norm in norms]
        return torch.stack(sizes).max()
