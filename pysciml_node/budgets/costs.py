"""What a solve costs, and a smooth stand-in for counts.

Evaluations come in whole steps: with `Tsit5` a field that gets steadily cheaper has 62 evaluations
for many training steps and then 56. A controller that sees only this knows nothing in between. But
the sizes of all steps, down to the one that the end of the interval cuts short, are continuous
functions of the parameters, where no step is rejected. So the last step is counted by its share

    share = min(1, (e_n / e_(n-1))**(1 / k)),      k = error order + 1,

of the step that would have had the error of the one before it: errors grow like `h**k`. Where
parameters move through the point at which a step disappears, its share goes to 0, the share of the
step before it is 1, and the count `n - 1 + share` has no jump. Half a step on top makes it right on
average over where the last step happens to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution

Kind = Literal["nfe", "steps", "seconds"]
UNITS: dict[Kind, str] = {"nfe": "evaluations", "steps": "steps", "seconds": "seconds"}
# PI control settles at steps that are this share of those with the largest error allowed:
# 0.9 = share**(7/10 - 4/10).
_USUAL_SHARE = 0.9 ** (1 / 0.3)


def cost_of(solution: Solution | EnsembleSolution, kind: Kind) -> float:
    """What a solve cost; counts of an ensemble are a member's on average.

    Args:
        solution: of the solve.
        kind: `"nfe"`: evaluations of the field; `"steps"`: accepted and rejected ones;
            `"seconds"`: by the clock.
    """
    if kind == "seconds":
        return solution.seconds
    stats = solution.stats
    members = len(solution) if isinstance(solution, EnsembleSolution) else 1
    return (stats.nfe if kind == "nfe" else stats.naccept + stats.nreject) / members


def smooth_cost_of(solution: Solution | EnsembleSolution, kind: Kind) -> float:
    """The same with the last step counted by its share, and half a step.

    The average over an ensemble's members is smooth as it is.
    """
    cost = cost_of(solution, kind)
    return cost if isinstance(solution, EnsembleSolution) else cost * _correction(solution)


def has_fixed_steps(solution: Solution | EnsembleSolution) -> bool:
    """Whether the method estimates errors, and none were estimated."""
    solve = solution[0] if isinstance(solution, EnsembleSolution) else solution
    known = getattr(solve.algorithm, "tableau", None) is not None
    return known and all(math.isnan(error) for error in solve.trajectory.errors)


def _correction(solution: Solution) -> float:
    order = _error_order(solution)
    attempts = solution.stats.naccept + solution.stats.nreject
    if order is None or not attempts:
        return 1.0
    return 1.0 + (last_share(solution.trajectory.errors, order + 1) - 0.5) / attempts


def _error_order(solution: Solution) -> float | None:
    """Order of the embedded solution; `None` of methods that only SciML knows."""
    algorithm: Any = solution.algorithm
    if isinstance(solution.problem, SDEProblem) and hasattr(algorithm, "tableau_for"):
        algorithm = algorithm.tableau_for(solution.problem)
    else:
        algorithm = getattr(algorithm, "tableau", None)
    order: float | None = getattr(algorithm, "error_order", None)
    return order


def last_share(errors: Iterable[float], k: float) -> float:
    """How much of a usual step the last one is, between 0 and 1.

    Args:
        errors: scaled error estimates of the accepted steps.
        k: exponent of the step size in the error.

    Examples:
        >>> last_share([0.2, 0.2, 0.2 / 2**5], k=5)
        0.5
    """
    last: list[float] = list(errors)[-2:]
    if not last or not all(map(math.isfinite, last)):
        return 0.5  # Nothing is known: the count is left as it is.
    if len(last) == 1:
        return min(1.0, float(last[0] ** (1 / k)) / _USUAL_SHARE)
    before, error = last
    return min(1.0, float((error / before) ** (1 / k))) if before > 0.0 else 1.0
