"""Local errors and stiffness of members' steps, those of all members at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DirectAdjoint
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.algorithms.switching import OneStepMethod
from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.modes import ordinary_modes
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.comparison import Comparison, as_solved
from pysciml_node.replay.measure import checkpointed
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.first_sizes import first_sizes
from pysciml_node.replay.members.implicit import member_stages_for
from pysciml_node.replay.members.limits import StepLimits
from pysciml_node.replay.members.norm import MembersNorm
from pysciml_node.replay.members.stacked import MembersUpToEvents
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.replay.newton import left_missing
from pysciml_node.replay.stages import Method
from pysciml_node.solutions.members import Members
from pysciml_node.solutions.solution import StepEstimate, StopGradient
from pysciml_node.steps.guard import guard
from pysciml_node.steps.record import check_discrete
from pysciml_node.steps.repeated import Repeated
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.tableaus import ImplicitTableau

# So many steps are taken again at once, with so many entries of their Jacobians, or those of one,
# and their graphs are not kept.
_ROWS, _ENTRIES = 8192, 2**22


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

    @property
    def quicker_alone(self) -> bool:
        """Whether each takes all of its steps again in less time than all of them at once."""


def estimates_of(members: Members) -> StackedEstimates | None:
    """Estimates of the steps of all members at once; `None` where each has to give its own.

    Those of another engine may have a field that `torch.vmap` does not take.
    """
    known = isinstance(getattr(members, "algorithm", None), OneStepMethod)
    if not (known and getattr(members, "maps_field", False)):
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
        assert isinstance(members.algorithm, OneStepMethod)
        # How the steps were taken; and which of two methods took each.
        self.methods = Method.all_of(members.algorithm.tableaus, spec.dtype, spec.device)
        self.of = 0 * self.rows if self.steps.methods is None else self.steps.methods
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

    def _expect_same(
        self, repeated: Repeated, found: StepEstimate, places: Iterable[tuple[Array, Tensor]]
    ) -> None:
        """Compare derivatives at times `(M,)` and states `(M, N)`."""
        field = MembersField(self.members.ensemble)
        field.given = self.members.reach.roots
        with ordinary_modes(self.members.ensemble.problem.spec.device):
            repeated.expect_same((found.error, found.stiffness), field.later(places))

    def _repeated(self) -> Repeated:
        """What the field can reach, before steps are taken again."""
        return Repeated(self.members.reach, self.members.ensemble.problem.spec.device)

    def _method(self, algorithm: ExplicitRungeKutta) -> Method:
        spec = self.members.ensemble.problem.spec
        return Method.of(algorithm.tableau, spec.dtype, spec.device)

    def _stages(
        self, method: Method, field: MembersField, rows: Array, u: Tensor, t: Array, h: Array
    ) -> MemberStages:
        options, p = self.members.options, field.parameters(rows)
        derivatives = 2 if isinstance(options.common.adjoint, DirectAdjoint) else 1
        make = member_stages_for(method, options, derivatives)
        stages = make(method, field, rows, p, u, recording())
        stages.begin(u, t, h, self.limits(rows, t, h))
        return stages

    def _compare(self, comparison: Comparison, n: Array, stages: MemberStages) -> None:
        """Compare the ends of steps, of their stages as far as they are there, with the solve's."""
        ends, late = self.members.states.detach(), None
        if self.members.rounded_times:
            late = torch.from_numpy(abs(self.steps.starts[n] / self.steps.sizes[n])).unsqueeze(-1)
        missing = 0.0
        if isinstance(stages.method.tableau, ImplicitTableau):
            missing = left_missing(ends.dtype)
        with torch.no_grad():
            again, index = stages.solution(with_error=False), torch.from_numpy(n).to(ends.device)
            ended = ends.index_select(0, index)
            comparison.add(again, ended, stages.u.detach(), missing, late)

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
        rows, members, repeated = np.arange(len(t)), self.members, self._repeated()
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
            found = self._measured(stages, norm, h)
        self._expect_same(repeated, found, [(t, u), (t + h, u)])
        guard((found.error, found.stiffness), members.reach)
        return found

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
        steps, every = self.steps, self.step_of(t)
        start, h, found = steps.starts, steps.sizes, list[Tensor]()
        parts = self._by_methods(every)
        for method, members in parts:
            n, when = every[members], t[members]
            u = self._states(n)
            stages = self._stages(method, field, members, u, start[n], h[n])
            if (when != start[n]).any():
                u = stages.inside(np.arange(len(n)), (when - start[n]) / h[n], when)[0]
            self._compare(comparison, n, stages)
            found.append(u)
        return _in_order(found, [members for _, members in parts])

    def _by_methods(self, steps: Array) -> list[tuple[Method, Array]]:
        """Places in a list of steps, by the methods that took them."""
        of = self.of[steps]
        places = [(method, np.flatnonzero(of == i)) for i, method in enumerate(self.methods)]
        return [(method, some) for method, some in places if len(some)]

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
        parts, taken, size = [], list[Array](), self.members.u0.shape[1]
        repeated = self._repeated()
        for method, steps in self._by_methods(np.arange(len(self.rows))):
            is_implicit = isinstance(method.tableau, ImplicitTableau)
            most = max(1, min(_ROWS, _ENTRIES // size**2)) if is_implicit else _ROWS
            for n in np.array_split(steps, -(-len(steps) // most)):
                u = self._states(n)
                again = checkpointed(self._again, method, n, u) if graph else None
                parts.append(self._again(method, n, u) if again is None else again)
                taken.append(n)
        error, stiffness = (_in_order(column, taken) for column in zip(*parts, strict=True))
        found = StepEstimate(torch.from_numpy(self.steps.sizes).to(error), error, stiffness)
        t0, u0 = self.spans[0], self.members.u0
        later = self.steps.later_starts(t0, u0, self.members.states)
        self._expect_same(repeated, found, chain([(t0, u0)], later))
        return found

    def _again(self, method: Method, n: Array, u: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and stiffness of some steps of a method from the states at their starts."""
        members, steps, rows = self.members, self.steps, self.rows[n]
        with self._computing() as (field, comparison):
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


def _in_order(parts: Sequence[Tensor], places: Sequence[Array]) -> Tensor:
    """Rows of tensors together, each in its place."""
    if len(parts) == 1:
        return parts[0]
    order = torch.from_numpy(np.concatenate(places).argsort(kind="stable"))
    return torch.cat([*parts])[order.to(parts[0].device)]
