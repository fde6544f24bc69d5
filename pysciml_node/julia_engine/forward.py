"""Forward solves in Julia, and their results in the form that the rest of the package uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.julia_engine.departure import Departure
from pysciml_node.julia_engine.fields import Field
from pysciml_node.julia_engine.process.buffers import (
    device_code,
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
_CPU = torch.device("cpu")
_DOUBLE = torch.empty(0, dtype=torch.float64, device=_CPU)


class Tally(NamedTuple):
    """How a forward solve ended, and what it cost."""

    steps: int  # accepted
    nfe: int  # evaluations of the field
    nreject: int  # rejected steps
    retcode: ReturnCode
    finite: bool  # whether all entries of the last state are


@dataclass
class Forward:
    """The result of a forward solve.

    Attributes:
        problem: what was solved.
        departure: how it began.
        log: the ends of the `n` accepted steps, and behind them the errors, in double precision.
        rows: the states at those ends, `(n + 1, N)`, real.
        saved: the states at `saveat`, `(saved, N)`.
        tally: how the solve ended.
        solution: SciML's solution, for its adjoints and dense output, where it was asked for.
    """

    problem: ODEProblem
    departure: Departure
    log: Tensor
    rows: Tensor
    saved: Tensor
    tally: Tally
    solution: Handle | None

    def __call__(self) -> tuple[Record, list[Tensor]]:
        """The accepted steps, and the states at their ends."""
        return self.record, self.states

    @cached_property
    def last(self) -> Tensor:
        """The last state, which keeps none of the others."""
        return self._states(self.rows[-1].clone())

    @cached_property
    def record(self) -> Record:
        """The accepted steps, and where the stops and the saved times lie in them."""
        options, marks, count = self.departure.options, self.departure.marks, self.tally.steps
        numbers: list[float] = self.log[: 2 * count + 1].tolist()
        times, errors = numbers[: count + 1], numbers[count + 1 :]
        stops = {t: i for i, t in enumerate(marks[1:])}
        record = Record(times=times, t1_stop=len(options.tstops), marks=marks)
        record.sizes = [after - before for before, after in pairwise(times)]
        record.errors = errors
        record.stops = [stops.get(t) for t in times[1:]]
        record.naccept, record.nreject = count, self.tally.nreject
        record.saved, record.retcode = len(self.saved), self.tally.retcode
        place(record, options.saveat or (), moving_ends(self.problem, options.saveat_tensor))
        return record

    @cached_property
    def states(self) -> list[Tensor]:
        """The states at the ends of the steps, flat, first the one that the solve began with."""
        return [*self._states(self.rows[:-1]).unbind(), self.last]

    def _states(self, rows: Tensor) -> Tensor:
        spec = self.problem.spec
        return from_real(rows if rows.device == spec.device else rows.to(spec.device), spec.dtype)


def run(
    departure: Departure,
    problem: ODEProblem,
    field: Field,
    u0: Tensor,
    parameters: Tensor,
    observer: Observer | None = None,
) -> Forward:
    """Solve forward.

    Args:
        departure: what is the same for all solves of these options.
        problem: the problem to solve.
        field: the right-hand side.
        u0: flat initial state `(N,)`.
        parameters: of the field, flat.
        observer: called with the ends of each accepted step; ends the solve by returning `True`.
    """
    spec, size, room = problem.spec, departure.size, departure.room
    device = _CPU if field.host else spec.device
    start = to_real(u0.detach())
    if start.device != device:
        start = start.to(device)
    saved = start.new_empty((departure.saves, size))
    # Torch takes a number faster than a shape; there are rows of them in the end.
    rows, log = start.new_empty((room + 1) * size), _DOUBLE.new_empty(2 * room + 1)
    report = integers((0,) * 6)
    device_number = device_code(device)
    handle: Handle = enter(
        "solve!",
        field=field.handle,
        device=device_number,
        u0=start,
        np=parameters.numel(),
        p=parameters,
        saved=saved,
        mass=None if problem.mass_matrix is None else real_mass(problem, device),
        observer=observer,
        log=log,
        states=rows,
        report=report,
        wrap=Handle,
        release=not field.calls_python and observer is None,
        **departure.given,
    )
    count, reached, nfe, nreject, code, finite = report
    if count > room:
        rows, log = start.new_empty((count + 1) * size), _DOUBLE.new_empty(2 * count + 1)
        enter("fetch!", record=handle, device=device_number, n=size, log=log, states=rows)
        if not departure.keep_solution:
            handle.forget()
    # In place: a view would keep what is not needed of the room in sight.
    rows.resize_(count + 1, size)
    if reached < departure.saves:
        saved = saved[:reached]
    if saved.device != spec.device:
        saved = saved.to(spec.device)
    return Forward(
        problem,
        departure,
        log,
        rows,
        from_real(saved, spec.dtype),
        Tally(count, nfe, nreject, RETCODES[code], bool(finite)),
        handle if departure.keep_solution else None,
    )


def real_mass(problem: ODEProblem, device: torch.device) -> Tensor | None:
    """The mass matrix as Julia sees it; for a complex state it acts on real and imaginary parts."""
    if problem.mass_matrix is None:
        return None
    mass = problem.mass_matrix.detach().to(device, problem.spec.real_dtype)
    if problem.spec.dtype.is_complex:
        mass = torch.kron(mass, torch.eye(2, dtype=mass.dtype, device=device))
    return mass.contiguous()


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
