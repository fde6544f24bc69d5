"""Typed errors and warnings. Wrong input is a `ValueError` or `TypeError`, as everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pysciml_node.solution import ReturnCode, Solution


class PsnWarning(UserWarning):
    """Base of the warnings this package gives."""


class EngineUnavailable(RuntimeError):
    """The engine asked for cannot run here; the message says how to get it."""


class SolverFailure(RuntimeError):
    """A solve that did not reach the end of its interval.

    Attributes:
        solution: what was computed up to the failure, with `retcode`, `stats` and dense output.
        retcode: why it stopped.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    @property
    def retcode(self) -> ReturnCode:
        """Why the solve stopped."""
        return self.solution.retcode
