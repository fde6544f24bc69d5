"""What to tell somebody whose solve has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem
from pysciml_node.replay.stages import FlatFunction
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.step import Attempt
from pysciml_node.stochastic.fields import Fields
from pysciml_node.stochastic.trajectory import SDETrajectory


def failure_message(solution: Solution, options: SolveOptions) -> str:
    """The cause, where it happened, and remedies in the order to try them."""
    stats, problem = solution.stats, solution.problem
    t = solution.trajectory.times[-1]
    steps = stats.naccept + stats.nreject
    share = stats.nreject / steps if steps else 0.0
    cause = {
        ReturnCode.MaxIters: f"max_steps={options.max_steps} was reached",
        ReturnCode.DtLessThanMin: f"the step size fell below dtmin={options.dtmin:.3g}"
        if options.dtmin
        else "the step size fell below the resolution of time",
        ReturnCode.Unstable: "the field or the state became NaN or infinite",
    }.get(solution.retcode, solution.retcode.value)
    where = f"{cause} at t={t:.6g} of ({problem.t0:.6g}, {problem.t1:.6g})"
    lines = [f"{where} (step {steps}, {share:.0%} rejected)."]
    trajectory = solution.trajectory
    stiff = False
    if isinstance(trajectory, TorchTrajectory):
        problem = trajectory.problem
        fields = {"f(t0, u0)": FlatField(problem)}
        lines += _attempt(
            trajectory.record.last, trajectory.flat_states[0], fields, options, problem
        )
        found, stiff = _stiffness(trajectory)
        lines += found
    elif isinstance(trajectory, SDETrajectory):
        both = Fields(trajectory.problem)
        rates: dict[str, FlatFunction] = {
            "drift(t0, u0)": both.drift,
            "diffusion(t0, u0)": both.diffusion,
        }
        start = trajectory.states()[0]
        lines += _attempt(trajectory.record.last, start, rates, options, trajectory.problem)
    lines += _remedies(solution, options, stiff)
    lines.append(f"  The solution up to t={t:.6g} is in .solution.")
    return "\n".join(lines)


def _attempt(
    last: Attempt | None,
    start: Tensor,
    fields: Mapping[str, FlatFunction],
    options: SolveOptions,
    problem: Problem,
) -> list[str]:
    """The worst component of the last attempt, or what is wrong before the first one."""
    lines: list[str] = []
    spec = problem.spec
    if last is None:
        with torch.no_grad():
            time = problem.time_tensor([problem.t0])[0]
            rates = {name: field(time, start.detach()) for name, field in fields.items()}
        for name, vector in {"u0": start.detach(), **rates}.items():
            bad = ~torch.isfinite(vector)
            if bool(bad.any()):
                # A matrix of noise has several entries for each of the state's.
                index = int(bad.nonzero()[0]) * start.numel() // vector.numel()
                lines.append(f"  {name} is not finite: {spec.locate(index)}.")
        return lines
    # What a method carries beside the state is not looked at.
    u, u1 = (vector.detach()[: start.numel()] for vector in (last.u, last.u1))
    bad = ~torch.isfinite(u1)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        return [f"  First value that is not finite: {spec.locate(index)}."]
    scale = torch.maximum(u.abs(), u1.abs()) * options.rtol + options.atol
    index = int(((u1 - u).abs() / scale).argmax())
    return [
        f"  Fastest change in units of the tolerance: {spec.locate(index)}; "
        f"scaled error {last.error:.3g} at dt={last.h:.3g}."
    ]


def _stiffness(trajectory: TorchTrajectory) -> tuple[list[str], bool]:
    """The stiffness of the last accepted step."""
    lines: list[str] = []
    radius = trajectory.method.tableau.stability_radius
    stiff = False
    if trajectory.record.sizes and radius and torch.isfinite(trajectory.flat_states[-1]).all():
        with torch.no_grad():
            stages, _ = trajectory._stages(trajectory.method)
            n = len(trajectory.record.sizes) - 1
            h = trajectory.record.sizes[n]
            product = abs(h) * float(
                stages.stiffness(trajectory.record.times[n], h, trajectory.flat_states[n])
            )
        if math.isfinite(product):
            stiff = product > 0.5 * radius
            lines.append(
                f"  Stiffness estimate |lambda|*dt = {product:.2g} "
                f"(this method is stable below {radius:.3g})."
            )
    return lines, stiff


def _remedies(solution: Solution, options: SolveOptions, stiff: bool) -> list[str]:
    tries: list[str] = []
    if solution.retcode is ReturnCode.Unstable:
        tries += [
            "check f for divisions by zero, logarithms and roots at the state named above",
            "a smaller dtmax" if options.controller.adaptive else "a smaller dt0",
            "bounded activations or weight decay, if the field is learned",
        ]
    else:
        if stiff:
            tries.append('a stiff solver such as Rodas5P() (engine="julia")')
        if solution.retcode is ReturnCode.MaxIters:
            tries.append(f"a larger max_steps than {options.max_steps}")
        eps = torch.finfo(solution.problem.spec.real_dtype).eps
        rtol = options.rtol if isinstance(options.rtol, float) else float(options.rtol.min())
        near = f" (rtol={rtol:.1g} is near the state's precision)" if rtol < 20 * eps else ""
        tries.append(f"larger tolerances{near}")
        if near:
            tries.append("float64")
        tries.append("a smoother or smaller field, or a regularizer such as LocalError")
    return ["  Try, in order: " + "; ".join(tries) + "."]
