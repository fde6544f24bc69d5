"""The parts of an optimizer's step: groups with their gradients, a model, a move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pysciml_node.errors import SolverFailure
from pysciml_node.optim.gauss_newton import set_parameters
from pysciml_node.optim.terminal import TerminalSolution, terminal_state

Source: TypeAlias = TerminalSolution | Tensor
Loss: TypeAlias = float | Tensor
Closure: TypeAlias = Callable[[], Loss] | Callable[[], tuple[Tensor, Source]]


class Row(NamedTuple):
    """One group's parameters that have a gradient, with the gradients to descend along."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


class Model:
    """Loss and outputs at the values that the parameters hold at the time of the call."""

    def __init__(self, closure: Closure, solution: Source, objective: float, sign: float) -> None:
        self.solution = solution
        self.objective = objective
        self._closure = closure
        self._sign = sign

    def objective_here(self) -> float:
        """The value that is minimized; infinite where the flow cannot be solved."""
        try:
            loss, _ = self._closure()  # type: ignore[misc]
        except SolverFailure:
            return math.inf
        return self._sign * float(loss)

    def outputs_here(self) -> Tensor:
        """Terminal state `(B, n)`."""
        _, solution = self._closure()  # type: ignore[misc]
        return terminal_state(solution)


@dataclass(frozen=True)
class Step:
    """The arguments of a step.

    Attributes:
        rows: the groups, at least one.
        state: what the optimizer keeps for each parameter.
        solution: the outputs that curvature is measured at, or `None`.
        horizon: length of the time interval, where it was given.
        second_moment: of the terminal state, where it was given.
    """

    rows: list[Row]
    state: dict[Tensor, dict[str, Any]]
    solution: Source | None
    horizon: float | Tensor | None
    second_moment: float | Tensor | None
    model: Model | None

    def option(self, name: str) -> Any:
        """An option that all groups share."""
        return self.rows[0].group[name]

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [param for row in self.rows for param in row.params]

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group."""
        return [float(row.group["lr"]) for row in self.rows]

    def several(self) -> Model:
        """Loss and solution at any parameters.

        Raises:
            ValueError: there is no closure that returns them.
        """
        if self.model is None:
            names = ", ".join(
                f"{name}={self.option(name)!r}" for name in ("curvature", "safeguard")
            )
            raise ValueError(
                f"{names} evaluates loss and solution at several points, but step() has no closure "
                "for them.\n"
                "  Pass step() a closure that returns (loss, solution) and does not call backward."
            )
        return self.model

    def move(self, directions: list[list[Tensor]], rates: list[float]) -> None:
        """`theta <- theta - rate * direction`."""
        for row, direction, rate in zip(self.rows, directions, rates, strict=True):
            foreach = row.group["foreach"]
            if foreach is None:
                foreach = all(param.is_cuda for param in row.params)
            if foreach:
                torch._foreach_add_(row.params, direction, alpha=-rate)
            else:
                for param, entry in zip(row.params, direction, strict=True):
                    param.add_(entry, alpha=-rate)

    def objective_after(self, directions: list[list[Tensor]], rates: list[float]) -> float:
        """Objective after a move, which is undone whatever happens."""
        start = [param.clone() for param in self.params]
        moved = [
            torch.add(param, entry, alpha=-rate)
            for row, direction, rate in zip(self.rows, directions, rates, strict=True)
            for param, entry in zip(row.params, direction, strict=True)
        ]
        try:
            set_parameters(self.params, moved)
            return self.several().objective_here()
        finally:
            set_parameters(self.params, start)

    def backtrack(self, directions: list[list[Tensor]], rates: list[float]) -> None:
        """Halve the step until the objective does not rise, and move; stay if it always does."""
        objective = self.several().objective
        for _ in range(self.option("max_trials")):
            if self.objective_after(directions, rates) <= objective:
                self.move(directions, rates)
                return
            rates = [0.5 * rate for rate in rates]
