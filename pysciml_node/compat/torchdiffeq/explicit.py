"""Explicit Runge-Kutta methods with fixed steps, every operation recorded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.compat.torchdiffeq.grid import Field, FixedGridODESolver, Walked
from pysciml_node.compat.torchdiffeq.normal import Perturb
from pysciml_node.tableaus import Tableau
from pysciml_node.tableaus.base import Row


def weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """`sum_j weights_j values_j`, zeros left out."""
    (w, first), *rest = [(w, x) for w, x in zip(weights, values, strict=False) if w]
    start = first if w == 1.0 else first * w
    return functools.reduce(lambda total, term: total.add(term[1], alpha=term[0]), rest, start)


def _stages(tableau: Tableau) -> list[tuple[float, Row]]:
    """Nodes and rows of the stages that the solution needs: not those for an error estimate."""
    needed = max(i for i, w in enumerate(tableau.b) if w) + 1
    return list(zip(tableau.c[:needed], tableau.a[:needed], strict=True))


def runge_kutta_step(
    tableau: Tableau,
    func: Field,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor | None = None,
    perturb: bool = False,
) -> tuple[Tensor, Tensor]:
    """The change of the state over an explicit step, and the derivative at its start."""
    first, last = (Perturb.NEXT, Perturb.PREV) if perturb else (Perturb.NONE, Perturb.NONE)
    stages = [func(t0, y0, perturb=first) if f0 is None else f0]
    for c, row in _stages(tableau)[1:]:
        y = y0 + dt * weighted(row, stages)
        stages.append(func(t1, y, perturb=last) if c == 1.0 else func(t0 + c * dt, y))
    return dt * weighted(tableau.b, stages), stages[0]


class ExplicitSteps(FixedGridODESolver):
    """An explicit method as a class with torchdiffeq's interface."""

    tableau: ClassVar[Tableau]

    @override
    def _step_func(
        self, func: Field, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        return runge_kutta_step(self.tableau, func, t0, dt, t1, y0, perturb=self.perturb)

    @override
    def _walk(self, grid: Tensor) -> Iterator[Walked]:
        if type(self)._step_func is not ExplicitSteps._step_func or grid.requires_grad:
            # A subclass has a step of its own; times with gradients are in every operation.
            yield from super()._walk(grid)
            return
        # All times of the stages at once, and sizes as numbers: a step is its stages, and as few
        # operations beside them as there can be.
        ends, sizes = grid.unbind(), grid.double().diff().tolist()
        nodes, rows = zip(*_stages(self.tableau), strict=True)
        y = self.y0
        for n, times in enumerate(self._times(grid, nodes)):
            h = sizes[n]
            self._tell(ends[n], y, ends[n + 1] - ends[n])
            stages: list[Tensor] = []
            for time, row in zip(times, rows, strict=True):
                argument = y
                for w, stage in zip(row, stages, strict=True):
                    if w:
                        argument = argument.add(stage, alpha=h * w)
                stages.append(self.func(time, argument))
            # The increment first: it is rounded on its own scale, and the state once a step.
            y1 = y.add(weighted(self.tableau.b, stages), alpha=h)
            yield ends[n], ends[n + 1], y, stages[0], y1
            y = y1

    def _times(self, grid: Tensor, c: Row) -> Iterator[tuple[Tensor, ...]]:
        """The times of the stages of each step, in the state's precision."""
        nodes = torch.tensor(c, dtype=torch.float64, device=grid.device)
        starts, ends = grid[:-1].double(), grid[1:].double()
        times = starts.unsqueeze(1) + nodes * (ends - starts).unsqueeze(1)
        times[:, nodes == 1.0] = ends.unsqueeze(1)
        times = times.to(self.y0.dtype.to_real())
        if self.perturb:
            later, earlier = times[:, 0], times[:, -1]
            times[:, 0] = torch.nextafter(later, later + 1)
            if c[-1] == 1.0:
                times[:, -1] = torch.nextafter(earlier, earlier - 1)
        return (row.unbind() for row in times.unbind())
