"""The members of an ensemble, solved by an engine that has been chosen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.errors import EnsembleFailure
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.members import ListedMembers, Members
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.solving.engines import Engine
from pysciml_node.solving.jumps import run


def solve_members(
    ensemble: EnsembleProblem, engine: Engine, algorithm: Algorithm, options: MemberOptions
) -> EnsembleSolution:
    """Solve the members of an ensemble by an engine that has been chosen.

    Args:
        ensemble: what is solved.
        engine: runs them.
        algorithm: how.
        options: of all, and of each.

    Raises:
        EnsembleFailure: members did not reach the end of the interval (with `throw=True`).
    """
    common = options.common
    members: Members
    if common.events:
        solutions = (
            run(engine, problem, algorithm, options.of(m))
            for m, problem in enumerate(ensemble.members())
        )
        members = ListedMembers(tuple(solutions), options.times)
    else:
        members = engine.solve_members(ensemble, algorithm, options)
    solved = EnsembleSolution(ensemble, members, _times(ensemble, options))
    if common.throw and not solved.success:
        failed = tuple(m for m, code in enumerate(solved.retcodes) if not code.successful)
        named = ", ".join(map(str, failed[:20])) + (", ..." if len(failed) > 20 else "")
        raise EnsembleFailure(
            f"{len(failed)} of {len(solved)} members failed: {named}. Member {failed[0]}: "
            f"{failure_message(solved[failed[0]], options.of(failed[0]))}\n"
            "  All members are in .ensemble; throw=False returns them.",
            solved,
            failed,
        )
    return solved


def _times(ensemble: EnsembleProblem, options: MemberOptions) -> Tensor | None:
    """The times of the states that are saved, `(T,)` or `(M, T)`."""
    common = options.common
    if common.saveat is None:
        return None
    given = options.saveat_tensor if options.saveat is not None else common.saveat_tensor
    if given is None:
        listed = common.saveat if options.saveat is None else options.saveat
        given = torch.from_numpy(np.array(listed))
    return given.to(ensemble.problem.spec.device, ensemble.problem.spec.real_dtype)
