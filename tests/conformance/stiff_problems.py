"""Stiff problems with published reference solutions, and a stiff network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def robertson(t: Tensor, y: Tensor) -> Tensor:
    """Robertson (1966): rates that differ by nine orders."""
    a, b, c = y
    return torch.stack((-0.04 * a + 1e4 * b * c, 0.04 * a - 1e4 * b * c - 3e7 * b**2, 3e7 * b**2))


# Hairer and Wanner, Solving Ordinary Differential Equations II, IV.1.
ROBERTSON_START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
ROBERTSON_AT_40 = torch.tensor([0.7158270688, 0.9185534765e-5, 0.2841637457], dtype=torch.float64)


def hires(t: Tensor, y: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h = y
    return torch.stack(
        (
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            280 * f * h - 1.81 * g,
            -280 * f * h + 1.81 * g,
        )
    )


class StiffNetwork(nn.Module):
    """A learned field behind a fast linear decay."""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("rates", torch.tensor([-1.0, -2000.0]))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return u * self.rates + self.net(u)
