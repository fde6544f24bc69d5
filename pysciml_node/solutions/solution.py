"""Solutions: everything that a training method needs from a solve, on every engine."""

from __future__ import annotations

import dataclasses
import enum
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from pysciml_node import checks, plot
from pysciml_node.problems.modes import ordinary_modes, refuse_recording, uncompiled, with_graph
from pysciml_node.problems.state import map_tensors, refuse_batched
from pysciml_node.solutions.elsewhere import ELSEWHERE, Counted, NoTensor, remedy
from pysciml_node.solutions.jump import Jump
from pysciml_node.solutions.parts import InParts
from pysciml_node.solutions.portable import mapped_problem, portable_problem

if TYPE_CHECKING:
    from pysciml_node.algorithms.explicit import Algorithm
    from pysciml_node.algorithms.options import SolveOptions
    from pysciml_node.problems.ode import ODEProblem, Problem


StopGradient = bool | Literal["state"]


class ReturnCode(enum.Enum):
    """The way in which a solve ended. The names are SciML's."""

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
class Stats(Counted):
    """The cost of a solve. The backward fields are filled when gradients have been taken.

    Attributes:
        nfe: evaluations of the vector field, or of the drift of a stochastic equation.
        naccept: accepted steps.
        nreject: rejected steps.
        nfe_backward: evaluations during the backward sweep. Each is followed by a vector-Jacobian
            product, except those that only rebuild dense output or look whether the field is as it
            was.
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

    def asdict(self) -> dict[str, int]:
        """The counts by name, as a logger takes them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StepEstimate:
    """The estimates of one step of an embedded pair, which the local regularizers penalize.

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
    """The end of a solve, as its trajectory explains it.

    Attributes:
        lines: of the message, each indented.
        stiff: whether stiffness limited the steps.
    """

    lines: tuple[str, ...] = ()
    stiff: bool = False


class Trajectory(Protocol):
    """The accepted steps of a solve, as an engine hands them to a solution."""

    @property
    def times(self) -> Sequence[float]:
        """Ends of the accepted steps, `t0` first."""

    @property
    def errors(self) -> Sequence[float]:
        """Scaled error estimate of each accepted step."""

    @property
    def flat_states(self) -> list[Tensor]:
        """The vectors that were stepped, at `times`: flat states, then what a method carries."""

    def mapped(self, states: list[Tensor], change: Callable[[Problem], Problem]) -> Trajectory:
        """The same trajectory with `states` for `flat_states`, and its problem changed."""

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
        """The failure of a solve, as its steps explain it."""

    def restrict(self, problem: ODEProblem) -> Trajectory:
        """The same trajectory for the leading part of its state."""


@dataclass(repr=False, eq=False)
class Solution(NoTensor, InParts):
    """The result of `solve`.

    Attributes:
        problem: the problem that was solved.
        algorithm: the algorithm that solved it.
        engine: name of the engine that ran.
        retcode: the way in which the solve ended.
        stats: the cost of the solve.
        t: times of `u`, shape `(T,)`: `saveat`, or else the ends of the accepted steps.
        saved: states at `saveat`, or `None` without it; `u` has the states in both cases.
        u1: state at the end of the interval: the result of the last step, never interpolated.
        event: index of the event that stopped the solve, or `None`.
        event_t: its time, a differentiable 0-d tensor, or `None`.
        jumps: what the events have done, in order; a solve that only an event has stopped has none.
        penalty: weighted sum of the regularizers (0 in eval mode or without any).
        penalties: each regularizer's unweighted value by name.
        integrals: value of each integral regularizer for each sample, `(B,)`, by name.
        detached: whether `detach` or a copy has cut the graph.
        seconds: what the solve took by the clock; 0 of a member of an ensemble.

    A solution can be called. `sol(t)` is the dense output at a time, or at times of shape `(m,)`.
    It has the algorithm's order, and is differentiable in everything that the solve depends on. It
    recomputes the stages of the steps around those times.

    Solutions can be copied by `deepcopy` and pickled; the copies are detached. Dense output of a
    pickled solution needs a field that can be pickled too, such as a module.
    """

    problem: Problem
    algorithm: Algorithm
    engine: str
    retcode: ReturnCode
    stats: Stats
    t: Tensor
    u1: Any
    trajectory: Trajectory
    saved: Any = None
    event: int | None = None
    event_t: Tensor | None = None
    jumps: tuple[Jump, ...] = ()
    penalty: Tensor = field(default_factory=lambda: torch.zeros(()))
    penalties: dict[str, Tensor] = field(default_factory=dict)
    integrals: dict[str, Tensor] = field(default_factory=dict)
    detached: bool = False
    seconds: float = 0.0
    _stacked: Any = field(default=None, init=False)

    @property
    def u(self) -> Any:
        """States at `t`, shape `(T, *u0.shape)` (in the structure of `u0`)."""
        if self.saved is not None:
            return self.saved
        if self._stacked is None:
            self._stacked = self._stack()
        return self._stacked

    @uncompiled
    def _stack(self) -> Any:
        # Stacking copies the steps' states, so it waits until somebody reads them.
        with with_graph(self.problem.spec.device):
            if self._is_later("trajectory"):
                states = self.__dict__["_make"]("states")
            else:
                states = self.trajectory.states()
            return self.problem.spec.unflatten(states)

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

        It is computed on demand by replaying the steps, and NaN where the method has no estimate.
        Multiply it by `|dt|` and compare with the method's `stability_radius`.
        """
        with self._computing():
            return self.trajectory.stiffness()

    @uncompiled
    def step_estimates(self) -> list[StepEstimate]:
        """Error and stiffness of every accepted step, differentiable.

        Raises:
            ValueError: the solve's adjoint is a continuous one.
        """
        with self._computing():
            return self.trajectory.step_estimates()

    def brownian(self, start: float, end: float) -> Any:
        """Increment `W(end) - W(start)` of the Brownian motions that drove a stochastic solve.

        It has the state's structure for diagonal noise, and for additive noise of that structure.
        It is `(B,)` for scalar noise and `(B, m)` for other noise, without `B` for a single system.

        Raises:
            TypeError: the equation is not stochastic.
            ValueError: times outside the interval, or out of order.
        """
        increment = getattr(self.trajectory, "brownian", None)
        if increment is None:
            hint = "Solve an SDEProblem."
            raise TypeError(f"the solution of an ODEProblem has no Brownian motion.\n  {hint}")
        start, end = checks.number("start", start), checks.number("end", end)
        if not self.problem.t0 <= start <= end <= self.problem.t1:
            raise ValueError(
                f"start and end must be in order and inside ({self.problem.t0}, "
                f"{self.problem.t1}), but are {start} and {end}.\n"
                "  Swap them where they are out of order, and stay inside the interval."
            )
        return increment(start, end)

    @uncompiled
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
            t: start of the step, inside the solved interval and before its end.
            algorithm: the pair; default the algorithm of the solve.
            dt: positive size of the step; default the first step that a solve from there would try,
                by Hairer's rule.
            stop_gradient: `"state"` keeps gradients out of the starting state, `True` out of the
                first stage too; `False` lets them through.
        """
        refuse_recording("an estimate")
        t = self._inside(checks.number("t", t))
        if t == self.trajectory.times[-1]:
            raise ValueError(
                f"t must lie before the end of the solved interval, but is {t}.\n"
                "  Give an earlier time: no step starts at the end."
            )
        dt = None if dt is None else checks.number("dt", dt, above=0)
        checks.choice("stop_gradient", stop_gradient, (True, False, "state"))
        chosen = self.algorithm if algorithm is None else algorithm
        if getattr(chosen, "tableau", None) is None:
            hint = "Write algorithm=Tsit5()."
            checks.refuse("algorithm", "an algorithm of steps, such as Tsit5()", chosen, hint)
        with self._computing():
            return self.trajectory.estimate(t, chosen, stop_gradient, dt)

    def step_size(self, t: float) -> float:
        """Size (positive) of the accepted step that contains `t`; the later one at a boundary."""
        times = self.trajectory.times
        t, sign = self._inside(checks.number("t", t)), self.problem.direction
        n = bisect_right(times, sign * t, key=lambda x: sign * x)
        n = min(max(n, 1), len(times) - 1)
        return abs(times[n] - times[n - 1])

    @uncompiled
    def __call__(self, t: float | Sequence[float] | Tensor) -> Any:
        """Dense output at one time (`u0`'s structure) or at times `(m,)` (a leading `m`).

        Raises:
            ValueError: a time outside the solved interval.
        """
        refuse_recording("dense output")
        if isinstance(t, Tensor):
            times = checks.tensor("t", t, real=True)
        else:
            number = checks.as_float(t)
            listed = checks.numbers("t", t) if number is None else number
            times = torch.tensor(listed, dtype=torch.float64, device="cpu")
        if torch._C._are_functorch_transforms_active():
            refuse_batched(times)
        if times.ndim > 1:
            raise ValueError(
                f"t must be a number or one-dimensional, but has {times.ndim} axes.\n"
                "  Write solution(t.reshape(-1))."
            )
        if not times.numel():
            raise ValueError("t must name at least one time.\n  The saved times are solution.t.")
        for value in times.detach().reshape(-1).tolist():
            self._inside(value, 1e-12 if times.dtype == torch.float64 else 1e-6)
        first, last = sorted((self.trajectory.times[0], self.trajectory.times[-1]))
        with self._computing():
            flat = self.trajectory.evaluate(times.reshape(-1).clamp(first, last))
        return self.problem.spec.unflatten(flat if times.ndim else flat[0])

    def _inside(self, t: float, slack: float = 1e-12) -> float:
        """A time of the solved interval, to within a share `slack` of its length."""
        first, last = sorted((self.trajectory.times[0], self.trajectory.times[-1]))
        slack *= last - first
        if not first - slack <= t <= last + slack:
            raise ValueError(
                f"t must lie inside the solved interval [{first}, {last}], but is {t}.\n"
                "  Widen tspan and solve again."
            )
        return t

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a Solution is one object, not a pair.\n"
            "  Its times are solution.t, its states solution.u, the last state solution.u1."
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Make a part that is not there yet; answer names of other packages with ours."""
            if self._is_later(name):
                return self._made(name)
            meant = remedy("solution", name, dir(self), ELSEWHERE, tensor=True)
            raise AttributeError(f"a Solution has no attribute {name!r}.{meant}")

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Ordinary modes, with gradients as they are outside; a detached solution has none."""
        with (
            ordinary_modes(self.problem.spec.device),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached),
        ):
            yield

    def mapped(
        self,
        fn: Callable[[Tensor], Tensor],
        change: Callable[[Problem], Problem] | None = None,
    ) -> Self:
        """The same solution with `fn` applied to each of its tensors.

        Args:
            fn: maps a tensor to its replacement.
            change: the same for the problem; default `fn` on its state, interval and `p`.
        """
        if change is None:

            def change(problem: Problem) -> Problem:
                return mapped_problem(problem, fn)

        trajectory = self.trajectory.mapped([fn(u) for u in self.trajectory.flat_states], change)
        values = {name: map_tensors(fn, getattr(self, name)) for name in _HELD}
        return dataclasses.replace(
            self, problem=change(self.problem), trajectory=trajectory, **values
        )

    def detach(self) -> Self:
        """The same solution without its graph; nothing that is read off it has gradients."""
        detached = self.mapped(Tensor.detach)
        detached.detached = True
        return detached

    def to(self, target: torch.device | str | torch.dtype) -> Self:
        """The solution on another device, or in another precision; gradients flow through.

        Dense output needs the field there too: move a module by its own `to`.

        Args:
            target: a device, or a dtype whose precision is taken.
        """

        def moved(x: Tensor) -> Tensor:
            if not isinstance(target, torch.dtype):
                return x.to(target)
            if not (x.is_floating_point() or x.is_complex()):
                return x
            return x.to(target.to_complex() if x.is_complex() else target.to_real())

        return self.mapped(moved)

    def numpy(self) -> tuple[np.ndarray[Any, Any], Any]:
        """Times `(T,)` and states `(T, *u0.shape)` as arrays (in the structure of `u0`).

        Examples:
            >>> import torch, pysciml_node as psn
            >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
            >>> t, u = psn.solve(problem, saveat=[0.5, 1.0]).numpy()
            >>> t.shape, u.shape
            ((2,), (2, 2))
        """
        times, states = map_tensors(lambda x: x.detach().cpu().numpy(), (self.t, self.u))
        return times, states

    def plot(self, **options: Any) -> Any:
        """Draw the state along time with the steps marked, as `plot.solution` does.

        Args:
            **options: those of `plot.solution`.

        Returns:
            The axes, matplotlib's.
        """
        return plot.solution(self, **options)

    def __repr__(self) -> str:
        times = self.trajectory.times
        shapes = map_tensors(lambda x: tuple(x.shape), self.u1)
        return (
            f"Solution({self.retcode.name} by {self.algorithm!r} on {self.engine}, "
            f"t={times[0]:.6g} to {times[-1]:.6g}, {self.stats.naccept} steps, "
            f"{self.stats.nreject} rejected, nfe={self.stats.nfe}, u1 of shape {shapes})"
        )

    def __copy__(self) -> Self:
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The field stays: it is what was solved, no part of what came back.
        copy = self.mapped(lambda x: x.detach().clone())
        copy.stats, copy.detached = Stats(**self.stats.asdict()), True
        return copy

    def __getstate__(self) -> dict[str, Any]:
        portable = self.detach().mapped(lambda x: x, portable_problem)
        # What the stack is made of is in the trajectory.
        return {**portable.__dict__, "_stacked": None}


_HELD = ("t", "u1", "saved", "event_t", "jumps", "penalty", "penalties", "integrals")
"""What a solution holds, in one structure or another of tensors."""


def _flatten(solution: Solution) -> tuple[list[Any], Solution]:
    held = [getattr(solution, name) for name in _HELD]
    return [*held, solution.trajectory.flat_states], solution


def _unflatten(children: Iterable[Any], solution: Solution) -> Solution:
    *held, states = children
    trajectory = solution.trajectory.mapped(states, lambda problem: problem)
    return dataclasses.replace(
        solution, trajectory=trajectory, **dict(zip(_HELD, held, strict=True))
    )


# Whoever walks through a module's output has to find the tensors in it: DistributedDataParallel
# puts a node behind each of them, torch.func wraps them.
register_pytree_node(Solution, _flatten, _unflatten)
