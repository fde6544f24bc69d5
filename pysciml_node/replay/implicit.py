"""The stages of one implicit step: Rosenbrock methods, and singly diagonally implicit ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.coupled import CoupledStages
from pysciml_node.replay.jacobians import linearizer_of
from pysciml_node.replay.linearization import Linearization, Linearizer, Solver
from pysciml_node.replay.newton import ITERATIONS, SLOW, newton_rounding, newton_scale, noise
from pysciml_node.replay.stages import FlatFunction, Method, Stages
from pysciml_node.replay.vectors import Real, RecordedVectors, Vectors
from pysciml_node.tableaus.implicit import (
    CoupledTableau,
    DiagonallyImplicitTableau,
    RosenbrockTableau,
)


def stages_for(
    method: Method,
    field: FlatFunction,
    marks: tuple[float, ...],
    vectors: Vectors,
    mass: Tensor | None = None,
    derivatives: int = 1,
    linearizer: Linearizer | None = None,
) -> Stages:
    """The stages of a step, as the method's tableau asks for; arguments as of `ImplicitStages`."""
    if isinstance(method.tableau, RosenbrockTableau | DiagonallyImplicitTableau):
        return ImplicitStages(method, field, marks, vectors, mass, derivatives, linearizer)
    if isinstance(method.tableau, CoupledTableau):
        return CoupledStages(method, field, marks, vectors, derivatives)
    return Stages(method, field, marks, vectors)


class ImplicitStages(Stages):
    """The slopes `k_1 ... k_s` of the implicit step being taken.

    What an explicit step does with its stages (the solution, the error estimate, dense output) an
    implicit one does with its slopes.

    Args:
        method: a method whose tableau is implicit.
        field: the derivative as a function of time and flat state.
        marks: start, stops and end of the solve, in its order.
        vectors: holds the slopes.
        mass: the mass matrix `M` of `M du/dt = f`, `(N, N)`; `None` stands for the identity.
        derivatives: how often autograd may differentiate what is recorded.
        linearizer: gives the field's derivatives; default as its problem says.
    """

    def __init__(
        self,
        method: Method,
        field: FlatFunction,
        marks: tuple[float, ...],
        vectors: Vectors,
        mass: Tensor | None = None,
        derivatives: int = 1,
        linearizer: Linearizer | None = None,
    ) -> None:
        super().__init__(method, field, marks, vectors)
        tableau = method.tableau
        assert isinstance(tableau, RosenbrockTableau | DiagonallyImplicitTableau)
        self.table = tableau
        self.mass = mass
        self.recorded = isinstance(vectors, RecordedVectors)
        self.derivatives = derivatives
        self.linearizer = linearizer or linearizer_of(field, method.linsolve)
        self._at_start: Linearization | None = None
        self._solver: tuple[float, Solver] | None = None

    @override
    def start(self, t: Real, h: Real, u: Tensor) -> Tensor:
        # One evaluation serves the first stage and the Jacobian.
        at_start = self._linearize(t, h, u)
        self.begin(at_start.value)
        self._at_start = at_start
        return at_start.value

    @override
    def begin(self, k1: Tensor) -> None:
        super().begin(k1)
        self._at_start, self._solver = None, None

    @override
    def evaluate(self, t: Real, h: Real, u: Tensor, upto: int) -> Tensor | None:
        if self.count >= self.method.stages:
            return None
        if self.count == 0:
            self.start(t, h, u)
        if self._at_start is None:
            self._at_start = self._linearize(t, h, u)
        times = self.times(t, h)
        if isinstance(self.table, RosenbrockTableau):
            self._rosenbrock(self.table, times, h, u, self._at_start)
        else:
            self._diagonal(times, h, u)
        self.count = self.method.stages
        return None

    @override
    def solution(self, t: Real, h: Real, u: Tensor, with_error: bool) -> Tensor:
        self.evaluate(t, h, u, self.method.stages)
        return self.vectors.combine(u, h, self.method.b)

    @override
    def largest_eigenvalue(self, t: Real, h: Real, u: Tensor) -> float:
        """A bound of it from the Jacobian at the step's start."""
        assert self._at_start is not None
        return self._at_start.bound()

    def _linearize(self, t: Real, h: Real, u: Tensor) -> Linearization:
        """The field and its derivatives at the start of the step."""
        rosenbrock = isinstance(self.table, RosenbrockTableau)
        # A diagonally implicit step takes its own Jacobians where it is differentiated.
        return self.linearizer(
            self.field,
            self.times(t, h)[0],
            u,
            with_time=rosenbrock,
            recorded=self.recorded,
            differentiable=self.recorded and rosenbrock,
        )

    def _solve(self, h: Real, start: Linearization) -> Solver:
        """Solves with `M - h gamma J`, and is kept for a second attempt of the same size."""
        size = float(h.detach()) if isinstance(h, Tensor) else h
        if self._solver is None or self._solver[0] != size:
            self._solver = (size, start.solver(self.table.gamma * h, self.mass))
        return self._solver[1]

    def _rosenbrock(
        self,
        table: RosenbrockTableau,
        times: tuple[Tensor, ...],
        h: Real,
        u: Tensor,
        start: Linearization,
    ) -> None:
        solve = self._solve(h, start)
        for i in range(self.method.stages):
            rate = self.field(times[i], self.argument(i, h, u)) if i else start.value
            if i:
                coupled = self.vectors.combine(None, 1.0, self.method.couplings[i])
                rate = rate + (coupled if self.mass is None else self.mass @ coupled)
            if start.time is not None and table.time_weights[i] != 0.0:
                rate = rate + start.time * (table.time_weights[i] * h)
            self.vectors.put(i, solve(rate * table.gamma))

    def _diagonal(self, times: tuple[Tensor, ...], h: Real, u: Tensor) -> None:
        # The first slope as it is stored: what it was given by may be the last one's place.
        guess = self.vectors.get(0).detach()
        for i in range(1, self.method.stages):
            known = self.argument(i, h, u)
            with torch.no_grad():
                start, at = u.detach(), times[i].detach()
                guess = self._newton(at, h, start, known.detach(), guess)
            slope = guess
            if self.recorded:
                for _ in range(self.derivatives):
                    slope = self._correct(times[i], h, known, slope)
            self.vectors.put(i, slope)

    def _newton(self, t: Tensor, h: Real, u: Tensor, known: Tensor, guess: Tensor) -> Tensor:
        """The slope `k = f(t, known + h gamma k)`; NaN where the iteration does not converge."""
        assert self._at_start is not None
        step = (float(h.detach()) if isinstance(h, Tensor) else h) * self.table.gamma
        # Without a matrix the iteration converges quadratically, and the last change says less.
        matrix_free = self._at_start.matrix_free
        scale = float(newton_scale(known, guess, step))
        close = scale * newton_rounding(u.dtype, 0.5 if matrix_free else 0.75)
        if not matrix_free:
            solve = self._solve(h, self._at_start)
        slope, change, theta = guess, None, 0.0
        local = 0  # changes by a Jacobian at the stage itself
        for iteration in range(2 * ITERATIONS):
            at = known + step * slope
            if matrix_free or (not local and (theta > SLOW or iteration == ITERATIONS)):
                there = self._local(t, at, recorded=False)
                solve, rate, local = there.solver(step, self.mass), there.value, local + 1
            else:
                rate, local = self.field(t, at), local + (local > 0)
            before, change = change, solve(rate - slope)
            slope = slope + change
            size = float(change.abs().max())
            if size <= close:
                judged = self.method.accuracy.missing(u, known, slope, step, change, before)
                missing, theta = torch.stack(judged).tolist()  # one read of the device
                rests = local > 1 and theta >= 1 and size <= scale * noise(u.dtype)
                if missing <= 1 or rests:
                    return slope
            if not math.isfinite(size):
                break
        if size <= close:
            return slope
        failed: Tensor = torch.full_like(slope, math.nan)
        return failed

    def _correct(self, t: Tensor, h: Real, known: Tensor, slope: Tensor) -> Tensor:
        """One step of Newton's iteration at the solution, recorded.

        The value stays. The derivative is that of the implicit function theorem, and two of them
        give the second derivative too.
        """
        scale = self.table.gamma * h
        local = self._local(t, known + scale * slope, recorded=True)
        return slope + local.solver(scale, self.mass)(local.value - slope)

    def _local(self, t: Tensor, u: Tensor, recorded: bool) -> Linearization:
        """The field and its Jacobian at a stage."""
        return self.linearizer(
            self.field,
            t,
            u,
            with_time=False,
            recorded=recorded,
            differentiable=recorded and self.derivatives > 1,
        )
