"""Forward solves in Julia, and their results in the form that the rest of the package uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine.fields import Field
from pysciml_node.julia_engine.process.buffers import (
    device_code,
    doubles,
    from_real,
    integers,
    to_real,
)
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import moves
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.record import Record

RETCODES = (
    ReturnCode.Success,
    ReturnCode.Terminated,
    ReturnCode.MaxIters,
    ReturnCode.DtLessThanMin,
    ReturnCode.Unstable,
    ReturnCode.ConvergenceFailure,
)
Observer = Callable[[float, float], bool]


@dataclass
class Forward:
    """The result of a forward solve.

    Attributes:
        record: the accepted steps.
        states: the states at their ends, flat, `u0` first.
        saved: the states at `saveat`, `(saved, N)`.
        nfe: evaluations of the field.
        solution: SciML's solution, for its adjoints and dense output, where it was asked for.
    """

    record: Record
    states: list[Tensor]
    saved: Tensor
    nfe: int
    solution: Handle | None


def run(
    problem: ODEProblem,
    options: SolveOptions,
    plan: Handle,
    field: Field,
    u0: Tensor,
    parameters: Tensor,
    keep_solution: bool,
    observer: Observer | None = None,
) -> Forward:
    """Solve forward.

    Args:
        problem: the problem to solve.
        options: of the solve.
        plan: the options in Julia.
        field: the right-hand side.
        u0: flat initial state `(N,)`.
        parameters: of the field, flat.
        keep_solution: whether SciML's solution is kept.
        observer: called with the ends of each accepted step; ends the solve by returning `True`.
    """
    spec = problem.spec
    device = torch.device("cpu") if field.host else spec.device
    start = to_real(u0.detach()).to(device)
    size, times = start.numel(), options.saveat or ()
    saved = torch.empty((len(times), size), dtype=start.dtype, device=device)
    marks = doubles((problem.t0, *options.tstops, problem.t1))
    saveat, report = doubles(times), integers((0,) * 5)
    mass = real_mass(problem, device)
    handle = enter(
        "solve!",
        field=field.handle,
        plan=plan,
        device=device_code(device),
        n=size,
        u0=start,
        np=parameters.numel(),
        p=parameters,
        nmarks=len(marks),
        marks=marks,
        dt0=options.dt0 or 0.0,
        m=len(times),
        saveat=saveat,
        saved=saved,
        mass=mass,
        dense=keep_solution,
        observer=observer,
        report=report,
        wrap=Handle,
        release=not field.calls_python and observer is None,
    )
    return collect(problem, options, handle, keep_solution, u0, saved, report)


def real_mass(problem: ODEProblem, device: torch.device) -> Tensor | None:
    """The mass matrix as Julia sees it; for a complex state it acts on real and imaginary parts."""
    if problem.mass_matrix is None:
        return None
    mass = problem.mass_matrix.detach().to(device, problem.spec.real_dtype)
    if problem.spec.dtype.is_complex:
        mass = torch.kron(mass, torch.eye(2, dtype=mass.dtype, device=device))
    return mass.contiguous()


def collect(
    problem: ODEProblem,
    options: SolveOptions,
    handle: Handle,
    keep_solution: bool,
    u0: Tensor,
    saved: Tensor,
    report: Sequence[int],
) -> Forward:
    """Fetch the result of a solve from Julia.

    Args:
        problem: the problem that was solved.
        options: of the solve.
        handle: of the record in Julia.
        keep_solution: whether SciML's solution, and so the record, stays there.
        u0: flat initial state `(N,)`.
        saved: real, where Julia wrote the states at `saveat`.
        report: accepted steps, saved states, evaluations, rejected steps, return code.
    """
    spec, size = problem.spec, saved.shape[1]
    steps, count, nfe, rejected, code = report
    ends, errors = doubles((0.0,) * (steps + 1)), doubles((0.0,) * steps)
    rows = [saved.new_empty(size) for _ in range(steps + 1)]
    addresses = integers([row.data_ptr() for row in rows])
    enter(
        "fetch!",
        record=handle,
        device=device_code(saved.device),
        n=size,
        times=ends,
        errors=errors,
        states=addresses,
    )
    if not keep_solution:
        handle.forget()
    record = _record(problem, options, list(ends), list(errors))
    record.nreject, record.saved, record.retcode = rejected, count, RETCODES[code]
    states = rows
    if spec.dtype.is_complex or saved.device != spec.device:
        states = [from_real(row.to(spec.device), spec.dtype) for row in rows]
    states[0] = u0
    return Forward(
        record,
        states,
        from_real(saved[:count].to(spec.device), spec.dtype),
        nfe,
        handle if keep_solution else None,
    )


def _record(
    problem: ODEProblem, options: SolveOptions, times: list[float], errors: list[float]
) -> Record:
    """The steps, and where the stops and the saved times lie in them."""
    marks = (problem.t0, *options.tstops, problem.t1)
    stops = {t: i for i, t in enumerate(marks[1:])}
    record = Record(times=times, t1_stop=len(options.tstops), marks=marks)
    record.sizes = [after - before for before, after in pairwise(times)]
    record.errors = errors
    record.stops = [stops.get(t) for t in times[1:]]
    record.naccept = len(record.sizes)
    place(record, options.saveat or (), moving_ends(problem, options.saveat_tensor))
    return record


Ends = tuple[bool, bool]
"""Whether the start and the end of the interval receive gradients."""


def moving_ends(problem: ODEProblem, saveat: Tensor | None) -> Ends | None:
    """What `place` is told of a solve: which ends move, where saved times do."""
    return None if saveat is None else (moves(problem.tspan[0]), moves(problem.tspan[1]))


def place(record: Record, saveat: Sequence[float], ends: Ends | None) -> None:
    """Note in which steps the saved times lie.

    A time that receives a gradient lies in the step that ends on it, since it moves along the dense
    output; but one at an end of the interval that receives a gradient itself moves with that end.

    Args:
        record: the steps; changed in place.
        saveat: the times, in the order of integration.
        ends: whether the ends of the interval receive gradients, where saved times do.
    """
    start, end = record.marks[0], record.marks[-1]
    sign, step = 1 if end > start else -1, 0
    bound: set[float] = set()
    if ends is not None:
        bound = {t for t, moving in zip((start, end), ends, strict=True) if moving}
    for i, t in enumerate(saveat):
        free = ends is not None and t not in bound and bool(record.sizes)
        while step < len(record.sizes) and sign * record.times[step + 1] < sign * t:
            step += 1
        if t == record.times[0] and not free:
            record.at_end.setdefault(0, []).append(i)
        elif step == len(record.sizes):
            return
        elif t == record.times[step + 1] and not free:
            record.at_end.setdefault(step + 1, []).append(i)
        else:
            indices, times = record.inside.setdefault(step, ([], []))
            indices.append(i)
            times.append(t)
