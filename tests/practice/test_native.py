"""Native solves in the practice that other solves stand."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.utils.checkpoint import checkpoint

import pysciml_node as psn

D = torch.float64
A = torch.tensor([[-0.5, 1.0], [-1.0, -0.2]], dtype=D)
U0 = torch.tensor([1.0, 0.5], dtype=D)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(A.clone())

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.a @ u


def flow(u0: Tensor, field: nn.Module | None = None) -> psn.Solution:
    problem = psn.ODEProblem(field or Linear(), u0, (0.0, 1.0))
    return psn.solve(problem, rtol=1e-10, atol=1e-10, compile=True)


def test_the_jacobian_at_once() -> None:
    exact = torch.linalg.matrix_exp(A)
    found = jacobian(lambda u0: flow(u0).u1, U0, vectorize=True)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
    dense = jacobian(lambda u0: flow(u0)(0.5), U0, vectorize=True)
    torch.testing.assert_close(dense, torch.linalg.matrix_exp(A / 2), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    field, u0 = Linear(), U0.clone().requires_grad_()
    expected = torch.autograd.grad(flow(u0, field).u1.sum(), (u0, field.a))
    checkpoint(lambda u0: flow(u0, field).u1.sum(), u0, use_reentrant=reentrant).backward()
    torch.testing.assert_close(u0.grad, expected[0])
    torch.testing.assert_close(field.a.grad, expected[1])


def test_inference_mode_first() -> None:
    field = Linear()
    with torch.inference_mode():
        inside = flow(U0, field).u1
    outside = flow(U0.clone().requires_grad_(), field).u1
    outside.sum().backward()
    torch.testing.assert_close(inside, outside.detach(), rtol=0, atol=0)


def test_copies() -> None:
    solution = flow(U0.clone().requires_grad_())
    exact = torch.linalg.matrix_exp(A * 0.3) @ U0
    for found in (copy.deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        torch.testing.assert_close(found(0.3), exact, rtol=1e-8, atol=1e-8)


def test_what_native_code_does_not_have_is_refused_by_name() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(psn.CompileError, match="autocast"):
        flow(U0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"autocast|Jacobian|native"),
    ):
        psn.CNF(Linear(), event_shape=2, compile=True).log_prob(U0[None].float())
    assert math.isfinite(flow(U0).u1.sum().item())
