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


def solve_linear(a: Tensor, x0: Tensor, t: float) -> Flow:
    u1 = x0 * torch.exp(a * t) if a.ndim == 0 else x0 @ torch.linalg.matrix_exp(a * t).T
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
