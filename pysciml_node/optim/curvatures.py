"""The three forms of the curvature `C` that a variance-corrected step divides by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pysciml_node.optim.gauss_newton import (
    DampedSolve,
    GaussNewton,
    ProductSpace,
    flatten,
    hutchinson_diagonal,
    refuse_unreached,
    unflatten,
)
from pysciml_node.optim.options import Curvature
from pysciml_node.optim.steps import Step
from pysciml_node.optim.terminal import terminal_moments, terminal_state

_DAMPING_AFTER_REJECTION = 0.1


class CurvatureRule(ABC):
    """One form of `C`: the state that it keeps for a parameter, and its step.

    Attributes:
        reads_graph: whether it differentiates the outputs, whose graph the backward pass must keep.
    """

    reads_graph: ClassVar[bool] = True

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {}

    @abstractmethod
    def step(self, step: Step) -> None:
        """Change the parameters.

        Raises:
            ValueError: an argument that the curvature or the safeguard needs is missing.
        """


class Terminal(CurvatureRule):
    """`C = t^2 E|x_t|^2`, one number for all parameters: the paper's rule."""

    reads_graph = False

    def step(self, step: Step) -> None:
        """Divide the gradient by the number."""
        horizon, moment = terminal_moments(step.solution, step.horizon, step.second_moment)
        curvature = horizon * horizon * moment
        directions = [[grad / curvature for grad in row.grads] for row in step.rows]
        rates = step.rates
        match step.option("safeguard"):
            case "backtracking":
                step.backtrack(directions, rates)
                return
            case "bound":
                cap = self._rate_cap(step, horizon * moment)
                rates = [min(rate, cap) for rate in rates]
        step.move(directions, rates)

    @staticmethod
    def _rate_cap(step: Step, scale: float) -> float:
        """Largest learning rate that does not overshoot in one dimension, `log(1 + d) / d`."""
        total = math.hypot(*(float(grad.norm()) for row in step.rows for grad in row.grads))
        distance = total / scale
        return math.log1p(distance) / distance if distance > 0.0 else math.inf


class Diagonal(CurvatureRule):
    """`C = diag E[(dx_t/dtheta_i)^2]`, estimated with random signs and a running average."""

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The running average."""
        return {"curvature": torch.zeros_like(param)}

    def step(self, step: Step) -> None:
        """Divide each entry of the gradient by its curvature and a share of the mean."""
        directions = self._directions(step)
        if step.option("safeguard") == "backtracking":
            step.backtrack(directions, step.rates)
        else:
            step.move(directions, step.rates)

    def _directions(self, step: Step) -> list[list[Tensor]]:
        averages = self._averages(step)
        entries = sum(param.numel() for param in step.params)
        mean = math.fsum(float(entry.sum()) for row in averages for entry in row) / entries
        return [
            [
                _quotient(grad, entry + row.group["damping"] * mean)
                for grad, entry in zip(row.grads, average, strict=True)
            ]
            for row, average in zip(step.rows, averages, strict=True)
        ]

    def _averages(self, step: Step) -> list[list[Tensor]]:
        """The running averages with this step's sample, corrected for their start at zero."""
        if step.solution is None:
            raise ValueError(
                "curvature='diagonal' needs the outputs whose curvature it estimates, but step() "
                "has none.\n"
                "  Pass solution=sol after loss.backward(retain_graph=True), or a closure that "
                "returns (loss, solution)."
            )
        outputs = terminal_state(step.solution)
        first = step.params[0]
        generator = torch.Generator(device=outputs.device)
        generator.manual_seed(step.option("seed") + int(step.state[first]["step"]))
        probes = step.option("probes")
        samples = iter(hutchinson_diagonal(outputs, step.params, probes, generator))
        averages: list[list[Tensor]] = []
        for row in step.rows:
            beta = row.group["beta"]
            average = []
            for param in row.params:
                state = step.state[param]
                state["curvature"].lerp_(next(samples), 1.0 - beta)
                average.append(state["curvature"] / (1.0 - beta ** (state["step"].item() + 1)))
            damped = row.group["damping"] > 0
            refuse_unreached(outputs, row.params, row.grads, average, damped=damped)
            averages.append(average)
        return averages


class FullGaussNewton(CurvatureRule):
    """`C = J^T J / B`, inverted by conjugate gradients and trusted while the loss follows it."""

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The damping, which follows the gain."""
        return {"damping": param.new_tensor(group["damping"])}

    def step(self, step: Step) -> None:
        """Solve for the step, and solve again with more damping where it does not help."""
        model = step.several()
        outputs = terminal_state(model.solution)
        gradient = flatten([grad for row in step.rows for grad in row.grads])
        space = ProductSpace(self._operator(step, outputs, gradient), gradient)
        safeguard, rates = step.option("safeguard"), step.rates
        growth, checked = 2.0, False
        for _ in range(step.option("max_trials")):
            solved = self._solve(step, space)
            if not checked:
                grads = unflatten(gradient, step.params)
                known = unflatten(space.along_gradient, step.params)
                refuse_unreached(outputs, step.params, grads, known, damped=True)
                checked = True
            pieces = iter(unflatten(solved.step, step.params))
            directions = [[next(pieces) for _ in row.params] for row in step.rows]
            if safeguard == "backtracking":
                step.backtrack(directions, rates)
                return
            predicted = self._predicted_decrease(step, rates, gradient, solved)
            if safeguard == "none" or predicted == 0.0:
                step.move(directions, rates)
                return
            gain = (model.objective - step.objective_after(directions, rates)) / predicted
            if predicted > 0.0 and gain > 0.0:
                step.move(directions, rates)
                self._scale_damping(step, max(0.1, 1.0 - (2.0 * gain - 1.0) ** 3))
                return
            self._scale_damping(step, growth, floor=_DAMPING_AFTER_REJECTION)
            growth *= 2.0

    @staticmethod
    def _operator(step: Step, outputs: Tensor, gradient: Tensor) -> GaussNewton:
        exact = step.option("jvp") == "double-backward"
        fd_step = step.option("fd_step") or torch.finfo(gradient.dtype).eps ** 0.25
        evaluate = None if exact else step.several().outputs_here
        return GaussNewton(outputs, step.params, evaluate, fd_step)

    @staticmethod
    def _solve(step: Step, space: ProductSpace) -> DampedSolve:
        damping = [step.state[param]["damping"].expand_as(param) for param in step.params]
        return space.solve(
            flatten(damping), max_steps=step.option("cg_steps"), rtol=step.option("cg_rtol")
        )

    @staticmethod
    def _scale_damping(step: Step, factor: float, floor: float = 0.0) -> None:
        for param in step.params:
            step.state[param]["damping"].clamp_(min=floor).mul_(factor)

    @staticmethod
    def _predicted_decrease(
        step: Step, rates: list[float], gradient: Tensor, solved: DampedSolve
    ) -> float:
        """Decrease of the quadratic model, exact where all groups have one learning rate."""
        sizes = [sum(param.numel() for param in row.params) for row in step.rows]
        rate = torch.cat([gradient.new_full((n,), r) for n, r in zip(sizes, rates, strict=True)])
        moved = rate * solved.step
        return float(gradient @ moved) - 0.5 * float(moved @ (rate * solved.image))


def _quotient(grad: Tensor, curvature: Tensor) -> Tensor:
    """`grad / curvature`, or no step where no probe has seen any curvature yet."""
    return torch.where(curvature > 0, grad / curvature, torch.zeros_like(grad))


RULES: dict[Curvature, CurvatureRule] = {
    "terminal": Terminal(),
    "diagonal": Diagonal(),
    "gauss-newton": FullGaussNewton(),
}
