"""Fields that keep what they computed, and differentiate it at a later evaluation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
FIXED = {"controller": psn.FixedStep(), "dt0": 0.125}


class Remembering(nn.Module):
    """`u' = -k sin u (1 + a)`, `a` being a slope of the value before in `k`, at its own state."""

    def __init__(self, retain: bool = True) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.7, dtype=D))
        self.last: Tensor | None = None
        self.retain = retain
        self.slopes: list[Tensor] = []
        self.states: list[Tensor] = []

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        a = torch.zeros((), dtype=D)
        if self.last is not None:
            ones = torch.ones_like(self.last)
            (a,) = torch.autograd.grad(self.last, self.k, ones, retain_graph=self.retain)
            self.slopes.append(a)
        self.states.append(u.detach().clone())
        with torch.enable_grad():
            self.last = -self.k * torch.sin(u)
        return self.last * (1 + 0.3 * torch.tanh(a).detach())


def of_one(field: Remembering) -> tuple[psn.ODEProblem, Any]:
    return psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0)), psn.RK4()


def of_noise(field: Remembering) -> tuple[psn.SDEProblem, Any]:
    u0 = torch.ones(1, dtype=D)
    return psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, (0.0, 1.0)), psn.EM()


@pytest.mark.parametrize("kind", [of_one, of_noise])
def test_they_have_the_solution_that_they_have_without_gradients(
    kind: Callable[[Remembering], Any],
) -> None:
    def solve(field: Remembering, **options: Any) -> Tensor:
        problem, algorithm = kind(field)
        if algorithm == psn.EM():
            options["generator"] = torch.Generator().manual_seed(0)
        return psn.solve(problem, algorithm, compile=False, **FIXED, **options).u1

    with torch.no_grad():
        expected = solve(Remembering())
    field = Remembering()
    found = solve(field, adjoint=psn.DirectAdjoint())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-13, atol=0)
    for slope, u in zip(field.slopes, field.states, strict=False):
        torch.testing.assert_close(slope, -torch.sin(u).sum(), rtol=1e-13, atol=0)
    assert torch.autograd.grad(found.sum(), field.k)[0] < 0


def test_what_lets_go_of_the_graph_of_the_solve_is_refused() -> None:
    problem, algorithm = of_one(Remembering(retain=False))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        psn.solve(problem, algorithm, adjoint=psn.DirectAdjoint(), compile=False, **FIXED)


def test_graphs_go_with_the_solution() -> None:
    problem, algorithm = of_one(field := Remembering())
    solution = psn.solve(problem, algorithm, adjoint=psn.DirectAdjoint(), compile=False, **FIXED)
    held = weakref.ref(solution.u1)
    field.last = None
    while gc.collect():
        pass  # what others have left goes in turns: a graph, then what it has held
    gc.disable()
    try:
        del solution
        assert held() is None
        assert not gc.collect()
    finally:
        gc.enable()
