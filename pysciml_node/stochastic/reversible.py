"""The gradient of the reversible Heun method by its own way back, without the states of its steps.

A step of size `h` with increment `W` leads from the state `z` and the carried vector `v` to

    v1 = 2 z - v + c(v),    z1 = z + (c(v) + c(v1)) / 2,    c(v) = h f(v) + g(v) W.

So it can be undone: `v = 2 z1 - v1 - c(v1)`, `z = z1 - (c(v) + c(v1)) / 2`, exact but for rounding,
whose errors are undone at the few vectors that are kept.
The fields are evaluated once for each end of a step. That value serves the way back, and its
pullback takes in the steps on both sides.

Reference: P. Kidger, J. Foster, X. Li, T. Lyons, arXiv 2105.13493, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import Accumulator
from pysciml_node.steps.graph import pull_back_all
from pysciml_node.steps.inputs import changed_message
from pysciml_node.steps.record import Record
from pysciml_node.steps.saver import Between, Saver
from pysciml_node.steps.step import Step
from pysciml_node.stochastic.adjoints import StepPullback
from pysciml_node.stochastic.brownian import Path
from pysciml_node.stochastic.fields import DifferentiableFields
from pysciml_node.stochastic.step import Stepper
from pysciml_node.stochastic.virtual_tree import Increment

# Vectors between the saved times that are kept, at most: rounding errors do not grow past them.
_MOST_KEPT = 32


class SparseSaver(Saver):
    """Keeps the vectors at the start, the end and saved times, and a few between.

    Attributes:
        kept: those at saved times and between, by the number of steps up to there.
    """

    def __init__(
        self, record: Record, u0: Tensor, between: Between, times: Sequence[float]
    ) -> None:
        super().__init__(record, u0, between, times)
        self.kept: dict[int, Tensor] = {}
        self._stride = 1

    @override
    def see(self, step: Step) -> None:
        super().see(step)
        record, n = self.record, len(self.record.sizes)
        if n in record.at_end or n % self._stride == 0:
            self.kept[n] = step.u1
        if n // self._stride > _MOST_KEPT:
            self._stride *= 2
            for m in list(self.kept):
                if m % self._stride and m not in record.at_end:
                    del self.kept[m]
        if len(self.states) > 2:
            del self.states[1]
            record.thinned = True


class _WayBack:
    """One sweep, from the end of a solve to its start.

    Args:
        prepared: the fields with their inputs.
        stepper: the method with these fields.
        path: the Brownian motions of the forward solve.
        backward: its steps, and the cotangents.
        kept: vectors on the way, by the number of steps up to there.
    """

    def __init__(
        self,
        prepared: DifferentiableFields,
        stepper: Stepper,
        path: Path,
        backward: BackwardPass,
        kept: dict[int, Tensor],
    ) -> None:
        self._prepared, self._stepper, self._path = prepared, stepper, path
        self._backward, self._record, self._kept = backward, backward.record, kept
        self._size = stepper.entries
        self._sums = Accumulator(prepared.leaves)
        self._pull = StepPullback(prepared, stepper, self._sums)
        self._gaps: list[Tensor] = []

    def gradients(self) -> Gradients:
        """Pull all cotangents of the solve back to its inputs."""
        steps = len(self._record.sizes)
        last = self._backward.states[-1]
        z, v = last[: self._size], last[self._size :]
        upon_z, upon_v = torch.zeros_like(z), torch.zeros_like(z)
        upon_ahead, half_back = upon_z, z
        ahead: Increment | None = None
        for n in range(steps, -1, -1):
            behind = self._motion(n - 1) if n else None
            known = self._kept.get(n) if n < steps else None
            if known is not None:
                self._compare(v, known[self._size :])
                v = known[self._size :]
            leaf, changes = self._changes(n, v, ahead, behind)
            if ahead is not None:
                z = half_back - changes[0].detach() / 2
            if known is not None:
                self._compare(z, known[: self._size])
                z = known[: self._size]
            upon_z, upon_v = self._entering(n, z, v, upon_z, upon_v)
            upon = ([] if ahead is None else [upon_ahead]) + (
                [] if behind is None else [upon_z / 2]
            )
            upon_v = upon_v + self._pulled(leaf, changes, upon)
            if behind is None:
                self._compare(z, self._backward.states[0][: self._size])
                break
            change = changes[-1].detach()
            half_back, v = z - change / 2, 2 * z - v - change
            upon_ahead = upon_z / 2 + upon_v
            upon_z, upon_v, ahead = upon_z + 2 * upon_v, -upon_v, behind
        self._expect_retraced()
        return Gradients(u0=torch.cat((upon_z, upon_v)), inputs=self._sums.sums)

    def _motion(self, n: int) -> Increment:
        return self._path.increment(self._record.times[n], self._record.times[n + 1])

    def _changes(
        self, n: int, v: Tensor, ahead: Increment | None, behind: Increment | None
    ) -> tuple[Tensor, list[Tensor]]:
        """`c(v)` for the steps that begin and that end here, of a leaf with the values of `v`."""
        fields = self._prepared.fields
        time = self._stepper.method.like.new_full((), self._record.times[n])
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            f, g = fields.drift(time, leaf), fields.diffusion(time, leaf)
            changes = [
                torch.add(fields.layout.apply(g, motion.w), f, alpha=motion.h)
                for motion in (ahead, behind)
                if motion is not None
            ]
        self._prepared.captured.expect_known(changes[-1], leaf)
        return leaf, changes

    def _entering(
        self, n: int, z: Tensor, v: Tensor, upon_z: Tensor, upon_v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The cotangents of both, with those that come in from outside here and in the step."""
        backward, size, record = self._backward, self._size, self._record
        parts = []
        at_end = record.at_end.get(n)
        if at_end and backward.saved is not None:
            parts.append(backward.saved[at_end].sum(0))
        if n == len(record.sizes) and backward.at_steps[-1] is not None:
            parts.append(backward.at_steps[-1])
        for t, upon in backward.saved_inside(n):
            start = record.times[n]
            motion = self._path.increment(start, t)
            parts.append(self._pull(start, torch.cat((z, v)), motion, upon))
        for part in parts:
            upon_z, upon_v = upon_z + part[:size], upon_v + part[size:]
        return upon_z, upon_v

    def _pulled(self, leaf: Tensor, changes: list[Tensor], upon: list[Tensor]) -> Tensor:
        """The cotangent of `v` from those of its changes."""
        at_v, *rest = pull_back_all(changes, (leaf, *self._prepared.leaves), upon)
        self._sums.add(rest)
        return torch.zeros_like(leaf) if at_v is None else at_v

    def _compare(self, found: Tensor, known: Tensor) -> None:
        largest = torch.linalg.vector_norm(known, math.inf)
        self._gaps.append(torch.dist(found, known, math.inf) / largest.clamp_min(1e-3))

    def _expect_retraced(self) -> None:
        """Look at how far the way back has passed from what is known.

        Raises:
            RuntimeError: it is more than rounding.
        """
        gap = torch.nan_to_num(torch.stack(self._gaps), nan=0.0).max().item()
        if gap <= torch.finfo(self._gaps[0].dtype).eps ** 0.5:
            return
        if self._prepared.captured.suspects:
            raise RuntimeError(changed_message(self._prepared.captured.suspects[0]))
        raise RuntimeError(
            f"the way back along the steps of the reversible Heun method ends up to {gap:.2g} "
            "(relative) from where they began: rounding errors have grown, or the sde has changed "
            "since, draws random numbers, or remembers earlier calls.\n"
            '  Use another adjoint_method, such as "midpoint": the states of the steps are then '
            "kept. Shorter steps and float64 help as well."
        )


def reversible_sweep(
    prepared: DifferentiableFields,
    stepper: Stepper,
    path: Path,
    backward: BackwardPass,
    stats: Stats,
    kept: dict[int, Tensor],
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs, its steps undone one by one.

    Args:
        prepared: the fields with their inputs.
        stepper: the reversible Heun method with these fields.
        path: the Brownian motions of the forward solve.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
        kept: vectors on the way, by the number of steps up to there.
    """
    before = prepared.fields.nfe
    gradients = _WayBack(prepared, stepper, path, backward, kept).gradients()
    evaluations = prepared.fields.nfe - before
    stats.nfe_backward += evaluations
    stats.nvjp += evaluations
    stats.naccept_backward += len(backward.record.sizes)
    return gradients
