"""Local errors and stiffness of members' steps, those of all members at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.modes import ordinary_modes
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.comparison import Comparison, as_solved
from pysciml_node.replay.measure import checkpointed
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.first_sizes import first_sizes
from pysciml_node.replay.members.limits import StepLimits
from pysciml_node.replay.members.norm import MembersNorm
from pysciml_node.replay.members.stacked import MembersUpToEvents
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.replay.stages import Method
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.solution import StepEstimate, StopGradient
from pysciml_node.steps.record import check_discrete
from pysciml_node.steps.surroundings import Surroundings

# So many steps are taken again at once, and their graphs are not kept.
_ROWS = 8192


class MappedMembers(MembersUpToEvents, Protocol):
    """Members over which `torch.vmap` maps the field, with their steps in common tensors."""

    @property
    def algorithm(self) -> Algorithm:
        """How they were solved."""

    @property
    def ensemble(self) -> EnsembleProblem:
        """What was solved."""

    @property
    def options(self) -> MemberOptions:
        """Those of all, and of each."""

    @property
    def u0(self) -> Tensor:
        """Flat starts, `(M, N)`."""

    @property
    def states(self) -> Tensor:
        """Flat states at the ends of the steps, `(P, N)`."""

    @property
    def reach(self) -> Surroundings:
        """What the field can reach."""

    @property
    def thinned(self) -> bool:
        """Whether only the last state of each is kept."""

    @property
    def detached(self) -> bool:
        """Whether gradients have been left behind."""

    @property
    def rounded_times(self) -> bool:
        """Whether times are as precise as states, and not doubles."""


def estimates_of(members: Members) -> StackedEstimates | None:
    """Estimates of the steps of all members at once; `None` where each has to give its own.

    Those of another engine may have a field that `torch.vmap` does not take.
    """
    explicit = isinstance(getattr(members, "algorithm", None), ExplicitRungeKutta)
    if not (explicit and getattr(members, "maps_field", False)):
        return None
    mapped = cast(MappedMembers, members)
    tspan = mapped.ensemble.tspan
    if mapped.thinned or not mapped.steps.counts.all() or (tspan is not None and moves(tspan)):
        return None
    return StackedEstimates(mapped)


class StackedEstimates:
    """Estimates of the steps of members that were solved in one batch.

    Args:
        members: all of them.
    """

    def __init__(self, members: MappedMembers) -> None:
        self.members, self.steps = members, members.steps
        self.spans, options = members.options.spans, members.options
        self.sign = np.sign(self.spans[1] - self.spans[0])
        counts = self.steps.counts
        self.rows = np.repeat(np.arange(len(counts)), counts)
        self.ends: Array = self.steps.ends[self.steps.offsets[1:] - 1]
        spec = members.ensemble.problem.spec
        self.limits = StepLimits(options, spec.real_dtype)
        # The state before each step: starts stand first.
        before = np.arange(len(self.rows)) + len(counts) - 1
        first = self.steps.offsets[:-1]
        before[first] = np.arange(len(counts))
        self.before = torch.from_numpy(before).to(spec.device)

    @contextmanager
    def _computing(self) -> Iterator[tuple[MembersField, Comparison]]:
        """Gives the field as the solve saw it, and compares the steps that are taken again.

        The modes are ordinary ones, and there are gradients if there are any outside.
        """
        members, reach = self.members, self.members.reach
        field = MembersField(members.ensemble)
        graph = torch.is_grad_enabled() and not members.detached
        device = members.ensemble.problem.spec.device
        with (
            ordinary_modes(device),
            torch.set_grad_enabled(graph),
            as_solved(reach) as comparison,
        ):
            field.given = reach.roots
            yield field, comparison
            members.add("nfe", field.nfe)

    def _method(self, algorithm: ExplicitRungeKutta) -> Method:
        spec = self.members.ensemble.problem.spec
        return Method.of(algorithm.tableau, spec.dtype, spec.device)

    def _stages(
        self, method: Method, field: MembersField, rows: Array, u: Tensor, t: Array, h: Array
    ) -> MemberStages:
        p = field.parameters(rows)
        stages = MemberStages(method, field, rows, p, u, recording())
        stages.begin(u, t, h, self.limits(rows, t, h))
        return stages

    def _compare(self, comparison: Comparison, n: Array, stages: MemberStages) -> None:
        """Compare the ends of steps, of their stages as far as they are there, with the solve's."""
        ends, late = self.members.states.detach(), None
        if self.members.rounded_times:
            late = torch.from_numpy(abs(self.steps.starts[n] / self.steps.sizes[n])).unsqueeze(-1)
        with torch.no_grad():
            again, index = stages.solution(with_error=False), torch.from_numpy(n).to(ends.device)
            comparison.add(again, ends.index_select(0, index), stages.u.detach(), late=late)

    def step_of(self, t: Array) -> Array:
        """Which step of each member contains a time of its own, the later one at a boundary."""
        sign = self.sign[self.rows]
        passed = sign * self.steps.ends <= (self.sign * t)[self.rows]
        n = np.bincount(self.rows[passed], minlength=len(t))
        found: Array = np.minimum(n, self.steps.counts - 1) + self.steps.offsets[:-1]
        return found

    def sizes_at(self, t: Array) -> Array:
        """The sizes of these steps, positive."""
        sizes: Array = abs(self.steps.sizes[self.step_of(t)])
        return sizes

    def starts(self, m: int) -> Array:
        """Where the steps of a member start."""
        starts: Array = self.steps.starts[self.steps.of(m)]
        return starts

    def local(
        self,
        t: Array,
        algorithm: ExplicitRungeKutta,
        stop_gradient: StopGradient,
        dt: Array | None,
    ) -> StepEstimate:
        """One step of `algorithm` from a time of each member, `(M,)`; see `TorchTrajectory`."""
        rows, members = np.arange(len(t)), self.members
        with self._computing() as (field, comparison):
            graph = torch.is_grad_enabled()
            with torch.set_grad_enabled(graph and not stop_gradient):
                u = self._states_at(field, comparison, t)
            method = self._method(algorithm)
            norm = MembersNorm(members.options, u)
            p, span = field.parameters(rows), self.spans[1] - t
            at = torch.from_numpy(t).to(method.nodes)
            with torch.set_grad_enabled(graph and stop_gradient is not True):
                k = field(at, u, p)
            field.tally(rows)
            with torch.no_grad():
                if dt is None:
                    order = method.tableau.order
                    h = self._first(field, norm, at, u.detach(), k.detach(), p, span, order)
                else:
                    h = np.minimum(dt, abs(span)) * self.sign
            stages = self._stages(method, field, rows, u, t, h)
            stages.know(k)
            return self._measured(stages, norm, h)

    def _first(
        self,
        field: MembersField,
        norm: MembersNorm,
        t: Tensor,
        u: Tensor,
        k: Tensor,
        p: Any,
        span: Array,
        order: float,
    ) -> Array:
        """Sizes of the first steps that solves from there would try."""

        def change(sizes: Array) -> Tensor:
            h = torch.from_numpy(sizes).to(t)
            field.tally(np.arange(len(sizes)))
            ahead: Tensor = field(t + h, u + h.unsqueeze(1) * k, p)
            return ahead - k

        with np.errstate(all="ignore"):
            return first_sizes(norm, u, k, change, abs(span), self.sign, order)

    def _states_at(self, field: MembersField, comparison: Comparison, t: Array) -> Tensor:
        """Dense output at a time of each member, `(M, N)`."""
        steps, n = self.steps, self.step_of(t)
        u = self._states(n)
        start, h = steps.starts[n], steps.sizes[n]
        assert isinstance(self.members.algorithm, ExplicitRungeKutta)
        method, rows = self._method(self.members.algorithm), np.arange(len(t))
        stages = self._stages(method, field, rows, u, start, h)
        if (t != start).any():
            u = stages.inside(rows, (t - start) / h, t)[0]
        self._compare(comparison, n, stages)
        return u

    def _states(self, steps: Array) -> Tensor:
        """The states before some steps, with their graph."""
        members = self.members
        index = self.before[torch.from_numpy(steps).to(self.before.device)]
        return torch.cat((members.u0, members.states)).index_select(0, index)

    def every_step(self) -> StepEstimate:
        """Of all accepted steps, `(P,)`; each is taken again, and once more in backward.

        Raises:
            ValueError: the solve's adjoint is a continuous one.
        """
        check_discrete(self.members.options.common.adjoint)
        graph = torch.is_grad_enabled() and not self.members.detached
        parts = []
        for first in range(0, len(self.rows), _ROWS):
            n = np.arange(first, min(first + _ROWS, len(self.rows)))
            u = self._states(n)
            found = checkpointed(self._again, n, u) if graph else None
            parts.append(self._again(n, u) if found is None else found)
        error, stiffness = (torch.cat(column) for column in zip(*parts, strict=True))
        return StepEstimate(torch.from_numpy(self.steps.sizes).to(error), error, stiffness)

    def _again(self, n: Array, u: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and stiffness of some steps from the states at their starts."""
        members, steps, rows = self.members, self.steps, self.rows[n]
        assert isinstance(members.algorithm, ExplicitRungeKutta)
        with self._computing() as (field, comparison):
            method = self._method(members.algorithm)
            stages = self._stages(method, field, rows, u, steps.starts[n], steps.sizes[n])
            norm = MembersNorm(members.options, members.u0)
            norm.keep(rows)
            found = self._measured(stages, norm, steps.sizes[n])
            self._compare(comparison, n, stages)
        return found.error, found.stiffness

    @staticmethod
    def _measured(stages: MemberStages, norm: MembersNorm, h: Array) -> StepEstimate:
        u1 = stages.solution(with_error=True)
        error = stages.error(u1, norm.recorded)
        return StepEstimate(torch.from_numpy(h).to(error), error, stages.stiffness())
