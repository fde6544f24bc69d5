"""The problems that are timed, with a reference solution for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from fields import (
    FlowField,
    LatentField,
    PreyField,
    RobertsonField,
    SpiralField,
    TimeField,
    Twinned,
)
from torch import Tensor


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
        stiff: whether implicit methods take part too.
    """

    name: str
    description: str
    field: Twinned
    u0: Tensor
    times: list[float]
    tolerance: float
    cotangent: Tensor
    reference_steps: int
    stiff: bool = False

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


def robertson() -> Workload:
    """Three reacting species whose fastest decay sets the steps of every explicit method."""
    generator = torch.Generator().manual_seed(0)
    return Workload(
        name="robertson",
        description="Robertson's three reactions, of which the fastest decays at 2,000 a unit of "
        "time, to t = 0.05, tolerance 1e-8, float64: the steps of explicit methods are at the edge "
        "of stability",
        field=RobertsonField(generator).double(),
        u0=torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64),
        times=[0.0, 0.025, 0.05],
        tolerance=1e-8,
        cotangent=torch.randn(2, 1, 3, generator=generator, dtype=torch.float64),
        reference_steps=400,
        stiff=True,
    )


def moons() -> Workload:
    """A flow of two moons: 256 points with their log-determinants, by the exact trace."""
    from pysciml_node.data.plane import plane

    generator = torch.Generator().manual_seed(0)
    points = plane("two-moons", 256, generator=generator).x
    return Workload(
        name="moons",
        description="a continuous flow of two moons, 2-64-2 tanh MLP with time and its exact "
        "trace, batch 256, tspan (0, 1), tolerance 1e-5; `CNF` here, products inside the "
        "field elsewhere",
        field=FlowField(generator),
        u0=torch.cat([points, torch.zeros(256, 1)], 1),
        times=[0.0, 1.0],
        tolerance=1e-5,
        cotangent=torch.randn(1, 256, 3, generator=generator),
        reference_steps=40,
    )


def latent() -> Workload:
    """The equation between encoder and decoder of a latent ODE, at the times of observation."""
    generator = torch.Generator().manual_seed(0)
    return Workload(
        name="latent",
        description="what a latent ODE decodes: 4-20-20-4 ELU MLP, batch 64, 40 output times in "
        "[0, 3], tolerance 1e-5",
        field=LatentField(generator),
        u0=torch.randn(64, 4, generator=generator),
        times=torch.linspace(0, 3, 41).tolist(),
        tolerance=1e-5,
        cotangent=torch.randn(40, 64, 4, generator=generator),
        reference_steps=20,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "spiral": lambda: spiral(fitted=False),
    "spiral-fitted": lambda: spiral(fitted=True),
    "lotka-volterra": lotka_volterra,
    "robertson": robertson,
    "moons": moons,
    "latent": latent,
    "mnist": mnist,
}
