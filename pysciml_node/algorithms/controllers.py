"""Step size controllers: how the next step follows from the error of the last ones.

All are written for the scaled error `e` of an attempted step (accepted where `e <= 1`) and the
exponent `k = error_order + 1` of the method. The parameter names and defaults are those of
OrdinaryDiffEq.jl.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.elementwise import ARRAYS, NUMBERS, Array, Maths

Norm = Callable[[Tensor], Tensor]
"""The size of a flat vector of scaled errors, a 0-d tensor."""


class StepSizes(ABC):
    """The running state of a controller during one solve.

    With `ARRAYS` for its functions it is that of many solves, each with a size, an error and a
    memory of its own.
    """

    def attempts(self, t: float, u: Tensor, h: float) -> None:  # noqa: B027 - most do not listen
        """Told of each attempt before it is made: a step of `h` from the flat state `u` at `t`."""

    def accepts(self, h: float, error: float) -> bool:
        """Whether an attempt of `h` with scaled error `error` becomes a step."""
        return error <= 1.0

    @abstractmethod
    def accepted(self, h: float, error: float) -> float:
        """Size of the next step after `h` was accepted with scaled error `error <= 1`."""

    @abstractmethod
    def rejected(self, h: float, error: float) -> float:
        """Size of the next attempt after `h` was rejected (`error > 1`, or not finite)."""


class ManySizes(StepSizes):
    """Step sizes by formulas that hold for numbers and for arrays, entry by entry.

    Attributes:
        memory: what it keeps of the steps before.
    """

    memory: tuple[Any, ...]

    @abstractmethod
    def accepted(self, h: Any, error: Any) -> Any:
        """Sizes of the next steps after `h` were accepted."""

    @abstractmethod
    def rejected(self, h: Any, error: Any) -> Any:
        """Sizes of the next attempts after `h` were rejected."""

    def following(self, h: Array, error: Array, accepted: Array) -> Array:
        """Sizes of the next attempts `(M,)` of solves of which some accepted their step.

        Args:
            h: sizes of the last attempts, `(M,)`.
            error: their scaled errors, `(M,)`.
            accepted: which were accepted, `(M,)`.
        """
        before = self.memory
        sizes: Array = self.accepted(h, error)
        rejecting = np.flatnonzero(~accepted)
        if not len(rejecting):
            return sizes
        for new, old in zip(self.memory, before, strict=True):
            if new is not old:
                new[rejecting] = old[rejecting]
        memory = self.memory
        self.memory = tuple(x[rejecting] for x in memory)
        sizes[rejecting] = self.rejected(h[rejecting], error[rejecting])
        self.memory = memory
        return sizes

    def keep(self, rows: Array) -> None:
        """Go on with some of the solves."""
        self.memory = tuple(x[rows] for x in self.memory)


class Controller(checks.Configured, ABC):
    """Base of all controllers: a frozen description; `start` begins a solve with it."""

    adaptive = True

    @property
    def norm(self) -> Norm | None:
        """What scaled errors are measured by; `None` for their root-mean-square."""
        return None

    @abstractmethod
    def start(self, error_order: float) -> StepSizes:
        """Begin a solve with a method whose embedded solution has order `error_order`."""

    def start_many(self, error_order: float, count: int) -> ManySizes | None:
        """Begin many solves at once; `None` where the control is for one at a time.

        Args:
            error_order: order of the embedded solution.
            count: number of solves.
        """
        return None


_GAMMA, _QMIN, _QMAX = 0.9, 0.2, 10.0
"""The usual limits of a controller, which are not checked again: one may be made for each solve."""


def _settle_limits(controller: PIController | IController) -> None:
    if controller.gamma is _GAMMA and controller.qmin is _QMIN and controller.qmax is _QMAX:
        return
    checks.settle(
        controller,
        gamma=checks.number("gamma", controller.gamma, above=0, at_most=1),
        qmin=checks.number("qmin", controller.qmin, above=0, below=1),
        qmax=checks.number("qmax", controller.qmax, above=1),
    )


@dataclass(frozen=True)
class PIController(Controller):
    """Proportional-integral control, `h <- h * gamma * e**-beta1 * e_previous**beta2`.

    The default of the adaptive methods: it damps the oscillation of step sizes that plain integral
    control shows near the stability limit.

    Args:
        beta1: exponent of the present error; default `7 / (10 k)`.
        beta2: exponent of the previous error; default `2 / (5 k)`.
        gamma: safety factor.
        qmin: smallest factor from one step to the next.
        qmax: largest factor from one step to the next.

    Reference: K. Gustafsson, ACM Trans. Math. Softw. 17 (1991) 533-554; Hairer and Wanner,
    Solving Ordinary Differential Equations II, section IV.2.
    """

    beta1: float | None = None
    beta2: float | None = None
    gamma: float = _GAMMA
    qmin: float = _QMIN
    qmax: float = _QMAX

    def __post_init__(self) -> None:
        _settle_limits(self)
        # Above 1 the power of a large error would overflow; without beta1 steps would not shrink.
        for name, above in (("beta1", 0.0), ("beta2", -1.0)):
            if getattr(self, name) is not None:
                checks.settle(
                    self, **{name: checks.number(name, getattr(self, name), above=above, at_most=1)}
                )

    def exponents(self, error_order: float) -> tuple[float, float]:
        """`(beta1, beta2)` for a method whose embedded solution has order `error_order`."""
        k = error_order + 1
        return (
            7 / (10 * k) if self.beta1 is None else self.beta1,
            2 / (5 * k) if self.beta2 is None else self.beta2,
        )

    def start(self, error_order: float) -> StepSizes:
        """Begin a solve."""
        return _PISizes(self.exponents(error_order), self)

    def start_many(self, error_order: float, count: int) -> ManySizes:
        """Begin many solves at once."""
        return _PISizes(self.exponents(error_order), self, ARRAYS, count)


@dataclass(frozen=True)
class IController(Controller):
    """Integral (elementary) control, `h <- h * gamma * e**(-1/k)`.

    Args:
        gamma: safety factor.
        qmin: smallest factor from one step to the next.
        qmax: largest factor from one step to the next.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4.
    """

    gamma: float = _GAMMA
    qmin: float = _QMIN
    qmax: float = _QMAX

    def __post_init__(self) -> None:
        _settle_limits(self)

    def exponents(self, error_order: float) -> tuple[float, float]:
        """`(1/k, 0)`: integral control is PI control without memory."""
        return 1 / (error_order + 1), 0.0

    def start(self, error_order: float) -> StepSizes:
        """Begin a solve."""
        return _PISizes(self.exponents(error_order), self)

    def start_many(self, error_order: float, count: int) -> ManySizes:
        """Begin many solves at once."""
        return _PISizes(self.exponents(error_order), self, ARRAYS, count)


class _PISizes(ManySizes):
    # Smaller errors are raised to this: a step that was exact by chance says nothing of the next.
    smallest_previous = 1e-4

    def __init__(
        self,
        exponents: tuple[float, float],
        controller: PIController | IController,
        maths: Maths = NUMBERS,
        count: int | None = None,
    ) -> None:
        self.beta1, self.beta2 = exponents
        self.gamma, self.qmin, self.qmax = controller.gamma, controller.qmin, controller.qmax
        self.maths = maths
        self.memory = (maths.full(count, self.smallest_previous),)

    def accepted(self, h: Any, error: Any) -> Any:
        maths, (previous,) = self.maths, self.memory
        q = maths.power(error, self.beta1)
        if self.beta2:
            q = q / maths.power(previous, self.beta2)
            self.memory = (maths.maximum(error, self.smallest_previous),)
        # A zero error asks for the largest factor.
        q = maths.maximum(q / self.gamma, 1 / self.qmax)
        return h / maths.minimum(q, 1 / self.qmin)

    def rejected(self, h: Any, error: Any) -> Any:
        maths = self.maths
        q = maths.maximum(maths.power(error, self.beta1) / self.gamma, 1.0)
        smaller = h / maths.minimum(q, 1 / self.qmin)
        return maths.where(maths.isfinite(error), smaller, h * self.qmin)


@dataclass(frozen=True)
class PIDController(Controller):
    """Proportional-integral-derivative control with a smooth limiter.

    `h <- h * lim(e0**-(beta1/k) * e1**-(beta2/k) * e2**-(beta3/k))`, `lim(x) = 1 + atan(x - 1)`,
    with the errors of the last three steps. The defaults (0.7, -0.4, 0) are PI; Soederlind's
    H211b and H312 families are other choices.

    Args:
        beta1: exponent of the present error.
        beta2: exponent of the previous one.
        beta3: exponent of the one before.
        safety: factor on the error that is aimed at.

    Reference: G. Soederlind, Numer. Algorithms 31 (2002) 281-310; ACM Trans. Math. Softw. 29
    (2003) 1-26.
    """

    beta1: float = 0.7
    beta2: float = -0.4
    beta3: float = 0.0
    safety: float = 0.81

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "beta3"):
            value = checks.number(name, getattr(self, name), at_least=-2, at_most=2)
            checks.settle(self, **{name: value})
        checks.settle(self, safety=checks.number("safety", self.safety, above=0, at_most=1))

    def start(self, error_order: float) -> StepSizes:
        """Begin a solve."""
        return _PIDSizes(self, error_order)

    def start_many(self, error_order: float, count: int) -> ManySizes:
        """Begin many solves at once."""
        return _PIDSizes(self, error_order, ARRAYS, count)


class _PIDSizes(ManySizes):
    # The floor keeps the powers finite where a step was exact.
    smallest = 1e-10

    def __init__(
        self,
        controller: PIDController,
        error_order: float,
        maths: Maths = NUMBERS,
        count: int | None = None,
    ) -> None:
        k = error_order + 1
        self.betas = (controller.beta1 / k, controller.beta2 / k, controller.beta3 / k)
        self.safety, self.maths = controller.safety, maths
        self.memory = (maths.full(count, 1.0), maths.full(count, 1.0))

    def _factor(self, error: Any) -> Any:
        maths = self.maths
        product: Any = 1.0
        for e, beta in zip((error, *self.memory), self.betas, strict=True):
            product = product * maths.power(e / self.safety, -beta)
        return 1 + maths.atan(product - 1)

    def accepted(self, h: Any, error: Any) -> Any:
        error = self.maths.maximum(error, self.smallest)
        factor = self._factor(error)
        self.memory = (error, self.memory[0])
        return h * factor

    def rejected(self, h: Any, error: Any) -> Any:
        maths = self.maths
        smaller = h * maths.minimum(self._factor(maths.maximum(error, self.smallest)), 0.9)
        return maths.where(maths.isfinite(error), smaller, h * 0.2)


@dataclass(frozen=True)
class AlgorithmController(Controller):
    """The controller that an algorithm of the Julia engine brings; their default."""

    def start(self, error_order: float) -> StepSizes:
        """Refused: the algorithms of the torch engine bring no controller."""
        raise ValueError(
            "AlgorithmController belongs to algorithms of the Julia engine only.\n"
            "  Write controller=PIController(), or leave it out."
        )


@dataclass(frozen=True)
class FixedStep(Controller):
    """Steps of `dt0`, or from each of `times` to the next, whatever the error.

    The last step is cut to end at `t1`. The field is evaluated at `times` themselves, from both
    sides. Times at which it jumps belong into `tstops`: no step sees values from the other side.

    Args:
        times: where steps end, in the order of integration; those outside the interval are left
            out. With `dt0` as well, no step is larger.

    Raises:
        ValueError: times that are out of order.
    """

    times: tuple[float, ...] = ()

    adaptive = False

    def __post_init__(self) -> None:
        given: Any = self.times
        if type(given) is tuple and not given:  # as most are: they may be made at each solve
            return
        if isinstance(given, int | float | str) or not hasattr(given, "__iter__"):
            raise TypeError(
                f"FixedStep: times must be a sequence of times, but is {given!r}.\n"
                "  The size of fixed steps is dt0: solve(..., controller=FixedStep(), dt0=0.1)."
            )
        times = tuple(float(t) for t in given)
        object.__setattr__(self, "times", times)
        pairs = list(itertools.pairwise(times))
        if not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
            raise ValueError(
                "FixedStep: times must be strictly increasing or strictly decreasing.\n"
                "  Sort them first."
            )

    def within(self, t0: float, t1: float) -> FixedStep:
        """The same, with the times that lie inside an interval."""
        low, high = min(t0, t1), max(t0, t1)
        return replace(self, times=tuple(t for t in self.times if low < t < high))

    def start(self, error_order: float) -> StepSizes:
        """Begin a solve."""
        return _FixedSizes()

    def start_many(self, error_order: float, count: int) -> ManySizes:
        """Begin many solves at once."""
        return _FixedSizes()


class _FixedSizes(ManySizes):
    memory = ()

    def accepted(self, h: Any, error: Any) -> Any:
        return h

    def rejected(self, h: Any, error: Any) -> Any:
        raise RuntimeError("fixed steps are never rejected")
