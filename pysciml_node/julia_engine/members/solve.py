"""Members of an ensemble by one call into Julia forward, and one backward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.julia_engine.fields import field_in_julia
from pysciml_node.julia_engine.members.field import MembersField
from pysciml_node.julia_engine.members.forward import Flown, fly
from pysciml_node.julia_engine.members.stacked import JuliaMembers
from pysciml_node.julia_engine.members.sweep import MembersSweep, ends_of, record_of
from pysciml_node.julia_engine.process.buffers import from_real, to_real
from pysciml_node.julia_engine.solve import ODESolve
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.modes import in_full_precision
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import moves
from pysciml_node.replay.members.node import MembersNode
from pysciml_node.replay.members.stacked import good_steps, roots_of
from pysciml_node.steps.surroundings import Surroundings


def solve_together(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions, engine: str
) -> JuliaMembers | None:
    """Solve all members by one call; `None` where each has to be solved by itself.

    What calls Python, a field or an event, needs its lock; tolerances of each member's own are part
    of how Julia solves.

    Args:
        ensemble: one member or more.
        algorithm: for all.
        options: of all, and of each.
        engine: its name.
    """
    problem = in_full_precision(ensemble.member(0), (nn.Module, JuliaField))
    if not isinstance(problem, ODEProblem) or options.rtol is not None or options.atol is not None:
        return None
    first = ODESolve(problem, algorithm, options.of(0), engine)
    if first.watcher is not None or first.fixed:
        return None
    field = field_in_julia(problem, torch.is_grad_enabled(), implicit=not first.explicit)
    if field is None:
        return None
    return MembersSolve(ensemble, options, first, MembersField(field, ensemble, problem)).solution()


class MembersSolve:
    """A solve of many members: its parts, and the ways to run it.

    Args:
        ensemble: what is solved.
        options: of all, and of each.
        first: the solve of the first member, for what they share.
        field: of all.
    """

    def __init__(
        self,
        ensemble: EnsembleProblem,
        options: MemberOptions,
        first: ODESolve,
        field: MembersField,
    ) -> None:
        self.ensemble, self.options, self.first, self.field = ensemble, options, first, field
        # A copy: it is read again by the sweep.
        self.u0 = ensemble.starts().clone()
        times = {
            "tspan": ensemble.tspan,
            "t0": first.problem.tspan[0],
            "t1": first.problem.tspan[1],
            "saveat": (
                options.common.saveat_tensor if options.saveat is None else options.saveat_tensor
            ),
        }
        if ensemble.tspan is not None:
            del times["t0"], times["t1"]
        self.times: dict[str, Tensor] = {
            name: t for name, t in times.items() if isinstance(t, Tensor) and moves(t)
        }

    def solution(self) -> JuliaMembers:
        """Run it; members that fail are returned like any other."""
        first, start = self.first, to_real(self.u0.detach())
        flown = fly(
            first.problem,
            self.options,
            first.departure.plan,
            self.field,
            start,
            first.departure.keep_solution,
        )
        if not first.watched:
            self._cut(flown)
        members = self._members(flown)
        if torch.is_grad_enabled():
            sweep = MembersSweep(flown, self.options, first, self.field, self.times, members.add)
            at_times, states = MembersNode.apply(  # type: ignore[no-untyped-call]
                sweep,
                (members.at_times, members.states),
                False,
                self.u0,
                *self.times.values(),
                *self.field.inputs,
            )
            members.at_times, members.states, members.recorded = at_times, states, True
        return members

    def _members(self, flown: Flown) -> JuliaMembers:
        dtype, times, problem = self.u0.dtype, self.options.times, self.ensemble.problem
        p = problem.p if self.ensemble.p is None else self.ensemble.p
        return JuliaMembers(
            ensemble=self.ensemble,
            algorithm=self.first.algorithm,
            engine=self.first.engine,
            options=self.options,
            codes=flown.codes,
            columns=flown.columns,
            steps=flown.steps,
            u0=self.u0,
            states=from_real(flown.states, dtype),
            at_times=None if times is None else from_real(flown.saved, dtype),
            reached=flown.reached,
            # Now: what changes later is not what the solve saw.
            surroundings=Surroundings({**roots_of(problem), "p": p}),
            solutions=flown.solutions,
            field=self.field,
        )

    def _cut(self, flown: Flown) -> None:
        """Leave out the steps after which a state is not finite."""
        kept = good_steps(flown.steps, flown.states, flown.codes)
        if kept is None:
            return
        cut = np.flatnonzero(kept < flown.steps.counts)
        flown.steps, places = flown.steps.first(kept)
        flown.states = flown.states[torch.from_numpy(places)].contiguous()
        flown.columns["naccept"] = kept
        ends = ends_of(self.times)
        for m in cut.tolist():
            record = record_of(flown, m, self.options, ends)
            inside = (indices for indices, _ in record.inside.values())
            flown.reached[m] = sum(map(len, (*inside, *record.at_end.values())))
            flown.saved[m, int(flown.reached[m]) :] = torch.nan
