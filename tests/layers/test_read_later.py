"""What is read of a layer's solution later is of its field as it was when it solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

D = torch.float64
NATIVE = pytest.param(True, marks=pytest.mark.skipif(not available()[0], reason=available()[1]))
KINDS = ("integral", "flow", "flow and integral")


class Decay(nn.Module):
    """`u' = -rate k u`, with a number beside the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.rate = nn.Parameter(torch.ones((), dtype=D)), 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`."""
        return -self.rate * self.k * u


def solver(field: Decay, kind: str, native: bool) -> Callable[[Tensor], psn.Solution]:
    """A layer with integrals beside its state: the solution of a call."""
    energy = [] if kind == "flow" else [psn.KineticEnergy()]
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "compile": native, "engine": "torch"}
    if kind == "integral":
        return psn.NeuralODE(field, regularizers=energy, **options)
    flow, solved = psn.CNF(field, regularizers=energy, **options), list[psn.Solution]()
    flow.node.register_solve_hook(lambda _, solution: solved.append(solution))

    def solve(x: Tensor) -> psn.Solution:
        flow.transform(x)
        return solved.pop()

    return solve


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [False, NATIVE])
def test_dense_output_is_of_the_field_as_it_was(kind: str, native: bool) -> None:
    x, field = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D), Decay()
    solve, half = solver(field, kind, native), math.exp(-0.5)
    for _ in range(3):  # native solves that were before begin in another way
        solution = solve(x)
        field.rate = 5.0
        with torch.no_grad():
            assert torch.allclose(solution(0.5), half * x)
        (slope,) = torch.autograd.grad(solution(0.5).sum(), field.k)
        assert slope.item() == pytest.approx(-0.5 * half * 10.0)
        assert solution.stats.naccept == len(solution.step_times) - 1
        field.rate = 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [False, NATIVE])
def test_what_has_changed_in_place_is_named(kind: str, native: bool) -> None:
    field = Decay()
    solve = solver(field, kind, native)
    for factor in (2.0, 0.5, 2.0):
        solution = solve(torch.ones(2, 2, dtype=D))
        with torch.no_grad():
            field.k.mul_(factor)
        with pytest.raises(RuntimeError, match=r"\bk\b"):
            solution(0.5)
