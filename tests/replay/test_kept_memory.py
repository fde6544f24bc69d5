"""Graphs of steps take no more memory than they may, whatever way a field goes later."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
WIDTH = 10_000
BYTES = 8 * WIDTH


class Widening(nn.Module):
    """`u' = -k u`, by the mean of many equal terms from a half on, whose parts are counted."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=D))
        self.wide, self.held = wide, list[weakref.ref[Tensor]]()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if not self.wide or t < 0.5:
            return -self.k * u
        ones = torch.ones(WIDTH, dtype=D)
        self.held.append(weakref.ref(ones))
        return -self.k * (u * ones).mean(-1, keepdim=True)


@pytest.mark.parametrize("memory", [20 * BYTES, 80 * BYTES, 2**40])
def test_an_evaluation_may_take_more_than_the_first(memory: int) -> None:
    def solve(wide: bool) -> tuple[Widening, Tensor]:
        field = Widening(wide)
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        adjoint = psn.DiscreteAdjoint(memory=memory)
        fixed = {"controller": psn.FixedStep(), "dt0": 1 / 32}
        return field, psn.solve(problem, psn.RK4(), adjoint=adjoint, compile=False, **fixed).u1

    field, u1 = solve(True)
    gc.collect()
    alive = sum(reference() is not None for reference in field.held)
    # Of a step that is the first one to take more its end alone tells: each has four evaluations.
    assert alive * BYTES <= memory + 4 * BYTES
    assert alive > 8
    (found,) = torch.autograd.grad(u1, field.k)
    assert found.item() == pytest.approx(-math.exp(-1.0), rel=1e-6)
    other, end = solve(False)
    (expected,) = torch.autograd.grad(end, other.k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
