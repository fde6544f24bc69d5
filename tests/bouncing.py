"""What tests of events share: a ball that bounces, its closed form, a condition with weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def leaf(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=D, requires_grad=True)


class Level(nn.Module):
    """A neural condition of time and state: a level of a network."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        for x in self.net.parameters():
            x.data = torch.randn(x.shape, dtype=D, generator=generator)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat((t.reshape(1) / 3, u))) - self.level
        return out


def fall(t: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """Height and velocity under gravity."""
    return torch.stack((u[1], -g))


def bouncing(h: Tensor, g: Tensor, e: Tensor, end: float, **options: Any) -> psn.Solution:
    bounce = psn.Event(
        lambda t, u: u[0], direction=-1, affect=lambda t, u, p: torch.stack((u[0], -e * u[1]))
    )
    start = torch.stack((h, torch.zeros_like(h)))
    problem = psn.ODEProblem(fall, start, (0.0, end), p=g)
    return psn.solve(problem, events=bounce, **TIGHT | options)


def bounces(h: Tensor, g: Tensor, e: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Times of `n` bounces, and the velocity after the last."""
    times, speed = [torch.sqrt(2 * h / g)], torch.sqrt(2 * g * h) * e
    for _ in range(n - 1):
        times.append(times[-1] + 2 * speed / g)
        speed = speed * e
    return torch.stack(times), speed


def assert_twenty_bounces(**options: Any) -> None:
    """Times, end and gradients of a solve are those of the closed form."""
    h, g, e = leaf(2.0), leaf(9.81), leaf(0.9)
    solution = bouncing(h, g, e, 10.65, **options)
    times, speed = bounces(h, g, e, 20)
    assert [jump.event for jump in solution.jumps] == [0] * 20
    found = torch.stack([jump.t for jump in solution.jumps])
    torch.testing.assert_close(found, times, rtol=1e-10, atol=0)
    rest = 10.65 - times[-1]
    end = torch.stack((speed * rest - g * rest**2 / 2, speed - g * rest))
    torch.testing.assert_close(solution.u1, end, rtol=1e-8, atol=1e-9)
    weights = torch.tensor([1.0, -2.0], dtype=D)
    one = torch.autograd.grad(found.sum() + solution.u1 @ weights, (h, g, e))
    other = torch.autograd.grad(times.sum() + end @ weights, (h, g, e))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def assert_both_sides_of_a_jump(solution: psn.Solution) -> None:
    """Both are kept, and the later one counts."""
    (first, *_) = solution.jumps
    at = (solution.t == first.t).nonzero().flatten()
    assert len(at) == 2
    torch.testing.assert_close(solution.u[at[0]], first.before)
    torch.testing.assert_close(solution.u[at[1]], first.after)
    torch.testing.assert_close(solution(first.t), first.after, rtol=0, atol=1e-12)
    torch.testing.assert_close(solution(first.t - 1e-9)[1], first.before[1], rtol=1e-7, atol=0)
    assert solution.stats.naccept == len(solution.step_errors)
