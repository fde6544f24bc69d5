"""Controlled equations whose solutions are known functions of the path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

TIMES = [0.0, 0.4, 1.0, 1.3, 2.0]
MAKERS = [
    psn.interpolate.linear,
    psn.interpolate.hermite_cubic,
    psn.interpolate.natural_cubic,
]


def observations(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Growth(nn.Module):
    """`dz = z (w . dX)`: `z0 exp(w . (X1 - X0))`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z.unsqueeze(-1) * self.weight.to(z.dtype)


class Product(Growth):
    """The same without matrices."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        raise AssertionError("the product is used")

    def prod(self, t: Tensor, z: Tensor, dx: Tensor) -> Tensor:
        return z * (dx @ self.weight).unsqueeze(-1)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("field", [Growth, Product])
def test_growth_along_a_path(maker: Any, field: type[Growth]) -> None:
    x, cde = observations(), psn.NeuralCDE(field(), rtol=1e-11, atol=1e-11)
    path = maker(x, TIMES)
    z0 = torch.ones(3, 4, dtype=torch.float64)
    solution = cde(z0, path, saveat=TIMES)
    exact = torch.exp((x - x[:, :1]) @ cde.field.weight).T.unsqueeze(-1).expand(5, 3, 4)
    torch.testing.assert_close(solution.u, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lines_are_followed_exactly_from_knot_to_knot(dtype: torch.dtype) -> None:
    """`dz = dX` with jumps of the derivative at every knot, by steps that end there."""
    x = observations(dtype)
    cde = psn.NeuralCDE(
        lambda t, z: torch.eye(2, dtype=dtype).expand(3, 2, 2), rtol=1e-2, atol=1e-2
    )
    solution = cde(x[:, 0], psn.interpolate.linear(x, TIMES))
    torch.testing.assert_close(solution.u1, x[:, -1], rtol=1e-5, atol=1e-5)
    assert set(torch.tensor(TIMES, dtype=dtype).tolist()) <= set(solution.t.tolist())
    assert solution.stats.nreject == 0


def test_the_solution_does_not_depend_on_how_fast_the_path_is_run_through() -> None:
    x, cde = observations(), psn.NeuralCDE(Growth(), rtol=1e-11, atol=1e-11, output="u1")
    z0 = torch.ones(3, 4, dtype=torch.float64)
    ends = [cde(z0, psn.interpolate.linear(x, t)) for t in (TIMES, None)]
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("maker", [*MAKERS, psn.interpolate.rectilinear])
@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint(), psn.InterpolatingAdjoint()]
)
def test_gradients_reach_state_field_and_observations(maker: Any, adjoint: Any) -> None:
    cde = psn.NeuralCDE(Growth(), rtol=1e-8, atol=1e-8, adjoint=adjoint, output="u1")
    x = observations().requires_grad_()
    z0 = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (z0, x, cde.field.weight)
    found = torch.autograd.grad(cde(z0, maker(x)).sum(), inputs)
    exact = z0 * torch.exp((x[:, -1] - x[:, 0]) @ cde.field.weight).unsqueeze(-1)
    for one, other in zip(found, torch.autograd.grad(exact.sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_matrices_of_another_shape_are_refused() -> None:
    cde = psn.NeuralCDE(lambda t, z: z)
    with pytest.raises(ValueError, match=r"matrices of shape \(3, 4, 2\)"):
        cde(torch.ones(3, 4).double(), psn.interpolate.linear(observations()))
    with pytest.raises(TypeError, match="path must be"):
        cde(torch.ones(3, 4), observations())
