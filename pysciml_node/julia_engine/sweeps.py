"""Backward sweeps that Julia runs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions, backward_limits
from pysciml_node.julia_engine.fields import Field
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    device_code,
    doubles,
    from_real,
    integers,
    pointer,
    to_real,
)
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import BackwardPass, Gradients, TimeCotangents
from pysciml_node.steps.record import Record

SENSITIVITY = ("SciMLSensitivity", "Zygote", "ChainRulesCore")
"""Julia packages of the continuous adjoints, loaded when one is asked for."""


def replayed_sweep(
    field: Field, tableau: Handle, backward: BackwardPass, stats: Stats, forward: bool = False
) -> Gradients:
    """The discrete adjoint, replayed in Julia with the field's own vector-Jacobian product.

    Args:
        field: the right-hand side.
        tableau: the method in Julia.
        backward: the steps of the solve, and the cotangents.
        stats: its backward fields are filled.
        forward: whether dual numbers are carried forward through the steps instead.
    """
    if forward:
        runtime.require("ForwardDiff")
    record, states = backward.record, backward.states
    dtype, device = states[0].dtype, states[0].device
    where = torch.device("cpu") if field.host else device
    parameters = field.parameters()
    count = len(record.sizes)
    known = [_as_julia_reads(state, where) for state in states]
    sums = [_sum(backward.entering(n)) for n in range(count + 1)]
    cotangents = [None if x is None else _as_julia_reads(x, where) for x in sums]
    start = known[0]
    outputs, inside, thetas = _dense_outputs(backward, where)
    numbers = (2 * count + len(outputs)) if backward.with_times else 0
    bars = doubles((0.0,) * numbers)
    times, sizes, marks = (doubles(x) for x in (record.times, record.sizes, record.marks))
    addresses = [integers([pointer(x) for x in rows]) for rows in (known, cotangents, outputs)]
    u0_bar, p_bar = torch.empty_like(start), torch.zeros_like(parameters)
    report = integers((0, 0))
    enter(
        "pullback!",
        field=field.handle,
        tableau=tableau,
        forward=forward,
        dtype=CODES[start.dtype],
        device=device_code(start.device),
        n=start.numel(),
        np=parameters.numel(),
        p=parameters,
        steps=count,
        times=times,
        sizes=sizes,
        nmarks=len(marks),
        marks=marks,
        states=addresses[0],
        cotangents=addresses[1],
        m=len(outputs),
        outputs=addresses[2],
        inside=inside,
        theta=thetas,
        u0bar=u0_bar,
        pbar=p_bar,
        bars=bars if backward.with_times else None,
        report=report,
        release=not field.calls_python,
    )
    replayed, evaluations = report
    stats.naccept_backward += replayed
    stats.nfe_backward += evaluations
    stats.nvjp += evaluations
    gradients = Gradients(u0=from_real(u0_bar, dtype).to(device), inputs=field.split(p_bar))
    if backward.with_times:
        complete_times(gradients, backward, start.new_tensor(bars.tolist(), device=device))
    return gradients


def _as_julia_reads(x: Tensor, where: torch.device) -> Tensor:
    """A vector, real and contiguous, in the memory of a device."""
    x = to_real(x)
    return x if x.device == where else x.to(where)


def _dense_outputs(
    backward: BackwardPass, where: torch.device
) -> tuple[list[Tensor], array[int], array[float]]:
    """The cotangents of states saved inside steps: real rows, their steps, and where they lie."""
    outputs: list[Tensor] = []
    steps, thetas = integers(), doubles()
    if backward.saved is not None:
        saved = to_real(backward.saved).to(where).unbind()
        for n, (indices, _) in sorted(backward.record.inside.items()):
            outputs.extend(saved[i] for i in indices)
            steps.extend([n + 1] * len(indices))
            thetas.extend(backward.record.fractions(n))
    return outputs, steps, thetas


def complete_times(gradients: Gradients, backward: BackwardPass, bars: Tensor) -> None:
    """Add the gradients of times; `bars` holds those of starts, sizes and places of outputs."""
    record = backward.record
    count = len(record.sizes)
    t_bars, h_bars, places = bars[:count], bars[count : 2 * count], bars[2 * count :]
    times = TimeCotangents(record, backward.saved_count, bars.new_zeros(()))
    first = len(places)
    for n in reversed(range(count)):
        inside = len(record.inside[n][0]) if len(places) and n in record.inside else 0
        first -= inside
        times.step(n, t_bars[n], h_bars[n], places[first : first + inside] if inside else None)
    times.put_into(gradients)


def _sum(tensors: list[Tensor]) -> Tensor | None:
    """The sum of the tensors, contiguous; `None` stands for zero."""
    if not tensors:
        return None
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total.contiguous()


@dataclass(frozen=True)
class KeptSolutions:
    """Solves whose solutions are kept in Julia, for the adjoints of SciMLSensitivity."""

    plan: Handle  # how they were solved
    solutions: Sequence[Handle]  # SciML's solutions
    options: SolveOptions  # of the solves; their adjoint names the method and its tolerances
    mass_matrix: Tensor | None  # (N, N); with one, all these adjoints are one of our own
    parameters: int  # how many numbers the field depends on
    release: bool = True  # whether other Python threads may run meanwhile


class _Arriving:
    """The cotangents that arrive at one solve, as a continuous adjoint takes them."""

    def __init__(self, backward: BackwardPass) -> None:
        record = backward.record
        # Dense output comes without the states at the steps.
        missing = len(record.times) - len(backward.at_steps)
        self.backward = replace(backward, at_steps=[*backward.at_steps, *[None] * missing])
        self.entries = _entries(self.backward)
        start = record.times[0]
        starting = [x for t, x in self.backward.saved_inside(0) if t == start]
        self.at_start = _sum([*self.backward.entering(0), *starting])
        sign = 1 if _forward(record) else -1
        self.moments = sorted({t for t, _, _ in self.entries}, key=lambda t: sign * t)
        self.scale = 1.0

    def rows(self) -> Tensor:
        """A real cotangent for each of the moments, `(m, N)`, of size 1.

        The equation is linear, and its tolerances are absolute too: solved for a cotangent of size
        1, gradients scale with the loss. A factor of two would change the steps.
        """
        sums = (_sum([x for s, x, _ in self.entries if s == t]) for t in self.moments)
        rows = torch.stack([to_real(x).cpu() for x in sums if x is not None])
        scale = float(rows.abs().max())
        if 0 < scale < math.inf:
            self.scale = scale
        return rows / self.scale

    def gradients(self, u0_bar: Tensor, slopes: Tensor | None) -> Gradients:
        """Those of the start and of times, from what Julia found for the rows."""
        like = self.backward.states[0]
        u0 = from_real(u0_bar * self.scale, like.dtype).to(like.device)
        gradients = Gradients(u0=u0, inputs=[])
        if slopes is not None:
            rates = from_real(slopes, like.dtype).to(like.device)
            known = dict(zip((None, *self.moments), rates, strict=True))
            _times_along(gradients, self.backward, self.entries, known)
        if self.at_start is not None:
            assert gradients.u0 is not None
            gradients.u0 = gradients.u0 + self.at_start
        return gradients


def continuous_sweep(
    solve: KeptSolutions, field: Field, backward: BackwardPass, stats: Stats
) -> Gradients:
    """A continuous adjoint along one kept solution.

    Args:
        solve: the solve.
        field: the right-hand side.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
    """
    (gradients,), p_bars, (evaluations,) = continuous_sweeps(solve, [backward])
    if evaluations:
        stats.nfe_backward += evaluations
        stats.nvjp += evaluations
        stats.naccept_backward += len(backward.record.sizes)
        gradients.inputs = field.split(p_bars[0])
    else:
        gradients.inputs = [None] * len(field.inputs)
    return gradients


def continuous_sweeps(
    solve: KeptSolutions, passes: Sequence[BackwardPass]
) -> tuple[list[Gradients], Tensor, list[int]]:
    """Continuous adjoints along kept solutions, by one call into Julia.

    Args:
        solve: the solves.
        passes: the steps of each, and its cotangents; times receive gradients in all or in none.

    Returns:
        Gradients of starts and times; those of the parameters, a row for each; the evaluations.
    """
    arriving = [_Arriving(backward) for backward in passes]
    spec = passes[0].states[0]
    size, dtype = to_real(spec).numel(), spec.dtype.to_real()
    some = [x for x in arriving if x.moments]
    with_times = passes[0].with_times
    rows = torch.cat([x.rows() for x in some]) if some else torch.empty((0, size), dtype=dtype)
    u0_bars = torch.zeros((len(passes), size), dtype=dtype)
    p_bars = torch.zeros((len(passes), solve.parameters), dtype=dtype)
    ends = list(accumulate(len(x.moments) for x in arriving))
    slopes = u0_bars.new_zeros((ends[-1] + len(passes), size)) if with_times else None
    counts = integers((0,) * len(passes))
    if some or with_times:
        _solve_backward(solve, arriving, ends, (rows, u0_bars, p_bars, slopes), counts)
    scales = torch.tensor([x.scale for x in arriving], dtype=torch.float64).to(dtype)
    found = []
    for m, x in enumerate(arriving):
        own = None
        if slopes is not None:
            own = slopes[ends[m] + m - len(x.moments) : ends[m] + m + 1]
        found.append(x.gradients(u0_bars[m], own))
    return found, p_bars * scales[:, None], list(counts)


def _solve_backward(
    solve: KeptSolutions,
    arriving: list[_Arriving],
    ends: list[int],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    counts: array[int],
) -> None:
    """Solve the adjoint equations in Julia.

    Args:
        solve: the forward solves.
        arriving: when cotangents enter them.
        ends: how many times there are up to each solve.
        tensors: the cotangents, real, `(m, N)`; what receives those of the starts `(M, N)` and of
            the parameters `(M, np)`, and the field at each start and the times behind it.
        counts: receives the evaluations.
    """
    if solve.mass_matrix is None:
        runtime.require(*SENSITIVITY)
    options = solve.options
    rtol, atol, max_steps = backward_limits(options.adjoint, options)
    rows, u0_bars, p_bars, slopes = tensors
    marks = [x.backward.record.marks for x in arriving]
    enter(
        "sensitivity!",
        members=len(arriving),
        records=integers([handle.number for handle in solve.solutions]),
        plan=solve.plan,
        method=type(options.adjoint).__name__,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        n=rows.shape[1],
        mark_ends=integers(list(accumulate(map(len, marks)))),
        marks=doubles([t for each in marks for t in each]),
        time_ends=integers(ends),
        times=doubles([t for x in arriving for t in x.moments]),
        cotangents=rows,
        np=p_bars.shape[1],
        u0bar=u0_bars,
        pbar=p_bars,
        slopes=slopes,
        report=counts,
        release=solve.release,
    )


Entry = tuple[float, Tensor, int | None]
"""A cotangent that enters after the start: the time, the cotangent `(N,)`, and the index of the
saved time where that moves."""


def _times_along(
    gradients: Gradients,
    backward: BackwardPass,
    entries: list[Entry],
    rates: dict[float | None, Tensor],
) -> None:
    """Add the gradients of times: products of a cotangent and the solution's slope.

    Args:
        gradients: of the sweep, without the cotangents that enter at the start; changed in place.
        backward: the steps of the solve, and the cotangents.
        entries: the cotangents that enter after the start.
        rates: the field at their times, `(N,)` each; under `None` at the start.
    """
    record = backward.record
    assert gradients.u0 is not None
    t0_bar = -torch.vdot(gradients.u0, rates[None]).real
    t1_bar = torch.zeros_like(t0_bar)
    if backward.saved is not None:
        gradients.saveat = t0_bar.new_zeros(backward.saved_count)
        for i, t in zip(*record.inside.get(0, ([], [])), strict=True):
            if t == record.times[0]:
                gradients.saveat[i] = torch.vdot(backward.saved[i], rates[None]).real
    free = _moving_with_start(record)
    for t, cotangent, index in entries:
        slope = torch.vdot(cotangent, rates[t]).real
        if index is not None:
            assert gradients.saveat is not None
            gradients.saveat[index] += slope
        elif t == record.marks[-1]:
            t1_bar = t1_bar + slope
        elif t in free:
            t0_bar = t0_bar + slope
    gradients.t0, gradients.t1 = t0_bar, t1_bar


def _moving_with_start(record: Record) -> set[float]:
    """Ends of steps that move with `t0`: free steps keep their sizes, until a stop fixes an end."""
    if record.fixed:
        return set()
    fixed = next((n for n, stop in enumerate(record.stops) if stop is not None), len(record.stops))
    return set(record.times[1 : fixed + 1])


def _forward(record: Record) -> bool:
    return record.times[-1] > record.times[0]


def _entries(backward: BackwardPass) -> list[Entry]:
    """The cotangents that enter after the start."""
    record = backward.record
    entries: list[Entry] = [
        (record.times[n], cotangent, None)
        for n in range(1, len(record.times))
        for cotangent in backward.entering(n)
    ]
    if backward.saved is not None:
        for indices, times in record.inside.values():
            pairs = zip(indices, times, strict=True)
            entries += [(t, backward.saved[i], i) for i, t in pairs if t != record.times[0]]
    return entries
