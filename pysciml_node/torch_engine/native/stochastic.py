"""Native solves of stochastic equations, and their solutions."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.steps.record import Kept
from pysciml_node.stochastic.fields import Fields, NoiseLayout
from pysciml_node.stochastic.march import path_for
from pysciml_node.stochastic.solve import check_additive
from pysciml_node.stochastic.step import SDEMethod, Stepper
from pysciml_node.stochastic.trajectory import SDETrajectory
from pysciml_node.torch_engine.native.brownian import Noise, noise_of
from pysciml_node.torch_engine.native.engine import FlownSolve, SingleSolve, Steps
from pysciml_node.torch_engine.native.prepared_stochastic import prepare_sde


class PathSolve(FlownSolve):
    """What native code has solved of a stochastic equation.

    Attributes:
        sde: the problem.
        layout: how the motions act on the state.
        method: the method.
    """

    sde: SDEProblem
    layout: NoiseLayout
    method: SDEMethod

    @override
    def state(self, stepped: Tensor) -> Tensor:
        carries = self.method.tableau.carry
        return stepped[..., : self.layout.entries] if carries else stepped

    @override
    def trajectory_of(self, load: Steps | Kept) -> SDETrajectory:
        return SDETrajectory(
            self.sde,
            Stepper(self.method, Fields(self.sde)),
            path_for(self.sde, self.options, self.layout.size),
            load,
            self.stats,
            self.options,
            self.surroundings(),
        )


class NativeSDESolve(PathSolve, SingleSolve):
    """One native solve of a stochastic equation.

    Raises:
        CompileError: an option or a field has no native code, or there is no compiler.
        ValueError: the diffusion has another shape than the noise asks for, or noise that is said
            to be additive depends on the state.
    """

    def __init__(
        self,
        problem: SDEProblem,
        algorithm: StochasticRungeKutta,
        options: SolveOptions,
        engine: str,
    ) -> None:
        prepared, self.parameters, see = prepare_sde(problem, algorithm, options)
        if problem.noise == "additive" and prepared.reads_state:
            check_additive(problem)
        super().__init__(problem, algorithm, options, engine, see)
        self.sde, self.layout, self.method = problem, prepared.layout, prepared.method
        self.departure = prepared.departure
        if self.method.tableau.carry:
            flat = self.u0.reshape(-1)
            self.u0 = torch.cat((flat, flat))

    @override
    def noise(self) -> Noise:
        return noise_of(self.problem, self.options)
