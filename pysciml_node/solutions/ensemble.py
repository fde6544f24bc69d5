"""The solution of an ensemble."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.modes import with_graph
from pysciml_node.problems.state import map_tensors
from pysciml_node.solutions.elsewhere import NoTensor
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.portable import mapped_problem, portable_problem
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats


@dataclass(eq=False)
class EnsembleSolution(NoTensor):
    """The result of `solve` for an `EnsembleProblem`.

    States of all members stand in one tensor. `solution[m]` is the `Solution` of a member, with its
    steps and dense output; it is made when it is asked for. Iteration goes over these.

    Attributes:
        problem: what was solved.
        members: what the engine handed back.
        t: times of `u`, shape `(T,)`: `saveat`, or `(M, T)` where each member has its own; `None`
            without `saveat`.
        seconds: what the solve took by the clock.
        penalty: weighted sum of the regularizers (0 in eval mode or without any).
        penalties: each regularizer's unweighted value by name: the mean over the members.
    """

    problem: EnsembleProblem
    members: Members = field(repr=False)
    t: Tensor | None = None
    seconds: float = 0.0
    penalty: Tensor = field(default_factory=lambda: torch.zeros(()))
    penalties: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.problem)

    def __getitem__(self, index: int) -> Solution:
        m = operator.index(index)
        if not -len(self) <= m < len(self):
            raise IndexError(f"there are {len(self)} members, and no solution[{m}].")
        return self._member(m % len(self))

    def __iter__(self) -> Iterator[Solution]:
        return map(self._member, range(len(self)))

    def _member(self, m: int) -> Solution:
        with self._with_graph():
            return self.members.solution(m)

    def _with_graph(self) -> AbstractContextManager[None]:
        """What is made on demand is kept: see `with_graph`."""
        return with_graph(self.problem.problem.spec.device)

    @property
    def solutions(self) -> tuple[Solution, ...]:
        """The solutions of all members, an object for each."""
        return tuple(self)

    @cached_property
    def u1(self) -> Any:
        """States at the end, shape `(M, *u0.shape)`; NaN for members that did not get there."""
        with self._with_graph():
            final = self.members.final()
            if not self.success:
                failed = torch.tensor([not code.successful for code in self.retcodes])
                final = torch.where(failed.to(final.device).unsqueeze(1), torch.nan, final)
            return self.problem.problem.spec.unflatten(final)

    @cached_property
    def u(self) -> Any:
        """States at `saveat`, shape `(M, T, *u0.shape)`; NaN where a member did not get to.

        Raises:
            ValueError: there was no `saveat`, so that the members have times of their own.
        """
        with self._with_graph():
            saved = self.members.saved()
            if saved is None:
                raise ValueError(
                    "the members of an ensemble take steps of their own: u needs saveat.\n"
                    "  Give saveat=..., or take solution[m].u."
                )
            return self.problem.problem.spec.unflatten(saved)

    def detach(self) -> EnsembleSolution:
        """The same solutions without their graph."""
        t, penalty, penalties = map_tensors(Tensor.detach, (self.t, self.penalty, self.penalties))
        members = self.members.detach()
        return EnsembleSolution(self.problem, members, t, self.seconds, penalty, penalties)

    def __getstate__(self) -> dict[str, Any]:
        problem = dataclasses.replace(
            self.problem,
            problem=portable_problem(mapped_problem(self.problem.problem, Tensor.detach)),
            **{
                name: map_tensors(Tensor.detach, getattr(self.problem, name))
                for name in ("u0", "p", "tspan")
            },
        )
        # Stacks are made again when somebody looks.
        kept = {name: getattr(self, name) for name in ("t", "seconds", "penalty", "penalties")}
        kept = map_tensors(Tensor.detach, kept)
        return {"problem": problem, "members": self.members, **kept}

    @cached_property
    def retcodes(self) -> tuple[ReturnCode, ...]:
        """The return code of each member."""
        return tuple(self.members.codes)

    @property
    def success(self) -> bool:
        """Whether all members reached their end."""
        # By identity: hashing an enum for each of many members takes longer than their steps.
        return all(code.successful for code in {id(code): code for code in self.retcodes}.values())

    @property
    def member_stats(self) -> tuple[Stats, ...]:
        """The cost of each member, as it stands now."""
        columns = [self.members.count(f.name).tolist() for f in dataclasses.fields(Stats)]
        return tuple(Stats(*row) for row in zip(*columns, strict=True))

    @property
    def stats(self) -> Stats:
        """The cost of all members together, as it stands now."""
        names = [f.name for f in dataclasses.fields(Stats)]
        return Stats(**{name: int(self.members.count(name).sum()) for name in names})


def _flatten(solution: EnsembleSolution) -> tuple[list[Any], EnsembleSolution]:
    held = [solution.t, solution.penalty, solution.penalties]
    return [*solution.members.children(), *held], solution


def _unflatten(children: Iterable[Any], solution: EnsembleSolution) -> EnsembleSolution:
    *held, t, penalty, penalties = children
    members = solution.members.replaced(held)
    return EnsembleSolution(solution.problem, members, t, solution.seconds, penalty, penalties)


register_pytree_node(EnsembleSolution, _flatten, _unflatten)
