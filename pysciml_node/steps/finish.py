"""One solve, whatever the engine: its parts, how it is run, and the solution that it leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats, Trajectory
from pysciml_node.steps.record import Outcome, check_finite


class Ending(NamedTuple):
    """How a solve has ended, and the states that its solution holds."""

    retcode: ReturnCode
    times: Sequence[float]  # (n + 1,), of the accepted steps
    u1: Tensor  # (N,), the last state
    saved: Tensor  # (saved, N), those at `saveat`
    event: int | None = None  # which one has stopped it


class Solve(ABC):
    """One solve: its parts, made once, and the way to run it.

    Args:
        problem: what to solve.
        algorithm: how.
        options: of the solve.
        engine: name of the engine.
    """

    def __init__(
        self, problem: Problem, algorithm: Algorithm, options: SolveOptions, engine: str
    ) -> None:
        self.problem, self.algorithm, self.options = problem, algorithm, options
        self.engine = engine

    @cached_property
    def stats(self) -> Stats:
        """What it has cost so far."""
        return Stats()

    @abstractmethod
    def run(self) -> Outcome:
        """Take the steps, with or without gradients."""

    @abstractmethod
    def trajectory(self, outcome: Outcome) -> Trajectory:
        """Dense output and local estimates of the steps."""

    def state(self, stepped: Tensor) -> Tensor:
        """The state, flat, in what is stepped."""
        return stepped

    @property
    def watched(self) -> bool:
        """Whether every step is controlled by the usual norm of the error of the whole state."""
        control = self.options.controller
        if not control.adaptive or control.norm is not None:
            return False
        return self.options.tolerances.driven == sum(self.problem.spec.sizes)

    def solution(self) -> Solution:
        """Run it; a failed solve is returned like any other."""
        return self.looked_through(self.run())

    def looked_through(self, outcome: Outcome) -> Solution:
        """The solution of steps that are looked at once, for what is not finite in them."""
        record, states, saved = outcome
        check_finite(record, states, self.watched)
        self.stats.naccept, self.stats.nreject = record.naccept, record.nreject
        ending = Ending(
            record.retcode,
            record.times,
            # A copy: whoever changes it in place does not change the steps.
            self.state(states[-1]).clone(),
            self.state(saved if saved.shape[0] == record.saved else saved[: record.saved]),
            record.event,
        )
        return self.finish(ending, self.trajectory(outcome))

    def finish(self, ending: Ending, trajectory: Trajectory) -> Solution:
        """The solution, once the solve has run."""
        problem, options, spec = self.problem, self.options, self.problem.spec
        parts: dict[str, Any] = {
            "problem": problem,
            "algorithm": self.algorithm,
            "engine": self.engine,
            "retcode": ending.retcode,
            "stats": self.stats,
            "u1": spec.unflatten(ending.u1),
            "trajectory": trajectory,
            "event": ending.event,
        }
        if options.saveat is not None:
            parts["saved"] = spec.unflatten(ending.saved)
        reached, ends = ending.saved.shape[0], ending.times
        if options.saveat_tensor is not None:
            parts["t"] = self.times(reached, ends)
        return in_parts(Solution, lambda _: self.times(reached, ends), parts)

    def times(self, reached: int, ends: Sequence[float]) -> Tensor:
        """The times of the states that a solution holds.

        Args:
            reached: how many of those that were asked for.
            ends: of the accepted steps, where none were.
        """
        problem, options, spec = self.problem, self.options, self.problem.spec
        if options.saveat_tensor is not None:
            times = options.saveat_tensor[:reached].to(spec.device, spec.real_dtype)
            return times.clone()  # the caller may go on and change what was given
        saved = ends if options.saveat is None else options.saveat[:reached]
        return problem.time_tensor(list(saved))

    def refuse_transforms(self) -> None:
        """Transforms of `torch.func` do not go through a node of the graph.

        Raises:
            RuntimeError: one is active.
        """
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{type(self.options.adjoint).__name__} cannot run inside a torch.func transform.\n"
                "  Use adjoint=DirectAdjoint() there."
            )
