"""The discrete adjoint: accepted steps replayed backward, one at a time.

For one step `U_i = u + h sum_j a_ij k_j`, `k_i = f(t + c_i h, U_i)`, `u1 = u + h sum_i b_i k_i`,
with dense outputs `v_m = u + h sum_i b_i(theta_m) k_i`, the cotangents obey, for i = s, ..., 1,

    k*_i = h (b_i u1* + sum_m b_i(theta_m) v*_m + sum_{j>i} a_ji U*_j),   U*_i = (df/du)^T k*_i,

and `u* = u1* + sum_m v*_m + sum_i U*_i` (Hager, Numer. Math. 87 (2000) 247-282). The stages'
cotangents stand in one buffer, so that each sum is a single fused call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pysciml_node.replay.adjoint_recorded import RecordedPullback, Totals
from pysciml_node.replay.kept import KeptSteps, arriving_at, compare_kept
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import Weights, vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import (
    BackwardPass,
    Gradients,
    StepBack,
    StepCotangents,
    TimeCotangents,
)
from pysciml_node.steps.field import DifferentiableField, Linearized
from pysciml_node.tableaus import ImplicitTableau
from pysciml_node.tableaus.base import Row


class _StepPullback:
    """Pulls cotangents back through single steps, with its buffers allocated once."""

    def __init__(
        self,
        field: DifferentiableField,
        method: Method,
        marks: tuple[float, ...],
        like: Tensor,
        outputs: int,
        time_gradient: bool,
        totals: Totals,
    ) -> None:
        self.field, self.method, self.time_gradient = field, method, time_gradient
        self.totals = totals
        self.stages = Stages(method, field.field, marks, vectors_like(like, method.all_stages))
        held = min(outputs, method.all_stages + 1)
        self.cotangents = vectors_like(like, method.all_stages + 1 + held)
        self._plain: dict[int, list[Weights]] = {}
        # The first stage of the step after, which is also a stage of this one, and its cotangent.
        self._after: tuple[Linearized, Tensor] | None = None

    def __call__(self, step: StepBack) -> StepCotangents:
        """Pull a step back."""
        method, cotangents, inside = self.method, self.cotangents, step.inside
        count = method.stages
        if inside is not None:
            count = method.all_stages
        elif method.tableau.fsal:
            count -= 1  # the last stage serves the next step, which replays it as its first
        h, u = step.h, step.u
        after, self._after = self._after, None
        lines = self._linearize(step.t, h, u, count, None if after is None else after[0])
        self.totals.comparison.add(self._end(h, u), step.u1, u)
        # Stored in the order in which they arise: u1*, v*_1 ... v*_m, U*_s, ..., U*_1, so that
        # each stage's cotangent combines all that is there.
        outputs, rows = self._outputs(step)
        arrived = [step.end, *outputs]
        for place, vector in enumerate(arrived):
            cotangents.put(place, vector)
        upon = self._weights(count, rows)
        t_bar: Tensor | None = None
        h_bar: Tensor | None = None
        for i in reversed(range(count)):
            k_bar = cotangents.combine(None, h, upon[i])
            if after is not None and i == method.end_stage:
                k_bar = k_bar + after[1]
            place = len(arrived) + count - 1 - i
            if step.joined and i == 0:
                self._after = lines[0], k_bar
                cotangents.put(place, torch.zeros_like(u))
                break
            state, time, leaves = lines[i].vjp(k_bar)
            self.totals.nvjp += 1
            cotangents.put(place, torch.zeros_like(u) if state is None else state)
            self.totals.sums.add(leaves)
            if self.time_gradient:
                along = torch.vdot(k_bar, lines[i].value).real / h
                h_bar = along if h_bar is None else h_bar + along
                if time is not None:
                    t_bar = time if t_bar is None else t_bar + time
                    h_bar = h_bar + method.host_nodes[i] * time
        theta_bar = None
        if self.time_gradient and inside is not None:
            slopes = method.dense_weights(step.theta, derivative=True)
            slope = self.stages.vectors.combine_many(None, h, slopes)
            theta_bar = (inside.conj() * slope).sum(1).real
        return StepCotangents(cotangents.combine(None, 1.0, upon[-1]), t_bar, h_bar, theta_bar)

    def _end(self, h: float, u: Tensor) -> Tensor:
        """The state at the end of the step, of the stages that are there."""
        if self.method.tableau.fsal:
            return self.stages.argument(self.method.stages - 1, h, u)
        return self.stages.vectors.combine(u, h, self.method.b)

    def _outputs(self, step: StepBack) -> tuple[Sequence[Tensor], list[list[float]]]:
        """Cotangents of the outputs, and for each its weights upon the stages and upon `u*`."""
        inside = step.inside
        if inside is None:
            return (), []
        weights = self.method.dense_weights(step.theta)
        stages = weights.shape[1]
        if len(inside) <= stages:
            return inside.unbind(), [[*row, 1.0] for row in weights.real.tolist()]
        # A sum for each stage and one for `u*` stand for any number of outputs.
        sums = (*(weights.T @ inside).unbind(), inside.sum(0))
        return sums, torch.eye(stages + 1).tolist()

    def _weights(self, count: int, outputs: list[list[float]]) -> list[Weights]:
        """Weights of all cotangents upon each stage; the last entry is their sum's."""
        if not outputs and count in self._plain:
            return self._plain[count]
        b = (*self.method.tableau.b, *([0.0] * (count - self.method.stages)))
        rows = self.method.host_rows
        combined: list[Row] = [
            (b[i], *(row[i] for row in outputs), *(rows[j][i] for j in range(count - 1, i, -1)))
            for i in range(count)
        ]
        combined.append((1.0, *(row[-1] for row in outputs), *(1.0,) * count))
        longest = len(combined[-1])
        # One tensor for all: making tensors costs more than these sums.
        padded = [(*row, *(0.0,) * (longest - len(row))) for row in combined]
        tensors = torch.tensor(padded, dtype=torch.float64).to(self.method.b.tensor)
        weights = [Weights(row, tensors[i, : len(row)]) for i, row in enumerate(combined)]
        if not outputs:
            self._plain[count] = weights
        return weights

    def _linearize(
        self, t: float, h: float, u: Tensor, count: int, end: Linearized | None
    ) -> list[Linearized]:
        """The stages again, each with its graph; that at the end may be known."""
        stages, lines = self.stages, []
        times = stages.times(t, h)
        for i in range(count):
            if end is not None and i == self.method.end_stage:
                lines.append(end)
            else:
                argument = stages.argument(i, h, u)
                lines.append(self.field.linearize(times[i], argument, self.time_gradient))
            stages.vectors.put(i, lines[i].value)
        return lines


def _pullback_for(
    field: DifferentiableField, method: Method, backward: BackwardPass, totals: Totals
) -> _StepPullback | RecordedPullback:
    """The adjoint of single steps of a method."""
    record, with_times = backward.record, backward.with_times
    if isinstance(method.tableau, ImplicitTableau):
        return RecordedPullback(field, method, record.marks, with_times, totals)
    outputs = 0
    if backward.saved is not None:
        outputs = max((len(indices) for indices, _ in record.inside.values()), default=0)
    return _StepPullback(
        field, method, record.marks, backward.states[0], outputs, with_times, totals
    )


def _step_back(
    backward: BackwardPass, n: int, end: Tensor, inside: Tensor | None, joined: bool
) -> StepBack:
    """Step `n`, with the cotangents that arrive at it."""
    record, states = backward.record, backward.states
    theta = torch.tensor(record.fractions(n), dtype=torch.float64)
    t, h = record.times[n], record.sizes[n]
    return StepBack(t, h, states[n], states[n + 1], end, inside, theta, joined)


def _joined(backward: BackwardPass, methods: Sequence[Method], n: int) -> bool:
    """Whether a step starts where the dense output of the one before ends, in one evaluation."""
    record = backward.record
    method = methods[record.method_of(n)]
    return (
        record.method_of(n - 1) == record.method_of(n)
        and not isinstance(method.tableau, ImplicitTableau)
        and method.end_stage is not None
        # At a stop the field may jump.
        and record.stops[n - 1] is None
        and not backward.with_times
    )


def discrete_sweep(
    field: DifferentiableField,
    methods: Sequence[Method],
    backward: BackwardPass,
    stats: Stats,
    kept: KeptSteps | None = None,
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs.

    Args:
        field: the field prepared for gradients.
        methods: those of the forward solve.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
        kept: the steps of the forward solve whose graphs were kept; they are let go here.
    """
    record, states = backward.record, backward.states
    totals = Totals(field)
    graphs = [] if kept is None else kept.take(field.captured, backward)
    count = len(graphs)
    if kept is not None and count < len(record.sizes):
        field.captured.expect_idle(field.later(backward))
    start_nfe = field.nfe

    # Each has buffers of its own, and most sweeps need only one.
    pullbacks: dict[int, _StepPullback | RecordedPullback] = {}
    cotangent = torch.zeros_like(states[0])
    times = None
    if backward.with_times:
        zero = states[0].new_zeros((), dtype=methods[0].nodes.dtype)
        times = TimeCotangents(record, backward.saved_count, zero)
    live, before = False, None
    for n in reversed(range(count, len(record.sizes))):
        for extra in backward.entering(n + 1):
            cotangent = cotangent + extra
            live = True
        inside = before if n + 1 < len(record.sizes) else backward.inside(n)
        before = backward.inside(n - 1) if n else None
        if not live and inside is None:
            continue
        live = True
        joined = before is not None and n > count and _joined(backward, methods, n)
        step = _step_back(backward, n, cotangent, inside, joined)
        method = record.method_of(n)
        if method not in pullbacks:
            pullbacks[method] = _pullback_for(field, methods[method], backward, totals)
        pulled = pullbacks[method](step)
        cotangent = pulled.u
        stats.naccept_backward += 1
        if times is not None:
            times.step(n, pulled.t, pulled.h, pulled.theta)
    through: list[Tensor | None] = []
    if kept is not None and graphs:
        upon = arriving_at(graphs, methods[0], backward, cotangent if live else None)
        cotangent = torch.zeros_like(cotangent) if upon.start is None else upon.start
        through = kept.placed(upon.ends, upon.stages)
        totals.nvjp += upon.products
        stats.naccept_backward += upon.taken
        # Of a field all of whose tensors have been compared another value would say nothing.
        if upon.taken and not field.captured.all_known:
            compare_kept(field, graphs[: upon.taken], methods[0], backward, totals.comparison)
    totals.comparison.expect_equal(field.captured.suspects)
    for extra in backward.entering(0):
        cotangent = cotangent + extra
    stats.nfe_backward += field.nfe - start_nfe
    stats.nvjp += totals.nvjp
    gradients = Gradients(u0=cotangent, inputs=totals.sums.sums, kept=through)
    if times is not None:
        times.put_into(gradients)
    return gradients
