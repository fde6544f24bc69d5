"""Continuous normalizing flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.flows.base import Base, Flow, Mapped
from pysciml_node.layers.neural_ode import KINDS, NeuralODE
from pysciml_node.layers.options import SolverOptions, check_options
from pysciml_node.problems.ode import ODEProblem, Time
from pysciml_node.problems.state import StateSpec
from pysciml_node.regularizers.probes import Distribution as ProbeDistribution
from pysciml_node.regularizers.probes import Probes, check_distribution, samples_of
from pysciml_node.regularizers.rates import FieldPoint, Rate
from pysciml_node.translation.recent import Recent

_LOG_DET = "log_det"


@dataclass(eq=False)
class Divergence:
    """The trace of the field's Jacobian, or its estimate, one number a sample.

    Attributes:
        vectors: unit vectors, or a probe.
        batch: number of samples.
        lasting: whether later solves have the same vectors.
    """

    vectors: list[Tensor]
    batch: int
    lasting: bool = False
    ends_at_arguments: ClassVar[bool] = True  # it asks the point, which does

    def __call__(self, point: FieldPoint) -> Tensor:
        """The rate at a point."""
        # Unit vectors are the same for all samples.
        alike = self.lasting
        products = [point.pullback(e, alike) * (e[:1] if alike else e) for e in self.vectors]
        return torch.stack([samples_of(x, self.batch).sum(1) for x in products]).sum(0)

    def is_of(self, vectors: list[Tensor], batch: int) -> bool:
        """Whether it is the rate of these very vectors."""
        same = len(vectors) == len(self.vectors) and all(map(is_, vectors, self.vectors))
        return same and self.batch == batch


class CNF(Flow):
    """A continuous normalizing flow: data flow along a field to a simple distribution.

    With `du/dt = f(t, u)` from the data `u(t0) = x` to `u(t1)`, of base density `q`,

        log p(x) = log q(u(t1)) + int_{t0}^{t1} tr(df/du) dt.

    The log-determinant is an extra state under the same tolerances, and takes part in the choice
    of steps. Its trace is exact, by one vector-Jacobian product a dimension, or Hutchinson's
    estimate `e^T (df/du) e` with a probe `e` drawn for each solve and fixed through it; then
    `log_prob` is unbiased, and random. A `JacobianFrobenius` regularizer shares the probe and the
    product.

    Samples flow from the base back to the data, as plain solves without extra states.

    Args:
        field: the vector field `f(t, u)`; usually an `nn.Module`, such as a `TimedField`.
        algorithm: default `Tsit5()`.
        tspan: from data to base.
        event_shape: shape of one sample, or the number of entries of a vector; needed to draw
            samples without a `base`.
        base: distribution of one sample at `t1`, or a module that makes it; default a standard
            normal one. Its parameters are trained with the flow's.
        exact: compute the trace itself; default where there are at most four dimensions. The
            attribute may be changed at any time, for example for evaluation.
        distribution: of the probe's entries, `"rademacher"` (less variance) or `"gaussian"`.
        generator: draws the probes; of the state's device. Default torch's own.
        options: as for `NeuralODE`, but `saveat`. The estimates of local and global regularizers
            are of state and log-determinant, which drive the steps.

    Raises:
        TypeError: a field that is not callable, an unknown option, a regularizer of another kind.
        ValueError: an unknown distribution of probes, a base of another shape.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> from pysciml_node.flows import CNF
        >>> flow = CNF(lambda t, u: -u, event_shape=2, rtol=1e-8, atol=1e-8)
        >>> x = flow.sample((5,))  # normal, of standard deviation e
        >>> exact = torch.distributions.Normal(0.0, torch.e).log_prob(x).sum(1)
        >>> torch.allclose(flow.log_prob(x), exact, atol=1e-5)
        True

    Reference: Grathwohl et al., FFJORD, arXiv 1810.01367; Chen et al., Neural Ordinary Differential
    Equations, arXiv 1806.07366, section 4.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        algorithm: Algorithm | None = None,
        tspan: tuple[Time, Time] = (0.0, 1.0),
        *,
        event_shape: int | Sequence[int] | None = None,
        base: Base | None = None,
        exact: bool | None = None,
        distribution: ProbeDistribution = "rademacher",
        generator: torch.Generator | None = None,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(event_shape, base)
        distribution_at_end = self.base_distribution()
        over = None if distribution_at_end is None else distribution_at_end.event_shape
        if over is not None and self.event_shape != over:
            raise ValueError(
                f"base must be over the shape of a sample, {tuple(self.event_shape or ())}, but is "
                f"over {tuple(over)}.\n  Give event_shape={tuple(over)}, or another base."
            )
        if "saveat" in options:
            raise TypeError(
                "a CNF takes no saveat, since it is solved in both directions.\n"
                "  Its solution at any times: cnf.node(x)(times)."
            )
        check_options(type(self), options)
        self.exact = None if exact is None else checks.flag("exact", exact)
        self.distribution = check_distribution(distribution)
        self.generator = checks.generator("generator", generator)
        self.node = NeuralODE(field, algorithm, tspan, **options)
        self._traces: Recent[StateSpec, Divergence] = Recent(KINDS)

    def transform(self, x: Tensor) -> Mapped:
        """Carry data to the base's space, from `t0` to `t1`."""
        return self._flow(x, self.node.tspan)

    def inverse(self, z: Tensor) -> Mapped:
        """Carry a batch of the base's space back to data, from `t1` to `t0`.

        Regularizers move no end: the inverse of a flow starts and ends where the data do.
        """
        return self._flow(z, self._backward, whole=True)

    def decode(self, z: Tensor) -> Tensor:
        """The data of `inverse`, by a plain solve."""
        u: Tensor = self.node.integrate(z, tspan=self._backward, regularize=False).u1
        return u

    @property
    def _backward(self) -> tuple[Time, Time]:
        t0, t1 = self.node.tspan
        return t1, t0

    def _flow(self, u: Tensor, tspan: tuple[Time, Time], *, whole: bool = False) -> Mapped:
        driven = {_LOG_DET: self._divergence}
        solution = self.node.integrate(u, tspan=tspan, driven=driven, batch=len(u), whole=whole)
        return Mapped(
            solution.u1,
            solution.integrals[_LOG_DET],
            solution.penalty,
            solution.penalties,
            solution.stats.nfe,
        )

    def _divergence(self, problem: ODEProblem, probes: Probes | None) -> Rate:
        if probes is None:
            raise TypeError("a flow's state must be one tensor.\n  Stack the parts into one.")
        if problem.spec.dtype.is_complex:
            raise TypeError(
                f"a flow's state must be real, but is {problem.spec.dtype}.\n"
                "  Flow its real view: torch.view_as_real(x)."
            )
        vectors = probes.of(self.exact, self.distribution, self.generator)
        known = self._traces.get(problem.spec)
        if known is not None and known.is_of(vectors, probes.batch):
            return known
        rate = Divergence([*vectors], probes.batch)
        rate.lasting = probes.are_kept(vectors) and probes.batch == len(probes.like)
        if rate.lasting:  # a random probe is another at each solve
            self._traces[problem.spec] = rate
        return rate

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        trace = {None: "auto", True: "exact", False: "hutchinson"}[self.exact]
        return f"event_shape={self.event_shape}, trace={trace}, probes={self.distribution}"
