"""Forward solves of many members by one call into Julia, over its threads."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.julia_engine.forward import RETCODES, real_mass
from pysciml_node.julia_engine.members.field import MembersField
from pysciml_node.julia_engine.process.buffers import device_code, integers
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.ensemble import Array
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.members.stacked import MemberSteps
from pysciml_node.solutions.solution import ReturnCode

_STEPS, _SAVED, _EVALUATIONS, _REJECTED, _CODE = range(5)


@dataclass
class Marks:
    """Starts, stops and ends of the members' intervals, one member after the other.

    Attributes:
        ends: the place of each member's last, `(M,)`.
        times: all of them.
        stops: of each member the times that its steps end on, and which of them these are.
    """

    ends: Tensor
    times: Tensor
    stops: list[dict[float, int]]

    @staticmethod
    def of(options: MemberOptions) -> Marks:
        """Those of a solve."""
        pairs = zip(*(ends.tolist() for ends in options.spans), strict=True)
        if options.common.tstops:
            listed = [(a, *options.of(m).tstops, b) for m, (a, b) in enumerate(pairs)]
        else:
            listed = list(pairs)
        times = torch.tensor([t for each in listed for t in each], dtype=torch.float64)
        ends = torch.tensor([len(each) for each in listed]).cumsum(0)
        return Marks(ends, times, [{t: i for i, t in enumerate(each[1:])} for each in listed])


@dataclass
class Flown:
    """What the solves of members leave.

    Attributes:
        marks: of their intervals.
        start: real starts, `(M, n)`.
        steps: the accepted steps.
        states: real states at their ends, `(P, n)`.
        saved: real states at `saveat`, `(M, T, n)`; NaN where a member did not get to.
        reached: how many of these each got to, `(M,)`.
        codes: how each ended.
        columns: fields of `Stats`.
        solutions: SciML's, where they were kept.
    """

    marks: Marks
    start: Tensor
    steps: MemberSteps
    states: Tensor
    saved: Tensor
    reached: Array
    codes: list[ReturnCode]
    columns: dict[str, Array]
    solutions: list[Handle]


def fly(
    problem: ODEProblem,
    options: MemberOptions,
    plan: Handle,
    field: MembersField,
    start: Tensor,
    keep_solutions: bool,
) -> Flown:
    """Solve forward.

    Args:
        problem: of the first member, for what they share.
        options: of all, and of each.
        plan: the options in Julia.
        field: of all members.
        start: real starts, `(M, n)`.
        keep_solutions: whether SciML's solutions are kept.
    """
    (count, size), marks, times = start.shape, Marks.of(options), options.times or 0
    dt0, saveat = _first_steps(options), _saved_times(options, count)
    saved = start.new_full((count, times, size), torch.nan)
    report = torch.zeros((count, 5), dtype=torch.int64)
    numbers = integers((0,) * count)
    handles: list[Handle] = enter(
        "solve_many!",
        field=field.handle,
        plan=plan,
        device=device_code(start.device),
        members=count,
        n=size,
        u0=start,
        np=field.shared.numel(),
        p=field.shared,
        k=len(field.places),
        places=field.places,
        own=field.own,
        mark_ends=marks.ends,
        marks=marks.times,
        dt0=dt0,
        m=times,
        saveat=saveat,
        saved=saved,
        mass=real_mass(problem, start.device),
        dense=keep_solutions,
        records=numbers,
        report=report,
        wrap=lambda _: [Handle(number) for number in numbers],
    )
    rows = report.numpy()
    ends, errors, states = _fetched(numbers, start, int(rows[:, _STEPS].sum()))
    if not keep_solutions:
        for handle in handles:
            handle.forget()
    return Flown(
        marks,
        start,
        _steps(options, marks, rows[:, _STEPS], ends.numpy(), errors.numpy()),
        states,
        saved,
        rows[:, _SAVED],
        [RETCODES[code] for code in rows[:, _CODE].tolist()],
        {
            "nfe": rows[:, _EVALUATIONS],
            "naccept": rows[:, _STEPS],
            "nreject": rows[:, _REJECTED],
        },
        handles if keep_solutions else [],
    )


def _fetched(records: array[int], start: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ends `(P,)` and errors `(P,)` of the accepted steps, and the states there, `(P, n)`."""
    ends, errors = (torch.empty(total, dtype=torch.float64) for _ in range(2))
    states = start.new_empty((total, start.shape[1]))
    enter(
        "fetch_many!",
        records=records,
        members=len(start),
        device=device_code(start.device),
        n=start.shape[1],
        ends=ends,
        errors=errors,
        states=states,
    )
    return ends, errors, states


def _first_steps(options: MemberOptions) -> Tensor:
    """The sizes of the first steps, or zeros."""
    t0, t1 = options.spans
    return torch.from_numpy(np.minimum(options.common.dt0 or 0.0, np.abs(t1 - t0)))


def _saved_times(options: MemberOptions, count: int) -> Tensor:
    """The times to be saved, `(M, T)`."""
    if options.saveat is not None:
        return torch.from_numpy(np.ascontiguousarray(options.saveat, dtype=np.float64))
    shared = torch.tensor(options.common.saveat or (), dtype=torch.float64)
    return shared.expand(count, -1).contiguous()


def _steps(
    options: MemberOptions, marks: Marks, counts: Array, ends: Array, errors: Array
) -> MemberSteps:
    """The accepted steps, and which of them end on stops."""
    t0, t1 = options.spans
    offsets = np.concatenate(([0], np.cumsum(counts)))
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1]
    moved = counts > 0
    starts[offsets[:-1][moved]] = t0[moved]
    if options.common.tstops:
        owners = np.repeat(np.arange(len(counts)), counts).tolist()
        pairs = zip(owners, ends.tolist(), strict=True)
        stops = np.array([marks.stops[m].get(t, -1) for m, t in pairs], dtype=np.int64)
    else:
        stops = np.where(ends == np.repeat(t1, counts), 0, -1)
    return MemberSteps(offsets, starts, ends - starts, ends, errors, stops)
