"""The discrete adjoint of implicit steps: each one taken again and recorded by autograd.

A Rosenbrock step is differentiated with its Jacobian, which takes second derivatives of the field.
A stage of a diagonally implicit step is differentiated by the implicit function theorem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.implicit import ImplicitStages
from pysciml_node.replay.stages import Method
from pysciml_node.replay.vectors import Real, RecordedVectors
from pysciml_node.steps.field import Accumulator, DifferentiableField


class RecordedPullback:
    """Pulls cotangents back through single implicit steps.

    Args:
        field: the field prepared for gradients.
        method: the method of the forward solve.
        marks: start, stops and end of the solve.
        time_gradient: whether cotangents of times are wanted.
    """

    def __init__(
        self,
        field: DifferentiableField,
        method: Method,
        marks: tuple[float, ...],
        time_gradient: bool,
    ) -> None:
        self.field, self.method, self.marks = field, method, marks
        self.time_gradient = time_gradient
        self.sums = Accumulator(field.leaves)
        self.comparison = Comparison()

    def __call__(
        self,
        t: float,
        h: float,
        u: Tensor,
        u1: Tensor,
        end: Tensor,
        inside: Tensor | None,
        theta: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Cotangents of the step's start, `t`, `h` and its dense outputs' `theta`.

        Args:
            t: start of the step.
            h: its size.
            u: its starting state `(N,)`.
            u1: the state at its end that the solve found, `(N,)`.
            end: cotangent of its end state `(N,)`.
            inside: cotangents of its dense outputs `(m, N)`, or `None`.
            theta: where they lie, `(m,)` in float64.
        """
        start: Real = t
        size: Real = h
        times: list[Tensor] = []
        field = self.field.field
        with torch.enable_grad():
            state = u.detach().requires_grad_()
            if self.time_gradient:
                start, size = times = [
                    self.method.nodes.new_tensor(x).requires_grad_() for x in (t, h)
                ]
                theta = theta.clone().requires_grad_()
            stages = ImplicitStages(self.method, field, self.marks, RecordedVectors(), field.mass)
            outputs, cotangents = [stages.solution(start, size, state, with_error=False)], [end]
            if inside is not None:
                outputs.append(stages.dense(start, size, state, theta))
                cotangents.append(inside)
        self.comparison.add(outputs[0].detach(), u1, u)
        for output in outputs:
            self.field.captured.expect_known(output, state, *times, theta)
        places = [theta] if self.time_gradient and inside is not None else []
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
        state_bar = gradients.pop(0)
        t_bar = gradients.pop(0) if times else None
        h_bar = gradients.pop(0) if times else None
        theta_bar = gradients.pop(0) if places else None
        self.sums.add(gradients)
        return torch.zeros_like(u) if state_bar is None else state_bar, t_bar, h_bar, theta_bar
