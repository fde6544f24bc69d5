"""Regularization by a random end of the interval."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.regularizers.base import Regularizer, Times
from pysciml_node.solutions.solution import Solution


class RandomEndTime(Regularizer):
    """STEER: in training integrate to `T ~ U(t1 - b, t1 + b)`; it adds nothing to the loss.

    Where output times are given (a time series), each is moved inside its own interval instead,
    `t_i + U(-1, 1) * b * (t_i - t_(i-1)) / 2` with `b <= 1`; times that coincide stay together.

    Args:
        b: half width of the end time's distribution, less than the length of the interval; for time
            series a share of each gap.
        generator: draws the times; a CPU generator. Default torch's own.

    Raises:
        ValueError: `b` that is not positive or too large.

    Reference: Ghosh et al., STEER: Simple Temporal Regularization For Neural ODEs, arXiv
    2006.10711.
    """

    of_stochastic = False

    def __init__(self, b: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__(0.0)
        self.b = checks.number("b", b, above=0)
        self.generator = checks.generator("generator", generator)

    def _uniform(self, count: int) -> Tensor:
        return 2 * torch.rand(count, generator=self.generator, dtype=torch.float64) - 1

    def prepare(self, problem: ODEProblem, saveat: Times | None) -> tuple[ODEProblem, Times | None]:
        """The problem with its end, or its output times, moved."""
        if saveat is not None:
            return self._jitter(problem, torch.as_tensor(saveat, dtype=torch.float64))
        length = abs(problem.t1 - problem.t0)
        if self.b >= length:
            raise ValueError(
                f"b must be less than the length of the interval, {length}, but is {self.b}.\n"
                f"  Write RandomEndTime({length / 2:g}), or widen tspan."
            )
        # The end may be learned: it moves by a constant.
        end = problem.tspan[1] + self.b * float(self._uniform(1))
        return dataclasses.replace(problem, tspan=(problem.tspan[0], end)), None

    def _jitter(self, problem: ODEProblem, times: Tensor) -> tuple[ODEProblem, Tensor]:
        if self.b > 1:
            raise ValueError(
                f"with output times b is a share of each gap, at most 1, not {self.b}.\n"
                "  Write RandomEndTime(1.0), or leave out saveat to move the end alone."
            )
        fixed = times.detach()
        distinct, place = torch.unique(fixed * problem.direction, return_inverse=True)
        start = problem.t0 * problem.direction
        before = torch.cat((distinct.new_tensor([start]), distinct[:-1]))
        moved = distinct + self._uniform(len(distinct)) * self.b * (distinct - before) / 2
        # The widest moves of neighbours can cross: keep the order.
        moved = torch.cummax(moved, 0).values[place] * problem.direction
        end = problem.tspan[1]
        if moved[-1].item() * problem.direction > problem.t1 * problem.direction:
            end = end + (moved[-1].item() - problem.t1)
        moved = times + (moved - fixed)
        return dataclasses.replace(problem, tspan=(problem.tspan[0], end)), moved

    def forward(self, solution: Solution) -> None:
        """No penalty: the random end is all."""
        return

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"b={self.b}"
