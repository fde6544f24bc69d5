"""The time loop alone, with a step and a controller that follow a script."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.algorithms.controllers import StepSizes
from pysciml_node.steps.loop import MarchOptions
from pysciml_node.torch_engine.march import March


class Script:
    """Stands for stages: `u' = 1` exactly, with the error that is written for each attempt."""

    def __init__(self, errors: list[float]) -> None:
        self.errors, self.attempts, self.count = errors, [], 0
        self.method = SimpleNamespace(tableau=SimpleNamespace(error_order=1))

    def field(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.ones_like(u)

    def times(self, t: float, h: float) -> tuple[Tensor, ...]:
        return (torch.tensor(t, dtype=torch.float64),)

    def start(self, t: float, h: float, u: Tensor) -> Tensor:
        self.count = 1
        return torch.ones_like(u)

    def solution(self, t: float, h: float, u: Tensor, with_error: bool) -> Tensor:
        self.attempts.append((t, h))
        return u + h

    def error_size(self, h: float, u: Tensor, u1: Tensor, norm: Any) -> float:
        return self.errors[len(self.attempts) - 1]

    def leave(self, goes_on: bool) -> None:
        self.count = 0


class Halving(StepSizes):
    """A controller that doubles after an accepted step and halves after a rejected one."""

    adaptive = True

    def start(self, error_order: float) -> Halving:
        return self

    def accepted(self, h: float, error: float) -> float:
        return 2 * h

    def rejected(self, h: float, error: float) -> float:
        return h / 2


def march(errors: list[float], t1: float = 1.0, **options: Any) -> tuple[March, Script, list[Any]]:
    script: Any = Script(errors)
    controller: Any = Halving()
    norm: Any = None
    loop = March(
        script,
        torch.zeros(1, dtype=torch.float64),
        0.0,
        t1,
        MarchOptions(controller, norm, **{"max_steps": 100, "dt0": 0.25, **options}),
    )
    return loop, script, list(loop)


def test_accepted_and_rejected_steps_follow_the_controller() -> None:
    """Halved after a rejection, doubled after a success, and cut at the end."""
    loop, script, steps = march([2.0, 0.5, 0.5, 3.0, 0.5, 0.5])
    sizes = [h for _, h in script.attempts]
    assert sizes[:5] == [0.25, 0.125, 0.25, 0.5, 0.25]
    assert [step.t for step in steps] == [0.0, 0.125, 0.375, 0.625]
    assert steps[-1].end == 1.0
    assert loop.retcode is psn.ReturnCode.Success
    assert (loop.naccept, loop.nreject) == (4, 2)
    torch.testing.assert_close(steps[-1].u1, torch.ones(1, dtype=torch.float64))


def test_steps_end_on_stops_and_keep_the_size_that_was_proposed() -> None:
    _, script, steps = march([0.5] * 20, tstops=(0.3,))
    assert [step.end for step in steps if step.stop is not None] == [0.3, 1.0]
    # 0.25, then 0.05 of a proposed 0.5 up to the stop, then the proposed size again.
    assert [h for _, h in script.attempts] == pytest.approx([0.25, 0.05, 0.5, 0.2])


@pytest.mark.parametrize(
    ("options", "errors", "code"),
    [
        ({"max_steps": 3}, [0.5, 2.0, 2.0, 2.0], psn.ReturnCode.MaxIters),
        ({"dtmin": 0.1}, [2.0, 2.0], psn.ReturnCode.DtLessThanMin),
        ({"dtmin": 0.1}, [math.nan, math.nan], psn.ReturnCode.Unstable),
    ],
)
def test_how_a_march_fails(options: Any, errors: list[float], code: psn.ReturnCode) -> None:
    loop, _, _ = march(errors, **options)
    assert loop.retcode is code


def test_backward_in_time_the_loop_is_mirrored() -> None:
    _, forward, _ = march([2.0, 0.5, 0.5, 3.0, 0.5, 0.5])
    _, backward, steps = march([2.0, 0.5, 0.5, 3.0, 0.5, 0.5], t1=-1.0)
    mirrored = torch.tensor(backward.attempts, dtype=torch.float64).neg()
    torch.testing.assert_close(mirrored, torch.tensor(forward.attempts, dtype=torch.float64))
    assert steps[-1].end == -1.0
