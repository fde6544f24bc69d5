"""Small networks for stochastic equations, and solves of them whose graphs may be kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
KEPT, REPLAYED, DIRECT = psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0), psn.DirectAdjoint()
Function = Callable[[Tensor, Tensor], Tensor]


class Nets(nn.Module):
    """Small networks, for any noise."""

    def __init__(self, noise: str = "diagonal") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise_type, self.sde_type = noise, "ito"
        self.first, self.second = nn.Linear(3, 5, dtype=D), nn.Linear(5, 3, dtype=D)
        columns = {"general": 2, "additive": 2}.get(noise, 1)
        self.mixing = nn.Parameter(torch.randn(3, columns, dtype=D) / 3)
        if noise in ("diagonal", "scalar"):
            self.mixing = nn.Parameter(torch.randn(3, dtype=D) / 3)

    def f(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(u) + torch.sin(5 * t)))
        return out

    def g(self, t: Tensor, u: Tensor) -> Tensor:
        if self.noise_type == "additive":
            return ((1 + t) * self.mixing).expand(len(u), 3, 2)
        size = torch.sin(u + t)
        return size * self.mixing if self.mixing.ndim == 1 else size.unsqueeze(-1) * self.mixing

    def h(self, t: Tensor, u: Tensor) -> Tensor:
        return -u


def start() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_()


FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.11}
ADAPTIVE: dict[str, Any] = {"rtol": 0.05, "atol": 0.05}


def solve(
    f: Function,
    g: Function,
    u0: Tensor,
    adjoint: Any,
    algorithm: Any = None,
    noise: Any = "diagonal",
    **options: Any,
) -> psn.Solution:
    algorithm = psn.EM() if algorithm is None else algorithm
    reading: Any = "ito" if "ito" in algorithm.interpretations else "stratonovich"
    problem = psn.SDEProblem(f, g, u0, (0.0, 1.0), noise=noise, interpretation=reading)
    return psn.solve(
        problem,
        algorithm,
        adjoint=adjoint,
        engine="torch",
        generator=torch.Generator().manual_seed(3),
        **(options or FIXED),
    )


def expect_close(one: list[Tensor], other: list[Tensor]) -> None:
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


class Counting(nn.Module):
    """Keeps weak references to what its graphs save for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=D))
        self.held: list[weakref.ref[Tensor]] = []

    def f(self, t: Tensor, u: Tensor) -> Tensor:
        saved = torch.ones(1, dtype=D)
        self.held.append(weakref.ref(saved))
        out: Tensor = self.weight * torch.cos(3 * u) * saved
        return out

    def g(self, t: Tensor, u: Tensor) -> Tensor:
        return self.weight * torch.sin(9 * u)

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.held)
