"""Global regularization: the solver's own estimates, summed over all its steps.

Reference: Pal, Ma, Shah, Rackauckas, Opening the Blackbox: Accelerating Neural Differential
Equations by Regularizing Internal Solver Heuristics, ICML 2021, arXiv 2105.03918.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.regularizers.base import Regularizer, stability_radius
from pysciml_node.replay.members.estimates import estimates_of
from pysciml_node.schedules import Schedule
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution, StepEstimate

Aggregate = Literal["sum", "mean", "max"]


def _entries(step: StepEstimate) -> tuple[Tensor, Tensor, Tensor]:
    return step.dt, step.error, step.stiffness


class _GlobalRegularizer(Regularizer):
    """An estimate of every accepted step, aggregated.

    Differentiated through the steps themselves, which a continuous adjoint does not know: needs
    `DiscreteAdjoint` or `DirectAdjoint`. Each step is evaluated again for its estimate, and once
    more in backward, so that memory stays at one step's graph.

    Args:
        weight: factor of the penalty in the loss, or a schedule of it.
        aggregate: over the steps.
        name: key in `Solution.penalties`.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        aggregate: Aggregate,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.aggregate = checks.choice("aggregate", aggregate, ("sum", "mean", "max"))

    @abstractmethod
    def _values(self, steps: StepEstimate, algorithm: Algorithm) -> Tensor:
        """What is aggregated, an entry for each step."""

    def forward(self, solution: Solution) -> Tensor:
        """The penalty, a 0-d tensor."""
        steps = solution.step_estimates()
        columns = (torch.stack(column) for column in zip(*map(_entries, steps), strict=True))
        stacked = self._values(StepEstimate(*columns), solution.algorithm)
        if self.aggregate == "max":
            return stacked.max()
        return stacked.sum() if self.aggregate == "sum" else stacked.mean()

    def _over_members(self, solution: EnsembleSolution) -> Tensor | None:
        """The mean over members, each of which aggregates its own steps."""
        found = estimates_of(solution.members)
        own_rule = type(self).forward is not _GlobalRegularizer.forward
        if found is None or found.members.quicker_alone or own_rule:
            return super()._over_members(solution)
        values = self._values(found.every_step(), solution[0].algorithm)
        rows = torch.from_numpy(found.rows).to(values.device)
        ways = {"sum": "sum", "mean": "mean", "max": "amax"}
        each = values.new_zeros(len(solution)).scatter_reduce(
            0, rows, values, ways[self.aggregate], include_self=False
        )
        return each.mean()

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"{super().extra_repr()}, aggregate={self.aggregate!r}"


class GlobalError(_GlobalRegularizer):
    """Error regularization, `sum over steps of E_j |dt_j|`.

    `E` is the step's error estimate in units of the tolerance.

    Args:
        weight: factor of the penalty in the loss, or a schedule of it.
        aggregate: `"sum"` as the paper writes, `"mean"` as its code does, or `"max"`.
        name: key in `Solution.penalties`.

    Reference: arXiv 2105.03918, section 3.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        aggregate: Aggregate = "sum",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, aggregate=aggregate, name=name)

    def _values(self, steps: StepEstimate, algorithm: Algorithm) -> Tensor:
        """Errors times sizes."""
        return steps.error * steps.dt.abs()


class GlobalStiffness(_GlobalRegularizer):
    """Stiffness regularization: the stiffness estimates of the steps, in units of stability.

    Args:
        weight: factor of the penalty in the loss, or a schedule of it.
        aggregate: `"max"` as the paper's code does for ODEs, `"mean"` (its SDEs), or `"sum"`,
            which then weighs each step by `|dt|` as the paper writes.
        name: key in `Solution.penalties`.

    Reference: arXiv 2105.03918, section 3; Shampine, Math. Comput. 31 (1977) 412-421.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        aggregate: Aggregate = "max",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, aggregate=aggregate, name=name)

    def _values(self, steps: StepEstimate, algorithm: Algorithm) -> Tensor:
        """Stiffness in units of stability."""
        values = steps.stiffness / stability_radius(algorithm)
        return values * steps.dt.abs() if self.aggregate == "sum" else values
