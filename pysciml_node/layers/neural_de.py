"""What modules that hold a differential equation have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.algorithms.adjoints import Adjoint
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.problems.ode import Problem, Time
from pysciml_node.regularizers.base import Regularizer, attach_penalties, check_names
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.solve import solve


class NeuralDE(nn.Module):
    """Base of the modules that solve an equation from their input over a fixed interval.

    Args:
        algorithm: how; `None` leaves the choice to `solve`.
        tspan: the interval.
        rtol: relative tolerance.
        atol: absolute tolerance.
        regularizers: what is added to the loss.
        adjoint: how gradients are taken; default `DiscreteAdjoint()`.
        saveat: times of `solution.u`; without it the ends of the steps.
        engine: `"torch"`, `"julia"` or `"auto"`.
        options: further arguments of `solve`.

    Raises:
        TypeError: a regularizer of another kind.
        ValueError: two regularizers of one name.
    """

    def __init__(
        self,
        algorithm: Algorithm | None,
        tspan: tuple[Time, Time],
        *,
        rtol: float | Tensor,
        atol: float | Tensor,
        regularizers: Sequence[Regularizer],
        adjoint: Adjoint | None,
        saveat: Sequence[float] | Tensor | None,
        engine: str | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.tspan = tspan
        self.rtol, self.atol = rtol, atol
        self.regularizers = nn.ModuleList(check_names(regularizers))
        self.adjoint, self.saveat, self.engine = adjoint, saveat, engine
        self.options = options

    def active_regularizers(self) -> list[Regularizer]:
        """Those that count now: all in training mode, none in eval mode."""
        return [r for r in self.regularizers if isinstance(r, Regularizer)] if self.training else []

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
