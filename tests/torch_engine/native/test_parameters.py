"""Which of a field's parameters native solves train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64


class Cast(nn.Module):
    """Decay at a rate in a dtype of its own, and one that is detached."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, 1.5], dtype=dtype))
        self.bound = nn.Parameter(torch.tensor(2.0, dtype=dtype))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u * self.rate.to(u) * self.bound.detach().to(u)


@pytest.mark.parametrize(("dtype", "state"), [(torch.float32, D), (D, torch.float32)])
def test_parameters_of_another_dtype_are_trained_and_detached_ones_are_not(
    dtype: torch.dtype, state: torch.dtype
) -> None:
    module, u0 = Cast(dtype), torch.ones(2, dtype=state)

    def solved(field: Any) -> Tensor:
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        return psn.solve(problem, psn.Tsit5(), rtol=1e-6, atol=1e-6, compile=True).u1

    inputs = [module.rate, module.bound]
    rate, bound = torch.autograd.grad(solved(module).sum(), inputs, allow_unused=True)
    assert bound is None
    assert rate is not None
    expected = -2 * torch.exp(-2 * module.rate.detach())
    torch.testing.assert_close(rate, expected, rtol=0, atol=1e-4)
    # Export hands out another tensor for a captured parameter; a dtype alone told it apart.
    with pytest.raises(psn.CompileError, match="can require gradients"):
        solved(lambda t, u: -u * module.rate.to(u))


@pytest.mark.parametrize("first", ["the field", "the solve"])
def test_weights_in_the_cache_of_torch_are_trained(first: str) -> None:
    """The cache held the tensors of the trace, and the field failed with them."""
    layer = weight_norm(nn.Linear(2, 2, dtype=D))
    u0 = torch.tensor([[1.0, 0.5]], dtype=D)
    problem = psn.ODEProblem(lambda t, u: torch.tanh(layer(u)), u0, (0.0, 1.0))

    def solved(**how: Any) -> tuple[Tensor, ...]:
        u1 = psn.solve(problem, **how).u1
        return u1, *torch.autograd.grad(u1.square().sum(), list(layer.parameters()))

    for _ in range(2):
        expected = solved(adjoint=psn.DirectAdjoint())
        with parametrize.cached():
            if first == "the field":
                layer(u0)
            torch.testing.assert_close(solved(compile=True), expected, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(
                layer(u0), nn.functional.linear(u0, layer.weight, layer.bias)
            )
        with torch.no_grad():
            for x in layer.parameters():
                x.mul_(1.3)


class _Mixed(nn.Module):
    """`du/dt = W u + h`, with a transposed weight and a vector in single precision."""

    def __init__(self, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(size, size, generator=generator, dtype=torch.float64) / size
        self.weight = nn.Parameter(weight.t())
        self.shift = nn.Parameter(torch.randn(size, generator=generator))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.weight @ u + self.shift.to(u.dtype)


@pytest.mark.parametrize("size", [3, 150])
def test_members_read_parameters_that_lie_otherwise_or_are_of_another_dtype(size: int) -> None:
    f, u0 = _Mixed(size), torch.eye(3, size, dtype=torch.float64)
    ensemble = psn.EnsembleProblem(psn.ODEProblem(f, u0[0], (0.0, 1.0)), u0=u0)
    u1 = psn.solve(ensemble, psn.Tsit5(), rtol=1e-9, atol=1e-9, compile=True).u1
    # Of (u, 1) the equation is linear.
    with torch.no_grad():
        whole = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        whole[:size, :size], whole[:size, size] = f.weight, f.shift
        start = torch.cat((u0, u0.new_ones(3, 1)), 1)
        expected = (start @ torch.linalg.matrix_exp(whole).T)[:, :size]
    torch.testing.assert_close(u1.detach(), expected, rtol=1e-6, atol=1e-7)
