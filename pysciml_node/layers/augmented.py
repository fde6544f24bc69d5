"""Integrals along a solution, as extra states that never drive the step size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node import checks
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.event import Event
from pysciml_node.problems.modes import InModes
from pysciml_node.problems.ode import ODEProblem, exchanged
from pysciml_node.problems.state import StateSpec, without_graph
from pysciml_node.regularizers.rates import FieldPoint, Rate
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import (
    Explanation,
    Solution,
    StepEstimate,
    StopGradient,
    Trajectory,
)
from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.graph import pull_back

# The parts of an augmented state: the problem's own, then one for each integral; those that drive
# the step size first.
_OWN, _DRIVEN, _EXTRA = "state", "driven", "integral"


@dataclass(eq=False)
class AugmentedField(DerivedField):
    """A problem's field with rates to integrate beside it.

    Attributes:
        inner: the problem's field.
        spec: structure of its state.
        with_p: whether it takes an extra argument.
        rates: by their part of the state.
    """

    inner: Callable[..., Any]
    spec: StateSpec
    with_p: bool
    rates: dict[str, Rate]
    # Rates are derivatives by the state, which are none by what it was computed from.
    ends_at_arguments: ClassVar[bool] = True

    def __call__(self, t: Tensor, state: dict[str, Tensor], p: Any = None) -> dict[str, Tensor]:
        """Derivative of the augmented state."""

        def field(t: Tensor, u: Any) -> Any:
            return self.inner(t, u, p) if self.with_p else self.inner(t, u)

        if torch.is_grad_enabled():
            return self._derive(t, state, field, with_graph=True)
        with torch.enable_grad():
            # A view made without gradients may claim to require them and yet lead nowhere: only
            # where gradients are on is the state itself what the field is differentiated at.
            apart = {key: without_graph(x) for key, x in state.items()}
            out = self._derive(t, apart, field, with_graph=False)
        return {key: without_graph(value) for key, value in out.items()}

    @override
    def derive(
        self, t: Tensor, state: dict[str, Tensor], field: Callable[[Tensor, Any], Any]
    ) -> dict[str, Tensor]:
        # A recording is all that is made of it, and the operations of a first derivative are fewer.
        return self._derive(t, state, field, with_graph=False)

    def _derive(
        self,
        t: Tensor,
        state: dict[str, Tensor],
        field: Callable[[Tensor, Any], Any],
        with_graph: bool,
    ) -> dict[str, Tensor]:
        own = {key: part for key, part in state.items() if key.startswith(_OWN)}
        if torch._C._are_functorch_transforms_active():
            point = _transformed(t, self.spec.assemble(list(own.values())), field)
        else:
            parts = [part if part.requires_grad else part.requires_grad_() for part in own.values()]
            point = _recorded(t, self.spec.assemble(parts), field, with_graph)
        out = dict(zip(own, self.spec.parts(point.f), strict=True))
        for name, rate in self.rates.items():
            out[name] = _checked(name, rate(point), state[name])
        return out


def _recorded(
    t: Tensor, u: Any, field: Callable[[Tensor, Any], Any], with_graph: bool
) -> FieldPoint:
    """The field with its graph; `u` requires gradients."""
    f = field(t, u)

    def pull(vector: Tensor) -> Tensor:
        (product,) = pull_back(f, (u,), vector, with_graph)
        return torch.zeros_like(u) if product is None else product

    return FieldPoint(t, u, f, field, pull)


def _transformed(t: Tensor, u: Any, field: Callable[[Tensor, Any], Any]) -> FieldPoint:
    """The field inside a transform of `torch.func`, which knows no `requires_grad_`."""
    f, vjp = torch.func.vjp(lambda u: field(t, u), u)  # type: ignore[misc]

    def pull(vector: Tensor) -> Tensor:
        product: Tensor = vjp(vector)[0]
        return product

    return FieldPoint(t, u, f, field, pull)


def _checked(name: str, value: Tensor, integral: Tensor) -> Tensor:
    """A rate in the dtype of the states, which it stands beside."""
    batch = len(integral)
    if (
        not isinstance(value, Tensor)
        or value.is_complex()
        or value.numel() != batch
        or value.shape[:1] not in ((), integral.shape)
    ):
        given = (
            f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(
            f"the integrand of {name.partition(' ')[2]} must be one real number a sample, of shape "
            f"{tuple(integral.shape)}, but is {given}.\n"
            "  Sum or average over all axes behind the batch; of complex numbers take .abs()."
        )
    return value.reshape(batch).to(integral.dtype)


class Augmentation:
    """Rates beside the states of a kind, each one number a sample, shape `(B,)`.

    Args:
        problem: a problem without them.
        rates: rates that have no tolerance, so that they never drive the step size.
        driven: rates that have the state's tolerances (the tightest of them).
        batch: how many samples the state holds.

    Attributes:
        field: of the bigger problems.
    """

    def __init__(
        self, problem: ODEProblem, rates: dict[str, Rate], driven: dict[str, Rate], batch: int
    ) -> None:
        spec = problem.spec
        self._rates, self._driven, self._batch = rates, driven, batch
        self._names = [f"{_OWN} {key}" for key in (spec.keys or ("u",))]
        self._beside = {f"{_DRIVEN} {name}": rate for name, rate in driven.items()}
        self._extra = {f"{_EXTRA} {name}": rate for name, rate in rates.items()}
        every = {**self._beside, **self._extra}
        self.field = AugmentedField(problem.f, spec, problem.p is not None, every)
        self._spec = StateSpec.of(self._state(problem))
        self._tolerances: tuple[Any, Any] | None = None

    def serves(
        self, problem: ODEProblem, rates: dict[str, Rate], driven: dict[str, Rate], batch: int
    ) -> bool:
        """Whether another one would have the same field and the same rates; arguments as above."""
        field = self.field
        return (
            field.inner is problem.f
            and field.spec == problem.spec
            and field.with_p == (problem.p is not None)
            and self._batch == batch
            and _are_same(self._rates, rates)
            and _are_same(self._driven, driven)
        )

    def problem(self, problem: ODEProblem) -> ODEProblem:
        """The bigger problem."""
        u0 = self._state(problem)
        if any(x is not None for x in (problem.mass_matrix, problem.jac, problem.jac_sparsity)):
            return dataclasses.replace(problem, f=self.field, u0=u0)
        # The rest has been checked, and has nothing to do with the size of the state.
        return exchanged(problem, f=self.field, u0=u0, spec=self._spec)

    def tolerances(self, rtol: Any, atol: Any) -> tuple[Any, Any]:
        """The bigger problem's tolerances, from the state's relative and absolute ones."""
        numbers = type(rtol) is type(atol) is float
        if numbers and not self._extra:
            return rtol, atol
        known = self._tolerances if numbers else None
        if known is None or known[0] != (rtol, atol):
            known = (rtol, atol), (self._spread(rtol), self._spread(atol, math.inf))
            self._tolerances = known if numbers else None
        spread: tuple[Any, Any] = known[1]
        return spread

    def _state(self, problem: ODEProblem) -> dict[str, Tensor]:
        """The bigger initial state."""
        spec = problem.spec
        u0 = dict(zip(self._names, spec.parts(problem.u0), strict=True))
        for name in (*self._beside, *self._extra):
            u0[name] = torch.zeros(self._batch, dtype=spec.dtype, device=spec.device)
        return u0

    def _spread(self, value: Any, for_extra: float | None = None) -> dict[str, Any]:
        """A tolerance for each part."""
        parts = self.field.spec.parts
        given = (
            parts(value) if isinstance(value, tuple | list | dict) else [value] * len(self._names)
        )
        tightest = min(map(_smallest, given))
        return {
            **dict(zip(self._names, given, strict=True)),
            **dict.fromkeys(self._beside, tightest),
            **dict.fromkeys(self._extra, tightest if for_extra is None else for_extra),
        }


def _are_same(mine: dict[str, Rate], theirs: dict[str, Rate]) -> bool:
    """Whether rates are the same objects, of the same names in the same order."""
    return list(mine) == list(theirs) and all(map(is_, mine.values(), theirs.values()))


def _smallest(tolerance: Any) -> float:
    number = checks.as_float(tolerance)  # a tensor of it would round it
    return float(torch.as_tensor(tolerance).min()) if number is None else number


def augmented_events(events: Sequence[Event], spec: StateSpec) -> tuple[Event, ...]:
    """Events that see the problem's own state, for an augmented problem; integrals do not jump."""

    def own(state: dict[str, Tensor]) -> Any:
        return spec.assemble([part for key, part in state.items() if key.startswith(_OWN)])

    def seen(event: Event) -> Event:
        condition, affect = event.condition, event.affect
        changes: dict[str, Any] = {}
        if condition is not None:
            changes["condition"] = lambda t, state: condition(t, own(state))
        if affect is not None:

            def jump(t: Tensor, state: dict[str, Tensor], *p: Any) -> dict[str, Tensor]:
                names = [key for key in state if key.startswith(_OWN)]
                parts = spec.parts(affect(t, own(state), *p))
                return {**state, **dict(zip(names, parts, strict=True))}

            changes["affect"] = jump
        return dataclasses.replace(event, **changes)

    return tuple(seen(event) for event in events)


def _integrals(solution: Solution) -> dict[str, Tensor]:
    """The integrals at the end of an augmented solve, each `(B,)` and real."""
    return {
        key.partition(" ")[2]: value.real if value.is_complex() else value
        for key, value in solution.u1.items()
        if not key.startswith(f"{_OWN} ")
    }


@dataclass(frozen=True)
class DrivenTrajectory:
    """The steps of a state, with the estimates of the bigger system whose errors drive them.

    Attributes:
        alone: steps of the state alone.
        driving: steps of the state with the rates that have tolerances.
    """

    alone: Trajectory
    driving: Trajectory

    @property
    def times(self) -> Sequence[float]:
        """Ends of the accepted steps, `t0` first."""
        return self.alone.times

    @property
    def errors(self) -> Sequence[float]:
        """Scaled error estimate of each accepted step."""
        return self.alone.errors

    @property
    def flat_states(self) -> list[Tensor]:
        """The vectors that were stepped: the state, followed by the rates."""
        return self.driving.flat_states

    def mapped(self, states: list[Tensor], change: Callable[[Any], Any]) -> DrivenTrajectory:
        """The same trajectory with other states at `times`, and its problem changed."""
        size = self.alone.flat_states[0].numel()
        alone = self.alone.mapped([u[:size] for u in states], change)
        return DrivenTrajectory(alone, self.driving.mapped(states, change))

    def states(self) -> Tensor:
        """The states at `times`."""
        return self.alone.states()

    def evaluate(self, times: Tensor) -> Tensor:
        """Dense output at `times`."""
        return self.alone.evaluate(times)

    def stiffness(self) -> Tensor:
        """Stiffness estimate of each accepted step."""
        return self.driving.stiffness()

    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """One step of `algorithm` from the solution at `t`."""
        return self.driving.estimate(t, algorithm, stop_gradient, dt)

    def step_estimates(self) -> list[StepEstimate]:
        """Error and stiffness of every accepted step, differentiable."""
        return self.driving.step_estimates()

    def explain(self, options: SolveOptions) -> Explanation:
        """The failure of a solve, as its steps explain it."""
        return self.driving.explain(options)

    def restrict(self, problem: ODEProblem) -> Trajectory:
        """The same trajectory for the leading part of its state."""
        return self.alone.restrict(problem)


def _driving(augmented: ODEProblem) -> ODEProblem | None:
    """An augmented problem with the driven rates alone; `None` where it has none.

    It is the problem itself where these are all."""
    field, u0 = augmented.f, augmented.u0
    if isinstance(field, InModes):
        field = field.function
    assert isinstance(field, AugmentedField)
    assert isinstance(u0, dict)
    rates = {key: rate for key, rate in field.rates.items() if key.startswith(f"{_DRIVEN} ")}
    if not rates:
        return None
    if len(rates) == len(field.rates):
        return augmented
    parts = {key: part for key, part in u0.items() if key.startswith(_OWN) or key in rates}
    return dataclasses.replace(augmented, f=dataclasses.replace(field, rates=rates), u0=parts)


def without_extra(solution: Solution, problem: ODEProblem) -> Solution:
    """The solution of the problem itself, with its integrals, from that of the augmented one.

    Estimates of its steps are those of the system that has driven them.
    """
    spec = problem.spec

    def state_of(state: dict[str, Tensor]) -> Any:
        return spec.assemble([part for key, part in state.items() if key.startswith(_OWN)])

    augmented = solution.problem
    assert isinstance(augmented, ODEProblem)
    changed = {
        "problem": problem,
        "u1": state_of(solution.u1),
        "integrals": _integrals(solution),
        "penalties": {},
        "saved": None if solution.saved is None else state_of(solution.saved),
        "jumps": tuple(
            jump._replace(before=state_of(jump.before), after=state_of(jump.after))
            for jump in solution.jumps
        ),
    }

    def trajectory() -> Trajectory:
        whole = solution.trajectory
        alone, driving = whole.restrict(problem), _driving(augmented)
        if driving is None:
            return alone
        return DrivenTrajectory(alone, whole if driving is augmented else whole.restrict(driving))

    if not solution._is_later("trajectory"):
        return dataclasses.replace(solution, trajectory=trajectory(), **changed)

    def part(name: str) -> Any:
        if name == "states":
            return trajectory().states()
        return trajectory() if name == "trajectory" else getattr(solution, name)

    return in_parts(Solution, part, {**vars(solution), **changed, "_stacked": None})
