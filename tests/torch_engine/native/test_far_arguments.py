"""Functions far from zero, where exponentials leave the range of the numbers, and at zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pysciml_node as psn

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    functional.logsigmoid,
    functional.softplus,
    functional.elu,
    lambda u: functional.celu(u, 0.3),
    functional.selu,
    functional.silu,
    functional.mish,
    functional.gelu,
    torch.sinc,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", ACTIVATIONS)
def test_values_and_slopes_far_from_zero_and_at_zero_are_torchs(
    f: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    far = torch.tensor([1.0, 3.0, 30.0, 60.0, 120.0, 900.0], dtype=dtype)
    found = []
    for compile in (False, True):
        u0 = torch.cat((-far, torch.zeros(1, dtype=dtype), far)).requires_grad_()
        # One step of Euler's method from u is u + f(u).
        problem = psn.ODEProblem(lambda t, u: f(u), u0, (0.0, 1.0))
        fixed = {"dt0": 1.0, "controller": psn.FixedStep()}
        end = psn.solve(problem, psn.Euler(), compile=compile, **fixed).u1
        found.append((end.detach() - u0.detach(), *torch.autograd.grad(end.sum(), u0)))
    for native, eager in zip(*found, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-6, atol=1e-6)
