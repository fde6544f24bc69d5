"""Cuts accepted steps at events."""

from __future__ import annotations

import torch

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.steps.event_search import Signs, condition_value
from pysciml_node.steps.step import Step, size_from
from pysciml_node.torch_engine.march import March


class EventSearch:
    """Looks at each accepted step; cuts it at the first event found there.

    Args:
        options: for the events that are watched.
        problem: that is solved.
        march: takes the steps.

    Attributes:
        found: index of the event that has ended the solve, or `None`.
    """

    def __init__(self, options: SolveOptions, problem: ODEProblem, march: March) -> None:
        self.events, self.problem, self.march = options.events, problem, march
        self.signs = Signs(problem, options.events, options.fired)
        self.found: int | None = None

    def __call__(self, step: Step) -> Step | None:
        """The step cut at its first event, or `None` where there is none."""
        stages = self.march.stages
        after = [condition_value(event, self.problem, step.end, step.u1) for event in self.events]

        def value(i: int, theta: float) -> float:
            at = torch.tensor([theta], dtype=torch.float64)
            # With their graph, where there is one: the steps that follow may use these stages too.
            stages.evaluate(step.time, step.size, step.u, stages.method.all_stages)
            with torch.no_grad():
                u = stages.dense(step.t, step.h, step.u.detach(), at)[0]
            return condition_value(self.events[i], self.problem, step.t + theta * step.h, u)

        crossing = self.signs.first_crossing(after, value, step.h)
        if crossing is None:
            return None
        theta, self.found = crossing
        # Taken again with the shorter size: the state at the event is the step's own result.
        h = theta * step.h
        if self.march.far:
            h = size_from(step.t, h)
        stages.count = 1
        u1 = stages.solution(step.time, h, step.u, with_error=False)
        return Step(step.t, h, step.t + h, step.u, u1, step.error, None, step.time, h, step.method)
