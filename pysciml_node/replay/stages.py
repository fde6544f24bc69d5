"""The stages of one Runge-Kutta step, for any tableau."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from pysciml_node.algorithms.krylov import GMRES
from pysciml_node.replay.newton import Accuracy
from pysciml_node.replay.vectors import Real, Vectors, Weights
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.tableaus import DiagonallyImplicitTableau, Tableau

FlatFunction = Callable[[Tensor, Tensor], Tensor]

FEW = 3
"""So many times take less time one by one than as the entries of a vector."""


class Method:
    """A tableau's coefficients as tensors of one dtype on one device."""

    # What solves the linear systems of an implicit method; `None` for dense factors.
    linsolve: GMRES | None = None
    _known: ClassVar[dict[tuple[int, torch.dtype, torch.device], Method]] = {}

    def __init__(self, tableau: Tableau, dtype: torch.dtype, device: torch.device) -> None:
        def tensor(row: tuple[float, ...], as_dtype: torch.dtype = dtype) -> Tensor:
            return torch.tensor(row, dtype=torch.float64).to(device, as_dtype)

        extra = tableau.interpolant
        self.tableau = tableau
        # What Newton's iteration of an implicit method may leave missing.
        self.accuracy = Accuracy.near_rounding(dtype)
        self.stages = tableau.stages
        self.all_stages = tableau.stages + len(extra.c)
        self.nodes = tensor(tableau.c + extra.c, dtype.to_real())
        self.host_nodes = tableau.c + extra.c
        self.nodes_inside = all(0 <= c <= 1 for c in self.host_nodes)
        self.host_rows = tableau.a + extra.a
        like = tensor(())
        self.rows = [Weights.of(row, like) for row in self.host_rows]
        self.b = Weights.of(tableau.b, like)
        self.b_error = Weights.of(tableau.b_error, like)
        low = tableau.b_error_low
        self.b_error_low = None if low is None else Weights.of(low, like)
        # Polynomials of theta cancel: their weights are formed in float64 on the host.
        self.dense = torch.tensor(extra.weights, dtype=torch.float64)
        self._powers = torch.arange(1, self.dense.shape[1] + 1, dtype=torch.float64)
        self.couplings = [Weights.of(row, like) for row in getattr(tableau, "couplings", ())]
        self.end_stage = _end_stage(tableau)

    @classmethod
    def of(cls, tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Method:
        """The method, built once for each dtype and device."""
        key = (id(tableau), dtype, device)
        if key not in cls._known:
            # These outlive the call, so they must not be tensors of inference mode.
            with torch.inference_mode(False):
                cls._known[key] = cls(tableau, dtype, device)
        return cls._known[key]

    @classmethod
    def all_of(
        cls,
        tableaus: Sequence[Tableau],
        dtype: torch.dtype,
        device: torch.device,
        linsolve: GMRES | None = None,
        accuracy: Accuracy | None = None,
    ) -> tuple[Method, ...]:
        """The methods of several tableaus, with what solves their equations, and how well."""
        methods = [cls.of(tableau, dtype, device) for tableau in tableaus]
        if linsolve is not None:
            methods = [copy.copy(method) for method in methods]
            for method in methods:
                method.linsolve = linsolve
        if accuracy is not None:
            methods = [method.accurate(accuracy) for method in methods]
        return tuple(methods)

    def accurate(self, accuracy: Accuracy) -> Method:
        """The method with another accuracy of its stages, where an iteration finds them."""
        if not isinstance(self.tableau, DiagonallyImplicitTableau):
            return self
        method = copy.copy(self)
        method.accuracy = accuracy
        return method

    def dense_weights(self, theta: Tensor, derivative: bool = False) -> Tensor:
        """`b_i(theta)`, or its derivative, for `theta` of shape `(m,)`; shape `(m, all_stages)`."""
        power = self._powers
        theta = theta.to(device="cpu", dtype=torch.float64).unsqueeze(1)
        basis = power * theta ** (power - 1) if derivative else theta**power
        return (basis @ self.dense.T).to(self.b.tensor)


def _end_stage(tableau: Tableau) -> int | None:
    """Index of the stage `f(t + h, u1)`, the next step's first; `None` where there is none."""
    if tableau.fsal:
        return tableau.stages - 1
    extra = tableau.interpolant
    if extra.c and extra.c[0] == 1.0 and extra.a[0] == tableau.b:
        return tableau.stages
    return None


class Stages:
    """The stages `k_1 ... k_s` of the step being taken.

    Args:
        method: the method.
        field: the derivative as a function of time and flat state.
        marks: start, stops and end of the solve, in its order. Times stay inside the interval, and
            inside the step where it starts or ends on a stop: the field may jump there.
        vectors: holds the stage derivatives.
    """

    def __init__(
        self, method: Method, field: FlatFunction, marks: tuple[float, ...], vectors: Vectors
    ) -> None:
        self.method = method
        self.field = field
        self.marks = marks
        self.low, self.high = min(marks[0], marks[-1]), max(marks[0], marks[-1])
        # The stops in increasing order; for each the last time before it and the first after it.
        self._stops = sorted(marks[1:-1])
        if self._stops:
            stops = torch.tensor(self._stops, dtype=method.nodes.dtype)
            infinity = torch.full_like(stops, math.inf)
            self._before = torch.nextafter(stops, -infinity).tolist()
            self._after = torch.nextafter(stops, infinity).tolist()
        # The last step's times: they are asked for again by its later stages.
        self._known: tuple[float, float, tuple[Tensor, ...]] | None = None
        self.vectors = vectors
        self.count = 0  # stages evaluated so far in this step

    def afresh(self, field: FlatFunction, vectors: Vectors) -> Self:
        """The same before the first step of another solve."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, field=field, vectors=vectors, count=0)
        return made

    def times(self, t: Real, h: Real) -> tuple[Tensor, ...]:
        """The stage times, kept inside the interval where rounding would leave it.

        They are formed in double precision on the host, and rounded once to the state's.
        """
        start = float(t.detach()) if isinstance(t, Tensor) else t
        size = float(h.detach()) if isinstance(h, Tensor) else h
        moving = isinstance(t, Tensor) or isinstance(h, Tensor)
        known = self._known
        if known is not None and known[0] == start and known[1] == size and not moving:
            return known[2]
        numbers = self.numbers(start, size)
        if not moving:
            return self.expect(start, size, self.times_of(numbers))
        nodes = self.method.nodes
        inside, times = torch.tensor(numbers, dtype=nodes.dtype), nodes * h + t
        return (times + (inside.to(nodes.device) - times.detach())).unbind()

    def numbers(self, start: float, size: float) -> list[float]:
        """The stage times of a step as numbers."""
        low, high = self._limits(start, size) if self._stops else (self.low, self.high)
        numbers = [start + c * size for c in self.method.host_nodes]
        # Rounding keeps their order.
        ends = (start, start + size) if self.method.nodes_inside else numbers
        if low <= min(ends) and max(ends) <= high:
            return numbers
        return [min(max(t, low), high) for t in numbers]

    def expect(self, start: float, size: float, times: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Be told the stage times of the step that is taken next."""
        self._known = (start, size, times)
        return times

    def times_of(self, numbers: list[float]) -> tuple[Tensor, ...]:
        """Stage times as tensors."""
        nodes = self.method.nodes
        if nodes.device.type != "cpu":
            inside = torch.tensor(numbers, dtype=nodes.dtype)
            return inside.to(nodes.device, non_blocking=True).unbind()
        if len(numbers) <= FEW:
            return tuple([torch.scalar_tensor(x, dtype=nodes.dtype) for x in numbers])
        return torch.tensor(numbers, dtype=nodes.dtype).unbind()

    def _limits(self, start: float, size: float) -> tuple[float, float]:
        """The interval's ends, or what stops leave of a step."""
        low, high = self.low, self.high
        near = 1e-9 * abs(size)
        first, last = min(start, start + size), max(start, start + size)
        i = bisect_left(self._stops, first - near)
        if i < len(self._stops) and self._stops[i] < first + near:
            low = self._after[i]
        i = bisect_left(self._stops, last - near)
        if i < len(self._stops) and self._stops[i] < last + near:
            high = self._before[i]
        return low, high

    def start(self, t: Real, h: Real, u: Tensor) -> Tensor:
        """Start a step whose first stage is not known yet, and return that stage."""
        k1 = self.field(self.times(t, h)[0], u)
        self.begin(k1)
        return k1

    def begin(self, k1: Tensor) -> None:
        """Start a step whose first stage is known."""
        self.vectors.put(0, k1)
        self.count = 1

    def argument(self, i: int, h: Real, u: Tensor) -> Tensor:
        """The state at which stage `i` is evaluated."""
        return self.vectors.combine(u, h, self.method.rows[i]) if i else u

    def evaluate(self, t: Real, h: Real, u: Tensor, upto: int) -> Tensor | None:
        """Evaluate the missing stages up to `upto`; return the argument of the last."""
        if self.count >= upto:
            return None
        times, rows = self.times(t, h), self.method.rows
        field, vectors = self.field, self.vectors
        argument = u
        for i in range(self.count, upto):
            if i:
                argument = vectors.combine(u, h, rows[i])
            vectors.put(i, field(times[i], argument))
            if 0 < i < upto - 1:
                vectors.recycle(argument)
        self.count = upto
        return argument

    def solution(self, t: Real, h: Real, u: Tensor, with_error: bool) -> Tensor:
        """The state at the end of the step."""
        tableau = self.method.tableau
        if not tableau.fsal:
            self.evaluate(t, h, u, tableau.stages)
            return self.vectors.combine(u, h, self.method.b)
        if with_error:
            end = self.evaluate(t, h, u, tableau.stages)
            if end is not None:
                return end
        else:
            # The last stage serves the error estimate and the next step alone.
            self.evaluate(t, h, u, tableau.stages - 1)
        return self.argument(tableau.stages - 1, h, u)

    def error(self, h: float, u: Tensor, u1: Tensor, norm: ErrorNorm) -> Tensor:
        """The scaled error estimate of a step from `u` to `u1`, a 0-d tensor."""
        return norm.complete(self._raw_error(u, u1, norm), abs(h))

    def error_size(self, h: float, u: Tensor, u1: Tensor, norm: ErrorNorm) -> float:
        """The same as a number: one host read."""
        return norm.read(self._raw_error(u, u1, norm), abs(h))

    def _raw_error(self, u: Tensor, u1: Tensor, norm: ErrorNorm) -> Tensor:
        error = self.vectors.raw_norm(self.method.b_error, u, u1, norm)
        if self.method.b_error_low is not None:
            low = self.vectors.raw_norm(self.method.b_error_low, u, u1, norm)
            combined = error.square() / torch.sqrt(error.square() + 0.01 * low.square())
            # Both vanish for an equilibrium.
            error = torch.where(error == 0, torch.zeros_like(error), combined)
        return error

    def dense(self, t: Real, h: Real, u: Tensor, theta: Tensor) -> Tensor:
        """Dense output at `t + theta * h` for `theta` of shape `(m,)`; returns `(m, N)`."""
        self.evaluate(t, h, u, self.method.all_stages)
        return self.vectors.combine_many(u, h, self.method.dense_weights(theta))

    def next_first(self) -> Tensor | None:
        """`f(t + h, u1)` where this step has evaluated it."""
        end = self.method.end_stage
        return self.vectors.get(end) if end is not None and end < self.count else None

    def leave(self, goes_on: bool) -> Tensor | None:
        """End an accepted step.

        Args:
            goes_on: whether the next one starts where it ends, in the same field.

        Returns:
            The next step's first stage, where it is known.
        """
        k = self.next_first() if goes_on else None
        self.count = 0
        return k

    def stiffness(self, t: Real, h: Real, u: Tensor) -> Tensor:
        """Shampine's estimate of the dominant eigenvalue, `|k_i - k_j| / |g_i - g_j|`.

        `k` are two stages with the same node and `g` their arguments. NaN where the method has no
        such pair.
        """
        pair = self.method.tableau.stiffness_stages
        if pair is None:
            return torch.full((), float("nan"), dtype=self.method.nodes.dtype, device=u.device)
        self.evaluate(t, h, u, max(pair) + 1)
        first, second = (self.argument(i, h, u) for i in pair)
        top = torch.linalg.vector_norm(self.vectors.get(pair[0]) - self.vectors.get(pair[1]))
        bottom = torch.linalg.vector_norm(first - second)
        ratio: Tensor = top / (bottom + torch.finfo(top.dtype).eps)
        return ratio

    def largest_eigenvalue(self, t: Real, h: Real, u: Tensor) -> float:
        """An estimate of the largest eigenvalue of `df/du` for the choice of a method.

        One host read, behind a step that has been taken.
        """
        pair = self.method.tableau.stiffness_stages
        if pair is not None:
            # With its graph, where there is one: the next step may begin with the last of them.
            self.evaluate(t, h, u, max(pair) + 1)
        with torch.no_grad():
            return float(self.stiffness(t, h, u))
