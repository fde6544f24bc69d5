"""The results of members that Julia has solved by one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine.members.field import MembersField
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.solve import ODESolve
from pysciml_node.julia_engine.trajectory import SciMLTrajectory
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.replay.members.stacked import StackedMembers
from pysciml_node.solutions.solution import Stats, Trajectory
from pysciml_node.steps.record import Kept
from pysciml_node.steps.surroundings import Surroundings


@dataclass
class JuliaMembers(StackedMembers):
    """Stacked members with the solutions that SciML has kept of them.

    Attributes:
        solutions: in Julia, one for each member, or none.
        field: of all, where they are kept.
        recorded: whether dense output has gradients.
    """

    rounded_times: ClassVar[bool] = True
    maps_field: ClassVar[bool] = False

    solutions: Sequence[Handle] = ()
    field: MembersField | None = None
    recorded: bool = False

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
        # Free steps move with the start in Julia's sweeps, whatever the adjoint is.
        kept.record.fixed = False
        if isinstance(self.algorithm, ExplicitRungeKutta):
            return super().trajectory(m, problem, kept, stats, options, surroundings)
        assert isinstance(problem, ODEProblem)
        solve = None
        if self.solutions:
            solve = ODESolve(problem, self.algorithm, options, self.engine)
            solve.stats, solve.solution_in_julia = stats, self.solutions[m]
            solve.recorded = self.recorded
            if self.field is not None:
                solve.field = self.field.of(m)
        return SciMLTrajectory(problem, kept, stats, options, solve)

    @override
    def detach(self) -> JuliaMembers:
        copy = super().detach()
        assert isinstance(copy, JuliaMembers)
        copy.recorded = False
        return copy

    @override
    def __getstate__(self) -> dict[str, Any]:
        gone = {"solutions": (), "field": None, "recorded": False}
        return {**super().__getstate__(), **gone}
