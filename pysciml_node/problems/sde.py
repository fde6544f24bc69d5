"""Stochastic initial value problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import Problem, Time, VectorField, check_field, ends_of
from pysciml_node.problems.state import State, StateSpec

Noise = Literal["diagonal", "scalar", "additive", "general"]
Interpretation = Literal["ito", "stratonovich"]

_SHORTEST = 1e-290
"""Billionths of a shorter interval, which Brownian paths are looked at in, are no numbers."""


@dataclass(frozen=True)
class SDEProblem(Problem):
    """The stochastic equation `du = f(t, u) dt + g(t, u) dW`, or with a third argument `p`.

    | `noise` | `g(t, u)` has shape | Brownian motions |
    |---|---|---|
    | `"diagonal"` | `u`'s; entry `i` may depend on entry `i` of `u` alone | one for each entry |
    | `"scalar"` | `u`'s | one for each sample |
    | `"additive"` | `u`'s, or `(*u.shape, m)`; does not depend on `u` | each entry's, or `m` |
    | `"general"` | `(*u.shape, m)` | `m` for each sample |

    A state of two or more axes is a batch, and each sample has Brownian motions of its own. A state
    of one axis is a single system.

    Args:
        drift: `f`; takes `t` (a 0-d tensor) and the state, and returns the state's structure.
        diffusion: `g`, likewise, in the shape that `noise` asks for.
        u0: initial state: a tensor of any shape (batch first), or a tuple, named tuple
            or dict of tensors of one dtype and device (diagonal noise, and additive noise of the
            state's structure); float32 or float64.
        tspan: `(t0, t1)`, numbers with `t0 < t1`; tensors are read now.
        noise: the structure of `g`.
        interpretation: of the integral: `"ito"`, or `"stratonovich"`.
        p: extra argument of both: a tensor, or a tuple, list or dict of tensors; receives
            gradients.

    Raises:
        TypeError: `drift` or `diffusion` is not callable, `u0` is no real tensor, or `tspan` is no
            pair.
        ValueError: noise or interpretation is unknown, or the interval does not go forward.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.SDEProblem(lambda t, u: -u, lambda t, u: 0.1 * u,
        ...                          torch.ones(8, 3), (0.0, 1.0))
        >>> generator = torch.Generator().manual_seed(0)
        >>> psn.solve(problem, psn.SOSRI(), generator=generator).u1.shape
        torch.Size([8, 3])

    Reference: P. E. Kloeden, E. Platen, Numerical Solution of Stochastic Differential Equations,
    Springer 1992, chapters 4 and 10.
    """

    functions: ClassVar[tuple[str, ...]] = ("drift", "diffusion")
    _elsewhere: ClassVar[Mapping[str, str]] = {**Problem._elsewhere, "f": "drift", "g": "diffusion"}

    drift: VectorField
    diffusion: VectorField
    u0: State
    tspan: tuple[Time, Time]
    noise: Noise = "diagonal"
    interpretation: Interpretation = "ito"
    p: Any = None
    spec: StateSpec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        hint = "The order is SDEProblem(drift, diffusion, u0, (t0, t1), noise, ...)."
        for name in self.functions:
            check_field(name, getattr(self, name), hint)
        for name, known in (("noise", Noise), ("interpretation", Interpretation)):
            checks.choice(name, getattr(self, name), get_args(known))
        self._check()
        if self.spec.dtype.is_complex:
            raise TypeError(
                f"the state of an SDEProblem must be real, but u0 is {self.spec.dtype}.\n"
                "  Give the real and imaginary parts as two entries."
            )
        if self.t1 < self.t0:
            raise ValueError(
                f"an SDEProblem goes forward in time, but tspan is ({self.t0}, {self.t1}).\n"
                "  Write t = t0 - s, and the drift and diffusion as functions of s."
            )
        if any(isinstance(t, Tensor) and t.requires_grad for t in self.tspan):
            raise ValueError(
                "the ends of an SDEProblem's tspan must not require gradients: Brownian motion "
                "has no derivative in time.\n  Give numbers: (float(t0), float(t1))."
            )
        checks.settle(self, tspan=ends_of(self))
        if self.t1 - self.t0 < _SHORTEST:
            raise ValueError(
                f"the interval of an SDEProblem must be {_SHORTEST} long or longer, but tspan is "
                f"({self.t0}, {self.t1}).\n  Take another unit of time."
            )
        if self.spec.keys is not None and self.noise in ("scalar", "general"):
            raise ValueError(
                f"{self.noise} noise needs a state of one tensor, but u0 has "
                f"{len(self.spec.keys)} parts.\n  Stack them into one tensor."
            )

    @property
    def f(self) -> VectorField:
        """The drift."""
        return self.drift

    @property
    def samples(self) -> int:
        """Number of samples with a Brownian motion of their own (scalar and general noise)."""
        shape = self.spec.shapes[0]
        return shape[0] if len(shape) >= 2 else 1
