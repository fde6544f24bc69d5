"""Linear systems of implicit steps: solutions, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pysciml_node.replay.linearization import lu_solver


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    return lu_solver(matrix)(right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "many"])
def test_solutions_and_their_derivatives(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    seeded = torch.Generator().manual_seed(0)
    matrix = torch.randn(*batch, 2, 2, generator=seeded, dtype=dtype, requires_grad=True)
    right = torch.randn(*batch, 2, generator=seeded, dtype=dtype, requires_grad=True)
    expected = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(solved(matrix, right), expected)
    torch.testing.assert_close(solved(matrix.detach(), right), expected)
    assert gradcheck(solved, (matrix, right), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solved, (matrix, right))


def test_transforms_of_functions() -> None:
    seeded = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 2, 2, generator=seeded, dtype=torch.float64)
    right = torch.randn(2, generator=seeded, dtype=torch.float64)

    def inverted(matrix: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.inv(matrix) @ right

    def curvature(solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        hessian = torch.func.hessian(lambda x: solve(x, right).square().sum())
        return torch.vmap(hessian)(matrix)

    torch.testing.assert_close(curvature(solved), curvature(inverted))
