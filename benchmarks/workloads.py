"""The problems that are timed, with a reference solution for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


class SpiralField(nn.Module):
    """`MLP(y**3)`, 2-50-2 with tanh: the field of torchdiffeq's spiral demo."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(2, 50)
        self.second = nn.Linear(50, 2)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=0.1, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the derivative at `y`, shape `(B, 2)`."""
        out: Tensor = self.second(torch.tanh(self.first(y**3)))
        return out


class TimeField(nn.Module):
    """`tanh(W2 [tanh(W1 [x, t]), t])`, 784-100-784: the field of the MNIST experiments.

    Reference: A. Pal, A. Edelman, C. Rackauckas, Locally regularized neural differential equations,
    ICML 2023.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(785, 100)
        self.second = nn.Linear(101, 784)
        for layer in (self.first, self.second):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate the derivative at `x`, shape `(B, 784)`, and `t`, shape `()` or `(B,)`."""
        time = t.reshape(-1, 1).expand(x.shape[0], 1).to(x)
        hidden = torch.tanh(self.first(torch.cat([x, time], 1)))
        return torch.tanh(self.second(torch.cat([hidden, time], 1)))


class PreyField(nn.Module):
    """`(1.3 x, -1.8 y) + net(x, y) / 10`, 2-5-5-2 with tanh: a universal differential equation.

    Reference: C. Rackauckas et al., Universal differential equations for scientific machine
    learning, arXiv:2001.04385.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        for layer in (self.first, self.second, self.third):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        self.register_buffer("rates", torch.tensor([1.3, -1.8]))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative at `u`, shape `(B, 2)`."""
        hidden = torch.tanh(self.second(torch.tanh(self.first(u))))
        out: Tensor = self.rates * u + 0.1 * self.third(hidden)
        return out


@dataclass
class Workload:
    """A field, an initial value, and what is asked of the solver.

    Attributes:
        field: the derivative, `(t, u) -> du`, with parameters `(W1, b1, W2, b2, ...)`.
        u0: initial state `(B, D)`.
        times: output times, the start included.
        tolerance: relative and absolute.
        cotangent: weights of the scalar `sum(cotangent * outputs)` that is differentiated, shape
            `(len(times) - 1, B, D)`: the initial value is not counted.
        reference_steps: fixed steps between two outputs for the reference.
    """

    name: str
    description: str
    field: SpiralField | TimeField | PreyField
    u0: Tensor
    times: list[float]
    tolerance: float
    cotangent: Tensor
    reference_steps: int

    @property
    def parameters(self) -> list[Tensor]:
        """`W1, b1, W2, b2, ...`."""
        return list(self.field.parameters())


def _rk4(
    f: Callable[[Tensor, Tensor], Tensor], u: Tensor, times: Sequence[float], steps: int
) -> Tensor:
    """The classical method, `steps` equal steps between two outputs; `(len(times) - 1, ...)`."""
    outputs = []
    for start, end in pairwise(times):
        h = (end - start) / steps
        for i in range(steps):
            t = torch.tensor(start + i * h, dtype=u.dtype)
            k1 = f(t, u)
            k2 = f(t + h / 2, u + h / 2 * k1)
            k3 = f(t + h / 2, u + h / 2 * k2)
            k4 = f(t + h, u + h * k3)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        outputs.append(u)
    return torch.stack(outputs)


def reference(workload: Workload) -> tuple[Tensor, list[Tensor]]:
    """Outputs and gradient (of `u0` and the parameters) in float64, by a method no peer uses."""
    field = type(workload.field)(torch.Generator()).double()
    field.load_state_dict(workload.field.state_dict())
    u0 = workload.u0.to(torch.float64, copy=True).requires_grad_()
    outputs = _rk4(field, u0, workload.times, workload.reference_steps)
    leaves = [u0, *field.parameters()]
    gradient = torch.autograd.grad((outputs * workload.cotangent.double()).sum(), leaves)
    return outputs.detach(), list(gradient)


def _true_spiral(t: Tensor, y: Tensor) -> Tensor:
    return y**3 @ torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=y.dtype)


def _spiral_data(generator: torch.Generator, batch: int = 20) -> Tensor:
    """States on the true spiral, 1000 times in [0, 25], of which `batch` are drawn."""
    grid = torch.linspace(0, 25, 1000, dtype=torch.float64).tolist()
    start = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    path = torch.cat([start[None], _rk4(_true_spiral, start, grid, 4)])
    chosen = torch.randperm(len(grid) - 10, generator=generator)[:batch]
    return path[chosen, 0].float()


def _fit(field: SpiralField, generator: torch.Generator, steps: int = 300) -> None:
    """Regress the field on the true derivative around the spiral: what a training ends with."""
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    states = _spiral_data(generator, 990)
    for _ in range(steps):
        y = states + 0.05 * torch.randn(states.shape, generator=generator)
        loss = (field(y, y) - _true_spiral(y, y)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def spiral(fitted: bool) -> Workload:
    """torchdiffeq's spiral demo: 20 states, the first 10 of 1000 times in [0, 25]."""
    generator = torch.Generator().manual_seed(0)
    field = SpiralField(generator)
    if fitted:
        _fit(field, generator)
    return Workload(
        name="spiral-fitted" if fitted else "spiral",
        description="torchdiffeq's spiral demo, 2-50-2 tanh MLP of y**3, "
        + ("weights fitted to the true field" if fitted else "weights as it starts")
        + ", batch 20, 10 output times, tolerance 1e-6",
        field=field,
        u0=_spiral_data(generator),
        times=torch.linspace(0, 25, 1000)[:10].tolist(),
        tolerance=1e-6,
        cotangent=torch.randn(9, 20, 2, generator=generator),
        reference_steps=20,
    )


def mnist(batch: int = 512) -> Workload:
    """The 784-100-784 field with time, one output at the end."""
    generator = torch.Generator().manual_seed(0)
    return Workload(
        name="mnist",
        description=f"784-100-784 tanh MLP with time, batch {batch}, tspan (0, 1), tolerance 1e-5",
        field=TimeField(generator),
        u0=torch.rand(batch, 784, generator=generator),
        times=[0.0, 1.0],
        tolerance=1e-5,
        cotangent=torch.randn(1, batch, 784, generator=generator),
        reference_steps=24,
    )


def lotka_volterra() -> Workload:
    """One trajectory of two species, 31 output times, in float64."""
    generator = torch.Generator().manual_seed(0)
    return Workload(
        name="lotka-volterra",
        description="growth and decay with a 2-5-5-2 tanh MLP, one trajectory, 31 output times in "
        "[0, 3], tolerance 1e-6, float64",
        field=PreyField(generator).double(),
        u0=torch.tensor([[0.44249296, 4.6280594]], dtype=torch.float64),
        times=torch.linspace(0, 3, 31, dtype=torch.float64).tolist(),
        tolerance=1e-6,
        cotangent=torch.randn(30, 1, 2, generator=generator, dtype=torch.float64),
        reference_steps=20,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "spiral": lambda: spiral(fitted=False),
    "spiral-fitted": lambda: spiral(fitted=True),
    "lotka-volterra": lotka_volterra,
    "mnist": mnist,
}
