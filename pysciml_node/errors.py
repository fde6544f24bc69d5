"""Typed errors and warnings. Wrong input is a `ValueError` or `TypeError`, as everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysciml_node.solutions.ensemble import EnsembleSolution
    from pysciml_node.solutions.solution import ReturnCode, Solution

# Types in Julia's messages can fill pages. This fits a screen.
_MOST_LINES = 20
_LONGEST_LINE = 400


class PsnWarning(UserWarning):
    """Base of the warnings this package gives."""


class EngineUnavailable(RuntimeError):
    """The engine asked for cannot run here; the message says how to get it."""


class MethodUnavailable(EngineUnavailable):
    """The engine asked for runs here, but lacks the method; the message names those it has."""


class CompileError(RuntimeError):
    """A solve cannot be made native. The message names the cause; `compile=False` always works."""


class JuliaError(RuntimeError):
    """An exception that Julia code raised.

    Its text is the first lines of Julia's message. The attributes hold all of it, and the stack.

    Attributes:
        julia_type: name of the exception's type in Julia.
        julia_message: Julia's message, uncut.
        julia_backtrace: the message followed by the stack, as Julia prints it.
    """

    def __init__(self, julia_type: str, julia_message: str, julia_backtrace: str = "") -> None:
        # All three are the exception's arguments, so it survives pickling.
        super().__init__(julia_type, julia_message, julia_backtrace)
        self.julia_type = julia_type
        self.julia_message = julia_message
        self.julia_backtrace = julia_backtrace

    def __str__(self) -> str:
        named = self.julia_type == "ErrorException" or self.julia_message.startswith(
            self.julia_type
        )
        text = f"Julia: {'' if named else f'{self.julia_type}: '}{self.julia_message}"
        lines = [
            line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ..."
            for line in text.splitlines()
        ]
        if len(lines) > _MOST_LINES:
            lines = [*lines[:_MOST_LINES], "  ... (the rest is in .julia_message)"]
        return "\n".join(lines)


class UnsupportedModule(TypeError):
    """A module that cannot be made into a program for Julia.

    Args:
        message: what is in the way.
        operation: the torch operation in the way, if it is one.
        captured: whether the module uses tensors that require gradients and are not its parameters.

    Attributes:
        message: as given.
        operation: as given.
        captured: as given.
    """

    def __init__(self, message: str, operation: str | None = None, captured: bool = False) -> None:
        super().__init__(
            f"{message}\n  Pass a function instead: lambda t, u: module(t, u). It is called back "
            "by Julia and may do anything."
        )
        self.message = message
        self.operation = operation
        self.captured = captured
        self._given = message, operation, captured

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), self._given


class SolverFailure(RuntimeError):
    """A solve that did not reach the end of its interval.

    Attributes:
        solution: what was computed up to the failure, with `retcode`, `stats` and dense output.
        retcode: why it stopped.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # Pickle makes an exception again from its arguments, and the text alone is not enough here.
        return type(self), (str(self), self.solution)

    @property
    def retcode(self) -> ReturnCode:
        """Why the solve stopped."""
        return self.solution.retcode


class EnsembleFailure(SolverFailure):
    """Members of an ensemble that did not reach the end of the interval.

    Attributes:
        solution: of the first member that failed.
        ensemble: all members, those that succeeded included.
        members: indices of those that failed.
    """

    def __init__(self, message: str, ensemble: EnsembleSolution, members: tuple[int, ...]) -> None:
        super().__init__(message, ensemble[members[0]])
        self.ensemble = ensemble
        self.members = members

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (str(self), self.ensemble, self.members)
