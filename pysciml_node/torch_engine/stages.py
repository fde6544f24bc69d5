"""The stages of one Runge-Kutta step, for any tableau.

Two classes hold the stage derivatives `k_1 ... k_s` and form the same linear combinations of them:
`BufferedStages` writes them into one preallocated matrix, so that a combination is a single fused
call; `RecordedStages` keeps them as autograd sees them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pysciml_node.torch_engine.tableaus import Tableau

Real = float | Tensor
FlatFunction = Callable[[Tensor, Tensor], Tensor]


class Method:
    """A tableau's coefficients as tensors of one dtype on one device."""

    _known: dict[tuple[int, torch.dtype, torch.device], Method] = {}

    def __init__(self, tableau: Tableau, dtype: torch.dtype, device: torch.device) -> None:
        def tensor(row: tuple[float, ...], as_dtype: torch.dtype = dtype) -> Tensor:
            return torch.tensor(row, dtype=torch.float64).to(device, as_dtype)

        extra = tableau.interpolant
        self.tableau = tableau
        self.stages = tableau.stages
        self.all_stages = tableau.stages + len(extra.c)
        self.nodes = tensor(tableau.c + extra.c, dtype.to_real())
        self.host_nodes = tableau.c + extra.c
        self.host_rows = tableau.a + extra.a
        self.rows = [tensor(row) for row in self.host_rows]
        self.b = tensor(tableau.b)
        self.b_error = tensor(tableau.b_error)
        self.b_error_low = None if tableau.b_error_low is None else tensor(tableau.b_error_low)
        # Polynomials of theta cancel: their weights are formed in float64 on the host.
        self.dense = torch.tensor(extra.weights, dtype=torch.float64)
        self.end_stage = _end_stage(tableau)

    @classmethod
    def of(cls, tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Method:
        """The method, built once for each dtype and device."""
        key = (id(tableau), dtype, device)
        if key not in cls._known:
            cls._known[key] = cls(tableau, dtype, device)
        return cls._known[key]

    def dense_weights(self, theta: Tensor, derivative: bool = False) -> Tensor:
        """`b_i(theta)`, or its derivative, for `theta` of shape `(m,)`; shape `(m, all_stages)`."""
        power = torch.arange(1, self.dense.shape[1] + 1, dtype=torch.float64)
        theta = theta.to(device="cpu", dtype=torch.float64).unsqueeze(1)
        basis = power * theta ** (power - 1) if derivative else theta**power
        return (basis @ self.dense.T).to(self.b)


def _end_stage(tableau: Tableau) -> int | None:
    """Index of the stage that is `f(t + h, u1)`: the next step's first stage. `None`: there is none."""
    if tableau.fsal:
        return tableau.stages - 1
    extra = tableau.interpolant
    if extra.c and extra.c[0] == 1.0 and extra.a[0] == tableau.b:
        return tableau.stages
    return None


class Stages(ABC):
    """The stages of the step being taken.

    Args:
        method: the method.
        field: the derivative as a function of time and flat state.
        bounds: the interval of the solve, in either order.
    """

    def __init__(self, method: Method, field: FlatFunction, bounds: tuple[float, float]) -> None:
        self.method = method
        self.field = field
        self.low, self.high = min(bounds), max(bounds)
        self.count = 0  # stages evaluated so far in this step

    @abstractmethod
    def put(self, i: int, k: Tensor) -> None:
        """Store stage `i`."""

    @abstractmethod
    def get(self, i: int) -> Tensor:
        """Stage `i`, valid until the next step."""

    @abstractmethod
    def combine(self, u: Tensor, h: Real, weights: Tensor) -> Tensor:
        """`u + h * sum_i weights_i k_i` over the first `len(weights)` stages."""

    @abstractmethod
    def combine_many(self, u: Tensor, h: Real, weights: Tensor) -> Tensor:
        """`combine` for each row of `weights`, shape `(m, stages)`; returns `(m, N)`."""

    @abstractmethod
    def difference(self, weights: Tensor) -> Tensor:
        """`sum_i weights_i k_i`."""

    def times(self, t: Real, h: Real) -> tuple[Tensor, ...]:
        """The stage times, kept inside the interval where rounding would leave it."""
        times = self.method.nodes * h + t
        if isinstance(t, Tensor) or isinstance(h, Tensor):
            return times.unbind()
        return times.clamp_(self.low, self.high).unbind()

    def begin(self, k1: Tensor) -> None:
        """Start a step whose first stage is known."""
        self.put(0, k1)
        self.count = 1

    def evaluate(self, t: Real, h: Real, u: Tensor, upto: int) -> Tensor | None:
        """Evaluate the stages that are missing up to `upto`; returns the last one's argument."""
        if self.count >= upto:
            return None
        times = self.times(t, h)
        rows = self.method.rows
        argument = u
        for i in range(self.count, upto):
            argument = self.combine(u, h, rows[i]) if i else u
            self.put(i, self.field(times[i], argument))
        self.count = upto
        return argument

    def solution(self, t: Real, h: Real, u: Tensor, with_error: bool) -> Tensor:
        """The state at the end of the step."""
        tableau = self.method.tableau
        if not tableau.fsal:
            self.evaluate(t, h, u, tableau.stages)
            return self.combine(u, h, self.method.b)
        if with_error:
            end = self.evaluate(t, h, u, tableau.stages)
            if end is not None:
                return end
        else:
            # The last stage serves the error estimate and the next step alone.
            self.evaluate(t, h, u, tableau.stages - 1)
        return self.combine(u, h, self.method.rows[tableau.stages - 1])

    def dense(self, t: Real, h: Real, u: Tensor, theta: Tensor) -> Tensor:
        """Dense output at `t + theta * h` for `theta` of shape `(m,)`; returns `(m, N)`."""
        self.evaluate(t, h, u, self.method.all_stages)
        return self.combine_many(u, h, self.method.dense_weights(theta))

    def next_first(self) -> Tensor | None:
        """`f(t + h, u1)` where this step has evaluated it."""
        end = self.method.end_stage
        return self.get(end) if end is not None and end < self.count else None

    def stiffness(self, t: Real, h: Real, u: Tensor) -> Tensor:
        """Shampine's estimate of the dominant eigenvalue, `|k_i - k_j| / |g_i - g_j|`.

        `k` are two stages with the same node and `g` their arguments. NaN where the method has no
        such pair.
        """
        pair = self.method.tableau.stiffness_stages
        if pair is None:
            return torch.full((), float("nan"), dtype=self.method.nodes.dtype, device=u.device)
        self.evaluate(t, h, u, max(pair) + 1)
        first, second = (self.combine(u, h, self.method.rows[i]) for i in pair)
        top = torch.linalg.vector_norm(self.get(pair[0]) - self.get(pair[1]))
        bottom = torch.linalg.vector_norm(first - second)
        return top / (bottom + torch.finfo(top.dtype).eps)


class BufferedStages(Stages):
    """Stages in one `(stages, N)` buffer; nothing is recorded for autograd."""

    def __init__(
        self, method: Method, field: FlatFunction, bounds: tuple[float, float], like: Tensor
    ) -> None:
        super().__init__(method, field, bounds)
        self.buffer = like.new_empty((method.all_stages, like.numel()))
        self._slots = self.buffer.unbind()
        # Views for the combinations, made once: heads[i] holds the first i stages as columns.
        self._heads = [self.buffer[:i].T for i in range(method.all_stages + 1)]

    def put(self, i: int, k: Tensor) -> None:
        self._slots[i].copy_(k)

    def get(self, i: int) -> Tensor:
        return self._slots[i]

    def combine(self, u: Tensor, h: Real, weights: Tensor) -> Tensor:
        return torch.addmv(u, self._heads[weights.numel()], weights, alpha=h)  # type: ignore[arg-type]

    def combine_many(self, u: Tensor, h: Real, weights: Tensor) -> Tensor:
        head = self.buffer[: weights.shape[1]]
        return torch.addmm(u.expand(weights.shape[0], -1), weights, head, alpha=h)  # type: ignore[arg-type]

    def difference(self, weights: Tensor) -> Tensor:
        return torch.mv(self._heads[weights.numel()], weights)

    def difference_many(self, weights: Tensor) -> Tensor:
        """`difference` for each row of `weights`, shape `(m, stages)`; returns `(m, N)`."""
        return weights @ self.buffer[: weights.shape[1]]


class RecordedStages(Stages):
    """Stages as separate tensors with their autograd history."""

    def __init__(self, method: Method, field: FlatFunction, bounds: tuple[float, float]) -> None:
        super().__init__(method, field, bounds)
        self._stages: list[Tensor] = []

    def put(self, i: int, k: Tensor) -> None:
        del self._stages[i:]
        self._stages.append(k)

    def get(self, i: int) -> Tensor:
        return self._stages[i]

    def combine(self, u: Tensor, h: Real, weights: Tensor) -> Tensor:
        return u + h * self.difference(weights)

    def combine_many(self, u: Tensor, h: Real, weights: Tensor) -> Tensor:
        return u + h * (weights @ torch.stack(self._stages[: weights.shape[1]]))

    def difference(self, weights: Tensor) -> Tensor:
        return weights @ torch.stack(self._stages[: weights.numel()])
