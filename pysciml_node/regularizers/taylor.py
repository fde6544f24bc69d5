"""Regularization of a high derivative of the solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.regularizers.integral import (
    IntegralRegularizer,
    Reduction,
    check_reduction,
    square_norm,
)
from pysciml_node.regularizers.probes import Probes
from pysciml_node.regularizers.rates import FieldPoint, Rate
from pysciml_node.schedules import Schedule

Field = Callable[[Tensor, Tensor], Tensor]


def total_derivative(field: Field, order: int) -> Field:
    """The `order`-th time derivative of solutions of `du/dt = field(t, u)`, as a function of them.

    `d1 = f` and `d(k+1) = (d/dt) dk + (d/du) dk . f`, by nested forward-mode differentiation.
    """
    if order == 1:
        return field
    lower = total_derivative(field, order - 1)

    def derivative(t: Tensor, u: Tensor) -> Tensor:
        direction = (torch.ones_like(t), field(t, u))
        tangent: Tensor = torch.func.jvp(lower, (t, u), direction)[1]
        return tangent

    return derivative


@dataclass(eq=False)
class _Derivative:
    """The squared norm of a total derivative."""

    order: int
    batch: int
    reduction: Reduction

    def __call__(self, point: FieldPoint) -> Tensor:
        derivative = point.f
        if self.order > 1:
            derivative = total_derivative(point.field, self.order)(point.t, point.u)
        return square_norm(derivative, self.batch, self.reduction)


class TaylorDerivative(IntegralRegularizer):
    """Squared `K`-th total derivative along the solution, `int ||d^K u / dt^K||^2 dt`.

    A method of order `K - 1` takes steps as long as this derivative is small. Costs grow
    exponentially with `K`.

    Args:
        order: `K`, at least 1 (1 is the kinetic energy).
        weight: factor of the penalty in the loss, or a schedule of it.
        reduction: over dimensions; `"mean"` as in the paper's code, or `"sum"`.
        name: key in `Solution.penalties`.

    Raises:
        ValueError: an order below 1.

    Reference: Kelly et al., Learning Differential Equations that are Easy to Solve, arXiv
    2007.04504, equation 3.
    """

    def __init__(
        self,
        order: int,
        weight: float | Schedule = 1.0,
        *,
        reduction: Reduction = "mean",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.order, self.reduction = checks.whole("order", order), check_reduction(reduction)

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand."""
        if probes is None:
            raise TypeError(
                "TaylorDerivative needs a single-tensor state.\n  Stack the parts into one tensor."
            )
        return _Derivative(self.order, probes.batch, self.reduction)
