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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import BacksolveAdjoint, GaussAdjoint
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import SolveOptions, Tolerances, backward_limits
from pysciml_node.replay.comparison import expect_same
from pysciml_node.replay.implicit import stages_for
from pysciml_node.replay.newton import Accuracy
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import Accumulator, DifferentiableField
from pysciml_node.steps.loop import MarchOptions
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.step import Step
from pysciml_node.torch_engine.augmented import Augmented, DenseForward, MassMatrix
from pysciml_node.torch_engine.switching import march_of


class BackwardFailure(RuntimeError):
    """The adjoint equation could not be solved; the message says what to try."""


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
    methods: Sequence[Method],
    options: SolveOptions,
    backward: BackwardPass,
    stats: Stats,
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs by the adjoint equation.

    Args:
        field: the field prepared for gradients.
        methods: those of the forward solve, used backward as well.
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
    mass = MassMatrix(field.field.mass)
    dense = DenseForward(field, methods, backward)
    sums = Accumulator(field.leaves)
    augmented = Augmented(
        field,
        dense,
        stats,
        mass,
        # The state is put back onto the stored one wherever a cotangent enters.
        with_state=isinstance(options.adjoint, BacksolveAdjoint),
        with_leaves=not isinstance(options.adjoint, GaussAdjoint),
    )
    # Nothing enters after the first of these times.
    first, cotangent = next(iter(jumps.by_time.items()))
    t0 = backward.record.times[0]
    vector = augmented.start(first, cotangent)
    if first != t0:
        vector = _march_back(augmented, methods, options, jumps, vector, sums)
    else:
        sums.add([torch.zeros_like(leaf) for leaf in field.leaves])
    augmented.collect(vector, sums)
    costate = augmented.costate(vector)
    at_start = jumps.at(t0)
    if at_start is not None and first != t0:
        costate = costate + at_start
    gradients = Gradients(u0=costate, inputs=list(sums.sums))
    if backward.with_times:
        _time_gradients(gradients, field, mass, jumps, backward, dense)
    dense.comparison.expect_equal(field.captured.suspects)
    begin = methods[0].nodes.new_tensor(t0)
    expect_same((field.field(begin, backward.states[0]),), (field.k0,), field.captured.suspects)
    stats.nfe_backward += field.nfe - start_nfe
    return gradients


def _march_back(
    augmented: Augmented,
    methods: Sequence[Method],
    options: SolveOptions,
    jumps: _Jumps,
    vector: Tensor,
    sums: Accumulator,
) -> Tensor:
    """The vector at `t0`, by a march from where the first cotangent has entered.

    Args:
        augmented: the right-hand side.
        methods: of the march.
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
    tolerances = Tolerances(rtol, atol, augmented.driven)
    march_options = MarchOptions(
        # Fixed steps backward where forward had them, all of one size.
        controller=options.controller if adaptive else FixedStep(),
        # Only the adjoint state (and the state beside it) drives the step size.
        norm=ErrorNorm(tolerances),
        max_steps=max_steps,
        dt0=None if adaptive else max(map(abs, record.sizes)),
        tstops=tuple(stops),
    )
    marks = (first, *(t for t in reversed(record.marks[1:-1]) if t in kinks), t0)
    accuracy = Accuracy.near_rounding(vector.dtype)
    if adaptive:
        accuracy = Accuracy.within(tolerances, vector.numel())
    parts = [
        stages_for(
            method.accurate(accuracy),
            augmented,
            marks,
            vectors_like(vector, method.all_stages),
            linearizer=augmented.linearize,
        )
        for method in methods
    ]
    march = march_of(parts, vector, first, t0, march_options)
    for step in march:
        if isinstance(adjoint, GaussAdjoint):
            _gauss_quadrature(step, march.stages, augmented, sums)
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


def _gauss_quadrature(step: Step, stages: Stages, augmented: Augmented, sums: Accumulator) -> None:
    """Add one backward step's share of the parameter gradient, `-int (df/dtheta)^T l dt`."""
    order = stages.method.tableau.order
    nodes, weights = np.polynomial.legendre.leggauss(order // 2 + 1)
    theta = torch.from_numpy((nodes + 1) / 2)
    costates = stages.dense(step.t, step.h, step.u, theta)
    times = stages.method.nodes.new_tensor([step.t + x * step.h for x in theta.tolist()]).unbind()
    for time, costate, weight in zip(times, costates, weights, strict=True):
        line = augmented.field.linearize(time, augmented.dense(float(time)))
        augmented.stats.nvjp += 1
        _, _, leaves = line.vjp(augmented.mass.transposed(costate), with_state=False)
        sums.add(leaves, scale=-float(weight) * step.h / 2 * augmented.unit)


def _time_gradients(
    gradients: Gradients,
    field: DifferentiableField,
    mass: MassMatrix,
    jumps: _Jumps,
    backward: BackwardPass,
    dense: DenseForward,
) -> None:
    """`dL/dt_i = <cotangent_i, du/dt>` at `t_i`, and `-<l, du/dt>` at `t0`."""

    like = backward.states[0].real

    def number(value: float) -> Tensor:
        return like.new_tensor(value)

    def along(t: float, cotangent: Tensor) -> Tensor:
        with torch.no_grad():
            rate = mass.solve(field.field(number(t), dense(t)))
        return torch.vdot(cotangent, rate).real

    record = backward.record
    t0, t1 = record.times[0], record.times[-1]
    at_end = jumps.at(t1)
    # A solve that an event has stopped does not reach the end of its interval.
    reached = bool(record.stops) and record.stops[-1] == record.t1_stop
    gradients.t1 = number(0.0)
    if reached and at_end is not None:
        gradients.t1 = along(t1, at_end)
    assert gradients.u0 is not None
    gradients.t0 = -along(t0, gradients.u0)
    if backward.saved is not None:
        gradients.saveat = number(0.0).repeat(backward.saved_count)
        for i, t in jumps.saved_times.items():
            if t not in (t0, t1):
                gradients.saveat[i] = along(t, backward.saved[i])
    at_start = jumps.at(t0)
    if at_start is not None:
        # A cotangent of u0 itself does not move with t0.
        gradients.t0 = gradients.t0 + along(t0, at_start)
