"""The stages of an implicit step that are found together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.linearization import linearize
from pysciml_node.replay.newton import Accuracy, newton_rounding, noise
from pysciml_node.replay.stages import FlatFunction, Method, Stages
from pysciml_node.replay.vectors import Real, RecordedVectors, Vectors

# Newton's iteration: after so many with a matrix that is kept one is made each time, and after as
# many more the step is given up.
_ITERATIONS = 10


class CoupledStages(Stages):
    """The slopes of a step whose tableau is a `CoupledTableau`.

    Args:
        method: the method.
        field: the derivative as a function of time and flat state.
        marks: start, stops and end of the solve, in its order.
        vectors: holds the slopes.
        derivatives: how often the slopes are to be differentiable, where they are recorded.
    """

    def __init__(
        self,
        method: Method,
        field: FlatFunction,
        marks: tuple[float, ...],
        vectors: Vectors,
        derivatives: int = 1,
    ) -> None:
        super().__init__(method, field, marks, vectors)
        rows = torch.tensor(method.host_rows[1 : method.stages], dtype=torch.float64)
        # How the slopes enter their arguments: the explicit one's column, and the others'.
        self.first, self.matrix = rows[:, 0].to(method.b.tensor), rows[:, 1:].to(method.b.tensor)
        self.derivatives = derivatives if isinstance(vectors, RecordedVectors) else 0
        # The matrix of Newton's iteration is kept from step to step, while it serves.
        self._solve: _LinearSystem | None = None

    @override
    def evaluate(self, t: Real, h: Real, u: Tensor, upto: int) -> Tensor | None:
        times = self.times(t, h)
        if self.count == 0:
            self.begin(self.field(times[0], u))
        if self.count < self.method.stages:
            start, size = self.vectors.get(0), float(h.detach()) if isinstance(h, Tensor) else h
            known = u + h * torch.outer(self.first, start)
            with torch.no_grad():
                plain = [time.detach() for time in times]
                slopes = self._newton(plain, size, u.detach(), known.detach(), start.detach())
            if self.derivatives:
                slopes = self._corrected(times, h, known, slopes)
            for i, slope in enumerate(slopes.unbind()):
                self.vectors.put(i + 1, slope)
            self.count = self.method.stages
        return super().evaluate(t, h, u, upto)

    @override
    def solution(self, t: Real, h: Real, u: Tensor, with_error: bool) -> Tensor:
        self.evaluate(t, h, u, self.method.stages)
        return self.vectors.combine(u, h, self.method.b)

    def _arguments(self, h: Real, known: Tensor, slopes: Tensor) -> Tensor:
        """The states at which the slopes are evaluated, `(s, N)`."""
        return known + h * (self.matrix @ slopes)

    def _newton(
        self, times: Sequence[Tensor], h: float, u: Tensor, known: Tensor, start: Tensor
    ) -> Tensor:
        """The slopes `(s, N)`; NaN where the iteration does not converge."""
        slopes, change, dtype = start.expand(len(known), -1), None, u.dtype
        size, every = abs(h), u.expand_as(known)
        scale = (float(u.abs().max()) + size * float(start.abs().max())) / size
        # The steps that are recorded go on from here, and with a better matrix.
        power = 0.5 if self.derivatives > 1 else 0.75
        accuracy = Accuracy.near_rounding(dtype, power)
        before, small = math.inf, False
        for iteration in range(2 * _ITERATIONS):
            points = list(zip(times[1:], self._arguments(h, known, slopes), strict=False))
            residual = torch.stack([self.field(*point) for point in points]) - slopes
            missing = float(residual.abs().max())
            if not math.isfinite(missing):
                small = False
                break
            if self._solve is None or self._solve.size != h or iteration >= _ITERATIONS:
                self._solve = self._linear(h, [self._jacobian(*point) for point in points])
            elif missing > before / 2:
                # The matrix of another step, or of the start of this one, has served its time.
                self._solve = self._linear(h, [self._jacobian(*point) for point in points])
            before, earlier, change = missing, change, self._solve(residual)
            slopes = slopes + change
            largest = float(change.abs().max())
            small = largest <= scale * newton_rounding(dtype, power)
            if small:
                left, theta = accuracy.missing(every, known, slopes, h, change, earlier)
                # A new matrix says less of the change before it.
                rests = iteration > _ITERATIONS and float(theta.max()) >= 1
                if float(left.max()) <= 1 or (rests and largest <= scale * noise(dtype)):
                    break
        return slopes if small else torch.full_like(slopes, math.nan)

    def _jacobian(self, t: Tensor, u: Tensor) -> Tensor:
        """`df/du`, `(N, N)`, not recorded."""
        linear = linearize(self.field, t, u, with_time=False, recorded=False, differentiable=False)
        return linear.jacobian.detach()

    def _linear(self, h: float, jacobians: list[Tensor]) -> _LinearSystem:
        return _LinearSystem(h, self.matrix, torch.stack(jacobians))

    def _corrected(
        self, times: tuple[Tensor, ...], h: Real, known: Tensor, slopes: Tensor
    ) -> Tensor:
        """Steps of Newton's iteration at the solution, recorded, with its matrix as a constant.

        The value stays. The derivative of one is that of the implicit function theorem; each more
        has one more.
        """
        size = float(h.detach()) if isinstance(h, Tensor) else h
        exact: _LinearSystem | None = None
        for _ in range(self.derivatives):
            arguments = self._arguments(h, known, slopes).unbind()
            points = zip(times[1:], arguments, strict=False)
            if exact is None:
                local = [
                    linearize(
                        self.field,
                        *point,
                        with_time=False,
                        recorded=True,
                        differentiable=False,
                    )
                    for point in points
                ]
                exact = self._linear(size, [point.jacobian.detach() for point in local])
                values = [point.value for point in local]
            else:
                values = [self.field(*point) for point in points]
            slopes = slopes + exact(torch.stack(values) - slopes)
        self._solve = exact
        return slopes


class _LinearSystem:
    """`(I - h A x J) x = b` for slopes `(s, N)`, factored.

    Args:
        size: `h`.
        matrix: `A`, `(s, s)`.
        jacobians: of the stages, `(s, N, N)`.
    """

    def __init__(self, size: float, matrix: Tensor, jacobians: Tensor) -> None:
        self.size = size
        stages, count, _ = jacobians.shape
        coupled = torch.einsum("ij,imn->imjn", matrix, jacobians)
        eye = torch.eye(stages * count, dtype=jacobians.dtype, device=jacobians.device)
        system = eye - size * coupled.reshape(stages * count, stages * count)
        self._factors = torch.linalg.lu_factor_ex(system)

    def __call__(self, right: Tensor) -> Tensor:
        """The solution."""
        factors, pivots = self._factors.LU, self._factors.pivots
        solved: Tensor = torch.linalg.lu_solve(factors, pivots, right.reshape(-1, 1))
        return solved.view_as(right)
