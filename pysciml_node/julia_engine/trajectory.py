"""Dense output of solves whose steps only SciML can interpolate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions, without_closures
from pysciml_node.julia_engine.fields import ODEField
from pysciml_node.julia_engine.forward import moving_ends, place
from pysciml_node.julia_engine.process.buffers import doubles, from_real, real_size
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import Explanation, Stats, StepEstimate, StopGradient
from pysciml_node.steps.record import Kept, Record, Recorded


class InJulia(Protocol):
    """A solve whose solution SciML has kept."""

    problem: ODEProblem
    algorithm: Algorithm
    solution_in_julia: Handle | None

    @property
    def field(self) -> ODEField:
        """The right-hand side."""

    def dense(
        self,
        record: Record,
        times: list[float],
        moving: Tensor | None,
        interpolate: Callable[[list[float]], Tensor],
    ) -> Tensor:
        """Dense output as a node of its own, with a sweep of its own."""


@dataclass
class SciMLTrajectory(Recorded):
    """The accepted steps of a solve, with SciML's own interpolation.

    Gradients of dense output are taken by the solve's adjoint, in a sweep of their own.
    """

    problem: ODEProblem
    load: Callable[[], tuple[Record, list[Tensor]]]
    stats: Stats
    options: SolveOptions
    solve: InJulia | None

    def mapped(self, states: list[Tensor], change: Callable[[Any], Any]) -> Self:
        """The same trajectory with other states at `times`, and its problem changed."""
        return dataclasses.replace(
            self,
            problem=change(self.problem),
            load=Kept(self.record, states),
            options=without_closures(self.options),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "solve": None}

    @property
    def _here(self) -> InJulia:
        """What Julia keeps of the solve.

        Raises:
            RuntimeError: it is in another process.
        """
        if self.solve is None:
            raise RuntimeError(
                "this solution was pickled, and SciML's interpolation stayed in the process that "
                "solved.\n  Ask for the times by saveat= in the solve."
            )
        return self.solve

    def states(self) -> Tensor:
        """The states at `times`, `(n + 1, N)`."""
        return torch.stack(self.flat_states)

    def evaluate(self, times: Tensor) -> Tensor:
        """Dense output `(m, N)` at `times` `(m,)`."""
        host = times.detach().double().tolist()
        if not torch.is_grad_enabled():
            return self._interpolate(host)
        order = sorted(range(len(host)), key=lambda i: host[i] * self.record.direction)
        ordered = [host[i] for i in order]
        moving = times[order] if times.requires_grad else None
        record = dataclasses.replace(self.record, inside={}, at_end={}, saved=len(host))
        place(record, ordered, moving_ends(self.problem, moving))
        rows = self._here.dense(record, ordered, moving, self._interpolate)
        back = sorted(range(len(order)), key=lambda i: order[i])
        return rows[back]

    def _interpolate(self, times: list[float]) -> Tensor:
        # Of a copy in another precision, the solve's.
        spec, solution = self._here.problem.spec, self._here.solution_in_julia
        assert solution is not None
        size = real_size(spec)
        out = torch.empty((len(times), size), dtype=spec.real_dtype)
        numbers = doubles(times)
        enter("interpolate!", record=solution, n=size, m=len(times), times=numbers, out=out)
        rows = from_real(out, spec.dtype)
        return rows.to(self.problem.spec.device, self.problem.spec.dtype)

    def stiffness(self) -> Tensor:
        """NaN for each step: these methods have no such estimate."""
        like = self.flat_states[0].detach().abs()
        return like.new_full((len(self.record.sizes),), float("nan"))

    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """One step of an explicit pair from the solution at `t`.

        Raises:
            TypeError: the algorithm is none.
            RuntimeError: what the field uses has been changed in place since the solve.
        """
        if not isinstance(algorithm, ExplicitRungeKutta):
            raise TypeError(
                f"a local step needs an explicit Runge-Kutta pair, not {algorithm!r}.\n"
                "  Name one: LocalError(..., algorithm=Tsit5())."
            )
        spec, field = self.problem.spec, self._here.field
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
            u = self.evaluate(torch.tensor([t], dtype=torch.float64))[0]
        methods = Method.all_of(algorithm.tableaus, spec.dtype, spec.device)
        load = Kept(self.record, self.flat_states)
        with field.as_solved():
            local = TorchTrajectory(
                self.problem, methods, load, self.stats, self.options, field.flat
            )
            return local.estimate_from(t, u, methods[0], stop_gradient, dt)

    def step_estimates(self) -> list[StepEstimate]:
        """Not for these methods.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self._here.algorithm!r} has no embedded explicit pair whose estimates could be "
            "differentiated.\n  Use LocalError with algorithm=Tsit5()."
        )

    def explain(self, options: SolveOptions) -> Explanation:
        """Nothing: SciML keeps no last attempt."""
        return Explanation()

    def restrict(self, problem: ODEProblem) -> SciMLTrajectory:
        """The same trajectory for the leading part of its state."""
        return _Restricted(problem, self.load, self.stats, self.options, self.solve, self)


@dataclass
class _Restricted(SciMLTrajectory):
    """Of a larger trajectory the leading part of the state."""

    whole: SciMLTrajectory

    @property
    def _size(self) -> int:
        return sum(self.problem.spec.sizes)

    def states(self) -> Tensor:
        """The states at `times`, `(n + 1, N)`."""
        return self.whole.states()[:, : self._size]

    def evaluate(self, times: Tensor) -> Tensor:
        """Dense output `(m, N)` at `times` `(m,)`."""
        return self.whole.evaluate(times)[:, : self._size]
