"""Cuts accepted steps at events."""

from __future__ import annotations

import torch

from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.stages import Stages
from pysciml_node.steps.event_search import condition_value, first_crossing, locate_crossing
from pysciml_node.steps.step import Step


class EventSearch:
    """Looks at each accepted step; cuts it at the first event found there.

    Args:
        events: all that are watched.
        problem: that is solved.
        stages: of the steps.
    """

    def __init__(self, events: tuple[Event, ...], problem: ODEProblem, stages: Stages) -> None:
        self.events, self.problem, self.stages = events, problem, stages
        start = problem.spec.flatten(problem.u0).detach()
        self.before = [condition_value(event, problem, problem.t0, start) for event in events]
        self.found: int | None = None

    def __call__(self, step: Step) -> Step | None:
        """The step cut at its first event, or `None` where there is none."""
        after = [condition_value(event, self.problem, step.end, step.u1) for event in self.events]
        crossing = first_crossing(self.events, self.before, after, lambda i: self._locate(i, step))
        if crossing is None:
            self.before = after
            return None
        theta, self.found = crossing
        # Taken again with the shorter size: the state at the event is the step's own result.
        h = theta * step.h
        self.stages.count = 1
        u1 = self.stages.solution(step.time, h, step.u, with_error=False)
        return Step(step.t, h, step.t + h, step.u, u1, step.error, None, step.time, h)

    def _locate(self, i: int, step: Step) -> float:
        event = self.events[i]

        def value(theta: float) -> float:
            at = torch.tensor([theta], dtype=torch.float64)
            u = self.stages.dense(step.t, step.h, step.u.detach(), at)[0]
            return condition_value(event, self.problem, step.t + theta * step.h, u)

        with torch.no_grad():
            return locate_crossing(value, event, self.before[i], self.problem)
