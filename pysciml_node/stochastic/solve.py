"""The torch engine's door for stochastic problems."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.adjoints import BacksolveAdjoint, DirectAdjoint
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import tensors_of
from pysciml_node.replay.kept import KeptSteps, keeping, memory_for
from pysciml_node.steps.autograd import as_node
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.finish import Solve
from pysciml_node.steps.first_graph import FirstGraph
from pysciml_node.steps.guard import guard
from pysciml_node.steps.loop import Steps
from pysciml_node.steps.overwritten import Overwritten
from pysciml_node.steps.progress import step_listener
from pysciml_node.steps.randomness import expect_repeatable
from pysciml_node.steps.record import Kept, Outcome, Record
from pysciml_node.steps.saver import Between, Saver, follow
from pysciml_node.steps.step import Step
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.stochastic.adjoints import (
    Pullback,
    StepPullback,
    backsolve_sweep,
    discrete_sweep,
)
from pysciml_node.stochastic.brownian import Path
from pysciml_node.stochastic.fields import DifferentiableFields, Fields
from pysciml_node.stochastic.kept import KeptPullback, KeptStepper, evaluations_of
from pysciml_node.stochastic.march import SDEMarch, Slope, Start, path_for
from pysciml_node.stochastic.step import SDEMethod, Stepper
from pysciml_node.stochastic.trajectory import SDETrajectory


def check_additive(problem: SDEProblem) -> None:
    """Additive noise does not depend on the state: look at two states.

    Raises:
        ValueError: it does.
    """
    spec, p = problem.spec, problem.p
    time = problem.time_tensor([problem.t0])[0]
    with torch.no_grad():
        u = spec.flatten(problem.u0).detach()
        # Another state, in no simple relation to the first.
        weights = torch.linspace(0.3, 1.1, u.numel(), dtype=u.dtype, device=u.device)
        values = []
        for state in (u, u + weights * (1 + u.abs())):
            given = (time, spec.unflatten(state.clone()))
            value = problem.diffusion(*given) if p is None else problem.diffusion(*given, p)
            values.append([part.clone() for part in tensors_of(value)])
    for one, other in zip(*values, strict=True):
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-7, equal_nan=True):
            raise ValueError(
                'noise="additive" says that the diffusion does not depend on the state, but it has '
                "different values at two states.\n"
                '  Use noise="diagonal" or "general", or a diffusion of t alone.'
            )


class Parts:
    """What an engine has of its own, here the embedded one's; all else is shared.

    Attributes:
        watches: whether inputs may be found while the steps are taken.
        keeps: whether graphs of steps are of use.
    """

    watches = True
    keeps = True

    def stepper(self, method: SDEMethod, fields: Fields) -> Stepper:
        """What takes single steps."""
        return Stepper(method, fields)

    def path(self, problem: SDEProblem, options: SolveOptions, size: int) -> Path:
        """So many Brownian motions."""
        return path_for(problem, options, size)

    def begin(self, stepper: Stepper, u0: Tensor) -> Tensor:
        """The vector that is stepped, at `t0`."""
        return stepper.start(u0)

    def steps(self, start: Start) -> Steps:
        """The accepted steps."""
        return SDEMarch(start)

    def saver(
        self, record: Record, vector: Tensor, between: Between, times: Sequence[float]
    ) -> Saver:
        """What keeps the steps."""
        return Saver(record, vector, between, times)

    def sweep(
        self,
        solve: SDESolve,
        prepared: DifferentiableFields,
        given: BackwardPass,
        kept: KeptPullback | None,
    ) -> Gradients:
        """Pull the cotangents of a solve back; the first steps may have been kept."""
        if isinstance(solve.options.adjoint, BacksolveAdjoint):
            return backsolve_sweep(prepared, solve.stepper, solve.path, given, solve.stats)
        if kept is not None:
            kept.take()
        pull = self.pullback(prepared, solve.stepper)
        return discrete_sweep(pull, solve.path, given, solve.stats, kept)

    def pullback(self, prepared: DifferentiableFields, stepper: Stepper) -> Pullback:
        """The adjoint of single steps, once they have been taken."""
        return StepPullback(prepared, stepper)


class SDESolve(Solve):
    """One solve of a stochastic equation: its parts, made once, and the ways to run it.

    Args:
        problem: what to solve.
        algorithm: how.
        options: of the solve.
        engine: name of the engine.
        parts: the engine's own; default those of the embedded one.
    """

    problem: SDEProblem

    def __init__(
        self,
        problem: SDEProblem,
        algorithm: StochasticRungeKutta,
        options: SolveOptions,
        engine: str,
        parts: Parts | None = None,
    ) -> None:
        super().__init__(problem, algorithm, options, engine)
        self.parts = Parts() if parts is None else parts
        spec = problem.spec
        tableau = algorithm.tableau_for(problem)
        self.method = SDEMethod.of(tableau, algorithm.delta, spec.dtype, spec.device)
        # A copy: the state that was given may be changed in place before this one is read.
        self.u0 = spec.flatten(problem.u0).clone()
        self.stepper: Stepper
        self.path: Path
        self.surroundings: Surroundings

    @override
    def run(self) -> Outcome:
        direct = isinstance(self.options.adjoint, DirectAdjoint)
        return self.recorded() if direct or not torch.is_grad_enabled() else self.node()

    @override
    def trajectory(self, outcome: Outcome) -> SDETrajectory:
        return SDETrajectory(
            self.problem,
            self.stepper,
            self.path,
            Kept(outcome.record, outcome.states),
            self.stats,
            self.options,
            self.surroundings,
        )

    @override
    def state(self, stepped: Tensor) -> Tensor:
        return self.stepper.state(stepped)

    def _with(self, fields: Fields) -> Tensor:
        """Use these fields; returns the vector to start from."""
        if self.problem.noise == "additive":
            check_additive(self.problem)
        self.stepper = self.parts.stepper(self.method, fields)
        self.path = self.parts.path(self.problem, self.options, fields.layout.size)
        return self.parts.begin(self.stepper, self.u0)

    def march(self, stepper: Stepper, vector: Tensor, slope: Slope | None) -> Outcome:
        """Run the time loop and keep what the options ask for."""
        options, problem = self.options, self.problem
        march = self.parts.steps(Start(stepper, options, self.path, vector, slope))
        record = Record(
            times=[problem.t0],
            t1_stop=len(options.landings(1)),
            marks=(problem.t0, *options.tstops, problem.t1),
        )
        between = partial(self._between, stepper)
        saver = self.parts.saver(record, vector, between, options.saveat or ())
        with step_listener(options.progress, problem) as on_step:
            outcome = follow(march, saver, on_step, watched=self.watched)
        fields = self.stepper.fields
        self.stats.nfe, self.stats.nfe_diffusion = fields.nfe, fields.nfe_diffusion
        return outcome

    def _between(
        self, stepper: Stepper, step: Step, times: Sequence[float], moving: Tensor | None
    ) -> Tensor:
        """The vectors at times inside a step: shorter steps from its start, on the same path."""
        assert moving is None
        path = self.path
        return torch.stack(
            [stepper.inside(step.t, step.u, path.increment(step.t, t)) for t in times]
        )

    def recorded(self) -> Outcome:
        """Without gradients, or with every operation recorded by autograd."""
        fields = Fields(self.problem)
        self.surroundings = Surroundings(fields.given)
        before = Overwritten(self.surroundings) if torch.is_grad_enabled() else None
        with self.surroundings.undisturbed():
            start = self._with(fields)
            outcome = self.march(self.stepper, start, self._first(fields))
        self.surroundings.settle()
        values = (*outcome.states, outcome.saved)
        if before is not None:
            before.expect_unread(values, lambda: self._slope(fields))
        guard(values, self.surroundings)
        return outcome

    def _slope(self, fields: Fields) -> Slope:
        """Both at the start."""
        time, u0 = self.problem.time_tensor([self.problem.t0])[0], self.u0
        return fields.drift(time, u0), fields.diffusion(time, u0)

    def _first(self, fields: Fields) -> Slope | None:
        """Both at the start; random ones are not for adaptive steps."""
        if not self.options.controller.adaptive:
            return None

        def evaluate() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            return self._slope(fields), ()

        device = self.u0.device
        checked = expect_repeatable(self.surroundings, device, evaluate, "an adaptive solve")
        (drift, diffusion), _ = checked()
        return drift, diffusion

    def node(self) -> Outcome:
        """As one node of the graph, its backward the sweep of the adjoint."""
        self.refuse_transforms()
        memory = self._memory()
        with keeping if memory else nullcontext():
            prepared, start, kept, outcome = self._forward(memory)
        prepared.fields.drift.watch = None
        prepared.captured.settle()
        self.surroundings = prepared.surroundings
        if self.surroundings.written:
            kept = None  # graphs of what the fields themselves have changed are none of a replay
        through = [] if kept is None else kept.values(outcome.record)
        sweep = partial(self._sweep, prepared, start.requires_grad, kept)
        return as_node(lambda _: outcome, sweep, start, prepared.inputs, kept=through)

    def _memory(self) -> int:
        """The bytes that graphs of steps may take, as far as the arguments tell."""
        carry = self.method.tableau.carry
        return 0 if carry or not self.parts.keeps else memory_for(self.options.adjoint)

    def _forward(
        self, memory: int
    ) -> tuple[DifferentiableFields, Tensor, KeptSteps | None, Outcome]:
        """Solve forward: the fields, the start, steps kept in `memory` bytes, and the outcome."""
        graph = FirstGraph() if memory else None
        prepared = DifferentiableFields(self.problem, self.u0, graph)
        if isinstance(self.options.adjoint, BacksolveAdjoint):
            prepared.captured.remember()
        start = self._with(prepared.fields)
        # Before the node is made: what the fields use on the way is among its inputs.
        if self.parts.watches:
            prepared.fields.drift.watch = prepared.captured.watch
        evaluations = evaluations_of(self.method, self.options.controller.adaptive)
        kept = KeptSteps.of(graph, prepared.captured, start, memory, evaluations)
        stepper = self.stepper
        if kept is not None and graph is not None:
            stepper = KeptStepper(stepper, graph, kept)
        with torch.no_grad():
            outcome = self.march(stepper, start.detach(), prepared.first)
        return prepared, start, kept, outcome

    def _sweep(
        self,
        prepared: DifferentiableFields,
        from_state: bool,
        kept: KeptSteps | None,
        backward: BackwardPass,
    ) -> Gradients:
        """The sweep of the solve's adjoint; the state at the start may need a gradient."""
        pull = None
        if kept is not None:
            pull = KeptPullback(prepared, self.stepper, kept, backward, self.stats)
            gradients = pull.sweep()
            if gradients is not None:
                return gradients
        backsolve = isinstance(self.options.adjoint, BacksolveAdjoint)
        later = prepared.later(backward)
        with prepared.captured.sweep(not backsolve, pull is not None, later):
            gradients = self.parts.sweep(self, prepared, backward, pull)
        if not from_state:
            prepared.captured.tell_of_cut_graph(gradients.inputs)
        return gradients
