"""Initial value problems with known solutions, and a tool that measures orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.tableaus import Tableau

EPS = float(np.finfo(np.float64).eps)

ALGORITHMS = (
    *("Euler", "Midpoint", "Heun", "Ralston", "BS3", "RK4"),
    *("Tsit5", "DP5", "DP8", "Vern7", "Vern9"),
)
"""Names of the explicit Runge-Kutta methods every engine has."""


@dataclass(frozen=True)
class Known:
    """`du/dt = f(t, u)` on `tspan` with its closed solution."""

    f: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    tspan: tuple[float, float]

    @property
    def u0(self) -> Tensor:
        return self.at(self.tspan[0])

    @property
    def length(self) -> float:
        return self.tspan[1] - self.tspan[0]

    def at(self, t: float | Tensor) -> Tensor:
        """The solution `(N,)` at a time, or `(m, N)` at times `(m,)`, in float64."""
        return self.exact(torch.as_tensor(t, dtype=torch.float64))


def _swirl(
    a: float,
    b: float,
    angle: Callable[[Tensor], Tensor],
    rate: Callable[[Tensor], Tensor],
) -> Known:
    """Radius `(1 + a t^2)^-b` at the given angle: two components, coupled and non-autonomous."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        x, y = u.unbind(-1)
        growth = -2 * a * b * t * (x**2 + y**2) ** (0.5 / b)
        return torch.stack((growth * x - rate(t) * y, growth * y + rate(t) * x), -1)

    def exact(t: Tensor) -> Tensor:
        radius = (1 + a * t**2) ** -b
        return torch.stack((radius * torch.cos(angle(t)), radius * torch.sin(angle(t))), -1)

    return Known(f, exact, (-1.0, 1.0))


KNOWN: dict[str, Known] = {
    # u = 1 / (1 + t^2): a Riccati equation with a rational solution.
    "riccati": Known(
        lambda t, u: -2 * t * u**2, lambda t: (1 / (1 + t**2)).unsqueeze(-1), (-1.0, 1.0)
    ),
    "swirl": _swirl(1.0, 0.5, angle=torch.square, rate=lambda t: 2 * t),
    "fast-swirl": _swirl(2.0, 1.0, angle=lambda t: t, rate=torch.ones_like),
    "swing": _swirl(2.0, 0.5, angle=torch.sin, rate=torch.cos),
    # Onto the unit circle from inside: a Bernoulli equation for the radius.
    "spiral": Known(
        lambda t, u: (
            u * (1 - (u**2).sum(-1, keepdim=True)) + 2 * torch.stack((-u[..., 1], u[..., 0]), -1)
        ),
        lambda t: (
            torch.stack((torch.cos(2 * t), torch.sin(2 * t)), -1)
            / torch.sqrt(1 + 3 * torch.exp(-2 * t)).unsqueeze(-1)
        ),
        (0.0, 2.0),
    ),
}


def observed_order(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of `log(error)` over `log(size)`, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def dense_rounding(tableau: Tableau, h: float, u: Tensor, k: Tensor) -> float:
    """How far two ways of adding up `u + h sum_ij w_ij theta^j k_i` may be apart.

    Machine epsilon times the sum of the sizes of what is added (Vern9's weights sum to 2e5), four
    times: either way rounds the weights, their products and the sum.

    Args:
        tableau: with the interpolant's weights `w`.
        h: size of the largest step.
        u: states of the solution.
        k: derivatives there.
    """
    weights = sum(abs(w) for row in tableau.interpolant.weights for w in row)
    return 4 * EPS * float(u.abs().max() + abs(h) * k.abs().max() * weights)


def step_rounding(tableau: Tableau, steps: int, h: float, u: Tensor, k: Tensor) -> float:
    """The same of states at the ends of steps, whose roundings add up; stages round too."""
    rows = [*tableau.a, tableau.b]
    weights = sum(abs(w) for row in rows for w in row)
    return 4 * EPS * steps * float(u.abs().max() + abs(h) * k.abs().max() * weights)
