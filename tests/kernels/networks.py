"""The finite network whose infinite-width limit the kernels describe."""

import math

import torch
from torch import Tensor, nn


class WeightTied(nn.Module):
    """`h_0 = (su/sqrt d) U x`, `L` Euler steps of `h' = (sw/sqrt n) W phi(h)`, readout."""

    def __init__(self, d, n, steps, phi, generator, T=1.0, scales=(1.0, 1.0, 1.0), linear=False):
        super().__init__()

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.u, self.w, self.v = normal(n, d), normal(n, n), normal(n)
        self.phi, self.steps, self.linear = phi, steps, linear
        su, sw, sv = scales
        self.su, self.sv = su / math.sqrt(d), sv / math.sqrt(n)
        self.step = T / steps * sw / math.sqrt(n)

    def forward(self, x: Tensor) -> Tensor:
        h = self.su * x @ self.u.T
        for _ in range(self.steps):
            h = h + self.step * self.phi(h) @ self.w.T
        return self.sv * (h if self.linear else self.phi(h)) @ self.v


def inputs(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)
