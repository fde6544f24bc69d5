"""Solutions: everything a training method needs from a solve, whatever engine ran it."""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pysciml_node.algorithms.explicit import Algorithm
    from pysciml_node.algorithms.options import SolveOptions
    from pysciml_node.problems.ode import ODEProblem, Problem


StopGradient = bool | Literal["state"]


class ReturnCode(enum.Enum):
    """How a solve ended. The names are SciML's."""

    Default = "not finished"
    Success = "reached the end of the interval"
    Terminated = "stopped by an event"
    MaxIters = "ran into max_steps"
    DtLessThanMin = "the step size fell below dtmin"
    Unstable = "the field or the state became NaN or infinite"
    ConvergenceFailure = "the iterations of an implicit step did not converge"

    @property
    def successful(self) -> bool:
        """Whether the solution is complete."""
        return self in (ReturnCode.Success, ReturnCode.Terminated)


@dataclass
class Stats:
    """What a solve cost. The backward fields are filled when gradients have been taken.

    Attributes:
        nfe: evaluations of the vector field (of a stochastic equation: of the drift).
        naccept: accepted steps.
        nreject: rejected steps.
        nfe_backward: evaluations during the backward sweep (each followed by one
            vector-Jacobian product, but for those that only rebuild dense output).
        nvjp: vector-Jacobian products of the field.
        naccept_backward: accepted (or replayed) steps of the backward sweep.
        nreject_backward: rejected steps of the backward sweep.
        nfe_diffusion: evaluations of the diffusion of a stochastic equation.
    """

    nfe: int = 0
    naccept: int = 0
    nreject: int = 0
    nfe_backward: int = 0
    nvjp: int = 0
    naccept_backward: int = 0
    nreject_backward: int = 0
    nfe_diffusion: int = 0


@dataclass(frozen=True)
class StepEstimate:
    """One step of an embedded pair: what the local regularizers are made of.

    Attributes:
        dt: signed size of the step, a 0-d tensor.
        error: scaled root-mean-square error estimate of the step, a 0-d tensor.
        stiffness: Shampine's estimate of the dominant eigenvalue, a 0-d tensor.
    """

    dt: Tensor
    error: Tensor
    stiffness: Tensor


@dataclass(frozen=True)
class Explanation:
    """What a trajectory knows about the end of its solve.

    Attributes:
        lines: of the message, each indented.
        stiff: whether stiffness limited the steps.
    """

    lines: tuple[str, ...] = ()
    stiff: bool = False


class Trajectory(Protocol):
    """What an engine hands to a solution besides the saved states."""

    @property
    def times(self) -> Sequence[float]:
        """Ends of the accepted steps, `t0` first."""

    @property
    def errors(self) -> Sequence[float]:
        """Scaled error estimate of each accepted step."""

    def states(self) -> Tensor:
        """The states at `times`, flat, shape `(n + 1, N)`, differentiable."""

    def evaluate(self, times: Tensor) -> Tensor:
        """Dense output at `times` of shape `(m,)`; flat, `(m, N)`, differentiable."""

    def stiffness(self) -> Tensor:
        """Stiffness estimate of each accepted step, shape `(n,)`."""

    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """One step of `algorithm` from the solution at `t`."""

    def step_estimates(self) -> list[StepEstimate]:
        """Error and stiffness of every accepted step, differentiable."""

    def explain(self, options: SolveOptions) -> Explanation:
        """What the steps of a failed solve say about its failure."""

    def restrict(self, problem: ODEProblem) -> Trajectory:
        """The same trajectory for the leading part of its state."""


@dataclass
class Solution:
    """The result of `solve`.

    Attributes:
        problem: what was solved.
        algorithm: how.
        engine: name of the engine that ran.
        retcode: how it ended.
        stats: what it cost.
        t: times of `u`, shape `(T,)`: `saveat`, or else the ends of the accepted steps.
        u1: state at the end of the interval: the last step's own result, never interpolated.
        event: index of the event that stopped the solve, or `None`.
        event_t: its time, a differentiable 0-d tensor, or `None`.
        penalty: weighted sum of the regularizers (0 in eval mode or without any).
        penalties: each regularizer's unweighted value by name.
        integrals: of each regularizer that is an integral, its value for each sample, `(B,)`.

    A solution can be called: `sol(t)` is the dense output at a time, or at times of shape `(m,)`,
    of the algorithm's own order, differentiable with respect to all that the solve depends on. It
    recomputes the stages of the steps that are asked for.
    """

    problem: Problem
    algorithm: Algorithm
    engine: str
    retcode: ReturnCode
    stats: Stats
    t: Tensor
    u1: Any
    trajectory: Trajectory = field(repr=False)
    make_states: Callable[[], Any] = field(repr=False)
    event: int | None = None
    event_t: Tensor | None = None
    penalty: Tensor = field(default_factory=lambda: torch.zeros(()))
    penalties: dict[str, Tensor] = field(default_factory=dict)
    integrals: dict[str, Tensor] = field(default_factory=dict)
    _states: Any = field(default=None, repr=False)

    @property
    def u(self) -> Any:
        """States at `t`, shape `(T, *u0.shape)` (in the structure of `u0`)."""
        if self._states is None:
            self._states = self.make_states()
        return self._states

    @property
    def success(self) -> bool:
        """Whether the solve reached its end (or an event that stops it)."""
        return self.retcode.successful

    @property
    def step_times(self) -> Tensor:
        """Ends of the accepted steps, `t0` first, shape `(n + 1,)`."""
        return self.problem.time_tensor(list(self.trajectory.times))

    @property
    def step_errors(self) -> Tensor:
        """Scaled error estimate of each accepted step, shape `(n,)`; NaN for fixed steps."""
        return self.problem.time_tensor(list(self.trajectory.errors))

    @property
    def step_stiffness(self) -> Tensor:
        """Estimate of the dominant eigenvalue `|lambda|` on each accepted step, shape `(n,)`.

        Computed when asked for, by replaying the steps; NaN where the method has no estimate.
        Multiply by `|dt|` and compare with the method's `stability_radius`.
        """
        return self.trajectory.stiffness()

    def brownian(self, start: float, end: float) -> Any:
        """Increment `W(end) - W(start)` of the Brownian motions that drove a stochastic solve.

        In the state's structure for diagonal noise (and additive noise of that structure), `(B,)`
        for scalar, `(B, m)` for other noise, without `B` for a single system.

        Raises:
            TypeError: the equation is not stochastic.
            ValueError: times outside the interval, or out of order.
        """
        found = getattr(self.trajectory, "brownian", None)
        if found is None:
            raise TypeError("there is no Brownian motion in the solution of an ODEProblem.")
        if not self.problem.t0 <= start <= end <= self.problem.t1:
            raise ValueError(
                f"start and end must be in order and inside ({self.problem.t0}, "
                f"{self.problem.t1}), but are {start} and {end}."
            )
        return found(start, end)

    def local_estimate(
        self,
        t: float,
        algorithm: Algorithm | None = None,
        *,
        dt: float | None = None,
        stop_gradient: StopGradient = True,
    ) -> StepEstimate:
        """Error and stiffness of one step of an embedded pair from the solution at `t`.

        Args:
            t: where the step starts, inside the solved interval and before its end.
            algorithm: the pair; default the algorithm of the solve.
            dt: size of the step (positive); default the first step that a solve from there would
                try (Hairer's).
            stop_gradient: `"state"` keeps gradients out of the starting state, `True` out of the
                first stage too, `False` out of nothing.
        """
        chosen = self.algorithm if algorithm is None else algorithm
        return self.trajectory.estimate(t, chosen, stop_gradient, dt)

    def step_size(self, t: float) -> float:
        """Size (positive) of the accepted step that contains `t`; the later one at a boundary."""
        times = self.trajectory.times
        sign = self.problem.direction
        n = bisect_right(times, sign * t, key=lambda x: sign * x)
        n = min(max(n, 1), len(times) - 1)
        return abs(times[n] - times[n - 1])

    def __call__(self, t: float | Sequence[float] | Tensor) -> Any:
        """Dense output at one time (`u0`'s structure) or at times `(m,)` (a leading `m`).

        Raises:
            ValueError: a time outside the solved interval.
        """
        times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        if times.ndim > 1:
            raise ValueError(f"t must be a number or one-dimensional, but has {times.ndim} axes.")
        first, last = sorted((self.trajectory.times[0], self.trajectory.times[-1]))
        host = [float(x) for x in times.detach().reshape(-1).tolist()]
        slack = 1e-6 * (last - first) if times.dtype != torch.float64 else 1e-12 * (last - first)
        for value in host:
            if not first - slack <= value <= last + slack:
                raise ValueError(
                    f"t must lie inside the solved interval [{first}, {last}], but is {value}.\n"
                    "  Widen tspan and solve again."
                )
        flat = self.trajectory.evaluate(times.reshape(-1).clamp(first, last))
        return self.problem.spec.unflatten(flat if times.ndim else flat[0])
