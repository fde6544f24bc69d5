"""The discrete adjoint of implicit steps: each one taken again and recorded by autograd.

A Rosenbrock step is differentiated with its Jacobian, which takes second derivatives of the field.
A stage of a diagonally implicit step is differentiated by the implicit function theorem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.implicit import stages_for
from pysciml_node.replay.newton import left_missing
from pysciml_node.replay.stages import Method
from pysciml_node.replay.vectors import Real, RecordedVectors
from pysciml_node.steps.cotangents import StepBack, StepCotangents
from pysciml_node.steps.field import Accumulator, DifferentiableField


class Totals:
    """What the steps of one sweep have in common.

    Attributes:
        sums: of the cotangents of the field's inputs.
        comparison: of the replayed steps with those of the solve.
        nvjp: vector-Jacobian products of the field.
    """

    def __init__(self, field: DifferentiableField) -> None:
        self.sums, self.comparison = Accumulator(field.leaves), Comparison()
        self.nvjp = 0


class RecordedPullback:
    """Pulls cotangents back through single implicit steps.

    Args:
        field: the field prepared for gradients.
        method: the method of the forward solve.
        marks: start, stops and end of the solve.
        time_gradient: whether cotangents of times are wanted.
        totals: receives what is pulled back to the field's inputs, and compares the steps.
    """

    def __init__(
        self,
        field: DifferentiableField,
        method: Method,
        marks: tuple[float, ...],
        time_gradient: bool,
        totals: Totals,
    ) -> None:
        self.field, self.method, self.marks = field, method, marks
        self.time_gradient, self.totals = time_gradient, totals

    def __call__(self, step: StepBack) -> StepCotangents:
        """Pull a step back."""
        start: Real = step.t
        size: Real = step.h
        theta = step.theta
        before = self.field.nfe
        times: list[Tensor] = []
        field = self.field.field
        with torch.enable_grad():
            state = step.u.detach().requires_grad_()
            if self.time_gradient:
                start, size = times = [
                    self.method.nodes.new_tensor(x).requires_grad_() for x in (step.t, step.h)
                ]
                theta = theta.clone().requires_grad_()
            stages = stages_for(self.method, field, self.marks, RecordedVectors(), field.mass)
            outputs = [stages.solution(start, size, state, with_error=False)]
            cotangents = [step.end]
            if step.inside is not None:
                outputs.append(stages.dense(start, size, state, theta))
                cotangents.append(step.inside)
        again = outputs[0].detach()
        self.totals.comparison.add(again, step.u1, step.u, left_missing(again.dtype))
        for output in outputs:
            self.field.captured.expect_known(output, state, *times, theta)
        places = [theta] if self.time_gradient and step.inside is not None else []
        gradients: list[Tensor | None] = list(
            torch.autograd.grad(
                outputs,
                [state, *times, *places, *self.field.leaves],
                cotangents,
                allow_unused=True,
                # Parts of the graph may be the caller's own (a captured tensor that is no leaf).
                retain_graph=True,
            )
        )
        self.totals.nvjp += self.field.nfe - before
        state_bar = gradients.pop(0)
        t_bar = gradients.pop(0) if times else None
        h_bar = gradients.pop(0) if times else None
        theta_bar = gradients.pop(0) if places else None
        self.totals.sums.add(gradients)
        u_bar = torch.zeros_like(step.u) if state_bar is None else state_bar
        return StepCotangents(u_bar, t_bar, h_bar, theta_bar)
