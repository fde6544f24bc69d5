"""The discrete adjoint: accepted steps replayed backward, one at a time.

For one step `U_i = u + h sum_j a_ij k_j`, `k_i = f(t + c_i h, U_i)`, `u1 = u + h sum_i b_i k_i`,
with dense outputs `v_m = u + h sum_i b_i(theta_m) k_i`, the cotangents obey, for i = s, ..., 1,

    k*_i = h (b_i u1* + sum_m b_i(theta_m) v*_m + sum_{j>i} a_ji U*_j),   U*_i = (df/du)^T k*_i,

and `u* = u1* + sum_m v*_m + sum_i U*_i` (Hager, Numer. Math. 87 (2000) 247-282). The stages'
cotangents stand in one buffer, so that each sum is a single fused call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pysciml_node.replay.adjoint_recorded import RecordedPullback
from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import Weights, vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import Cotangents, Gradients, TimeCotangents, arriving_at
from pysciml_node.steps.field import Accumulator, DifferentiableField, Linearized
from pysciml_node.steps.record import Record
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
    ) -> None:
        self.field, self.method, self.time_gradient = field, method, time_gradient
        self.stages = Stages(method, field.field, marks, vectors_like(like, method.all_stages))
        self.cotangents = vectors_like(like, method.all_stages + 1 + outputs)
        self.sums = Accumulator(field.leaves)
        self.comparison = Comparison()
        self._plain: dict[int, list[Weights]] = {}

    def __call__(
        self,
        t: float,
        h: float,
        u: Tensor,
        u1: Tensor,
        end: Tensor,
        inside: Tensor | None,
        theta: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Cotangents of the step's start, `t`, `h` and its dense outputs' `theta`.

        Args:
            t: start of the step.
            h: its size.
            u: its starting state `(N,)`.
            u1: the state at its end that the solve found, `(N,)`.
            end: cotangent of its end state `(N,)`.
            inside: cotangents of its dense outputs `(m, N)`, or `None`.
            theta: where they lie, `(m,)` in float64.
        """
        method, cotangents = self.method, self.cotangents
        count = method.stages
        if inside is not None:
            count = method.all_stages
        elif method.tableau.fsal:
            count -= 1  # the last stage serves the next step, which replays it as its first
        lines = self._linearize(t, h, u, count)
        stages = self.stages
        if method.tableau.fsal:
            again = stages.argument(method.stages - 1, h, u)
        else:
            again = stages.vectors.combine(u, h, method.b)
        self.comparison.add(again, u1, u)
        # Stored in the order in which they arise: u1*, v*_1 ... v*_m, U*_s, ..., U*_1, so that
        # each stage's cotangent combines all that is there.
        arrived = [end] if inside is None else [end, *inside.unbind()]
        for place, vector in enumerate(arrived):
            cotangents.put(place, vector)
        outputs = None if inside is None else method.dense_weights(theta)
        upon = self._weights(count, outputs)
        t_bar: Tensor | None = None
        h_bar: Tensor | None = None
        for i in reversed(range(count)):
            k_bar = cotangents.combine(None, h, upon[i])
            state, time, leaves = lines[i].vjp(k_bar)
            cotangents.put(
                len(arrived) + count - 1 - i, torch.zeros_like(u) if state is None else state
            )
            self.sums.add(leaves)
            if self.time_gradient:
                along = torch.vdot(k_bar, lines[i].value).real / h
                h_bar = along if h_bar is None else h_bar + along
                if time is not None:
                    t_bar = time if t_bar is None else t_bar + time
                    h_bar = h_bar + method.host_nodes[i] * time
        theta_bar = None
        if self.time_gradient and inside is not None:
            slopes = method.dense_weights(theta, derivative=True)
            slope = self.stages.vectors.combine_many(None, h, slopes)
            theta_bar = (inside.conj() * slope).sum(1).real
        return cotangents.combine(None, 1.0, upon[-1]), t_bar, h_bar, theta_bar

    def _weights(self, count: int, outputs: Tensor | None) -> list[Weights]:
        """Weights of all cotangents upon each stage; the last entry sums them all."""
        if outputs is None and count in self._plain:
            return self._plain[count]
        b = (*self.method.tableau.b, *([0.0] * (count - self.method.stages)))
        columns = [] if outputs is None else outputs.real.T.tolist()
        rows = self.method.host_rows
        found: list[Row] = [
            (b[i], *(columns[i] if columns else ()), *(rows[j][i] for j in range(count - 1, i, -1)))
            for i in range(count)
        ]
        longest = len(found[0]) + 1
        found.append((1.0,) * longest)
        # One tensor for all: making tensors costs more than these sums.
        padded = [(*row, *(0.0,) * (longest - len(row))) for row in found]
        tensors = torch.tensor(padded, dtype=torch.float64).to(self.method.b.tensor)
        weights = [Weights(row, tensors[i, : len(row)]) for i, row in enumerate(found)]
        if outputs is None:
            self._plain[count] = weights
        return weights

    def _linearize(self, t: float, h: float, u: Tensor, count: int) -> list[Linearized]:
        """The stages again, each with its graph."""
        stages, lines = self.stages, []
        times = stages.times(t, h)
        for i in range(count):
            argument = stages.argument(i, h, u)
            lines.append(self.field.linearize(times[i], argument, self.time_gradient))
            stages.vectors.put(i, lines[i].value)
        return lines


def discrete_sweep(
    field: DifferentiableField,
    method: Method,
    record: Record,
    states: tuple[Tensor, ...],
    arriving: Cotangents,
    time_gradient: bool,
    stats: Stats,
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs.

    Args:
        field: the field prepared for gradients.
        method: the method of the forward solve.
        record: its accepted steps.
        states: the states at `record.times`.
        arriving: cotangents of the saved and of the step states.
        time_gradient: whether `t0`, `t1` and `saveat` need gradients.
        stats: its backward fields are filled.
    """
    start_nfe = field.nfe
    saved = arriving.saved
    most = max((len(indices) for indices, _ in record.inside.values()), default=0)
    if isinstance(method.tableau, ImplicitTableau):
        pullback: _StepPullback | RecordedPullback = RecordedPullback(
            field, method, record.marks, time_gradient
        )
    else:
        outputs = 0 if saved is None else most
        pullback = _StepPullback(field, method, record.marks, states[0], outputs, time_gradient)
    cotangent = torch.zeros_like(states[0])
    times = None
    if time_gradient:
        zero = states[0].new_zeros((), dtype=method.nodes.dtype)
        times = TimeCotangents(record, 0 if saved is None else saved.shape[0], zero)
    live = False
    for n in reversed(range(len(record.sizes))):
        for extra in arriving_at(n + 1, record, arriving):
            cotangent = cotangent + extra
            live = True
        indices, theta_list = record.inside.get(n, ([], []))
        inside = saved[indices] if saved is not None and indices else None
        if not live and inside is None:
            continue
        live = True
        h = record.sizes[n]
        theta = torch.tensor(theta_list, dtype=torch.float64)
        cotangent, t_bar, h_bar, theta_bar = pullback(
            record.times[n], h, states[n], states[n + 1], cotangent, inside, theta
        )
        stats.naccept_backward += 1
        if times is not None:
            times.step(n, t_bar, h_bar, theta_bar)
    pullback.comparison.expect_equal(field.captured.suspects)
    for extra in arriving_at(0, record, arriving):
        cotangent = cotangent + extra
    stats.nfe_backward += field.nfe - start_nfe
    stats.nvjp += field.nfe - start_nfe
    return Gradients(
        cotangent,
        times.start if times is not None else None,
        times.end if times is not None else None,
        times.saveat if times is not None and saved is not None else None,
        pullback.sums.sums,
    )
