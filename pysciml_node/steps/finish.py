"""What every engine makes of a solve that has run."""

from __future__ import annotations

from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem
from pysciml_node.solutions.solution import Solution, Stats, Trajectory
from pysciml_node.steps.record import Record


def build_solution(
    problem: Problem,
    algorithm: Algorithm,
    engine: str,
    options: SolveOptions,
    record: Record,
    states: list[Tensor],
    saved: Tensor,
    stats: Stats,
    trajectory: Trajectory,
) -> Solution:
    """The solution of a solve that has run.

    Args:
        problem: what was solved.
        algorithm: how.
        engine: name of the engine.
        options: of the solve.
        record: the accepted steps.
        states: flat, at their ends.
        saved: the states at `saveat`, `(saved, N)`.
        stats: what it cost.
        trajectory: dense output and local estimates.
    """
    spec = problem.spec
    if options.saveat is None:
        t = problem.time_tensor(record.times)
    elif options.saveat_tensor is not None:
        t = options.saveat_tensor[: record.saved].to(spec.device, spec.real_dtype)
    else:
        t = problem.time_tensor(list(options.saveat[: record.saved]))
    return Solution(
        problem=problem,
        algorithm=algorithm,
        engine=engine,
        retcode=record.retcode,
        stats=stats,
        t=t,
        u1=spec.unflatten(states[-1]),
        trajectory=trajectory,
        saved=None if options.saveat is None else spec.unflatten(saved[: record.saved]),
        event=record.event,
    )
