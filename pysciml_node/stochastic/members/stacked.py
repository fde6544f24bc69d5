"""The results of stochastic members that were solved in one batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.ode import Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.members.stacked import StackedMembers
from pysciml_node.solutions.solution import Stats, Trajectory
from pysciml_node.steps.record import Kept
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.stochastic.fields import Fields
from pysciml_node.stochastic.march import path_for
from pysciml_node.stochastic.step import SDEMethod, Stepper
from pysciml_node.stochastic.trajectory import SDETrajectory


@dataclass
class StackedPaths(StackedMembers):
    """Stacked members of a stochastic equation; `states` are the vectors that were stepped."""

    @override
    def state(self, stepped: Tensor) -> Tensor:
        return stepped[..., : sum(self.ensemble.problem.spec.sizes)]

    @override
    def trajectory(
        self,
        m: int,
        problem: Problem,
        kept: Kept,
        stats: Stats,
        options: SolveOptions,
        surroundings: Surroundings,
    ) -> Trajectory:
        assert isinstance(problem, SDEProblem)
        assert isinstance(self.algorithm, StochasticRungeKutta)
        tableau = self.algorithm.tableau_for(problem)
        spec, delta = problem.spec, self.algorithm.delta
        fields = Fields(problem)
        stepper = Stepper(SDEMethod.of(tableau, delta, spec.dtype, spec.device), fields)
        path = path_for(problem, options, fields.layout.size)
        return SDETrajectory(problem, stepper, path, kept, stats, options, surroundings)
