"""The results of many members, as an engine hands them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pysciml_node.solutions.solution import ReturnCode, Solution

Array = np.ndarray[Any, Any]


class Members(Protocol):
    """What an engine hands back of the members of an ensemble.

    States are flat, `(N,)` each; those of all members stand in one tensor.
    """

    @property
    def codes(self) -> Sequence[ReturnCode]:
        """How each ended."""

    def final(self) -> Tensor:
        """The states that they got to, `(M, N)`."""

    def saved(self) -> Tensor | None:
        """The states at `saveat`, `(M, T, N)`; NaN where a member did not get to."""

    def count(self, name: str) -> Array:
        """A field of `Stats` for each member, `(M,)`, as it stands now."""

    def solution(self, m: int) -> Solution:
        """The solution of one member, made when it is asked for and kept."""

    def children(self) -> list[Any]:
        """What holds tensors: these, or solutions."""

    def replaced(self, children: list[Any]) -> Members:
        """The same with other children."""

    def detach(self) -> Members:
        """The same without the graph."""


@dataclass
class ListedMembers:
    """Members that were solved one after the other.

    Args:
        solutions: theirs.
        times: how many times `saveat` names, or `None` without it.
    """

    solutions: tuple[Solution, ...]
    times: int | None

    @property
    def codes(self) -> Sequence[ReturnCode]:
        """How each ended."""
        return [solution.retcode for solution in self.solutions]

    def final(self) -> Tensor:
        """The states that they got to, `(M, N)`."""
        return torch.stack([s.problem.spec.flatten(s.u1) for s in self.solutions])

    def saved(self) -> Tensor | None:
        """The states at `saveat`, `(M, T, N)`; NaN where a member did not get to."""
        if self.times is None:
            return None
        return torch.stack([self._filled(s, self.times) for s in self.solutions])

    @staticmethod
    def _filled(solution: Solution, times: int) -> Tensor:
        spec = solution.problem.spec
        parts = zip(spec.parts(solution.u), spec.sizes, strict=True)
        rows = torch.cat([part.reshape(len(part), size) for part, size in parts], dim=1)
        missing = times - len(rows)
        if not missing:
            return rows
        return torch.cat([rows, rows.new_full((missing, rows.shape[1]), torch.nan)])

    def count(self, name: str) -> Array:
        """A field of `Stats` for each member, `(M,)`, as it stands now."""
        return np.array([getattr(solution.stats, name) for solution in self.solutions])

    def solution(self, m: int) -> Solution:
        """The solution of one member."""
        return self.solutions[m]

    def children(self) -> list[Any]:
        """The solutions."""
        return list(self.solutions)

    def replaced(self, children: list[Any]) -> ListedMembers:
        """The same with other solutions."""
        return dataclasses.replace(self, solutions=tuple(children))

    def detach(self) -> ListedMembers:
        """The same without the graph."""
        return self.replaced([solution.detach() for solution in self.solutions])
