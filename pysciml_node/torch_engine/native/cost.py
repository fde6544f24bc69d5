"""What a native solve costs, put together when somebody asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from pysciml_node.solutions.solution import Stats


class Costly(ABC):
    """Base of solves that count what they cost.

    Attributes:
        swept: what sweeps have cost while nobody has asked for `stats`.
    """

    swept: tuple[tuple[int, ...], ...] = ()

    @abstractmethod
    def counted(self) -> tuple[int, int, int]:
        """Evaluations, accepted and rejected steps of the way forward."""

    @cached_property
    def stats(self) -> Stats:
        """What it has cost so far."""
        back = (sum(counts) for counts in zip(*self.swept, strict=True))
        return Stats(*self.counted(), *back)

    def note_sweep(self, evaluations: int, pulls: int, steps: int) -> None:
        """Count what a sweep has cost: evaluations, pullbacks and replayed steps."""
        if "stats" not in self.__dict__:
            self.swept += ((evaluations, pulls, steps),)
            return
        stats = self.stats
        stats.nfe_backward += evaluations
        stats.nvjp += pulls
        stats.naccept_backward += steps
