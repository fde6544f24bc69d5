"""Fields that take derivatives inside, or map by `torch.vmap`, on the Julia engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

pytestmark = pytest.mark.julia

D = torch.float64
SYMPLECTIC = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D)

Energy = Callable[[Tensor], Tensor]


def recorded(energy: Energy, u: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u if u.requires_grad else u.detach().requires_grad_()
        return torch.autograd.grad(energy(x), x, create_graph=True)[0]


def transformed(energy: Energy, u: Tensor) -> Tensor:
    return torch.func.grad(energy)(u)


def mapped(energy: Energy, u: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(energy))(u)


@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Rodas5P()])
@pytest.mark.parametrize("gradient", [recorded, transformed, mapped])
def test_hamiltonian_fields_have_the_flow_of_the_oscillator(
    gradient: Callable[[Energy, Tensor], Tensor], algorithm: Any
) -> None:
    """From (1, 0) `q = cos(w t)` and `p = -w sin(w t)`; the later of two solves is prepared."""
    w = torch.tensor(2.0, dtype=D, requires_grad=True)

    def energy(x: Tensor) -> Tensor:
        q, p = x.unbind(-1)
        return (p.square() + (w * q).square()).sum() / 2

    def field(t: Tensor, u: Tensor) -> Tensor:
        return gradient(energy, u) @ SYMPLECTIC

    problem = psn.ODEProblem(field, torch.tensor([[1.0, 0.0]], dtype=D), (0.0, 1.0))
    for _ in range(2):
        solution = psn.solve(problem, algorithm, rtol=1e-10, atol=1e-10, engine="julia")
        q, p = solution.u1[0]
        assert q.item() == pytest.approx(math.cos(2), abs=1e-8)
        assert p.item() == pytest.approx(-2 * math.sin(2), abs=1e-8)
        (found,) = torch.autograd.grad(q, w)
        assert found.item() == pytest.approx(-math.sin(2), abs=1e-7)
