"""Ensembles in one batch: which of them can be, and what solves them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override

from pysciml_node.algorithms.adjoints import DirectAdjoint, DiscreteAdjoint, GaussAdjoint
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.implicit import ImplicitMethod
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.algorithms.switching import linsolve_of
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.modes import InModes
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.end_times import hides_time
from pysciml_node.replay.members.field import MembersField, differing
from pysciml_node.replay.members.implicit import member_stages_for
from pysciml_node.replay.members.node import Sweep
from pysciml_node.replay.members.stacked import MemberEvents, StackedMembers
from pysciml_node.replay.stages import Method
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.inputs import Inputs
from pysciml_node.tableaus.implicit import DiagonallyImplicitTableau, RosenbrockTableau
from pysciml_node.torch_engine.members.batch import Batch, OneByOne
from pysciml_node.torch_engine.members.continuous import Solved, continuous_sweep_of_members
from pysciml_node.torch_engine.members.crossings import Crossings
from pysciml_node.torch_engine.members.march import MembersMarch
from pysciml_node.torch_engine.members.runge_kutta import StagesMarch
from pysciml_node.torch_engine.members.stochastic import StochasticBatch
from pysciml_node.torch_engine.members.sweep import Again, StagesAgain
from pysciml_node.torch_engine.members.tape import SavedPlaces, Tape

# Jacobians of all members are held at once where they have no more entries than this: 512 MB in
# double precision.
_ENTRIES = 2**26


def batches(ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions) -> bool:
    """Whether members can be solved in one batch, as far as the arguments tell."""
    common, problem = options.common, ensemble.problem
    if common.progress:
        return False
    if isinstance(problem, SDEProblem):
        # The numbers of a path are made on the CPU, for all members at once.
        kind = isinstance(algorithm, StochasticRungeKutta) and problem.spec.device.type == "cpu"
    else:
        kind = isinstance(algorithm, ExplicitRungeKutta) or _is_implicit(
            ensemble, algorithm, options
        )
    if not kind or common.controller.start_many(1.0, 1) is None:
        return False
    field = getattr(problem, problem.functions[0])
    if isinstance(field, InModes) and field.autocast and not ensemble.batched:
        # Inside of torch.vmap operations do not change their precision.
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not recording():
        return True
    times = [*problem.tspan, options.saveat_tensor, common.saveat_tensor]
    if isinstance(problem, SDEProblem):
        times.append(ensemble.tspan)
    if any(map(moves, times)):
        return False
    if isinstance(common.adjoint, DiscreteAdjoint | DirectAdjoint):
        return True
    if isinstance(problem, SDEProblem):
        return False
    # The gradient that is integrated beside the costate has no stages of its own in these.
    rosenbrock = isinstance(algorithm, ImplicitMethod) and isinstance(
        algorithm.tableau, RosenbrockTableau
    )
    return isinstance(common.adjoint, GaussAdjoint) or not rosenbrock


def solve_batch(
    ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions
) -> StackedMembers | None:
    """Solve all members in one batch; `None` where their field is none that can be batched."""
    try:
        if isinstance(algorithm, StochasticRungeKutta):
            return StochasticBatch(ensemble, algorithm, options).solve()
        assert isinstance(algorithm, ExplicitRungeKutta | ImplicitMethod)
        return StagesBatch(ensemble, algorithm, options).solve()
    except OneByOne:
        return None


def _is_implicit(ensemble: EnsembleProblem, algorithm: Algorithm, options: MemberOptions) -> bool:
    """Whether steps solve linear systems of one stage, with dense matrices that fit in memory."""
    problem, size = ensemble.problem, sum(ensemble.problem.spec.sizes)
    return (
        isinstance(problem, ODEProblem)
        and isinstance(algorithm, ImplicitMethod)
        and isinstance(algorithm.tableau, RosenbrockTableau | DiagonallyImplicitTableau)
        and linsolve_of(algorithm, size) is None
        and problem.jac_sparsity is None
        and (problem.mass_matrix is None or not options.common.events)
        and len(ensemble) * size**2 <= _ENTRIES
    )


class StagesBatch(Batch):
    """Members that take steps of an explicit Runge-Kutta method, or of an implicit one."""

    def __init__(
        self,
        ensemble: EnsembleProblem,
        algorithm: ExplicitRungeKutta | ImplicitMethod,
        options: MemberOptions,
    ) -> None:
        spec = ensemble.problem.spec
        assert isinstance(ensemble.problem, ODEProblem)
        self.method = Method.of(algorithm.tableau, spec.dtype, spec.device)
        field, u0 = MembersField(ensemble), ensemble.starts()
        super().__init__(ensemble, algorithm, options, field, u0, self.method.nodes)
        self.crossings: Crossings | None = None
        if options.common.events:
            try:
                self.crossings = Crossings(ensemble, options, self.u0)
            except Exception as error:
                # Whatever vmap cannot do; what a condition itself raises, one member raises again.
                self._refuse(error)
        replayed = self.moving is not None and options.common.adjoint.discrete
        if replayed and any(map(self._hides_time, {0, len(ensemble) - 1})):
            self._refuse()

    def _hides_time(self, m: int) -> bool:
        """Whether steps lack the gradients of the ends of a member's interval."""
        problem = self.ensemble.member(m)
        assert isinstance(problem, ODEProblem)
        return hides_time(problem, self.method, self.u0[m])

    @override
    def march(self, tape: Tape, recorded: bool) -> MembersMarch:
        return StagesMarch(
            self.method,
            self.field,
            self.options,
            tape,
            recorded,
            member_stages_for(self.method, self.options, derivatives=2),
            self.moving if recorded else None,
            self.crossings,
        )

    @override
    def events(self) -> MemberEvents | None:
        crossings = self.crossings
        return None if crossings is None else MemberEvents(crossings.first, crossings.fired)

    @override
    def sweep(self, captured: Inputs, result: StackedMembers, places: SavedPlaces | None) -> Sweep:
        if self.options.common.adjoint.discrete:
            return super().sweep(captured, result, places)
        solved = Solved(
            self.method,
            member_stages_for(self.method, self.options),
            self.field,
            captured,
            self.options,
            result.steps,
            places,
            self.moving is not None,
        )
        return lambda *given: continuous_sweep_of_members(solved, result, *given)

    @override
    def again(self) -> Again:
        kind = member_stages_for(self.method, self.options)
        return StagesAgain(self.method, self.field, self.options, kind)

    @override
    def _attempt(self, u: Tensor, t: Tensor) -> Tensor:
        value = super()._attempt(u, t)
        if self.field.has_jacobian:
            try:
                self.field.jacobian(t, u, self.field.given["p"])
            except Exception as error:
                self._refuse(error)
        return value

    @override
    def alone(self, m: int, recorded: bool = False) -> Tensor:
        problem = self.ensemble.member(m)
        assert isinstance(problem, ODEProblem)
        u = problem.spec.flatten(problem.u0).detach().requires_grad_(recorded)
        return FlatField(problem)(problem.time_tensor([problem.t0])[0].detach(), u)

    @override
    def differing(self, k: Tensor) -> int | None:
        return differing(self.field, self.alone, k)
