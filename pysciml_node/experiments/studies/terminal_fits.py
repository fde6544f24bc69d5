"""Fields fitted to the end of a flow: the tasks of `examples/simplest_ode.py` and their descent."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.optim import VarianceCorrected

BLOWN_UP = 1e6


class LinearField(nn.Module):
    """`u' = A u`."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """`A u` for rows `u`."""
        return u @ self.matrix.T


class NetworkField(nn.Module):
    """A tanh network with one hidden layer."""

    def __init__(self, generator: torch.Generator, hidden: int, spread: float) -> None:
        super().__init__()
        self.into = nn.Parameter(normal(hidden, 2, generator=generator) / math.sqrt(2.0))
        self.bias = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
        self.out = nn.Parameter(spread * normal(2, hidden, generator=generator))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Its value; autonomous."""
        return torch.tanh(u @ self.into.T + self.bias) @ self.out.T


def pendulum(t: Tensor, u: Tensor) -> Tensor:
    """The damped pendulum, `angle'' = -sin(angle) - 0.1 angle'`."""
    angle, speed = u.unbind(dim=1)
    return torch.stack([speed, -torch.sin(angle) - 0.1 * speed], dim=1)


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal entries in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class Task:
    """A field to fit to terminal states; `closure` gives the loss `E|x_t - y|^2 / 2`."""

    field: nn.Module
    truth: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    horizon: float
    tolerance: float = 1e-5
    scale: float = field(init=False)
    solves: int = 0

    def __post_init__(self) -> None:
        # A field that needs ten times the steps of a good one has blown up for our purpose.
        loose = self.tolerance > 1e-6
        algorithm, max_steps = (psn.Tsit5(), 100) if loose else (psn.Vern7(), 500)
        options: dict[str, Any] = {"rtol": self.tolerance, "atol": self.tolerance}
        options["max_steps"] = max_steps
        span = (0.0, self.horizon)
        with torch.no_grad():
            self.y = psn.NeuralODE(self.truth, algorithm, span, **options)(self.x0).u1
        self.node = psn.NeuralODE(self.field, algorithm, span, **options)
        self.scale = float(self.y.square().sum(dim=1).mean()) / 2.0

    def closure(self) -> tuple[Tensor, psn.Solution]:
        """Solve, count it, and compare."""
        self.solves += 1
        sol = self.node(self.x0)
        return (sol.u1 - self.y).square().sum(dim=1).mean() / 2.0, sol


def scalar_task(start: float, target: float, horizon: float) -> Task:
    """`x' = start x`, to become `x' = target x`."""
    x0 = normal(32, 1, generator=torch.Generator().manual_seed(0))
    student, truth = (LinearField(torch.full((1, 1), a).double()) for a in (start, target))
    return Task(student, truth, x0, horizon, tolerance=1e-8)


def linear_task(dimension: int, horizon: float, seed: int, spread: float = 0.5, **kw: Any) -> Task:
    """Start and truth are independent Gaussian matrices of spectral radius about `spread`, 0.5."""
    generator = torch.Generator().manual_seed(1000 * seed + dimension)
    start, truth = (normal(dimension, dimension, generator=generator) for _ in range(2))
    x0 = normal(4 * dimension, dimension, generator=generator)
    size = math.sqrt(dimension)
    fields = LinearField(spread * start / size), LinearField(0.5 * truth / size)
    return Task(*fields, x0, horizon, **kw)


def network_task(
    horizon: float,
    seed: int,
    *,
    hidden: int = 16,
    samples: int = 64,
    spread: float = 0.1,
    tolerance: float = 1e-5,
) -> Task:
    """A network for the pendulum; `spread` is the scale of its last layer at the start."""
    generator = torch.Generator().manual_seed(seed)
    student = NetworkField(generator, hidden, spread)
    x0 = normal(samples, 2, generator=generator)
    return Task(student, pendulum, x0, horizon, tolerance)


def straight_line_of_flows(task: Task, samples: int = 2001) -> bool:
    r"""Whether a linear task's end-point map can go straight from the start to the truth.

    Gauss-Newton with a small step moves the end-point map along the segment from `exp(A_0 t)` to
    `exp(A* t)`. Each of its points is the map of a real field near the last one as long as no
    eigenvalue meets the negative half-line, where the principal logarithm ends; and the start has
    to lie in its range, `|Im lambda(A_0) t| < pi`. A start of zero always qualifies.
    """
    start, truth = (
        task.horizon * module.matrix.detach()
        for module in (task.field, task.truth)
        if isinstance(module, LinearField)
    )
    if float(torch.linalg.eigvals(start).imag.abs().max()) >= math.pi:
        return False
    first, last = torch.matrix_exp(start), torch.matrix_exp(truth)
    near = torch.logspace(-8, 0, samples, dtype=torch.float64)
    along = torch.cat([near, 1.0 - near])[:, None, None]
    values = torch.linalg.eigvals(last + along * (first - last))
    real = values.imag.abs() <= 1e-12 * values.abs()
    return not bool((real & (values.real <= 0.0)).any())


@dataclass(frozen=True)
class Run:
    """One descent. `losses` are relative to `E|y|^2 / 2`; `seconds` are of the processor."""

    losses: list[float]
    seconds: float
    solves: int
    reached: bool


def descend(task: Task, optimizer: torch.optim.Optimizer, target: float, iterations: int) -> Run:
    """Step until the relative loss is below `target`, the flow blows up or the iterations end."""

    def standard() -> Tensor:
        optimizer.zero_grad()
        loss, _ = task.closure()
        torch.autograd.backward(loss)
        return loss

    closure: Any = task.closure if isinstance(optimizer, VarianceCorrected) else standard
    losses: list[float] = []
    started = time.process_time()
    for _ in range(iterations):
        try:
            loss = float(torch.as_tensor(optimizer.step(closure)).detach()) / task.scale
        except psn.SolverFailure:
            losses.append(BLOWN_UP)
            break
        losses.append(min(loss, BLOWN_UP) if loss == loss else BLOWN_UP)
        if losses[-1] >= BLOWN_UP or loss < target:
            break
    seconds = time.process_time() - started
    return Run(losses, seconds, task.solves, bool(losses) and losses[-1] < target)


def asymptotic_rate(losses: Sequence[float], steps: int = 6) -> float:
    """Mean of `log(L_k / L_{k+1})` over the last steps."""
    tail = losses[-steps - 1 :]
    return math.log(tail[0] / tail[-1]) / (len(tail) - 1) if len(tail) > 1 else math.nan
