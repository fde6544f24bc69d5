"""The continuous adjoints: the adjoint equation solved backward by the forward loop.

With `l(t)` the cotangent of the state, `dl/dt = -(df/du)^T l` and `dL/dtheta = int (df/dtheta)^T l`
(Pontryagin; Chen et al. 2018, arXiv 1806.07366). Cotangents of outputs enter as jumps of `l`: the
march lands on their times, keeps its step size, and is never restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import (
    BacksolveAdjoint,
    GaussAdjoint,
    InterpolatingAdjoint,
    _ContinuousAdjoint,
)
from pysciml_node.algorithms.controllers import Controller, FixedStep
from pysciml_node.errors import SolverFailure
from pysciml_node.replay.norms import Tolerance
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import Cotangents, Gradients
from pysciml_node.steps.field import Accumulator, DifferentiableField
from pysciml_node.steps.record import Record
from pysciml_node.steps.step import Step
from pysciml_node.torch_engine.march import March, MarchOptions


class BackwardFailure(RuntimeError):
    """The adjoint equation could not be solved; the message says what to try."""


class DenseForward:
    """The forward solution at any time, its last used step's stages kept."""

    def __init__(
        self, field: DifferentiableField, method: Method, record: Record, states: Iterable[Tensor]
    ) -> None:
        self.record, self.states = record, tuple(states)
        times = record.times
        self.sign = 1.0 if times[-1] >= times[0] else -1.0
        self.ordered = np.asarray(times) * self.sign
        vectors = vectors_like(self.states[0], method.all_stages)
        self.stages = Stages(method, field.field, record.marks, vectors)
        self.current = -1

    def __call__(self, t: float) -> Tensor:
        """The state `(N,)` at `t`."""
        n = int(np.searchsorted(self.ordered, t * self.sign, side="right")) - 1
        n = min(max(n, 0), len(self.record.sizes) - 1)
        start, h, u = self.record.times[n], self.record.sizes[n], self.states[n]
        if n != self.current:
            self.stages.count, self.current = 0, n
        theta = min(max((t - start) / h, 0.0), 1.0)
        with torch.no_grad():
            return self.stages.dense(start, h, u, torch.tensor([theta]).double())[0]


class _Jumps:
    """The cotangents that enter, by time, in the order of the backward march."""

    def __init__(self, record: Record, arriving: Cotangents) -> None:
        self.by_time: dict[float, list[Tensor]] = {}
        self.saved_times: dict[int, float] = {}
        for n, gradient in enumerate(arriving.states):
            if gradient is not None:
                self.by_time.setdefault(record.times[n], []).append(gradient)
        if arriving.saved is not None:
            for n, (indices, thetas) in record.inside.items():
                for i, theta in zip(indices, thetas, strict=True):
                    self.saved_times[i] = record.times[n] + theta * record.sizes[n]
            for n, indices in record.at_end.items():
                for i in indices:
                    self.saved_times[i] = record.times[n]
            for i, t in self.saved_times.items():
                self.by_time.setdefault(t, []).append(arriving.saved[i])

    def at(self, t: float) -> Tensor | None:
        """Sum of the cotangents that enter at `t`."""
        found = self.by_time.get(t)
        return None if found is None else torch.stack(found).sum(0)


def continuous_sweep(
    field: DifferentiableField,
    method: Method,
    record: Record,
    states: tuple[Tensor, ...],
    arriving: Cotangents,
    adjoint: _ContinuousAdjoint,
    controller: Controller,
    rtol: float,
    atol: float,
    max_steps: int,
    time_gradient: bool,
    stats: Stats,
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs by the adjoint equation.

    Args:
        field: the field prepared for gradients.
        method: the method, used backward as well.
        record: the accepted steps of the forward solve.
        states: the states at `record.times`.
        arriving: cotangents of the saved and of the step states.
        adjoint: which adjoint, and its tolerances.
        controller: step control of the backward march.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: limit of the backward march.
        time_gradient: whether `t0`, `t1` and `saveat` need gradients.
        stats: its backward fields are filled.

    Raises:
        BackwardFailure: the backward march failed.
    """
    start_nfe = field.nfe
    jumps = _Jumps(record, arriving)
    dense = DenseForward(field, method, record, states)
    sums = Accumulator(field.leaves)
    t0, t1 = record.times[0], record.times[-1]
    size = states[0].numel()
    augmented = _augmentation(adjoint, field, dense, size, stats)

    end = jumps.at(t1)
    costate = torch.zeros_like(states[0]) if end is None else end
    # Where the forward march had to stop, the field may have a kink.
    kinks = {t for t, stop in zip(record.times[1:], record.stops, strict=True) if stop is not None}
    stop_times = sorted((kinks | set(jumps.by_time)) - {t0, t1}, reverse=t0 < t1)
    start = augmented.start(costate, states[-1])
    options = MarchOptions(
        controller=controller,
        # Only the adjoint state (and the state beside it) drives the step size.
        tolerance=Tolerance(rtol, atol, augmented.driven),
        max_steps=max_steps,
        dt0=abs(record.sizes[-1]) if not controller.adaptive else None,
        tstops=tuple(stop_times),
    )
    marks = (t1, *reversed(record.marks[1:-1]), t0)
    stages = Stages(method, augmented, marks, vectors_like(start, method.all_stages))
    march = March(stages, start, t1, t0, options)
    for step in march:
        if isinstance(adjoint, GaussAdjoint):
            _gauss_quadrature(step, stages, field, dense, sums, stats)
        jump = jumps.at(step.end) if step.stop is not None else None
        if jump is not None and step.stop != len(stop_times):
            march.replace(augmented.jump(step.u1, jump, step.end))
    stats.naccept_backward += march.naccept
    stats.nreject_backward += march.nreject
    if not march.retcode.successful:
        raise BackwardFailure(
            f"the backward solve of {type(adjoint).__name__} stopped at "
            f"t={march.last.t if march.last else t1:.6g}: {march.retcode.value}.\n"
            "  Try, in order: adjoint=DiscreteAdjoint(); looser tolerances for the adjoint, as in "
            f"{type(adjoint).__name__}(rtol=1e-4, atol=1e-4); a larger max_steps."
        )
    final = march.u
    costate = augmented.costate(final)
    augmented.collect(final, sums)
    at_start = jumps.at(t0)
    if at_start is not None:
        costate = costate + at_start
    gradients = Gradients(costate, None, None, None, sums.sums)
    if time_gradient:
        _time_gradients(gradients, field, method, jumps, arriving, dense, (t0, t1), costate)
    stats.nfe_backward += field.nfe - start_nfe
    return gradients


class _Augmented:
    """The right-hand side of a backward march, on a flat vector.

    Layout: `[costate, state (backsolve only), parameter gradients (not for Gauss)]`.
    """

    def __init__(
        self,
        field: DifferentiableField,
        state_at: Callable[[float], Tensor] | None,
        with_leaves: bool,
        size: int,
        stats: Stats,
    ) -> None:
        self.field, self.state_at, self.with_leaves = field, state_at, with_leaves
        self.size, self.stats = size, stats
        self.driven = size if state_at is not None else 2 * size
        # Complex states carry real parameters' gradients in their real parts.
        self.lengths = [leaf.numel() for leaf in field.leaves] if with_leaves else []

    def start(self, costate: Tensor, state: Tensor) -> Tensor:
        """The vector at `t1`."""
        parts = [costate] + ([] if self.state_at is not None else [state])
        parts.append(costate.new_zeros(sum(self.lengths)))
        return torch.cat(parts)

    def costate(self, vector: Tensor) -> Tensor:
        """The adjoint state in a vector."""
        return vector[: self.size]

    def jump(self, vector: Tensor, cotangent: Tensor, t: float) -> Tensor:
        """The vector after a cotangent has entered."""
        vector = vector.clone()
        vector[: self.size] += cotangent
        return vector

    def __call__(self, t: Tensor, vector: Tensor) -> Tensor:
        """Time derivative of the vector."""
        costate = vector[: self.size]
        if self.state_at is None:
            state = vector[self.size : 2 * self.size]
        else:
            state = self.state_at(float(t))
        line = self.field.linearize(t, state)
        self.stats.nvjp += 1
        pulled, _, leaves = line.vjp(costate, with_leaves=self.with_leaves)
        out = torch.zeros_like(vector)
        if pulled is not None:
            out[: self.size] = -pulled
        if self.state_at is None:
            out[self.size : 2 * self.size] = line.value
        position = self.driven
        for gradient, length in zip(leaves, self.lengths, strict=False):
            if gradient is not None:
                out[position : position + length] = -gradient.reshape(-1)
            position += length
        return out

    def collect(self, vector: Tensor, sums: Accumulator) -> None:
        """Hand over the parameter gradients that the march has integrated."""
        pieces = torch.split(vector[self.driven :], self.lengths) if self.lengths else ()
        gradients: list[Tensor | None] = []
        for piece, leaf in zip(pieces, self.field.leaves, strict=False):
            shaped = piece.view(leaf.shape)
            gradients.append((shaped if leaf.is_complex() else shaped.real).to(leaf.dtype))
        if gradients:
            sums.add(gradients)


class _Backsolve(_Augmented):
    """Puts the state back onto the stored one where a cotangent enters."""

    def __init__(
        self, field: DifferentiableField, dense: DenseForward, size: int, stats: Stats
    ) -> None:
        super().__init__(field, None, True, size, stats)
        self.stored = dict(zip(dense.record.times, dense.states, strict=True))
        self.dense = dense

    def jump(self, vector: Tensor, cotangent: Tensor, t: float) -> Tensor:
        vector = super().jump(vector, cotangent, t)
        stored = self.stored.get(t)
        vector[self.size : 2 * self.size] = self.dense(t) if stored is None else stored
        return vector


def _augmentation(
    adjoint: _ContinuousAdjoint,
    field: DifferentiableField,
    dense: DenseForward,
    size: int,
    stats: Stats,
) -> _Augmented:
    if isinstance(adjoint, BacksolveAdjoint):
        return _Backsolve(field, dense, size, stats)
    with_leaves = isinstance(adjoint, InterpolatingAdjoint)
    return _Augmented(field, dense, with_leaves, size, stats)


def _gauss_quadrature(
    step: Step,
    stages: Stages,
    field: DifferentiableField,
    dense: DenseForward,
    sums: Accumulator,
    stats: Stats,
) -> None:
    """Add one backward step's share of the parameter gradient, `-int (df/dtheta)^T l dt`."""
    order = stages.method.tableau.order
    nodes, weights = np.polynomial.legendre.leggauss(order // 2 + 1)
    theta = torch.from_numpy((nodes + 1) / 2)
    costates = stages.dense(step.t, step.h, step.u, theta)
    times = stages.method.nodes.new_tensor([step.t + x * step.h for x in theta.tolist()]).unbind()
    for time, costate, weight in zip(times, costates, weights, strict=True):
        line = field.linearize(time, dense(float(time)))
        stats.nvjp += 1
        _, _, leaves = line.vjp(costate, with_state=False)
        sums.add(leaves, scale=-float(weight) * step.h / 2)


def _time_gradients(
    gradients: Gradients,
    field: DifferentiableField,
    method: Method,
    jumps: _Jumps,
    arriving: Cotangents,
    dense: DenseForward,
    ends: tuple[float, float],
    costate: Tensor,
) -> None:
    """`dL/dt_i = <cotangent_i, f(t_i, u_i)>`, and `-<l, f>` at `t0`."""

    def along(t: float, cotangent: Tensor) -> Tensor:
        with torch.no_grad():
            rate = field.field(method.nodes.new_tensor(t), dense(t))
        return torch.vdot(cotangent, rate).real

    t0, t1 = ends
    record = dense.record
    at_end = jumps.at(t1)
    # A solve that an event has stopped does not reach the end of its interval.
    reached = bool(record.stops) and record.stops[-1] == record.t1_stop
    gradients.t1 = method.nodes.new_zeros(())
    if reached and at_end is not None:
        gradients.t1 = along(t1, at_end)
    gradients.t0 = -along(t0, costate)
    if arriving.saved is not None:
        gradients.saveat = method.nodes.new_zeros(arriving.saved.shape[0])
        for i, t in jumps.saved_times.items():
            if t not in ends:
                gradients.saveat[i] = along(t, arriving.saved[i])
    at_start = jumps.at(t0)
    if at_start is not None:
        # A cotangent of u0 itself does not move with t0.
        gradients.t0 = gradients.t0 + along(t0, at_start)
    # The ends of free steps move with t0, until a stop fixes them.
    for t, stop, cotangent in zip(record.times[1:], record.stops, arriving.states[1:], strict=True):
        if stop is not None:
            break
        if cotangent is not None:
            gradients.t0 = gradients.t0 + along(t, cotangent)


def backward_controller(controller: Controller) -> Controller:
    """Step control of the backward march: fixed steps backward where forward had them."""
    return FixedStep() if isinstance(controller, FixedStep) else controller


__all__ = ["BackwardFailure", "SolverFailure", "continuous_sweep"]
