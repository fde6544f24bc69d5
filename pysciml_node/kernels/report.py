"""The effect of an activation on a neural ODE: existence, gradients, and the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pysciml_node.kernels.activations import Activation, Elementwise, as_function, describe
from pysciml_node.kernels.expectations import GaussianExpectation, LeakyReLU, Sinusoid
from pysciml_node.kernels.hermite import Polynomial, derivative

Smoothness = Literal["discontinuous", "C0", "C1", "C2 or smoother"]

_RADII = (8.0, 16.0, 32.0)
_POINTS = 40_001
_GROWTH = 1.2  # a maximum that grows faster than this from radius to radius has no bound
_MAX_DEGREE = 8
_SPACING, _STEEPER = 1e-7, 1.15  # quotients that grow further, below this spacing, have no bound
_SUSPECTS = 32  # grid intervals of largest change, looked at for jumps


@dataclass(frozen=True)
class ActivationReport:
    """The findings, and `str(report)` in words.

    Attributes:
        name: the activation.
        lipschitz: Lipschitz constant of `phi`; `inf` if it has none.
        derivative_lipschitz: Lipschitz constant of `phi'`; `inf` if `phi'` jumps or grows.
        smoothness: number of continuous derivatives seen.
        polynomial_degree: degree if `phi` is a polynomial, else None.
        kinks: where `phi` or `phi'` jumps, or is infinitely steep.
        steep: kinks at which `phi` itself is infinitely steep without a jump, as `sqrt|u|` at 0.
        forward_well_posed: the ODE has one solution, for all time.
        backward_well_posed: so has the adjoint ODE, and the gradients of "optimise then discretise"
            and of "discretise then optimise" agree to first order in the step.
        kernel_positive_definite: the conditions under which NNGP and NTK are strictly positive
            definite for distinct inputs hold (sufficient, not necessary).
    """

    name: str
    lipschitz: float
    derivative_lipschitz: float
    smoothness: Smoothness
    polynomial_degree: int | None
    kinks: tuple[float, ...]
    steep: tuple[float, ...]
    forward_well_posed: bool
    backward_well_posed: bool
    kernel_positive_definite: bool

    def __str__(self) -> str:
        """The findings in words a practitioner can act on."""
        lines = [
            f"{self.name}: {self.smoothness}, Lipschitz constant {self.lipschitz:.4g}, of the "
            f"derivative {self.derivative_lipschitz:.4g}"
        ]
        lines.append(f"  forward ODE:  {self._forward()}")
        lines.append(f"  gradients:    {self._backward()}")
        lines.append(f"  kernel:       {self._kernel()}")
        return "\n".join(lines)

    def _forward(self) -> str:
        if self.forward_well_posed:
            return "well posed: one solution for all time, and it depends Lipschitz on the input."
        if self.smoothness == "discontinuous":
            return (
                "not covered: the activation jumps, so a solution need not exist. "
                "Use a continuous activation."
            )
        if self.steep:
            where = ", ".join(f"{point:.3g}" for point in self.steep)
            return (
                f"not Lipschitz: the slope is unbounded at {where}, where several solutions can "
                "start from one state. Use a Lipschitz activation (softplus, tanh, GELU)."
            )
        return (
            "not Lipschitz: the ODE can blow up in finite time. Keep T and the weights small, "
            "bound the state, or use a Lipschitz activation (softplus, tanh, GELU)."
        )

    def _backward(self) -> str:
        if self.backward_well_posed:
            return (
                "well posed: adjoint (optimise-then-discretise) and backpropagated "
                "(discretise-then-optimise) gradients agree to the order of the step."
            )
        if self.kinks:
            where = ", ".join(f"{kink:.3g}" for kink in self.kinks)
            return (
                f"the derivative is not Lipschitz (it jumps, or is infinitely steep, at {where}): "
                "discretise-then-optimise and optimise-then-discretise gradients need not agree "
                "where a trajectory crosses or rests on the kink, and adaptive solvers take small "
                "steps there. Prefer the discrete adjoint, or softplus/GELU/SiLU instead."
            )
        return (
            "not covered: they grow without bound along a state that does. They are fine as long "
            "as the state stays bounded."
        )

    def _kernel(self) -> str:
        if self.kernel_positive_definite:
            return (
                "strictly positive definite for distinct, non-parallel inputs: gradient descent "
                "on a wide enough network reaches zero training loss at a linear rate."
            )
        if self.polynomial_degree is not None and self.polynomial_degree <= 1:
            return (
                "singular: a linear field makes kernels of rank d (inputs' dimension), so more "
                "than d samples cannot be fitted. Use a nonlinear activation."
            )
        if self.polynomial_degree is not None:
            return (
                f"not guaranteed: polynomial of degree {self.polynomial_degree}. Depth raises the "
                "degree, so the kernel may still be positive definite on a given data set: check "
                "psn.kernels.condition_number."
            )
        return (
            "not covered by the theory, which asks for a Lipschitz activation: check "
            "psn.kernels.condition_number on the data."
        )


def activation_report(act: Activation) -> ActivationReport:
    """A numerical report on an activation's fitness for a neural ODE.

    Lipschitz constants are the largest `|phi'|` and the largest difference quotient of `phi'`
    on grids of 40001 points on [-8, 8], [-16, 16] and [-32, 32]. The constant is `inf` where the
    maximum grows by more than a fifth from each grid to the next, or where the function jumps. A
    jump is an interval over which a change does not shrink as it is bisected to 1e-9. A function is
    infinitely steep where its largest difference quotient still grows as the spacing goes from 1e-7
    to 1e-10. A polynomial is a function whose least-squares fit of degree at most 8 on [-8, 8] is
    exact to 1e-9. These are observations at finitely many points: they miss an activation that
    misbehaves elsewhere, or between them.

    Conditions: the forward ODE is well posed if `phi` is Lipschitz; the adjoint, and the
    agreement of the two gradients, ask for `phi'` Lipschitz as well; the kernels are strictly
    positive definite if `phi` is Lipschitz, nonlinear and not a polynomial.

    Args:
        act: a name, an elementwise callable, or an `nn.Module`.

    Returns:
        The report; `print` it.

    Examples:
        >>> activation_report("relu").backward_well_posed
        False
        >>> activation_report("softplus").kernel_positive_definite
        True

    Reference: Gao, Sun, Liu and Gao, arXiv 2509.22436, Propositions 1, 2 and 5.
    """
    fn = _elementwise(act)
    value_jumps = _jumps(fn)
    slope_jumps = _jumps(lambda u: derivative(fn, u))
    steep = tuple(point for point in _steep(fn) if point not in value_jumps)
    steep_slopes = _steep(lambda u: derivative(fn, u))
    lipschitz = float("inf")
    if not (value_jumps or steep):
        lipschitz = _bound(lambda u: derivative(fn, u))
    if value_jumps or slope_jumps or steep_slopes:
        second = float("inf")
    else:
        second = _bound(lambda u: _quotients(fn, u))
    degree = _polynomial_degree(fn)
    smoothness: Smoothness = "C2 or smoother"
    if value_jumps:
        smoothness = "discontinuous"
    elif slope_jumps or steep:
        smoothness = "C0"
    elif steep_slopes or _jumps(lambda u: derivative(lambda v: _differentiable_slope(fn, v), u)):
        smoothness = "C1"
    forward = bool(np.isfinite(lipschitz))
    return ActivationReport(
        name=describe(act) if not isinstance(act, GaussianExpectation) else str(act),
        lipschitz=lipschitz,
        derivative_lipschitz=second,
        smoothness=smoothness,
        polynomial_degree=degree,
        kinks=tuple(sorted({*value_jumps, *slope_jumps, *steep, *steep_slopes})),
        steep=steep,
        forward_well_posed=forward,
        backward_well_posed=forward and bool(np.isfinite(second)),
        kernel_positive_definite=forward and degree is None,
    )


def _elementwise(act: Activation) -> Elementwise:
    """The activation as a function, also where it was given by its expectation."""
    if isinstance(act, LeakyReLU):
        slope = act.negative_slope
        return lambda u: torch.where(u > 0, u, slope * u)
    if isinstance(act, Sinusoid):
        frequency, phase = act.frequency, act.phase
        return lambda u: torch.sin(frequency * u + phase)
    if isinstance(act, GaussianExpectation) and not isinstance(act, Polynomial):
        raise TypeError(
            f"act must be an activation, but is the expectation {act} of one.\n"
            "  Pass the function itself, such as torch.tanh."
        )
    return as_function(act, "act")


def _differentiable_slope(fn: Elementwise, u: Tensor) -> Tensor:
    """`phi'` with a graph, so that it can be differentiated once more."""
    if not u.requires_grad:
        return derivative(fn, u)
    value = fn(u)
    if not value.requires_grad:
        return torch.zeros_like(u)
    return torch.autograd.grad(value.sum(), u, create_graph=True)[0]


def _grid(radius: float) -> Tensor:
    # an odd shift keeps kinks at round numbers strictly inside an interval
    shift = 0.37 * 2 * radius / (_POINTS - 1)
    return torch.linspace(-radius, radius, _POINTS, dtype=torch.float64) + shift


def _jumps(fn: Elementwise) -> tuple[float, ...]:
    """Points of [-8, 8] at which a function jumps, by bisecting the largest changes."""
    grid = _grid(_RADII[0])
    values = fn(grid).detach()
    change = (values[1:] - values[:-1]).abs()
    scale = max(float(values.abs().max()), 1e-12)
    largest, where = change.topk(_SUSPECTS)
    jumps = []
    for k in where[largest > 1e-5 * scale].tolist():
        left, right, whole = float(grid[k]), float(grid[k + 1]), float(change[k])
        while right - left > 1e-9:
            middle = (left + right) / 2
            low, mid, high = fn(torch.tensor([left, middle, right], dtype=torch.float64)).tolist()
            left, right = (left, middle) if abs(mid - low) > abs(high - mid) else (middle, right)
        ends = fn(torch.tensor([left, right], dtype=torch.float64)).detach()
        if float((ends[1] - ends[0]).abs()) > 0.5 * whole:
            jumps.append(_place(left, right))
    return tuple(jumps)


def _steep(fn: Elementwise) -> tuple[float, ...]:
    """Points of [-8, 8] near which difference quotients grow without bound."""
    grid = _grid(_RADII[0])
    change = fn(grid).detach().diff().abs()
    steep = []
    for k in change.topk(_SUSPECTS).indices.tolist():
        left, right = float(grid[max(k - 1, 0)]), float(grid[min(k + 2, _POINTS - 1)])
        quotients: dict[float, float] = {}
        while right - left > 1e-9:
            points = torch.linspace(left, right, 11, dtype=torch.float64)
            largest, j = (fn(points).detach().diff().abs() * (10 / (right - left))).max(0)
            quotients[(right - left) / 10] = float(largest)
            left, right = float(points[max(int(j) - 1, 0)]), float(points[min(int(j) + 2, 10)])
        before = next(q for spacing, q in quotients.items() if spacing <= _SPACING)
        if not max(quotients.values()) <= _STEEPER * before:
            steep.append(_place(left, right))
    return tuple(dict.fromkeys(steep))


def _place(left: float, right: float) -> float:
    return round((left + right) / 2, 6) + 0.0


def _quotients(fn: Elementwise, u: Tensor) -> Tensor:
    slopes = derivative(fn, u)
    return (slopes[1:] - slopes[:-1]) / (u[1:] - u[:-1])


def _bound(fn: Elementwise) -> float:
    """Largest absolute value, or infinity if it grows with the interval."""
    largest = [float(fn(_grid(radius)).abs().nan_to_num(float("inf")).max()) for radius in _RADII]
    growing = all(wide > _GROWTH * narrow + 1e-9 for narrow, wide in pairwise(largest))
    return float("inf") if growing or not np.isfinite(largest[-1]) else max(largest)


def _polynomial_degree(fn: Elementwise) -> int | None:
    x = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    y = fn(torch.as_tensor(_RADII[0] * x)).detach().numpy()
    scale = max(float(np.abs(y).max()), 1e-12)
    for degree in range(_MAX_DEGREE + 1):
        fit = np.polynomial.chebyshev.Chebyshev.fit(x, y, degree, domain=[-1, 1])
        if float(np.abs(fit(x) - y).max()) < 1e-9 * scale:
            return degree
    return None
