"""Closed-form flows with the two attributes the optimizers read from a solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Paired = Callable[[], tuple[Tensor, "Flow"]]


@dataclass(frozen=True)
class Problem:
    tspan: tuple[float, float]


@dataclass(frozen=True)
class Flow:
    """`x' = a x` (a scalar or a matrix) solved exactly, `(B, 1)` or `(B, d)` at `t`."""

    u1: Tensor
    problem: Problem


def matrix_exponential(a: Tensor) -> Tensor:
    """Taylor series of `a / 64`, squared six times.

    The backward of `torch.linalg.matrix_exp` is the exponential of a block matrix that holds the
    cotangent: its relative error grows with the size of the cotangent, which hides invariances.
    """
    term = total = torch.eye(len(a), dtype=a.dtype)
    for order in range(1, 13):
        term = term @ a / (64.0 * order)
        total = total + term
    for _ in range(6):
        total = total @ total
    return total


def solve_linear(a: Tensor, x0: Tensor, t: float) -> Flow:
    u1 = x0 * torch.exp(a * t) if a.ndim == 0 else x0 @ matrix_exponential(a * t).T
    return Flow(u1, Problem((0.0, t)))


def paper_loss(x: Tensor, y: Tensor) -> Tensor:
    """`E|x - y|^2 / 2`: mean over the batch, sum over the state."""
    return 0.5 * (x - y).square().sum(dim=1).mean()


def linear_closure(a: Tensor, x0: Tensor, target: Tensor, t: float) -> Paired:
    y = solve_linear(target, x0, t).u1

    def closure() -> tuple[Tensor, Flow]:
        sol = solve_linear(a, x0, t)
        return paper_loss(sol.u1, y), sol

    return closure


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(value, dtype=dtype))
