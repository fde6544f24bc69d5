"""Regularizers that are integrals along the solution: kinetic energy, Jacobian norm, any other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.checks import choice
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import tensors_of
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.regularizers.probes import (
    Distribution,
    Probes,
    batch_of,
    check_distribution,
    kept_basis,
    samples_of,
    squares,
)
from pysciml_node.regularizers.rates import FieldPoint, Rate
from pysciml_node.schedules import Schedule
from pysciml_node.solutions.solution import Solution

Reduction = Literal["mean", "sum"]


def check_reduction(reduction: str) -> Reduction:
    """The name of a reduction over the dimensions of a state.

    Raises:
        ValueError: an unknown name.
    """
    return choice("reduction", reduction, get_args(Reduction))


def square_norm(x: Tensor, batch: int, reduction: Reduction) -> Tensor:
    """Sum or mean of the squared magnitudes of each sample, `(B,)`."""
    entries = squares(samples_of(x, batch))
    return entries.mean(1) if reduction == "mean" else entries.sum(1)


@dataclass(eq=False)
class _Given:
    """An integrand of the user's; of a single system, whose samples are not told apart, its mean.

    Rates are objects, whose parts can be seen, where a field with them is translated.
    """

    lasting: ClassVar[bool] = True
    fn: Callable[[Tensor, Any, Any], Tensor]
    single: bool

    def __call__(self, point: FieldPoint) -> Tensor:
        value: Tensor = self.fn(point.t, point.u, point.f)
        single = self.single and point.u.ndim == 1
        return value.mean() if single and value.shape == point.u.shape else value


@dataclass(eq=False)
class _Speed:
    """The squared norm of the derivative."""

    lasting: ClassVar[bool] = True
    batch: int
    reduction: Reduction

    def __call__(self, point: FieldPoint) -> Tensor:
        parts = [samples_of(part, self.batch) for part in tensors_of(point.f)]
        return square_norm(torch.cat(parts, 1), self.batch, self.reduction)


_speed = lru_cache(maxsize=64)(_Speed)


@dataclass(eq=False)
class _Frobenius:
    """The squared norm of the Jacobian's products with some vectors."""

    vectors: list[Tensor]
    batch: int
    reduction: Reduction
    lasting: bool = False

    def __call__(self, point: FieldPoint) -> Tensor:
        norms = [square_norm(point.pullback(e), self.batch, self.reduction) for e in self.vectors]
        return torch.stack(norms).sum(0)


@lru_cache(maxsize=16)
def _exact(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, batch: int, reduction: Reduction
) -> _Frobenius | None:
    """The same by the vectors that are kept for states of a kind, where they are."""
    like = torch.empty(shape, dtype=dtype, device=device)
    kept = kept_basis(like, batch)
    return None if kept is None else _Frobenius(kept, batch, reduction, lasting=True)


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
        # An empty batch has no penalty. Backward in time the integral runs the other way.
        mean = value.mean() if value.numel() else value.sum()
        return mean if solution.problem.direction == 1 else -mean


class Integral(IntegralRegularizer):
    """Any integrand along the solution.

    Args:
        fn: `fn(t, u, f)` with the state and its derivative; returns one real number a sample,
            `(B,)`. For a state with one axis it returns one number, or one for each entry, and
            then their mean is integrated.
        name: key in `Solution.penalties`.
        weight: factor of the penalty in the loss, or a schedule of it.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> length = psn.Integral(lambda t, u, f: f.norm(dim=1), "length")
        >>> node = psn.NeuralODE(lambda t, u: -u, regularizers=[length])
        >>> round(float(node(torch.ones(1, 1)).penalties["length"]), 4)
        0.6321
    """

    _given: _Given | None = None

    def __init__(
        self, fn: Callable[[Tensor, Any, Any], Tensor], name: str, weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(weight, checks.text("name", name))
        self.fn = checks.function("fn", fn, "t", "u", "f")

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand."""
        single, known = probes is not None and probes.batch == 1, self._given
        if known is None or known.fn is not self.fn or known.single != single:
            known = self._given = _Given(self.fn, single)
        return known


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
        self.reduction = check_reduction(reduction)

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand."""
        return _speed(batch_of(problem.u0) if probes is None else probes.batch, self.reduction)


class JacobianFrobenius(IntegralRegularizer):
    """Squared Frobenius norm of the field's Jacobian, `int ||df/du||_F^2 dt`.

    It is estimated as `E ||e^T df/du||^2` with one random probe `e` a sample, drawn for each solve
    and fixed through it: a probe that changed between evaluations would make the equation rough.
    For a complex state it is `||df/du||_F^2 + ||df/du*||_F^2`; the second term is 0 for holomorphic
    fields.

    Args:
        weight: factor of the penalty in the loss, or a schedule of it.
        exact: compute the norm itself, by as many vector-Jacobian products as there are
            dimensions; default where there are at most four.
        reduction: over dimensions; `"mean"` as in the paper, or `"sum"`.
        distribution: of the probe's entries, `"rademacher"` (less variance) or `"gaussian"` (the
            paper's).
        generator: draws the probes, on the state's device. The default is the probe of a `CNF` that
            this regularizes if it is of the same distribution, else torch's own generator.
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
        self.exact = None if exact is None else checks.flag("exact", exact)
        self.reduction = check_reduction(reduction)
        self.distribution = check_distribution(distribution)
        self.generator = checks.generator("generator", generator)

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        """The integrand, with its probe drawn."""
        if probes is None:
            raise TypeError(
                "JacobianFrobenius needs a single-tensor state.\n  Stack the parts into one tensor."
            )
        vectors = probes.of(self.exact, self.distribution, self.generator)
        batch, like = probes.batch, probes.like
        if probes.are_kept(vectors):
            known = _exact(like.shape, like.dtype, like.device, batch, self.reduction)
            if known is not None and probes.are_kept(known.vectors):
                return known
        return _Frobenius(vectors, batch, self.reduction)
