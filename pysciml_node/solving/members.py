"""The members of an ensemble, solved by an engine that has been chosen."""

from __future__ import annotations

from collections.abc import Sequence

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.errors import EnsembleFailure
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import Problem
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.solving.engines import Engine
from pysciml_node.steps.event_gradient import differentiable_event


def solve_members(
    ensemble: EnsembleProblem,
    members: Sequence[Problem],
    engine: Engine,
    algorithm: Algorithm,
    options: Sequence[SolveOptions],
) -> EnsembleSolution:
    """Solve the members of an ensemble by an engine that has been chosen.

    Args:
        ensemble: what is solved.
        members: its single problems.
        engine: runs them.
        algorithm: how.
        options: of each member.

    Raises:
        EnsembleFailure: members did not reach the end of the interval (with `throw=True`).
    """
    solutions: list[Solution] = engine.solve_many(members, algorithm, options)
    common = options[0]
    for solution in solutions:
        if solution.event is not None:
            differentiable_event(solution, common.events[solution.event], common.tstops)
    t = None
    if common.saveat is not None:
        t = common.saveat_tensor
        t = members[0].time_tensor(list(common.saveat)) if t is None else t
    found = EnsembleSolution(ensemble, tuple(solutions), t)
    failed = tuple(i for i, solution in enumerate(solutions) if not solution.success)
    if common.throw and failed:
        named = ", ".join(map(str, failed[:20])) + (", ..." if len(failed) > 20 else "")
        raise EnsembleFailure(
            f"{len(failed)} of {len(solutions)} members failed: {named}. Member {failed[0]}: "
            f"{failure_message(solutions[failed[0]], common)}\n"
            "  All members are in .ensemble; throw=False returns them.",
            found,
            failed,
        )
    return found
