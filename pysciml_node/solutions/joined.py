"""Solutions of several pieces with jumps of the state between them."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.solutions.solution import (
    Explanation,
    Solution,
    Stats,
    StepEstimate,
    StopGradient,
    Trajectory,
)


class JoinedStats(Stats):
    """The cost of all pieces, as it stands now: backward sweeps count in the pieces."""

    def __init__(self, parts: Sequence[Stats]) -> None:
        self.parts = tuple(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stats, tuple(getattr(self, f.name) for f in dataclasses.fields(Stats))


def _total(name: str) -> property:
    return property(lambda self: sum(getattr(part, name) for part in self.parts))


for _field in dataclasses.fields(Stats):
    setattr(JoinedStats, _field.name, _total(_field.name))


@dataclass(frozen=True)
class JoinedTrajectory:
    """Trajectories one after the other. At a jump the later one counts.

    Attributes:
        pieces: the trajectories, each of which starts at the time at which the one before it ends.
        problems: what each has solved.
        last: the flat state that a jump at the very end has left, `None` without one.
    """

    pieces: tuple[Trajectory, ...]
    problems: tuple[ODEProblem, ...]
    last: Tensor | None = None

    @property
    def times(self) -> Sequence[float]:
        """Ends of the accepted steps, `t0` first."""
        return [self.pieces[0].times[0], *(t for piece in self.pieces for t in piece.times[1:])]

    @property
    def errors(self) -> Sequence[float]:
        """Scaled error estimate of each accepted step."""
        return [error for piece in self.pieces for error in piece.errors]

    @property
    def flat_states(self) -> list[Tensor]:
        """The states of all pieces, with both sides of each jump."""
        states = [state for piece in self.pieces for state in piece.flat_states]
        return states if self.last is None else [*states, self.last]

    def mapped(self, states: list[Tensor], change: Callable[[Any], Any]) -> JoinedTrajectory:
        """The same trajectory with other states, and its problems changed."""
        ends = [0]
        for piece in self.pieces:
            ends.append(ends[-1] + len(piece.flat_states))
        pieces = tuple(
            piece.mapped(states[a:b], change)
            for piece, (a, b) in zip(self.pieces, pairwise(ends), strict=True)
        )
        last = None if self.last is None else states[-1]
        return JoinedTrajectory(pieces, tuple(change(problem) for problem in self.problems), last)

    def states(self) -> Tensor:
        """The states at `times`, those after the jumps, flat, `(n + 1, N)`."""
        parts = [piece.states() for piece in self.pieces]
        end = parts[-1] if self.last is None else torch.cat((parts[-1][:-1], self.last[None]))
        return torch.cat([*(part[:-1] for part in parts[:-1]), end])

    def evaluate(self, times: Tensor) -> Tensor:
        """Dense output at `times` `(m,)`, flat, `(m, N)`; right-continuous at jumps."""
        # Rounded as the times are: a time of a jump that has been saved in single precision is one.
        sign = self.problems[0].direction
        starts = [sign * t for t in _rounded(times, [piece.times[0] for piece in self.pieces])]
        owners = torch.tensor(
            [_owner(starts, sign * t) for t in times.detach().double().tolist()],
            device=times.device,
        )
        order = torch.argsort(owners, stable=True)
        rows = [
            self.pieces[i].evaluate(times[owners == i])
            for i in range(len(self.pieces))
            if bool((owners == i).any())
        ]
        states = torch.cat(rows)[torch.argsort(order).to(rows[0].device)]
        if self.last is None:
            return states
        (end,) = _rounded(times, [self.pieces[-1].times[-1]])
        ended = (times.detach().double() == end).to(states.device).unsqueeze(1)
        return torch.where(ended, self.last, states)

    def stiffness(self) -> Tensor:
        """Stiffness estimate of each accepted step."""
        return torch.cat([piece.stiffness() for piece in self.pieces])

    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        """One step of `algorithm` from the solution at `t`."""
        sign = self.problems[0].direction
        owner = _owner([sign * piece.times[0] for piece in self.pieces], sign * t)
        return self.pieces[owner].estimate(t, algorithm, stop_gradient, dt)

    def step_estimates(self) -> list[StepEstimate]:
        """Error and stiffness of every accepted step, differentiable."""
        return [estimate for piece in self.pieces for estimate in piece.step_estimates()]

    def explain(self, options: SolveOptions) -> Explanation:
        """The failure of a solve, as the steps of its last piece explain it."""
        return self.pieces[-1].explain(options)

    def restrict(self, problem: ODEProblem) -> JoinedTrajectory:
        """The same trajectory for the leading part of its state."""
        size = sum(problem.spec.sizes)
        problems = tuple(
            problem.part(*whole.tspan, problem.spec.unflatten(piece.flat_states[0][:size]))
            for piece, whole in zip(self.pieces, self.problems, strict=True)
        )
        pieces = (p.restrict(own) for p, own in zip(self.pieces, problems, strict=True))
        last = None if self.last is None else self.last[:size]
        return JoinedTrajectory(tuple(pieces), problems, last)


def _owner(starts: Sequence[float], t: float) -> int:
    """Which piece counts at a time, both in the direction of integration."""
    return max(bisect_right(starts, t) - 1, 0)


def _rounded(times: Tensor, given: Sequence[float]) -> list[float]:
    """Numbers in the precision of `times`."""
    dtype = times.dtype if times.is_floating_point() else torch.float64
    rounded: list[float] = torch.tensor(given, dtype=dtype).double().tolist()
    return rounded


def joined_trajectory(pieces: Sequence[Solution], last: Tensor | None) -> JoinedTrajectory:
    """The steps of solutions of ordinary problems that follow one another.

    Args:
        pieces: the solutions.
        last: the flat state that a jump at the very end has left, if there is one.
    """
    problems = []
    for piece in pieces:
        assert isinstance(piece.problem, ODEProblem)
        problems.append(piece.problem)
    return JoinedTrajectory(tuple(piece.trajectory for piece in pieces), tuple(problems), last)
