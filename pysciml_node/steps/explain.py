"""What the steps of a failed solve say about its failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem
from pysciml_node.steps.step import Attempt


def explain_attempt(
    last: Attempt | None,
    start: Tensor,
    rates: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    options: SolveOptions,
    problem: Problem,
) -> list[str]:
    """The worst component of the last attempt, or what was wrong before the first one.

    Args:
        last: the last attempt, `None` where there was none.
        start: the flat state at `t0`, `(N,)`.
        rates: the functions of the equation, by what the message calls their values at `t0`.
        options: of the solve.
        problem: names the components.
    """
    spec = problem.spec
    if last is None:
        with torch.no_grad():
            time = problem.time_tensor([problem.t0])[0]
            values = {name: rate(time, start.detach()) for name, rate in rates.items()}
        lines: list[str] = []
        for name, vector in {"u0": start.detach(), **values}.items():
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
    tolerances = options.tolerances
    scale = torch.maximum(u.abs(), u1.abs()) * tolerances.rtol + tolerances.atol
    index = int(((u1 - u).abs() / scale).argmax())
    return [
        f"  Fastest change in units of the tolerance: {spec.locate(index)}; "
        f"scaled error {last.error:.3g} at dt={last.h:.3g}."
    ]
