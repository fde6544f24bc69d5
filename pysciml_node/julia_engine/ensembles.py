"""Runs the forward solves of an ensemble by one call into Julia, over its threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine.fields import Field
from pysciml_node.julia_engine.forward import Forward, collect, real_mass
from pysciml_node.julia_engine.process.buffers import device_code, doubles, integers, pointer
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.ode import ODEProblem

_REPORTED = 5


def run_many(
    problem: ODEProblem,
    options: SolveOptions,
    plan: Handle,
    fields: Sequence[Field],
    u0: Sequence[Tensor],
    keep_solution: bool,
) -> list[Forward]:
    """Solve forward from each initial state with the parameters of the field beside it.

    Args:
        problem: what the members share: interval, mass matrix, structure of the state.
        options: of the solves.
        plan: the same for Julia.
        fields: one for each member, all with one handle in Julia, none of which calls Python.
        u0: flat and real initial states, `(N,)` each.
        keep_solution: whether SciML's solutions are kept.
    """
    count, times = len(u0), options.saveat or ()
    starts = [u.detach().contiguous() for u in u0]
    like = starts[0]
    size, device = like.numel(), device_code(like.device)
    saved = [like.new_empty((len(times), size)) for _ in starts]
    vectors = {id(field): field.parameters() for field in fields}
    parameters = [vectors[id(field)] for field in fields]
    marks = doubles((problem.t0, *options.tstops, problem.t1))
    saveat = doubles(times)
    mass = real_mass(problem, like.device)
    lists = [integers([pointer(x) for x in tensors]) for tensors in (starts, parameters, saved)]
    numbers, report = integers((0,) * count), integers((0,) * (_REPORTED * count))
    handles: list[Handle] = enter(
        "solve_many!",
        field=fields[0].handle,
        plan=plan,
        device=device,
        # What is kept for the adjoints of SciMLSensitivity evaluates the one field that they know.
        threaded=not (keep_solution and torch.is_grad_enabled()),
        members=count,
        n=size,
        u0=lists[0],
        np=parameters[0].numel(),
        p=lists[1],
        nmarks=len(marks),
        marks=marks,
        dt0=options.dt0 or 0.0,
        m=len(times),
        saveat=saveat,
        saved=lists[2],
        mass=mass,
        dense=keep_solution,
        records=numbers,
        report=report,
        wrap=lambda _: [Handle(number) for number in numbers],
    )
    reports = [report[_REPORTED * i : _REPORTED * (i + 1)] for i in range(count)]
    return [
        collect(problem, options, handle, keep_solution, start, rows, cost)
        for handle, start, rows, cost in zip(handles, u0, saved, reports, strict=True)
    ]
