"""Regularizers that are integrals along the solution: kinetic energy, Jacobian norm, any other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import tensors_of
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.regularizers.probes import Distribution, Probes, check_distribution, samples_of
from pysciml_node.regularizers.rates import FieldPoint, Rate
from pysciml_node.schedules import Schedule
from pysciml_node.solutions.solution import Solution

Reduction = Literal["mean", "sum"]


def _reduce(squares: Tensor, reduction: Reduction) -> Tensor:
    """Per sample, `(B, D)` to `(B,)`."""
    return squares.mean(1) if reduction == "mean" else squares.sum(1)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", but is {reduction!r}.')


class IntegralRegularizer(Regularizer):
    """Base of regularizers `R = mean over samples of int rate(t, u, f) |dt|`.

    The integral is an extra state of the solve: it has the solution's order of accuracy, never
    drives the step size, and is dropped in eval mode.
    """

    of_stochastic = False

    @abstractmethod
    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand for one solve, one number a sample; random choices are made here, once.

        Args:
            problem: what is solved.
            probes: of the Jacobian; `None` for a state of several tensors.
        """

    def forward(self, solution: Solution) -> Tensor:
        """The penalty, a 0-d tensor."""
        value = solution.integrals.get(self.name)
        if value is None:
            raise ValueError(
                f"the solution holds no integral named {self.name!r}.\n"
                "  Solve through NeuralODE(..., regularizers=[...]) in training mode."
            )
        # Backward in time the integral runs the other way.
        return value.mean() * solution.problem.direction


class Integral(IntegralRegularizer):
    """Any integrand along the solution.

    Args:
        fn: `fn(t, u, f)` with the state and its derivative; returns one number a sample, `(B,)`.
        name: key in `Solution.penalties`.
        weight: factor of the penalty in the loss, or a schedule of it.

    Example:
        >>> import torch, pysciml_node as psn
        >>> length = psn.Integral(lambda t, u, f: f.norm(dim=1), "length")
        >>> node = psn.NeuralODE(lambda t, u: -u, regularizers=[length])
        >>> round(float(node(torch.ones(1, 1)).penalties["length"]), 4)
        0.6321
    """

    def __init__(
        self, fn: Callable[[Tensor, Any, Any], Tensor], name: str, weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(weight, name)
        self.fn = fn

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand."""
        return lambda point: self.fn(point.t, point.u, point.f)


class KineticEnergy(IntegralRegularizer):
    """Kinetic energy along the solution, `int ||f||^2 dt`, the cost of optimal transport.

    Args:
        weight: factor of the penalty in the loss, or a schedule of it.
        reduction: over dimensions; `"mean"` as in the paper, so that the weight does not depend on
            the dimension, or `"sum"`. (The paper's code has a further factor 1/2.)
        name: key in `Solution.penalties`.

    Reference: Finlay et al., How to train your neural ODE, arXiv 2002.02798, equation 17.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        reduction: Reduction = "mean",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        _check_reduction(reduction)
        self.reduction: Reduction = reduction

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand."""

        def rate(point: FieldPoint) -> Tensor:
            parts = [samples_of(part) for part in tensors_of(point.f)]
            return _reduce(torch.cat(parts, 1).abs().square(), self.reduction)

        return rate


class JacobianFrobenius(IntegralRegularizer):
    """Squared Frobenius norm of the field's Jacobian, `int ||df/du||_F^2 dt`.

    Estimated as `E ||e^T df/du||^2` with one random probe `e` a sample, drawn for each solve and
    fixed through it (a probe that changed between evaluations would make the equation rough).

    Args:
        weight: factor of the penalty in the loss, or a schedule of it.
        exact: compute the norm itself, by as many vector-Jacobian products as there are
            dimensions; default where there are at most four.
        reduction: over dimensions; `"mean"` as in the paper, or `"sum"`.
        distribution: of the probe's entries, `"rademacher"` (less variance) or `"gaussian"` (the
            paper's).
        generator: draws the probes; of the state's device. Default the probe of a `CNF` that this
            regularizes, if it is of the same distribution, else torch's own generator.
        name: key in `Solution.penalties`.

    Reference: Finlay et al., How to train your neural ODE, arXiv 2002.02798, equation 17 and
    Algorithm 1.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        exact: bool | None = None,
        reduction: Reduction = "mean",
        distribution: Distribution = "rademacher",
        generator: torch.Generator | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        _check_reduction(reduction)
        self.exact, self.reduction = exact, reduction
        self.distribution = check_distribution(distribution)
        self.generator = generator

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand, with its probe drawn."""
        if probes is None:
            raise TypeError(
                "JacobianFrobenius needs a single-tensor state.\n  Stack the parts into one tensor."
            )
        vectors = probes.of(self.exact, self.distribution, self.generator)
        divisor = samples_of(probes.like).shape[1] if self.reduction == "mean" else 1

        def rate(point: FieldPoint) -> Tensor:
            squares = [samples_of(point.pullback(e)).square().sum(1) for e in vectors]
            return torch.stack(squares).sum(0) / divisor

        return rate
