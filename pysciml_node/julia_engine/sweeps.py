"""Backward sweeps that Julia runs."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, replace

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
    known = [to_real(state.detach()).to(where) for state in states]
    sums = [_sum(backward.entering(n)) for n in range(count + 1)]
    cotangents = [None if x is None else to_real(x).to(where) for x in sums]
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
        _complete_times(gradients, backward, start.new_tensor(bars.tolist(), device=device))
    return gradients


def _dense_outputs(
    backward: BackwardPass, where: torch.device
) -> tuple[list[Tensor], array[int], array[float]]:
    """The cotangents of states saved inside steps: real rows, their steps, and where they lie."""
    outputs: list[Tensor] = []
    steps, thetas = integers(), doubles()
    if backward.saved is not None:
        saved = [to_real(row).to(where) for row in backward.saved]
        for n, (indices, _) in sorted(backward.record.inside.items()):
            outputs.extend(saved[i] for i in indices)
            steps.extend([n + 1] * len(indices))
            thetas.extend(backward.record.fractions(n))
    return outputs, steps, thetas


def _complete_times(gradients: Gradients, backward: BackwardPass, bars: Tensor) -> None:
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
class KeptSolution:
    """A solve whose solution is kept in Julia, for the adjoints of SciMLSensitivity."""

    field: Field  # the right-hand side
    plan: Handle  # how it was solved
    solution: Handle  # SciML's solution
    options: SolveOptions  # of the solve; its adjoint names the method and its tolerances
    mass_matrix: Tensor | None  # (N, N); with one, all these adjoints are one of our own


def continuous_sweep(solve: KeptSolution, backward: BackwardPass, stats: Stats) -> Gradients:
    """A continuous adjoint along the kept solution.

    Args:
        solve: the solve.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
    """
    field, record = solve.field, backward.record
    # Dense output comes without the states at the steps.
    missing = len(record.times) - len(backward.at_steps)
    backward = replace(backward, at_steps=[*backward.at_steps, *[None] * missing])
    entries = _entries(backward)
    at_start = _sum(backward.entering(0))
    if not entries:
        assert at_start is not None
        return Gradients(u0=at_start, inputs=[None] * len(field.inputs))
    if solve.mass_matrix is None:
        runtime.require(*SENSITIVITY)
    dtype, device = entries[0][1].dtype, entries[0][1].device
    moments = sorted({t for t, _, _ in entries}, key=lambda t: t * (1 if _forward(record) else -1))
    sums = {t: _sum([x for s, x, _ in entries if s == t]) for t in moments}
    rows = torch.stack([to_real(x).cpu() for x in sums.values() if x is not None])
    # The equation is linear, and its tolerances are absolute too: solve for a cotangent of size 1,
    # so that gradients scale with the loss. A factor of two would change the steps.
    scale = float(rows.abs().max())
    if not 0 < scale < math.inf:
        scale = 1.0
    slopes = rows.new_zeros((len(rows) + 1, rows.shape[1])) if backward.with_times else None
    u0_bar, p_bar, evaluations = _solve_backward(solve, record, moments, rows / scale, slopes)
    u0_bar, p_bar = u0_bar * scale, p_bar * scale
    stats.nfe_backward += evaluations
    stats.nvjp += evaluations
    stats.naccept_backward += len(record.sizes)
    gradients = Gradients(u0=from_real(u0_bar, dtype).to(device), inputs=field.split(p_bar))
    if slopes is not None:
        rates = from_real(slopes, dtype).to(device)
        _times_along(gradients, backward, entries, dict(zip((None, *moments), rates, strict=True)))
    if at_start is not None:
        gradients.u0 = gradients.u0 + at_start
    return gradients


def _solve_backward(
    solve: KeptSolution,
    record: Record,
    moments: list[float],
    rows: Tensor,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """Solve the adjoint equation in Julia.

    Args:
        solve: the forward solve.
        record: its steps.
        moments: `m` times after the start at which cotangents enter.
        rows: these cotangents, real, `(m, N)`.
        slopes: receives the field at the start and at these times, `(m + 1, N)`.

    Returns:
        Cotangents of the initial state and of the parameters, and the number of evaluations.
    """
    field, options = solve.field, solve.options
    count, size = rows.shape
    u0_bar, p_bar = rows.new_zeros(size), torch.zeros_like(field.parameters(), device="cpu")
    times, marks = doubles(moments), doubles(record.marks)
    report = integers((0,))
    rtol, atol, max_steps = backward_limits(options.adjoint, options)
    enter(
        "sensitivity!",
        record=solve.solution,
        plan=solve.plan,
        method=type(options.adjoint).__name__,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        n=size,
        nmarks=len(marks),
        marks=marks,
        m=count,
        times=times,
        cotangents=integers([pointer(row) for row in rows]),
        np=p_bar.numel(),
        u0bar=u0_bar,
        pbar=p_bar,
        slopes=slopes,
        report=report,
        release=not field.calls_python,
    )
    return u0_bar, p_bar, report[0]


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
    t0_bar = -torch.vdot(gradients.u0, rates[None]).real
    t1_bar = torch.zeros_like(t0_bar)
    if backward.saved is not None:
        gradients.saveat = t0_bar.new_zeros(backward.saved_count)
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
            entries += [(t, backward.saved[i], i) for i, t in zip(indices, times, strict=True)]
    return entries
