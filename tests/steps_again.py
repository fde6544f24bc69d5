"""Steps of native solves that are taken again, beside those that Python takes again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.solutions.solution import Solution
from pysciml_node.torch_engine.native.taken import TakenSteps
from pysciml_node.torch_engine.native.trajectory import NativeTrajectory


def in_python(solution: Solution) -> Solution:
    """The same solution, whose steps are taken again in Python."""
    trajectory = solution.trajectory
    assert isinstance(trajectory, NativeTrajectory)
    eager = dataclasses.replace(trajectory, program=None, translated=True)
    return dataclasses.replace(solution, trajectory=eager, stats=psn.Stats())


@contextmanager
def natively(calls: int = 1) -> Iterator[None]:
    """So many times are steps taken by native code, and not otherwise."""
    take = TakenSteps.take
    with mock.patch.object(TakenSteps, "take", autospec=True, side_effect=take) as seen:
        yield
    assert seen.call_count >= calls


def gradients(values: Any, inputs: list[Tensor]) -> list[Tensor]:
    weights = [torch.linspace(0.5, 2, x.numel(), dtype=x.dtype).reshape(x.shape) for x in values]
    loss = sum((x * w).sum() for x, w in zip(values, weights, strict=True))
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_alike(
    found: Solution, inputs: list[Tensor], read: Callable[[Solution], Any], bound: float = 1e-11
) -> None:
    """What is read off a solution, with its gradients, is what steps in Python give."""
    with natively():
        native = [x for x in read(found) if not bool(torch.isnan(x).any())]
    eager = [x for x in read(in_python(found)) if not bool(torch.isnan(x).any())]
    assert len(native) == len(eager) > 0
    for one, other in zip(native, eager, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * size)
    if not inputs:
        return
    for one, other in zip(gradients(native, inputs), gradients(eager, inputs), strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * (size + 1e-30))


def errors_of_steps(solution: Solution) -> list[Tensor]:
    return [torch.stack([x.error for x in solution.step_estimates()])]
