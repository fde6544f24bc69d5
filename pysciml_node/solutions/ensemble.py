"""What comes back from an ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.state import map_tensors
from pysciml_node.solutions.portable import mapped_problem, portable_problem
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats


@dataclass(eq=False)
class EnsembleSolution:
    """The result of `solve` for an `EnsembleProblem`.

    `solution[m]` is the `Solution` of a member, with its steps and dense output; iteration goes
    over these.

    Attributes:
        problem: what was solved.
        solutions: of the members.
        t: times of `u`, shape `(T,)`: `saveat`, or `None` where each member has its own.
    """

    problem: EnsembleProblem
    solutions: tuple[Solution, ...] = field(repr=False)
    t: Tensor | None = None

    def __len__(self) -> int:
        return len(self.solutions)

    def __getitem__(self, index: int) -> Solution:
        return self.solutions[index]

    def __iter__(self) -> Iterator[Solution]:
        return iter(self.solutions)

    @cached_property
    def u1(self) -> Any:
        """States at the end, shape `(M, *u0.shape)`; of a failed member where it got to."""
        return self._stack([solution.u1 for solution in self.solutions])

    @cached_property
    def u(self) -> Any:
        """States at `saveat`, shape `(M, T, *u0.shape)`; NaN where a member did not get to.

        Raises:
            ValueError: there was no `saveat`, so that the members have times of their own.
        """
        if self.t is None:
            raise ValueError(
                "the members of an ensemble take steps of their own: u needs saveat.\n"
                "  Give saveat=..., or take solution[m].u."
            )
        spec, length = self.problem.problem.spec, len(self.t)

        def filled(part: Tensor) -> Tensor:
            missing = length - part.shape[0]
            if not missing:
                return part
            return torch.cat([part, part.new_full((missing, *part.shape[1:]), torch.nan)])

        rows = [solution.u for solution in self.solutions]
        return self._stack([spec.assemble([filled(x) for x in spec.parts(row)]) for row in rows])

    def detach(self) -> EnsembleSolution:
        """The same solutions without their graph."""
        t = None if self.t is None else self.t.detach()
        return EnsembleSolution(self.problem, tuple(s.detach() for s in self.solutions), t)

    def __getstate__(self) -> dict[str, Any]:
        problem = dataclasses.replace(
            self.problem,
            problem=portable_problem(mapped_problem(self.problem.problem, Tensor.detach)),
            u0=map_tensors(Tensor.detach, self.problem.u0),
            p=map_tensors(Tensor.detach, self.problem.p),
        )
        # Stacks are made again when somebody looks.
        return {"problem": problem, "solutions": self.solutions, "t": self.detach().t}

    def _stack(self, states: list[Any]) -> Any:
        spec = self.problem.problem.spec
        columns = zip(*(spec.parts(state) for state in states), strict=True)
        return spec.assemble([torch.stack(column) for column in columns])

    @property
    def retcodes(self) -> tuple[ReturnCode, ...]:
        """How each member ended."""
        return tuple(solution.retcode for solution in self.solutions)

    @property
    def success(self) -> bool:
        """Whether all members reached their end."""
        return all(solution.success for solution in self.solutions)

    @property
    def member_stats(self) -> tuple[Stats, ...]:
        """What each member cost."""
        return tuple(solution.stats for solution in self.solutions)

    @property
    def stats(self) -> Stats:
        """What all cost together, as it stands now."""
        names = [f.name for f in dataclasses.fields(Stats)]
        return Stats(**{name: sum(getattr(s, name) for s in self.member_stats) for name in names})


def _flatten(solution: EnsembleSolution) -> tuple[list[Any], EnsembleProblem]:
    return [list(solution.solutions), solution.t], solution.problem


def _unflatten(children: Iterable[Any], problem: EnsembleProblem) -> EnsembleSolution:
    solutions, t = children
    return EnsembleSolution(problem, tuple(solutions), t)


register_pytree_node(EnsembleSolution, _flatten, _unflatten)
