"""Backward sweeps that Julia runs."""

from __future__ import annotations

import math

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
from pysciml_node.steps.cotangents import Cotangents, Gradients, TimeCotangents, arriving_at
from pysciml_node.steps.record import Record

SENSITIVITY = ("SciMLSensitivity", "Zygote", "ChainRulesCore")
"""Julia packages of the continuous adjoints, loaded when one is asked for."""


def replayed_sweep(
    field: Field,
    tableau: Handle,
    record: Record,
    states: tuple[Tensor, ...],
    arriving: Cotangents,
    time_gradient: bool,
    stats: Stats,
    forward: bool = False,
) -> Gradients:
    """The discrete adjoint, replayed in Julia with the field's own vector-Jacobian product.

    Args:
        field: the right-hand side.
        tableau: the method in Julia.
        record: the accepted steps.
        states: the states at `record.times`.
        arriving: cotangents of the saved and of the step states.
        time_gradient: whether `t0`, `t1` and `saveat` need gradients.
        stats: its backward fields are filled.
        forward: whether dual numbers are carried forward through the steps instead.
    """
    if forward:
        runtime.require("ForwardDiff")
    dtype, device = states[0].dtype, states[0].device
    where = torch.device("cpu") if field.host else device
    parameters = field.parameters()
    count = len(record.sizes)
    known = [to_real(state.detach()).to(where) for state in states]
    sums = [_sum(arriving_at(n, record, arriving)) for n in range(count + 1)]
    cotangents = [None if x is None else to_real(x).to(where) for x in sums]
    start = known[0]
    outputs: list[Tensor] = []
    inside, thetas = integers(), doubles()
    if arriving.saved is not None:
        saved = [to_real(row).to(where) for row in arriving.saved]
        for n, (indices, places) in sorted(record.inside.items()):
            outputs.extend(saved[i] for i in indices)
            inside.extend([n + 1] * len(indices))
            thetas.extend(places)
    bars = doubles((0.0,) * ((2 * count + len(outputs)) if time_gradient else 0))
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
        bars=bars if time_gradient else None,
        report=report,
        release=not field.calls_python,
    )
    replayed, evaluations = report
    stats.naccept_backward += replayed
    stats.nfe_backward += evaluations
    stats.nvjp += evaluations
    moved = None
    if time_gradient:
        moved = TimeCotangents(
            record,
            0 if arriving.saved is None else arriving.saved.shape[0],
            start.new_zeros((), device=device),
        )
        numbers = start.new_tensor(bars.tolist(), device=device)
        t_bars, h_bars = numbers[:count], numbers[count : 2 * count]
        rest = numbers[2 * count :]
        first = len(rest)
        for n in reversed(range(count)):
            here = len(record.inside[n][0]) if outputs and n in record.inside else 0
            first -= here
            theta_bar = rest[first : first + here] if here else None
            moved.step(n, t_bars[n], h_bars[n], theta_bar)
    return Gradients(
        from_real(u0_bar, dtype).to(device),
        None if moved is None else moved.start,
        None if moved is None else moved.end,
        None if moved is None or arriving.saved is None else moved.saveat,
        field.split(p_bar),
    )


def _sum(tensors: list[Tensor]) -> Tensor | None:
    """The sum of the tensors, contiguous; `None` stands for zero."""
    if not tensors:
        return None
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total.contiguous()


def continuous_sweep(
    field: Field,
    plan: Handle,
    solution: Handle,
    options: SolveOptions,
    record: Record,
    arriving: Cotangents,
    time_gradient: bool,
    stats: Stats,
    mass_matrix: Tensor | None,
) -> Gradients:
    """A continuous adjoint along the solution that was kept.

    Args:
        field: the right-hand side.
        plan: how the solve was run.
        solution: SciML's solution.
        options: of the solve; its adjoint names the method and its tolerances.
        record: the accepted steps.
        arriving: cotangents of the saved and of the step states.
        time_gradient: whether `t0`, `t1` and `saveat` need gradients.
        stats: its backward fields are filled.
        mass_matrix: of the problem; with one, all these adjoints are one of our own.
    """
    # Dense output comes without the states at the steps.
    missing = len(record.times) - len(arriving.states)
    arriving = Cotangents(arriving.saved, [*arriving.states, *[None] * missing])
    entries = _entries(record, options, arriving)
    at_start = _sum(arriving_at(0, record, arriving))
    if not entries:
        assert at_start is not None
        return Gradients(at_start, None, None, None, [None] * len(field.inputs))
    if mass_matrix is None:
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
    rows = rows / scale
    parameters = field.parameters()
    count, size = rows.shape
    u0_bar, p_bar = rows.new_zeros(size), torch.zeros_like(parameters, device="cpu")
    slopes = rows.new_zeros((count + 1, size)) if time_gradient else None
    times, marks = doubles(moments), doubles(record.marks)
    report = integers((0,))
    rtol, atol, max_steps = backward_limits(options.adjoint, options)
    enter(
        "sensitivity!",
        record=solution,
        plan=plan,
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
    u0_bar, p_bar = u0_bar * scale, p_bar * scale
    stats.nfe_backward += report[0]
    stats.nvjp += report[0]
    stats.naccept_backward += len(record.sizes)
    lam = from_real(u0_bar, dtype).to(device)
    t0_bar = t1_bar = saveat_bar = None
    if slopes is not None:
        rates = from_real(slopes, dtype).to(device)
        t0_bar = -torch.vdot(lam, rates[0]).real
        along = {t: rates[i + 1] for i, t in enumerate(moments)}
        t1_bar = torch.zeros_like(t0_bar)
        problem_end = record.marks[-1]
        free = _moving_with_start(record)
        if arriving.saved is not None:
            saveat_bar = t0_bar.new_zeros(arriving.saved.shape[0])
        for t, cotangent, index in entries:
            slope = torch.vdot(cotangent, along[t]).real
            if index is not None:
                assert saveat_bar is not None
                saveat_bar[index] += slope
            elif t == problem_end:
                t1_bar = t1_bar + slope
            elif t in free:
                t0_bar = t0_bar + slope
    if at_start is not None:
        lam = lam + at_start
    return Gradients(lam, t0_bar, t1_bar, saveat_bar, field.split(p_bar))


def _moving_with_start(record: Record) -> set[float]:
    """Ends of steps that move with `t0`: free steps keep their sizes, until a stop fixes an end."""
    fixed = next((n for n, stop in enumerate(record.stops) if stop is not None), len(record.stops))
    return set(record.times[1 : fixed + 1])


def _forward(record: Record) -> bool:
    return record.times[-1] > record.times[0]


def _entries(
    record: Record, options: SolveOptions, arriving: Cotangents
) -> list[tuple[float, Tensor, int | None]]:
    """Cotangents after the start: their times, and the index of a saved time that moves."""
    found: list[tuple[float, Tensor, int | None]] = [
        (record.times[n], cotangent, None)
        for n in range(1, len(record.times))
        for cotangent in arriving_at(n, record, arriving)
    ]
    if arriving.saved is not None:
        for indices, _ in record.inside.values():
            found += [((options.saveat or ())[i], arriving.saved[i], i) for i in indices]
    return found
