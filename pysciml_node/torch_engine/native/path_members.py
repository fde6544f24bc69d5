"""Native ensembles of stochastic equations: from checked members to native code and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import MemberOptions, SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import tensors_of
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.stochastic.fields import NoiseLayout
from pysciml_node.stochastic.solve import check_additive
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.torch_engine.native.crew import OF_DIFFUSION, Crew
from pysciml_node.torch_engine.native.library import Library
from pysciml_node.torch_engine.native.member_run import Flights
from pysciml_node.torch_engine.native.member_solve import MembersSolve, check_times
from pysciml_node.torch_engine.native.member_sweep import SweptMembers
from pysciml_node.torch_engine.native.members import FlownMember, NativeMembers
from pysciml_node.torch_engine.native.prepared import See, check_kind, check_surroundings, no_code
from pysciml_node.torch_engine.native.stochastic import PathSolve
from pysciml_node.torch_engine.native.stochastic_code import Translated


@dataclass
class _Solve(MembersSolve):
    """That of stochastic equations."""

    library: Library
    method: SDEMethod
    layout: NoiseLayout
    crew: Crew = field(init=False)

    @override
    def run(self, u0: Tensor, parameters: Sequence[Tensor]) -> Flights:
        # Aliases could be changed in place before they are replayed.
        kept = [self.library.lying(x.detach()).clone() for x in parameters]
        self.crew = Crew(self.library, self.options, kept, self.own)
        entries = sum(self.ensemble.problem.spec.sizes)
        order = self.method.tableau.error_order
        return self.crew.fly(self.passengers(u0, (), entries), order)

    @override
    def sweep(self, flights: Flights, *arriving: Tensor | None) -> SweptMembers:
        return self.crew.sweep(flights, *arriving)


class _Member(PathSolve, FlownMember):
    """One member, solved with all others."""


@dataclass
class NativePaths(NativeMembers):
    """The members of a stochastic equation that native code has solved."""

    counted: ClassVar[dict[str, int]] = {**NativeMembers.counted, "nfe_diffusion": OF_DIFFUSION}
    swept: ClassVar[dict[str, int]] = {"nfe_backward": 0, "nvjp": 1, "naccept_backward": 2}

    solve: _Solve

    @override
    def final(self) -> Tensor:
        return self.tensors[2][:, : self.solve.layout.entries]

    @override
    def saved(self) -> Tensor | None:
        saved = super().saved()
        return None if saved is None else saved[..., : self.solve.layout.entries]

    @override
    def member(self, problem: Problem, options: SolveOptions, see: See) -> FlownMember:
        assert isinstance(problem, SDEProblem)
        member = _Member(problem, self.algorithm, options, self.engine, see)
        member.sde, member.layout, member.method = problem, self.solve.layout, self.solve.method
        return member

    @override
    def rows(self, ends: Tensor, m: int) -> Tensor:
        first, behind = self.flights.offsets[m : m + 2].tolist()
        return ends[first + m : behind + m + 1]


def solve_native_paths(
    ensemble: EnsembleProblem,
    algorithm: StochasticRungeKutta,
    options: MemberOptions,
    engine: str,
) -> NativePaths:
    """Run the members of a checked ensemble of a stochastic equation as native code.

    Raises:
        CompileError: an option or a function has no native code, or there is no compiler.
        ValueError: the diffusion has another shape than the noise asks for, or noise that is said
            to be additive depends on the state.
    """
    common, problem = options.common, cast(SDEProblem, ensemble.problem)
    check_surroundings(common)
    check_kind(problem.spec, common, problem.drift, problem.diffusion)
    check_times((*problem.tspan, ensemble.tspan, options.saveat_tensor), options)
    spec, tableau = problem.spec, algorithm.tableau_for(problem)
    method = SDEMethod.of(tableau, algorithm.delta, spec.dtype, spec.device)
    first = cast(SDEProblem, ensemble.member(0))
    stacked = list(tensors_of(ensemble.p))
    rows = dict(zip(map(id, tensors_of(first.p)), stacked, strict=False)) if stacked else {}
    try:
        translated = Translated.of(first)
        read = [*translated.drift.parameters, *translated.diffusion.parameters]
        parameters, own = [rows.get(id(x), x) for x in read], [id(x) in rows for x in read]
        library = None
        if _are_alike(ensemble, options):
            library = translated.library_abreast(method, spec.dtype, tuple(own))
        library = library or translated.library(method, spec.dtype)
    except UnsupportedModule as error:
        raise no_code(error, "the drift or the diffusion") from error
    if problem.noise == "additive" and translated.reads_state:
        for m in {0, len(ensemble) - 1}:
            check_additive(cast(SDEProblem, ensemble.member(m)))
    starts = ensemble.starts()
    if tableau.carry:
        starts = torch.cat((starts, starts), dim=1)
    swept = np.zeros((len(ensemble), 3), dtype=np.int64)
    solve = _Solve(ensemble, options, own, swept, None, library, method, translated.layout)
    p = problem.p if ensemble.p is None else ensemble.p
    seen = Surroundings({"f": problem.drift, "diffusion": problem.diffusion, "p": p})
    flights, tensors = solve.fly(starts, parameters)
    return NativePaths(solve, algorithm, engine, flights, (*tensors, starts), seen)


def _are_alike(ensemble: EnsembleProblem, options: MemberOptions) -> bool:
    """Whether all members take the same steps, and are saved at the same times."""
    common = options.common
    fixed = not common.controller.adaptive and common.dt0 is not None
    return fixed and ensemble.tspan is None and options.saveat is None
