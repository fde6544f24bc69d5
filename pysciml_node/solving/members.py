"""The members of an ensemble, solved by an engine that has been chosen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.algorithms.parallel import Parallel
from pysciml_node.errors import EnsembleFailure
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solving.chunks import Chunk, run_members
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.solving.engines import Engine
from pysciml_node.solving.parallel import run_in_parallel


def solve_members(
    ensemble: EnsembleProblem,
    engine: Engine,
    algorithm: Algorithm,
    options: MemberOptions,
    parallel: Parallel | None = None,
) -> EnsembleSolution:
    """Solve the members of an ensemble by an engine that has been chosen.

    Args:
        ensemble: what is solved.
        engine: runs them.
        algorithm: how.
        options: of all, and of each.
        parallel: hands chunks of them to other processes.

    Raises:
        EnsembleFailure: members did not reach the end of the interval (with `throw=True`).
    """
    if parallel is None:
        members = run_members(ensemble, engine, algorithm, options)
    else:
        members = run_in_parallel(parallel, Chunk(ensemble, engine.NAME, algorithm, options))
    solved = EnsembleSolution(ensemble, members, _times(ensemble, options))
    if options.common.throw and not solved.success:
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
    times = given.to(ensemble.problem.spec.device, ensemble.problem.spec.real_dtype)
    return times.clone()  # the caller may go on and change what was given
