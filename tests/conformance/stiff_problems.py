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


# High irradiance responses; the test set for initial value problems.
HIRES_START = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.0057], dtype=torch.float64)
HIRES_AT_321 = torch.tensor(
    [
        *(0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4),
        *(0.1175651343283149e-2, 0.2386356198831331e-2, 0.6238968252742796e-2),
        *(0.2849998395185769e-2, 0.2850001604814231e-2),
    ],
    dtype=torch.float64,
)


def orego(t: Tensor, y: Tensor) -> Tensor:
    """The Oregonator of the Belousov-Zhabotinskii reaction; the same test set."""
    a, b, c = y
    return torch.stack(
        (
            77.27 * (b + a * (1 - 8.375e-6 * a - b)),
            (c - (1 + a) * b) / 77.27,
            0.161 * (a - c),
        )
    )


OREGO_START = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
OREGO_AT_360 = torch.tensor(
    [0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3], dtype=torch.float64
)

_POLLU_RATES = torch.tensor(
    [
        *(0.35, 0.266e2, 0.123e5, 0.86e-3, 0.82e-3, 0.15e5, 0.13e-3, 0.24e5, 0.165e5, 0.9e4),
        *(0.22e-1, 0.12e5, 0.188e1, 0.163e5, 0.48e7, 0.35e-3, 0.175e-1, 0.1e9, 0.444e12, 0.124e4),
        *(0.21e1, 0.578e1, 0.474e-1, 0.178e4, 0.312e1),
    ],
    dtype=torch.float64,
)
# The species that each of the 25 reactions takes, and what it leaves, counted from one.
_POLLU_TAKES = (
    *((1,), (2, 4), (5, 2), (7,), (7,), (7, 6), (9,), (9, 6), (11, 2), (11, 1), (13,), (10, 2)),
    *((14,), (1, 6), (3,), (4,), (4,), (16,), (16,), (17, 6), (19,), (19,), (1, 4), (19, 1)),
    (20,),
)
_POLLU_LEAVES = (
    *((2, 3), (1,), (6, 1), (5, 5, 8), (8,), (5, 8), (5, 8, 10), (11,), (1, 10, 12), (13,)),
    *((11, 1), (14, 1), (7, 5), (15,), (4,), (16,), (3,), (6, 6), (3,), (5, 18), (2,), (1, 3)),
    *((19,), (20,), (1, 19)),
)


def _pollu_balance() -> Tensor:
    balance = torch.zeros(20, 25, dtype=torch.float64)
    for j, (taken, left) in enumerate(zip(_POLLU_TAKES, _POLLU_LEAVES, strict=True)):
        for i in taken:
            balance[i - 1, j] -= 1
        for i in left:
            balance[i - 1, j] += 1
    return balance


_POLLU_BALANCE = _pollu_balance()
_POLLU_FIRST = torch.tensor([taken[0] - 1 for taken in _POLLU_TAKES])
# A reaction of one species is multiplied by an entry that is always 1.
_POLLU_SECOND = torch.tensor([(*taken, 21)[1] - 1 for taken in _POLLU_TAKES])


def pollu(t: Tensor, y: Tensor) -> Tensor:
    """Air pollution: 20 species and 25 reactions; the same test set."""
    extended = torch.cat((y, y.new_ones(1)))
    return _POLLU_BALANCE @ (_POLLU_RATES * y[_POLLU_FIRST] * extended[_POLLU_SECOND])


POLLU_START = torch.zeros(20, dtype=torch.float64)
POLLU_START[[1, 3, 6, 7, 8, 16]] = torch.tensor(
    [0.2, 0.04, 0.1, 0.3, 0.01, 0.007], dtype=torch.float64
)
POLLU_AT_60 = torch.tensor(
    [
        *(0.5646255480022769e-1, 0.1342484130422339, 0.4139734331099427e-8),
        *(0.5523140207484359e-2, 0.2018977262302196e-6, 0.1464541863493966e-6),
        *(0.7784249118997964e-1, 0.3245075353396018, 0.7494013383880406e-2),
        *(0.1622293157301561e-7, 0.1135863833257075e-7, 0.2230505975721359e-2),
        *(0.2087162882798630e-3, 0.1396921016840158e-4, 0.8964884856898295e-2),
        *(0.4352846369330103e-17, 0.6899219696263405e-2, 0.1007803037365946e-3),
        *(0.1772146513969984e-5, 0.5682943292316392e-4),
    ],
    dtype=torch.float64,
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
