"""One step that each of some stochastic members takes, on a path of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.norm import Norm
from pysciml_node.stochastic.members.fields import MembersFields, TakenByAll
from pysciml_node.stochastic.members.paths import BrownianPaths, Motions


class StochasticStages:
    """A step of some members; it satisfies `StepOfMembers`.

    Args:
        fields: of all members.
        paths: of all members.
        rows: which members, `(L,)`.
        p: their parameters.
        start: the vectors where they start, `(L, N)`, and these times, `(L,)`.
        motions: Brownian motion over the steps.
    """

    def __init__(
        self,
        fields: MembersFields,
        paths: BrownianPaths,
        rows: Array,
        p: Any,
        start: tuple[Tensor, Array],
        motions: Motions,
    ) -> None:
        self.fields, self.paths, self.rows, self.p = fields, paths, rows, p
        self.u, self.t = start
        self.motions = motions
        like = fields.stepper.method.like
        self.times: Sequence[Tensor] = (torch.from_numpy(self.t).to(like),)
        self._first: Tensor | None = None
        self._taken: TakenByAll

    @property
    def end(self) -> Tensor | None:
        """Drift and diffusion at the ends, where the method has evaluated them."""
        return self._taken.last

    def know(self, k: Tensor) -> None:
        """Take drift and diffusion of the first stages as they are known."""
        if self.fields.stepper.method.starts_at_start:
            self._first = k

    def solution(self, with_error: bool) -> Tensor:
        """The vectors at the ends of the steps, `(L, N)`."""
        self._count(self.rows, with_error, self._first is not None)
        self._taken = self.fields.take(
            self.times[0], self.u, self.motions, self.p, self._first, with_error
        )
        return self._taken.end

    def _count(self, rows: Array, with_error: bool, known: bool) -> None:
        method, fields = self.fields.stepper.method, self.fields
        drifts, diffusions = method.for_error if with_error else method.for_step
        f = sum(stage is not None for stage in method.tableau.drift[:drifts])
        g = sum(stage is not None for stage in method.tableau.diffusion[:diffusions])
        np.add.at(fields.nfe, rows, f - known)
        np.add.at(fields.nfe_diffusion, rows, g - known)

    def error(self, u1: Tensor, norm: Norm) -> Tensor:
        """The scaled error estimates, `(L,)`."""
        assert self._taken.error is not None
        scaled = norm(self._taken.error, self.u.detach(), u1)
        if not self.fields.stepper.method.tableau.per_root:
            return scaled
        # Between two stops that the path does not tell apart there is no time, and no error.
        span, h = self.paths.span[self.rows], self.motions.h
        share = np.sqrt(np.divide(span, h, out=np.ones_like(h), where=h > 0))
        return scaled * torch.from_numpy(share).to(scaled)

    def inside(
        self, places: Array, theta: Array, when: Array
    ) -> tuple[Tensor, tuple[Array, Tensor] | None]:
        """The vectors inside the steps: shorter steps from their starts, on the same paths."""
        del theta
        rows, index = self.rows[places], torch.from_numpy(places)
        motions = self.paths.increments(rows, self.t[places], when)
        u, t = self.u.index_select(0, index), self.times[0].index_select(0, index)
        self._count(rows, False, False)
        found = self.fields.take(t, u, motions, self.fields.parameters(rows), None, False).end
        at_start = torch.from_numpy(motions.h <= 0).unsqueeze(1)
        return torch.where(at_start, u, found), None
