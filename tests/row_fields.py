"""Fields of batches whose rows depend on none of each other, and others, with what solves give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pysciml_node as psn

D = torch.float64
BATCH = 12


class Field(nn.Module):
    """A function of the module itself, the time and the state."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(5)
        shapes = {"w": (7, 3), "v": (3, 7), "b": (7,), "own": (BATCH, 3), "turn": (7, BATCH)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=D) / 2))

    def forward(self, t: Tensor, u: Any) -> Any:
        return self.function(self, t, u)


def net(m: Any, t: Tensor, u: Tensor) -> Tensor:
    hidden = torch.tanh(u @ m.w.T + m.b * t)
    return (hidden * hidden + torch.sigmoid(hidden)) @ m.v.T


def context(m: Any, t: Tensor, u: Tensor) -> Tensor:
    """Parameters, and what is known of them beforehand, with entries of their own for each row."""
    factors = torch.tanh(m.own @ m.w.T)
    return (torch.tanh(u @ m.w.T) * factors) @ m.v.T + torch.cat([u[:, 1:], m.own[:, :1]], 1)


def joined(m: Any, t: Tensor, u: Tensor) -> Tensor:
    x = torch.cat([u[:, :1], t.expand(BATCH, 1), torch.ones_like(u[:, :1])], 1)
    return F.elu(F.linear(x, m.w, m.b)) @ m.v.T


def normalized(m: Any, t: Tensor, u: Tensor) -> Tensor:
    hidden = u @ m.w.T
    shares = torch.softmax(hidden, 1) + F.layer_norm(hidden, (7,), m.b, m.b)
    return (shares / (1 + hidden.norm(dim=1, keepdim=True)) + hidden.amax(1, keepdim=True)) @ m.v.T


def stacked(m: Any, t: Tensor, u: Tensor) -> Tensor:
    """Values whose rows are not in front."""
    both = torch.stack([u, u.sin()])
    last = torch.stack([u, u.cos()], 2)
    return both.sum(0) + (both * both)[1] + last.prod(2) + both.transpose(0, 1).flatten(1)[:, 1:4]


def turned(m: Any, t: Tensor, u: Tensor) -> Tensor:
    columns = u.T * torch.linspace(0.5, 1.5, 3, dtype=D)[:, None]
    return columns.T.tanh() + u.flip(1) + u[:, [2, 0, 0]] + F.pad(u, (1, 0))[:, :3]


def attention(m: Any, t: Tensor, u: Tensor) -> Tensor:
    heads = torch.tanh(u @ m.w.T)[:, :6].reshape(BATCH, 3, 2)
    mixed = torch.softmax(heads @ heads.transpose(1, 2), -1) @ heads
    return mixed.sum(2) + (heads @ m.w[:2, :2]).mean(2)


def convolved(m: Any, t: Tensor, u: Tensor) -> Tensor:
    return F.conv1d(u[:, None], m.w[:2].reshape(2, 1, 3), padding=1).tanh().sum(1)


def parts(m: Any, t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
    x, size = u["x"], u["size"]
    return {"x": net(m, t, x) * size[:, None], "size": x.square().sum(1) - size}


def centred(m: Any, t: Tensor, u: Tensor) -> Tensor:
    return net(m, t, u - u.mean(0))


def coupled(m: Any, t: Tensor, u: Tensor) -> Tensor:
    return torch.softmax(u @ u.T, 1) @ u


def rolled(m: Any, t: Tensor, u: Tensor) -> Tensor:
    return u.roll(1, 0) - u + u[3] * t


def both_ways(m: Any, t: Tensor, u: Tensor) -> Tensor:
    """A parameter that is read by rows, and whole."""
    return u * m.own + (m.own * t).sum(0)


def known(m: Any, t: Tensor, u: Tensor) -> Tensor:
    """The same, but that the sum is known beforehand."""
    return u * m.own + m.own.sum(0) * t


def mixed(m: Any, t: Tensor, u: Tensor) -> Tensor:
    return torch.tanh(u @ m.w.T + (m.turn @ u).mean(1)) @ m.v.T


ALONE = (net, context, known, joined, normalized, stacked, turned, attention, convolved, parts)
TOGETHER = (centred, coupled, rolled, both_ways, mixed)


def start(function: Any, batch: int = BATCH) -> Any:
    x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(2), dtype=D)
    return {"x": x, "size": x.square().sum(1) / 4} if function is parts else x


def outcome(field: nn.Module, u0: Any, compile: bool) -> list[Tensor]:
    """States of a solve, and gradients to the start, the times and the parameters."""
    names = sorted(u0) if isinstance(u0, dict) else None
    leaves = [u0[name] for name in names] if names else [u0]
    leaves = [x.clone().requires_grad_() for x in leaves]
    t1 = torch.tensor(0.5, dtype=D, requires_grad=True)
    state = dict(zip(names, leaves, strict=True)) if names else leaves[0]
    solution = psn.solve(
        psn.ODEProblem(field, state, (0.0, t1)), psn.DP5(), dt0=0.125,
        controller=psn.FixedStep(), saveat=[0.2, 0.5], compile=compile, engine="torch",
    )  # fmt: skip
    saved = [solution.u[name] for name in names] if names else [solution.u]
    loss = torch.stack([(x.sin() * x).sum() for x in saved]).sum()
    inputs = [*leaves, t1, *field.parameters()]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*saved, *gradients]
