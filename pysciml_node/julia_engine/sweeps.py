"""Backward sweeps that Julia runs."""

from __future__ import annotations

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions, backward_limits
from pysciml_node.julia_engine.fields import Field
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    address,
    device_code,
    doubles,
    from_real,
    integers,
    pointer,
    to_real,
)
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import Cotangents, Gradients, TimeCotangents, arriving_at
from pysciml_node.steps.record import Record

SENSITIVITY = ("SciMLSensitivity", "Zygote", "ForwardDiff", "ChainRulesCore")
"""Julia packages of the continuous adjoints, loaded when one is asked for."""


def replayed_sweep(
    field: Field,
    tableau: Handle,
    record: Record,
    states: tuple[Tensor, ...],
    arriving: Cotangents,
    time_gradient: bool,
    stats: Stats,
) -> Gradients:
    """The discrete adjoint, replayed in Julia with the field's own vector-Jacobian product.

    Args:
        field: the right-hand side, real and on the states' device.
        tableau: the method in Julia.
        record: the accepted steps.
        states: the states at `record.times`.
        arriving: cotangents of the saved and of the step states.
        time_gradient: whether `t0`, `t1` and `saveat` need gradients.
        stats: its backward fields are filled.
    """
    start = states[0].detach()
    parameters = field.parameters()
    count = len(record.sizes)
    known = [state.detach().contiguous() for state in states]
    cotangents = [_sum(arriving_at(n, record, arriving)) for n in range(count + 1)]
    outputs: list[Tensor] = []
    inside, thetas = integers(), doubles()
    if arriving.saved is not None:
        saved = arriving.saved.contiguous()
        for n, (indices, places) in sorted(record.inside.items()):
            outputs.extend(saved[i] for i in indices)
            inside.extend([n + 1] * len(indices))
            thetas.extend(places)
    bars = doubles((0.0,) * ((2 * count + len(outputs)) if time_gradient else 0))
    times, sizes, marks = (doubles(x) for x in (record.times, record.sizes, record.marks))
    addresses = [integers([pointer(x) for x in rows]) for rows in (known, cotangents, outputs)]
    u0_bar, p_bar = torch.empty_like(start), torch.zeros_like(parameters)
    report = integers((0, 0))
    runtime.call_released(
        "pullback!",
        field.handle.number,
        tableau.number,
        CODES[start.dtype],
        device_code(start.device),
        start.numel(),
        parameters.numel(),
        pointer(parameters),
        count,
        address(times),
        address(sizes),
        len(marks),
        address(marks),
        address(addresses[0]),
        address(addresses[1]),
        len(outputs),
        address(addresses[2]),
        address(inside),
        address(thetas),
        pointer(u0_bar),
        pointer(p_bar),
        address(bars) if time_gradient else 0,
        address(report),
        release=not field.calls_python,
    )
    replayed, evaluations = report
    stats.naccept_backward += replayed
    stats.nfe_backward += evaluations
    stats.nvjp += evaluations
    moved = None
    if time_gradient:
        moved = TimeCotangents(
            record, 0 if arriving.saved is None else arriving.saved.shape[0], start.new_zeros(())
        )
        numbers = start.new_tensor(bars.tolist())
        t_bars, h_bars = numbers[:count], numbers[count : 2 * count]
        rest = numbers[2 * count :]
        first = len(rest)
        for n in reversed(range(count)):
            here = len(record.inside[n][0]) if outputs and n in record.inside else 0
            first -= here
            theta_bar = rest[first : first + here] if here else None
            moved.step(n, t_bars[n], h_bars[n], theta_bar)
    return Gradients(
        u0_bar,
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
) -> Gradients:
    """An adjoint of SciMLSensitivity along the solution that was kept.

    Args:
        field: the right-hand side.
        plan: how the solve was run.
        solution: SciML's solution.
        options: of the solve; its adjoint names the method and its tolerances.
        record: the accepted steps.
        arriving: cotangents of the saved and of the step states.
        time_gradient: whether `t0`, `t1` and `saveat` need gradients.
        stats: its backward fields are filled.
    """
    # Dense output comes without the states at the steps.
    missing = len(record.times) - len(arriving.states)
    arriving = Cotangents(arriving.saved, [*arriving.states, *[None] * missing])
    entries = _entries(record, options, arriving)
    at_start = _sum(arriving_at(0, record, arriving))
    if not entries:
        assert at_start is not None
        return Gradients(at_start, None, None, None, [None] * len(field.inputs))
    runtime.require(*SENSITIVITY)
    dtype, device = entries[0][1].dtype, entries[0][1].device
    moments = sorted({t for t, _, _ in entries}, key=lambda t: t * (1 if _forward(record) else -1))
    sums = {t: _sum([x for s, x, _ in entries if s == t]) for t in moments}
    rows = [to_real(x).cpu() for x in sums.values() if x is not None]
    parameters = field.parameters()
    size = rows[0].numel()
    u0_bar, p_bar = torch.zeros_like(rows[0]), torch.zeros_like(parameters)
    slopes = rows[0].new_zeros((len(moments) + 1, size))
    times, addresses = doubles(moments), integers([pointer(row) for row in rows])
    report = integers((0,))
    rtol, atol, max_steps = backward_limits(options.adjoint, options)
    runtime.call_released(
        "sensitivity!",
        solution.number,
        field.handle.number,
        plan.number,
        type(options.adjoint).__name__,
        rtol,
        atol,
        max_steps,
        size,
        len(moments),
        address(times),
        address(addresses),
        p_bar.numel(),
        pointer(u0_bar),
        pointer(p_bar),
        pointer(slopes),
        address(report),
        release=not field.calls_python,
    )
    stats.nfe_backward += report[0]
    stats.nvjp += report[0]
    stats.naccept_backward += len(record.sizes)
    lam = from_real(u0_bar, dtype).to(device)
    t0_bar = t1_bar = saveat_bar = None
    if time_gradient:
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
