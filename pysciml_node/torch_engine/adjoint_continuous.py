"""The continuous adjoints: the adjoint equation solved backward by the forward loop.

With `l(t)` the cotangent of the state, `dl/dt = -(df/du)^T l` and `dL/dtheta = int (df/dtheta)^T l`
(Pontryagin; Chen et al. 2018, arXiv 1806.07366). Cotangents of outputs enter as jumps of `l`: the
march lands on their times, keeps its step size, and is never restarted.

The equation is linear, and so the march runs on `l` in units of its own size, measured anew
wherever a cotangent enters: `atol` is relative to it, and the gradient of `c L` is `c` times that
of `L` for any number `c`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import (
    BacksolveAdjoint,
    GaussAdjoint,
    _ContinuousAdjoint,
)
from pysciml_node.algorithms.controllers import Controller, FixedStep
from pysciml_node.replay.comparison import expect_same
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
        if t == self.record.times[-1]:
            return self.states[-1]
        n = int(np.searchsorted(self.ordered, t * self.sign, side="right")) - 1
        n = min(max(n, 0), len(self.record.sizes) - 1)
        start, h, u = self.record.times[n], self.record.sizes[n], self.states[n]
        if t == start:
            return u
        if n != self.current:
            self.stages.count, self.current = 0, n
        theta = min(max((t - start) / h, 0.0), 1.0)
        with torch.no_grad():
            return self.stages.dense(start, h, u, torch.tensor([theta]).double())[0]


class _Jumps:
    """The cotangents that enter, by time, in the order of the backward march.

    Attributes:
        by_time: their sums; those that are zero are left out.
        saved_times: of the saved states, by index.
        finite: whether all of them are.
    """

    def __init__(self, record: Record, arriving: Cotangents) -> None:
        entering: dict[float, list[Tensor]] = {}
        self.saved_times: dict[int, float] = {}
        for n, gradient in enumerate(arriving.states):
            if gradient is not None:
                entering.setdefault(record.times[n], []).append(gradient)
        if arriving.saved is not None:
            for n, (indices, thetas) in record.inside.items():
                for i, theta in zip(indices, thetas, strict=True):
                    self.saved_times[i] = record.times[n] + theta * record.sizes[n]
            for n, indices in record.at_end.items():
                for i in indices:
                    self.saved_times[i] = record.times[n]
            for i, t in self.saved_times.items():
                entering.setdefault(t, []).append(arriving.saved[i])
        sums = {t: torch.stack(parts).sum(0) for t, parts in entering.items()}
        peaks = torch.stack([x.abs().max() for x in sums.values()]).tolist() if sums else []
        self.finite = all(math.isfinite(peak) for peak in peaks)
        forward = record.times[-1] >= record.times[0]
        self.by_time = {
            t: sums[t]
            for t, peak in sorted(zip(sums, peaks, strict=True), reverse=forward)
            if peak != 0
        }

    def at(self, t: float) -> Tensor | None:
        """Sum of the cotangents that enter at `t`; `None` for zero."""
        return self.by_time.get(t)


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
    if not jumps.finite:
        # As through any other operation: who scales losses looks for it.
        return _filled(field, states[0], arriving, time_gradient, math.nan)
    if not jumps.by_time:
        return _filled(field, states[0], arriving, time_gradient, 0.0)
    dense = DenseForward(field, method, record, states)
    sums = Accumulator(field.leaves)
    t0, t1 = record.times[0], record.times[-1]
    augmented = _augmentation(adjoint, field, dense, stats)

    # Nothing enters after the first of these times.
    first, cotangent = next(iter(jumps.by_time.items()))
    # Where the forward march had to stop, the field may have a kink.
    kinks = {t for t, stop in zip(record.times[1:], record.stops, strict=True) if stop is not None}
    sign = 1.0 if t1 > t0 else -1.0
    stop_times = sorted(
        (t for t in kinks | set(jumps.by_time) if sign * t0 < sign * t < sign * first),
        reverse=t0 < t1,
    )
    start = augmented.start(first, cotangent)
    vector = start
    if first != t0:
        options = MarchOptions(
            controller=controller,
            # Only the adjoint state (and the state beside it) drives the step size.
            tolerance=Tolerance(rtol, atol, augmented.driven),
            max_steps=max_steps,
            dt0=max(map(abs, record.sizes)) if not controller.adaptive else None,
            tstops=tuple(stop_times),
        )
        marks = (first, *(t for t in reversed(record.marks[1:-1]) if t in kinks), t0)
        stages = Stages(method, augmented, marks, vectors_like(start, method.all_stages))
        march = March(stages, start, first, t0, options)
        for step in march:
            if isinstance(adjoint, GaussAdjoint):
                _gauss_quadrature(step, stages, augmented, sums)
            jump = jumps.at(step.end) if step.stop is not None else None
            if jump is not None and step.stop != len(stop_times):
                march.replace(augmented.jump(step.u1, jump, step.end))
        stats.naccept_backward += march.naccept
        stats.nreject_backward += march.nreject
        if not march.retcode.successful:
            raise BackwardFailure(
                f"the backward solve of {type(adjoint).__name__} stopped at "
                f"t={march.last.t if march.last else first:.6g}: {march.retcode.value}.\n"
                "  Try, in order: adjoint=DiscreteAdjoint(); looser tolerances for the adjoint, as "
                f"in {type(adjoint).__name__}(rtol=1e-4, atol=1e-4); a larger max_steps."
            )
        vector = march.u
    augmented.collect(vector, sums)
    costate = augmented.costate(vector)
    at_start = jumps.at(t0)
    if at_start is not None and first != t0:
        costate = costate + at_start
    inputs: list[Tensor | None] = [
        torch.zeros_like(leaf) if total is None else total
        for total, leaf in zip(sums.sums, field.leaves, strict=True)
    ]
    gradients = Gradients(costate, None, None, None, inputs)
    if time_gradient:
        _time_gradients(gradients, field, method, jumps, arriving, dense, (t0, t1), costate)
    begin = method.nodes.new_tensor(t0)
    expect_same((field.field(begin, states[0]),), (field.k0,), field.captured.suspects)
    stats.nfe_backward += field.nfe - start_nfe
    return gradients


def _filled(
    field: DifferentiableField,
    like: Tensor,
    arriving: Cotangents,
    time_gradient: bool,
    value: float,
) -> Gradients:
    """Gradients that are all one number."""
    time = like.new_full((), value, dtype=like.dtype.to_real()) if time_gradient else None
    saved = arriving.saved
    saveat = None if time is None or saved is None else time.expand(saved.shape[0])
    leaves: list[Tensor | None] = [torch.full_like(leaf, value) for leaf in field.leaves]
    return Gradients(torch.full_like(like, value), time, time, saveat, leaves)


def _size(cotangent: Tensor) -> float:
    """Root-mean-square of a cotangent that is not zero; its squares neither over- nor underflow."""
    peak = cotangent.abs().max()
    scaled = torch.linalg.vector_norm(cotangent / peak) / math.sqrt(cotangent.numel())
    return float(peak * scaled)


class _Augmented:
    """The right-hand side of a backward march, on a flat vector.

    Layout: `[costate, state (backsolve only), parameter gradients (not for Gauss)]`, of which the
    costate and the gradients are in units of `unit`.
    """

    def __init__(
        self,
        field: DifferentiableField,
        dense: DenseForward,
        stats: Stats,
        with_state: bool = False,
        with_leaves: bool = True,
    ) -> None:
        self.field, self.dense, self.stats = field, dense, stats
        self.with_state, self.with_leaves = with_state, with_leaves
        self.size = dense.states[0].numel()
        self.driven = 2 * self.size if with_state else self.size
        # Complex states carry real parameters' gradients in their real parts.
        self.lengths = [leaf.numel() for leaf in field.leaves] if with_leaves else []
        self.unit = 1.0

    def start(self, t: float, cotangent: Tensor) -> Tensor:
        """The vector where the first cotangent enters."""
        empty = cotangent.new_zeros(self.driven + sum(self.lengths))
        return self.jump(empty, cotangent, t)

    def costate(self, vector: Tensor) -> Tensor:
        """The adjoint state in a vector."""
        return vector[: self.size] * self.unit

    def jump(self, vector: Tensor, cotangent: Tensor, t: float) -> Tensor:
        """The vector after a cotangent has entered, in units of the size that it has then."""
        costate = self.costate(vector) + cotangent
        # What enters may cancel what is there.
        unit = _size(costate) if bool(costate.any()) else self.unit
        vector = vector * (self.unit / unit)
        vector[: self.size] = costate / unit
        if self.with_state:
            vector[self.size : 2 * self.size] = self.dense(t)
        self.unit = unit
        return vector

    def __call__(self, t: Tensor, vector: Tensor) -> Tensor:
        """Time derivative of the vector."""
        costate = vector[: self.size]
        if self.with_state:
            state = vector[self.size : 2 * self.size]
        else:
            state = self.dense(float(t))
        line = self.field.linearize(t, state)
        self.stats.nvjp += 1
        pulled, _, leaves = line.vjp(costate, with_leaves=self.with_leaves)
        out = torch.zeros_like(vector)
        if pulled is not None:
            out[: self.size] = -pulled
        if self.with_state:
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
            shaped = piece.view(leaf.shape) * self.unit
            gradients.append((shaped if leaf.is_complex() else shaped.real).to(leaf.dtype))
        if gradients:
            sums.add(gradients)


def _augmentation(
    adjoint: _ContinuousAdjoint, field: DifferentiableField, dense: DenseForward, stats: Stats
) -> _Augmented:
    return _Augmented(
        field,
        dense,
        stats,
        # The state is put back onto the stored one wherever a cotangent enters.
        with_state=isinstance(adjoint, BacksolveAdjoint),
        with_leaves=not isinstance(adjoint, GaussAdjoint),
    )


def _gauss_quadrature(step: Step, stages: Stages, augmented: _Augmented, sums: Accumulator) -> None:
    """Add one backward step's share of the parameter gradient, `-int (df/dtheta)^T l dt`."""
    order = stages.method.tableau.order
    nodes, weights = np.polynomial.legendre.leggauss(order // 2 + 1)
    theta = torch.from_numpy((nodes + 1) / 2)
    costates = stages.dense(step.t, step.h, step.u, theta)
    times = stages.method.nodes.new_tensor([step.t + x * step.h for x in theta.tolist()]).unbind()
    for time, costate, weight in zip(times, costates, weights, strict=True):
        line = augmented.field.linearize(time, augmented.dense(float(time)))
        augmented.stats.nvjp += 1
        _, _, leaves = line.vjp(costate, with_state=False)
        sums.add(leaves, scale=-float(weight) * step.h / 2 * augmented.unit)


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


def backward_controller(controller: Controller) -> Controller:
    """Step control of the backward march: fixed steps backward where forward had them."""
    return FixedStep() if isinstance(controller, FixedStep) else controller
