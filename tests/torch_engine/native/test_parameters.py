"""Which of a field's parameters native solves train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
