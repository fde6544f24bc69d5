"""What modules that hold a differential equation have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import nn

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.layers.options import SolverOptions, check_options
from pysciml_node.problems.ode import Problem, Time
from pysciml_node.regularizers.base import Regularizer, attach_penalties, check_names
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.solve import solve


class NeuralDE(nn.Module):
    """Base of the modules that solve an equation from their input over a fixed interval.

    Args:
        algorithm: how; `None` leaves the choice to `solve`.
        tspan: the interval.
        options: see `SolverOptions`.

    Raises:
        TypeError: an unknown option, a regularizer of another kind.
        ValueError: two regularizers of one name.
    """

    usual_tolerance: ClassVar[float] = 1e-6

    def __init__(
        self, algorithm: Algorithm | None, tspan: tuple[Time, Time], options: SolverOptions
    ) -> None:
        super().__init__()
        check_options(type(self).__name__, options)
        self.algorithm = algorithm
        self.tspan = tspan
        others: dict[str, Any] = dict(options)
        self.rtol = others.pop("rtol", self.usual_tolerance)
        self.atol = others.pop("atol", self.usual_tolerance)
        self.regularizers = nn.ModuleList(check_names(others.pop("regularizers", ())))
        self.adjoint = others.pop("adjoint", None)
        self.saveat = others.pop("saveat", None)
        self.engine = others.pop("engine", None)
        self.options = others
        self.regularize = True

    def active_regularizers(self) -> list[Regularizer]:
        """Those that count now: all in training mode, none in eval mode."""
        if not (self.training and self.regularize):
            return []
        return list(cast(Iterable[Regularizer], self.regularizers))

    def solve(self, problem: Problem, **arguments: Any) -> Solution:
        """Solve a problem with the module's settings, which `arguments` can replace."""
        settings = {
            "rtol": self.rtol,
            "atol": self.atol,
            "saveat": self.saveat,
            "engine": self.engine,
            "adjoint": self.adjoint,
            **self.options,
        }
        return solve(problem, self.algorithm, **{**settings, **arguments})

    @staticmethod
    def penalize(solution: Solution, regularizers: Sequence[Regularizer]) -> Solution:
        """Set a solution's penalties; returns it."""
        spec = solution.problem.spec
        solution.penalty = torch.zeros((), dtype=spec.real_dtype, device=spec.device)
        attach_penalties(solution, regularizers)
        return solution

    def step_schedules(self) -> None:
        """Count one training step of every regularizer's weight schedule."""
        for regularizer in self.regularizers:
            regularizer.step()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"{self.algorithm}, tspan={self.tspan}, rtol={self.rtol}, atol={self.atol}"


@contextmanager
def without_regularizers(module: nn.Module) -> Iterator[None]:
    """Solve the equations inside a module as in eval mode where it comes to regularizers."""
    layers = [inner for inner in module.modules() if isinstance(inner, NeuralDE)]
    before = [layer.regularize for layer in layers]
    try:
        for layer in layers:
            layer.regularize = False
        yield
    finally:
        for layer, regularize in zip(layers, before, strict=True):
            layer.regularize = regularize
