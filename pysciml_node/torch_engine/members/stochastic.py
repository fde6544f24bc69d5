"""Stochastic members in one batch: each has a Brownian path and steps of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.stochastic.brownian import DEPTH
from pysciml_node.stochastic.fields import Fields
from pysciml_node.stochastic.march import root_length
from pysciml_node.stochastic.members.fields import MembersFields
from pysciml_node.stochastic.members.paths import BrownianPaths, Motions
from pysciml_node.stochastic.members.stacked import StackedPaths
from pysciml_node.stochastic.members.stages import StochasticStages
from pysciml_node.stochastic.solve import check_additive
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.torch_engine.members.batch import Batch
from pysciml_node.torch_engine.members.march import MembersMarch
from pysciml_node.torch_engine.members.sweep import Again, states_of
from pysciml_node.torch_engine.members.tape import Tape


class StochasticMarch(MembersMarch):
    """Steps of a stochastic Runge-Kutta method, as `SDEMarch` takes them for one member.

    Args:
        fields: of all members.
        paths: of all members.
        options: step control.
        tape: is told of accepted steps.
    """

    def __init__(
        self, fields: MembersFields, paths: BrownianPaths, options: MemberOptions, tape: Tape
    ) -> None:
        method = fields.stepper.method
        super().__init__(method.like, method.tableau.error_order, fields, options, tape)
        self.fields, self.paths = fields, paths
        # By member: whether its last attempt was rejected.
        self._rejecting = np.zeros(len(fields.nfe), dtype=bool)
        self._motions: Motions
        self._p: object = None

    @property
    @override
    def order(self) -> float:
        return self.fields.stepper.method.tableau.strong_order + 0.5

    @override
    def _rate(self, k: Tensor) -> Tensor:
        drift, _ = self.fields.split(k)
        if not self.fields.stepper.method.tableau.carry:
            return drift
        return torch.cat((drift, torch.zeros_like(drift)), dim=1)

    @override
    def _speed(self, k: Tensor) -> Tensor:
        # Three standard deviations of the noise.
        drift, diffusion = self.fields.split(k)
        return drift.abs() + 3 * self.fields.magnitude(diffusion)

    @override
    def _change(self, k: Tensor, ahead: Tensor) -> Tensor:
        (f, g), (f1, g1) = self.fields.split(k), self.fields.split(ahead)
        magnitude = self.fields.magnitude
        return (f1 - f).abs() + 3 * (magnitude(g1) - magnitude(g)).abs()

    @override
    def _smallest(self, t: Array) -> Array:
        rows = self.live.rows
        resolved = np.ldexp(self.paths.length[rows], 4 - DEPTH)
        ends = 8 * np.spacing(abs(self.options.spans[1][rows]))
        smallest: Array = np.maximum(np.maximum(self.options.common.dtmin, resolved), ends)
        return smallest

    @override
    def _place(self, proposed: Array, stop: Array, lands: Array) -> tuple[Array, Array, Array]:
        live = self.live
        end = np.where(lands, stop, live.t + proposed)
        if self.adaptive:
            down = self._rejecting[live.rows] | (proposed == self.options.common.dtmax)
            aligned = self.paths.aligned(live.rows, live.t, proposed, down)
            end = np.minimum(np.where(lands, stop, aligned), stop)
        lands = end >= stop
        self._motions = self.paths.increments(live.rows, live.t, end)
        return self._motions.h, end, lands

    @override
    def _renew(self) -> None:
        self._p = self.field.parameters(self.live.rows)

    @override
    def _begin(self, h: Array, landing: bool) -> None:
        live = self.live
        self.stages = StochasticStages(
            self.fields, self.paths, live.rows, self._p, (self.u, live.t), self._motions
        )

    @override
    def _first_stages(self) -> None:
        if self.fields.stepper.method.starts_at_start:
            super()._first_stages()

    @override
    def _told(
        self, h: Array, end: Array, proposed: Array, accepted: Array
    ) -> tuple[Array, Array | None]:
        self._rejecting[self.live.rows] = ~accepted
        size = end - self._last.t
        cut = size < 0.7 * proposed
        # What the alignment has changed is not fed back: small factors would be rounded away.
        told = np.where(cut, size, proposed)
        return np.where(accepted, told, np.minimum(proposed, 1.125 * size)), cut


@dataclass(frozen=True)
class PathsAgain:
    """Steps of stochastic members again, on the same paths.

    Args:
        fields: of all members.
        paths: of all members.
    """

    fields: MembersFields
    paths: BrownianPaths

    def __call__(
        self,
        u: Tensor,
        members: Array,
        span: tuple[Array, Array, Array],
        inside: tuple[Array, Array, Array],
        moved: tuple[Tensor, Tensor] | None,
    ) -> list[Tensor]:
        """The vectors at the ends of steps, and inside; paths have fixed ends."""
        assert moved is None
        t, _, end = span
        p, motions = self.fields.parameters(members), self.paths.increments(members, t, end)
        stages = StochasticStages(self.fields, self.paths, members, p, (u, t), motions)
        return states_of(stages, inside)


class StochasticBatch(Batch):
    """Members that take stochastic Runge-Kutta steps."""

    result = StackedPaths
    # Dense output takes shorter steps, from the states of all.
    lets_go = False

    def __init__(
        self, ensemble: EnsembleProblem, algorithm: StochasticRungeKutta, options: MemberOptions
    ) -> None:
        problem, spec = ensemble.problem, ensemble.problem.spec
        assert isinstance(problem, SDEProblem)
        tableau = algorithm.tableau_for(problem)
        method = SDEMethod.of(tableau, algorithm.delta, spec.dtype, spec.device)
        if problem.noise == "additive":
            for m in {0, len(ensemble) - 1}:
                one = ensemble.member(m)
                assert isinstance(one, SDEProblem)
                check_additive(one)
        self.fields = MembersFields(ensemble, method)
        t0, t1 = options.spans
        length = np.array([root_length(x, options.common) for x in (t1 - t0).tolist()])
        size = self.fields.fields.layout.size
        self.paths = BrownianPaths(options.seeds, size, options.spans, length, spec.dtype)
        u0 = ensemble.starts()
        u0 = torch.cat((u0, u0), dim=1) if tableau.carry else u0
        super().__init__(ensemble, algorithm, options, self.fields, u0, method.like)

    @override
    def march(self, tape: Tape, recorded: bool) -> MembersMarch:
        return StochasticMarch(self.fields, self.paths, self.options, tape)

    @override
    def again(self) -> Again:
        return PathsAgain(self.fields, self.paths)

    @override
    def counts(self) -> dict[str, Array]:
        return {**super().counts(), "nfe_diffusion": self.fields.nfe_diffusion.copy()}

    @override
    def alone(self, m: int, recorded: bool = False) -> Tensor:
        problem = self.ensemble.member(m)
        assert isinstance(problem, SDEProblem)
        fields, t = Fields(problem), problem.time_tensor([problem.t0])[0].detach()
        u = problem.spec.flatten(problem.u0).detach().requires_grad_(recorded)
        return torch.cat((fields.drift(t, u), fields.diffusion(t, u)))

    @override
    def differing(self, k: Tensor) -> int | None:
        drift, diffusion = self.fields.split(k)
        rounding = torch.finfo(k.dtype).eps ** 0.5
        for m in {0, len(self.ensemble) - 1}:
            with torch.no_grad():
                expected = self.alone(m)
            batched = torch.cat((drift[m], diffusion[m])).detach()
            close = torch.isclose(batched, expected, rtol=rounding, atol=rounding, equal_nan=True)
            if not bool(close.all()):
                return m
        return None
