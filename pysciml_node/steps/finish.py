"""One solve, whatever the engine: its parts, how it is run, and the solution that it leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import Solution, Stats, Trajectory
from pysciml_node.steps.record import Outcome, check_finite


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

    def make_trajectory(self, outcome: Outcome) -> Callable[[], Trajectory]:
        """What gives it when something asks: by then what the field can reach may be other things.

        Most make it at once.
        """
        made = self.trajectory(outcome)
        return lambda: made

    def state(self, stepped: Tensor) -> Tensor:
        """The state, flat, in what is stepped."""
        return stepped

    def last(self, states: Sequence[Tensor]) -> Any:
        """The state at the end: a copy, for whoever changes it in place does not change the steps.

        Args:
            states: at the ends of steps, as they are in the outcome.
        """
        return self.problem.spec.unflatten(self.state(states[-1]).clone())

    def vectors(self, states: list[Tensor]) -> list[Tensor]:
        """What is stepped, flat, of the states of an outcome."""
        return states

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
        options, spec, stats = self.options, self.problem.spec, self.stats
        check_finite(record, states, self.watched)
        stats.naccept, stats.nreject = record.naccept, record.nreject
        parts: dict[str, Any] = {
            "problem": self.problem,
            "algorithm": self.algorithm,
            "engine": self.engine,
            "retcode": record.retcode,
            "stats": stats,
            "u1": self.last(states),
            "event": record.event,
        }
        reached, ends = record.saved, record.times
        if options.saveat is not None:
            whole = saved.shape[0] == reached
            parts["saved"] = spec.unflatten(self.state(saved if whole else saved[:reached]))
        if options.saveat_tensor is not None:
            parts["t"] = self.times(reached, ends)
        trajectory = self.make_trajectory(outcome)

        def make(name: str) -> Any:
            if name == "states":
                return self.state(torch.stack(self.vectors(states)))
            return trajectory() if name == "trajectory" else self.times(reached, ends)

        return in_parts(Solution, make, parts)

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
