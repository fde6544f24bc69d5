"""Initial value problems. A problem is checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node import checks
from pysciml_node.problems.state import (
    HALVED,
    State,
    StateSpec,
    as_parameters,
    as_state,
    full_precision,
    kind_of,
    refuse_batched,
    tensors_of,
)

Time = float | Tensor
VectorField = Callable[..., Any]


def _check_time(name: str, value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{name} must be one real number, but is a tensor of shape {tuple(value.shape)} "
                f"and dtype {value.dtype}.\n"
                "  Give an end to all samples; one for each needs problems of their own."
            )
        refuse_batched(value)
        value = value.reshape(())
    return checks.number(name, value)


def check_field(name: str, field: Any, hint: str) -> checks.Arguments:
    """Check a function of time and state, and perhaps of `p`, which an ensemble may bring.

    Args:
        name: of the argument.
        field: the function.
        hint: what to do where it is refused.

    Returns:
        The arguments that it takes.

    Raises:
        TypeError: it is not callable, or takes other arguments, or these in another order.
    """
    taken = checks.arguments(field)
    if taken.known_as_field:
        return taken
    whole = callable(field) and not isinstance(field, type)
    if not (whole and (taken.takes(2) or taken.takes(3))):
        if whole and taken.takes(1):
            hint = f"A function of the state alone is lambda t, u: {name}(u)."
        elif whole and taken.names[:2] == ("du", "u"):
            hint = f"It returns the derivative: {name}(t, u) or {name}(t, u, p)."
        checks.function(name, field, "t", "u", hint=hint)
    checks.expect_time_first(name, field)
    taken.known_as_field = True
    return taken


def _check_called(name: str, field: Any, p: Any) -> None:
    """Refuse a function that does not take a `p` that is given, or asks for one that is not."""
    if p is None and not checks.takes(field, 2):
        hint = "p is not given: write p=..., or let the function take (t, u)."
        checks.function(name, field, "t", "u", hint=hint)
    elif p is not None and not checks.takes(field, 3):
        hint = "p is given: let the function take (t, u, p), or leave p out."
        checks.function(name, field, "t", "u", "p", hint=hint)


def time_number(time: Time) -> float:
    """A time as a number, without its graph."""
    return float(time.detach()) if isinstance(time, Tensor) else time


_ARRAYS, _ROWS = (Tensor, np.ndarray), (tuple, list)


def check_span(tspan: Any) -> Sequence[Any]:
    """The ends of an interval, which may be anything yet.

    Raises:
        TypeError: it is no pair.
    """
    span = tspan
    if isinstance(span, _ARRAYS):
        span = tuple(span) if span.ndim else (span,)
    if not isinstance(span, _ROWS) or len(span) != 2:
        listed = hasattr(span, "__len__")
        hint = "Saved times are saveat= of solve." if listed else "Write (0.0, 1.0)."
        checks.refuse("tspan", "a pair (t0, t1)", tspan, hint)
    return span


CONTAINS_ITSELF = "p must not contain itself.\n  Put a copy in, or leave the reference out."
# An interval has at least so many times of the state's dtype.
FEWEST_TIMES = 1000


def checked_parameters(p: Any, spec: StateSpec) -> list[Tensor]:
    """The tensors of an extra argument, which are on the device of the state."""
    try:
        tensors = [p] if isinstance(p, Tensor) else list(tensors_of(p))
    except RecursionError:
        raise ValueError(CONTAINS_ITSELF) from None
    for tensor in tensors:
        if tensor.device != spec.device:
            raise ValueError(
                f"p must be on the device of u0 ({spec.device}), but is on "
                f"{tensor.device}.\n  Move it: p.to(u0.device)."
            )
    return tensors


@lru_cache(maxsize=256)
def _check_interval(t0: float, t1: float, dtype: torch.dtype) -> None:
    """Refuse an interval whose ends are equal, or whose times a dtype cannot tell apart."""
    for i, t in enumerate((t0, t1)):
        _check_time(f"tspan[{i}]", t)
    if t0 == t1:
        raise ValueError(
            f"tspan must have two different ends, but both are {t0}.\n"
            "  The state at t0 is u0 itself: no solve is needed."
        )
    # A number in single precision has 29 bits fewer.
    spacing = math.ulp(max(abs(t0), abs(t1))) * (1 if dtype == torch.float64 else 2**29)
    if abs(t1 - t0) < FEWEST_TIMES * spacing:
        raise ValueError(
            f"tspan ({t0}, {t1}) must have at least {FEWEST_TIMES} different times in "
            f"{dtype}, that of u0, but has {abs(t1 - t0) / spacing:.0f}: the field could not "
            "tell them apart.\n"
            "  Solve in float64, or count time from the start: f(t0 + s, u) over "
            "(0, t1 - t0)."
        )


class Problem(checks.Configured):
    """The base of initial value problems: a state, an interval, an extra argument."""

    u0: State
    tspan: tuple[Time, Time]
    p: Any
    spec: StateSpec

    functions: ClassVar[tuple[str, ...]] = ("f",)
    _elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("y0", "x0"), "u0"),
        **dict.fromkeys(("t", "ts", "t_eval", "saveat"), "tspan=(t0, t1), and saveat=... of solve"),
        **dict.fromkeys(("args", "params", "parameters", "theta"), "p, the argument of f(t, u, p)"),
    }
    jac: VectorField | None = None
    jac_sparsity: Tensor | None = None
    # Whether the functions have been found to take what they are given; it is asked once.
    _called = False

    def check_arguments(self) -> None:
        """Refuse functions that ask for a `p` that is not given, or do not take one that is.

        Raises:
            TypeError: a function is refused.
        """
        if self._called:
            return
        for name in self.functions:
            _check_called(name, getattr(self, name), self.p)
        if self.jac is not None:
            _check_called("jac", self.jac, self.p)
        checks.settle(self, _called=True)

    def _check(self) -> None:
        """Check state, interval and extra argument, and set `spec`."""
        u0 = self.u0
        if not isinstance(u0, Tensor) or u0.dtype in HALVED:
            u0 = full_precision(as_state(u0))
            checks.settle(self, u0=u0)
        spec = StateSpec.of(u0)
        object.__setattr__(self, "spec", spec)
        if kind_of(spec.device) == "meta":
            raise ValueError(
                "u0 must have values, but is on the meta device.\n"
                "  Make it on a device that computes, such as cpu."
            )
        span: Any = self.tspan
        numbers = type(span) is tuple and len(span) == 2 and type(span[0]) is type(span[1]) is float
        if not numbers:
            span = self._checked_span()
        _check_interval(*span, spec.real_dtype)
        if self.p is not None:
            if not isinstance(self.p, Tensor):
                checks.settle(self, p=as_parameters(self.p))
            checked_parameters(self.p, self.spec)

    def _checked_span(self) -> tuple[float, float]:
        """The ends of the interval as numbers; `tspan` is set to a pair of numbers and tensors."""
        span = check_span(self.tspan)
        times = _check_time("tspan[0]", span[0]), _check_time("tspan[1]", span[1])
        ends = tuple(t if isinstance(t, Tensor) else float(t) for t in span)
        checks.settle(self, tspan=ends)
        return times

    @property
    def t0(self) -> float:
        """Start time as a number."""
        return time_number(self.tspan[0])

    @property
    def t1(self) -> float:
        """End time as a number."""
        return time_number(self.tspan[1])

    @property
    def direction(self) -> int:
        """`1` forward in time, `-1` backward."""
        return 1 if self.t1 > self.t0 else -1

    @property
    def mass(self) -> Tensor | None:
        """The mass matrix of the flat state, `(N, N)`; `None` stands for the identity."""
        return None

    def part(self, start: Time, end: Time, u0: State | None = None) -> Self:
        """The same equation over a part of the interval, which may be as short as a step.

        Args:
            start: of the part.
            end: of the part.
            u0: the state at its start; default that of the problem.
        """
        return exchanged(self, tspan=(start, end), u0=self.u0 if u0 is None else u0)

    def time_tensor(self, times: list[float]) -> Tensor:
        """Times as a tensor of the state's real dtype on its device."""
        return torch.tensor(times, dtype=self.spec.real_dtype, device=self.spec.device)


P = TypeVar("P", bound=Problem)


def exchanged(problem: P, **parts: Any) -> P:
    """A copy of a problem with other parts, which have been checked."""
    made = object.__new__(type(problem))
    made.__dict__.update(problem.__dict__, **parts)
    return made


def ends_of(problem: Problem) -> tuple[float, float]:
    """Both ends of a problem's interval as numbers."""
    t0, t1 = problem.tspan
    if type(t0) is float and type(t1) is float:
        return t0, t1
    return time_number(t0), time_number(t1)


@dataclass(frozen=True)
class ODEProblem(Problem):
    """The initial value problem `du/dt = f(t, u)`, or `f(t, u, p)` where `p` is given.

    Args:
        f: the vector field; takes `t` (a 0-d tensor of the state's real dtype) and the state, and
            returns its derivative in the same structure, shapes and dtype. It is any callable. The
            parameters of an `nn.Module` receive gradients, and so does every tensor that `f` uses.
        u0: initial state: a tensor of any shape (batch first), or a tuple, named tuple
            or dict of tensors of one dtype and device; float32, float64, complex64 or complex128.
            NumPy's arrays, a number and a list of numbers become a tensor, the latter two of
            torch's default dtype.
        tspan: `(t0, t1)`, numbers or 0-d tensors (which then receive gradients);
            `t1 < t0` integrates backward in time.
        p: extra argument of `f`: a tensor, or a tuple, list or dict of tensors; receives
            gradients. NumPy's arrays in it become tensors.
        mass_matrix: `M` of `M du/dt = f(t, u)`, real, shape `(N, N)` for a flat state of `N`
            entries, and singular for differential-algebraic equations. It is for implicit methods,
            and receives no gradients.
        jac: `df/du` as a function of the same arguments as `f`, `(N, N)` for the flat state. It
            saves implicit methods time: without it they take one vector-Jacobian product a row.
            Gradients do not go through it.
        jac_sparsity: which entries of `df/du` may differ from zero, `(N, N)`: rows, or columns,
            that share no entry are then taken together.

    Raises:
        TypeError: `f` is not callable or takes the time behind the state, `u0` cannot be a tensor,
            or `tspan` is no pair.
        ValueError: `u0` is empty or mixed, the ends of `tspan` are equal or not finite, or the mass
            matrix or the sparsity has another shape.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(3), (0.0, 1.0))
        >>> problem.tspan
        (0.0, 1.0)
    """

    f: VectorField
    u0: State
    tspan: tuple[Time, Time]
    p: Any = None
    mass_matrix: Tensor | None = None
    jac: VectorField | None = None
    jac_sparsity: Tensor | None = None
    spec: StateSpec = field(init=False, repr=False, compare=False)

    @property
    @override
    def mass(self) -> Tensor | None:
        """The mass matrix in the state's dtype on its device; `None` stands for the identity."""
        if self.mass_matrix is None:
            return None
        return self.mass_matrix.detach().to(self.spec.device, self.spec.dtype)

    def __post_init__(self) -> None:
        taken = check_field("f", self.f, "The order is ODEProblem(f, u0, (t0, t1), p=None).")
        self._check()
        if self.jac is None and self.jac_sparsity is None and self.mass_matrix is None:
            if taken.takes(2 if self.p is None else 3):
                object.__setattr__(self, "_called", True)
            return
        size = sum(self.spec.sizes)
        if self.jac is not None:
            check_field("jac", self.jac, "It takes what f takes: jac(t, u), or jac(t, u, p).")
        self._check_sparsity(size)
        if self.mass_matrix is None:
            return
        mass = checks.tensor("mass_matrix", self.mass_matrix, finite=True)
        checks.settle(self, mass_matrix=mass)
        if mass.shape != (size, size) or mass.is_complex():
            raise ValueError(
                f"mass_matrix must be real of shape {(size, size)}, a row and a column for each "
                f"entry of the flat state, but is {mass.dtype} of shape {tuple(mass.shape)}.\n"
                "  The flat state is the whole batch: torch.block_diag repeats a sample's matrix."
            )
        if mass is not None and mass.requires_grad:
            raise ValueError(
                "mass_matrix receives no gradient, but the one given requires it.\n"
                "  Give mass_matrix.detach(); put what should be learned into f."
            )

    def _check_sparsity(self, size: int) -> None:
        if self.jac_sparsity is None:
            return
        if self.jac is not None:
            raise ValueError(
                "jac and jac_sparsity must not both be given: the one is the Jacobian, the other "
                "says how to find it.\n  Leave one out."
            )
        pattern = checks.tensor("jac_sparsity", self.jac_sparsity)
        if pattern.shape != (size, size):
            raise ValueError(
                f"jac_sparsity must have shape {(size, size)}, a row and a column for each entry "
                f"of the flat state, but has {tuple(pattern.shape)}.\n"
                "  The flat state is the whole batch: torch.block_diag repeats a sample's pattern."
            )
        if pattern.dtype != torch.bool:
            checks.settle(self, jac_sparsity=pattern.detach() != 0)
