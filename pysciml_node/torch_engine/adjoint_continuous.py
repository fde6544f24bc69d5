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

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import Adjoint, BacksolveAdjoint, GaussAdjoint
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import SolveOptions, Tolerances, backward_limits
from pysciml_node.replay.comparison import expect_same
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import Accumulator, DifferentiableField
from pysciml_node.steps.loop import MarchOptions
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.step import Step
from pysciml_node.torch_engine.march import March


class BackwardFailure(RuntimeError):
    """The adjoint equation could not be solved; the message says what to try."""


class DenseForward:
    """The forward solution at any time, its last used step's stages kept."""

    def __init__(self, field: DifferentiableField, method: Method, backward: BackwardPass) -> None:
        self.record, self.states = backward.record, backward.states
        times = self.record.times
        self.sign = 1.0 if times[-1] >= times[0] else -1.0
        self.ordered = np.asarray(times) * self.sign
        vectors = vectors_like(self.states[0], method.all_stages)
        self.stages = Stages(method, field.field, self.record.marks, vectors)
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

    def __init__(self, backward: BackwardPass) -> None:
        record, saved = backward.record, backward.saved
        entering: dict[float, list[Tensor]] = {}
        self.saved_times: dict[int, float] = {}
        for t, gradient in zip(record.times, backward.at_steps, strict=True):
            if gradient is not None:
                entering.setdefault(t, []).append(gradient)
        if saved is not None:
            for indices, times in record.inside.values():
                self.saved_times.update(zip(indices, times, strict=True))
            for n, indices in record.at_end.items():
                self.saved_times.update((i, record.times[n]) for i in indices)
            for i, t in self.saved_times.items():
                entering.setdefault(t, []).append(saved[i])
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
    options: SolveOptions,
    backward: BackwardPass,
    stats: Stats,
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs by the adjoint equation.

    Args:
        field: the field prepared for gradients.
        method: the method of the forward solve, used backward as well.
        options: of the forward solve; its adjoint may have tolerances of its own.
        backward: the steps of the forward solve, and the cotangents.
        stats: its backward fields are filled.

    Raises:
        BackwardFailure: the backward march failed.
    """
    start_nfe = field.nfe
    jumps = _Jumps(backward)
    if not jumps.finite:
        # As through any other operation: who scales losses looks for it.
        return _filled(field, backward, math.nan)
    if not jumps.by_time:
        return _filled(field, backward, 0.0)
    dense = DenseForward(field, method, backward)
    sums = Accumulator(field.leaves)
    augmented = _augmentation(options.adjoint, field, dense, stats)
    # Nothing enters after the first of these times.
    first, cotangent = next(iter(jumps.by_time.items()))
    t0 = backward.record.times[0]
    vector = augmented.start(first, cotangent)
    if first != t0:
        vector = _march_back(augmented, method, options, jumps, vector, sums)
    augmented.collect(vector, sums)
    costate = augmented.costate(vector)
    at_start = jumps.at(t0)
    if at_start is not None and first != t0:
        costate = costate + at_start
    inputs: list[Tensor | None] = [
        torch.zeros_like(leaf) if total is None else total
        for total, leaf in zip(sums.sums, field.leaves, strict=True)
    ]
    gradients = Gradients(u0=costate, inputs=inputs)
    if backward.with_times:
        _time_gradients(gradients, field, method, jumps, backward, dense)
    begin = method.nodes.new_tensor(t0)
    expect_same((field.field(begin, backward.states[0]),), (field.k0,), field.captured.suspects)
    stats.nfe_backward += field.nfe - start_nfe
    return gradients


def _march_back(
    augmented: _Augmented,
    method: Method,
    options: SolveOptions,
    jumps: _Jumps,
    vector: Tensor,
    sums: Accumulator,
) -> Tensor:
    """The vector at `t0`, by a march from where the first cotangent has entered.

    Args:
        augmented: the right-hand side.
        method: of the march.
        options: of the forward solve.
        jumps: the cotangents that enter.
        vector: where the march starts.
        sums: receives the gradients of the field's inputs, where they are no part of the vector.

    Raises:
        BackwardFailure: the march has failed.
    """
    record, stats, adjoint = augmented.dense.record, augmented.stats, options.adjoint
    first, t0, forward = next(iter(jumps.by_time)), record.times[0], augmented.dense.sign
    # Where the forward march had to stop, the field may have a kink.
    kinks = {t for t, stop in zip(record.times[1:], record.stops, strict=True) if stop is not None}
    stops = sorted(
        (t for t in kinks | set(jumps.by_time) if forward * t0 < forward * t < forward * first),
        reverse=forward > 0,
    )
    rtol, atol, max_steps = backward_limits(adjoint, options)
    adaptive = options.controller.adaptive
    march_options = MarchOptions(
        # Fixed steps backward where forward had them, all of one size.
        controller=options.controller if adaptive else FixedStep(),
        # Only the adjoint state (and the state beside it) drives the step size.
        norm=ErrorNorm(Tolerances(rtol, atol, augmented.driven)),
        max_steps=max_steps,
        dt0=None if adaptive else max(map(abs, record.sizes)),
        tstops=tuple(stops),
    )
    marks = (first, *(t for t in reversed(record.marks[1:-1]) if t in kinks), t0)
    stages = Stages(method, augmented, marks, vectors_like(vector, method.all_stages))
    march = March(stages, vector, first, t0, march_options)
    for step in march:
        if isinstance(adjoint, GaussAdjoint):
            _gauss_quadrature(step, stages, augmented, sums)
        jump = jumps.at(step.end) if step.stop is not None else None
        if jump is not None and step.stop != len(stops):
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
    return march.u


def _filled(field: DifferentiableField, backward: BackwardPass, value: float) -> Gradients:
    """Gradients that are all one number."""
    like = backward.states[0]
    leaves: list[Tensor | None] = [torch.full_like(leaf, value) for leaf in field.leaves]
    gradients = Gradients(u0=torch.full_like(like, value), inputs=leaves)
    if backward.with_times:
        time = like.new_full((), value, dtype=like.dtype.to_real())
        gradients.t0 = gradients.t1 = time
        if backward.saved is not None:
            gradients.saveat = time.expand(backward.saved_count)
    return gradients


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
    adjoint: Adjoint, field: DifferentiableField, dense: DenseForward, stats: Stats
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
    backward: BackwardPass,
    dense: DenseForward,
) -> None:
    """`dL/dt_i = <cotangent_i, f(t_i, u_i)>`, and `-<l, f>` at `t0`."""

    def along(t: float, cotangent: Tensor) -> Tensor:
        with torch.no_grad():
            rate = field.field(method.nodes.new_tensor(t), dense(t))
        return torch.vdot(cotangent, rate).real

    record = backward.record
    t0, t1 = record.times[0], record.times[-1]
    at_end = jumps.at(t1)
    # A solve that an event has stopped does not reach the end of its interval.
    reached = bool(record.stops) and record.stops[-1] == record.t1_stop
    gradients.t1 = method.nodes.new_zeros(())
    if reached and at_end is not None:
        gradients.t1 = along(t1, at_end)
    gradients.t0 = -along(t0, gradients.u0)
    if backward.saved is not None:
        gradients.saveat = method.nodes.new_zeros(backward.saved_count)
        for i, t in jumps.saved_times.items():
            if t not in (t0, t1):
                gradients.saveat[i] = along(t, backward.saved[i])
    at_start = jumps.at(t0)
    if at_start is not None:
        # A cotangent of u0 itself does not move with t0.
        gradients.t0 = gradients.t0 + along(t0, at_start)
