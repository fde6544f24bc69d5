"""Native code of every operation: value and pullback beside torch's, in one fixed step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vocabulary import GROUPS, Vocabulary

import pysciml_node as psn
from pysciml_node.problems.state import StateSpec
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.operations import OPERATIONS
from pysciml_node.translation.export import translate

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64


class Field(nn.Module):
    """A function of the module itself, the time and the state."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(7)
        for name, part in parts.items():
            setattr(self, name, part)
        for x in self.parameters():
            x.data = torch.randn(x.shape, generator=generator, dtype=D) * 0.6

    def forward(self, t: Tensor, u: Any) -> Any:
        return self.function(self, t, u)


def state(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=D)


def smooth(m: Any, t: Tensor, u: Tensor) -> Tensor:
    """Functions entry by entry, at arguments where all of them are smooth."""
    a = 0.2 + u * u
    return (
        torch.tanh(u) + torch.sigmoid(2 * u) + torch.exp(-a) + torch.expm1(u) + torch.sqrt(a)
        + torch.rsqrt(a) + 1 / a + u**3 + torch.sin(3 * u) + torch.cos(u * t) + torch.log(a)
        + torch.log1p(a) + torch.erf(u) + F.silu(u) + F.gelu(u) + F.gelu(u, approximate="tanh")
        + F.softplus(u) + F.softplus(u, beta=3.0, threshold=1.0) + F.mish(u) + F.logsigmoid(u)
        + a**1.7 + 1.3**u
    )  # fmt: skip


def kinked(m: Any, t: Tensor, u: Tensor) -> Tensor:
    return (
        torch.relu(u) + F.leaky_relu(u, 0.2) + F.elu(u, 1.3) + F.selu(u) + u.abs()
        + torch.clamp(u, -0.5, 0.7) + torch.clamp(u, min=0.1) + F.relu6(3 * u)
        + torch.maximum(u, m.row) * torch.minimum(u, m.column) + torch.maximum(u, u)
    )  # fmt: skip


def broadcast(m: Any, t: Tensor, u: Tensor) -> Tensor:
    row, column = torch.sigmoid(m.row), torch.exp(m.column)
    return (u * row + t) / column - u.abs().add(1.0) ** row + column * row - (m.row / column) * t


def sums(m: Any, t: Tensor, u: Tensor) -> Tensor:
    v = torch.stack([u, u * u], 1)
    return (
        u.sum() * u.mean(0) + u.sum(1, keepdim=True) * u + u / (1 + u.norm(dim=-1, keepdim=True))
        + v.mean((0, 2)).sum() + v.sum(1)
    )  # fmt: skip


def moved(m: Any, t: Tensor, u: Tensor) -> Tensor:
    joined = torch.cat([u, t.expand(4, 1), u[:, 1:2], torch.ones_like(u[:, :2])], 1)
    turned = joined.T.reshape(-1)[:12].reshape(4, 3) * u.unbind(0)[2]
    return turned + torch.stack(u.unbind(0)[::-1]) + u.t().contiguous().reshape(4, 3) * 0.5


def products(m: Any, t: Tensor, u: Tensor) -> Tensor:
    hidden = torch.tanh(m.first(torch.cat([u, t.expand(u.shape[0], 1)], 1)))
    hidden = torch.sigmoid(m.second(torch.cat([hidden, torch.ones_like(hidden[:, :1]) * t, u], 1)))
    gram = u @ u.T @ u
    return m.third(torch.relu(m.wide(hidden))) + 0.1 * gram + u @ (m.a @ m.a.T) + m.a @ u[0]


def stacked(m: Any, t: Tensor, u: Tensor) -> Tensor:
    heads = u.reshape(2, 2, 3)
    scores = torch.bmm(heads, heads.transpose(1, 2))
    return (torch.matmul(scores, heads) + torch.matmul(heads, m.a) @ m.a).reshape(4, 3)


FIELDS: dict[str, tuple[nn.Module, Any]] = {
    "smooth": (Field(smooth), state(4, 5)),
    "smooth, few": (Field(smooth), state(3)),
    "kinked": (
        Field(kinked, row=nn.Parameter(torch.ones(5)), column=nn.Parameter(torch.ones(4, 1))),
        state(4, 5),
    ),
    "broadcast": (
        Field(broadcast, row=nn.Parameter(torch.ones(5)), column=nn.Parameter(torch.ones(4, 1))),
        state(4, 5),
    ),
    "sums": (Field(sums), state(4, 3)),
    "moved": (Field(moved), state(4, 3)),
    "products": (
        Field(
            products,
            first=nn.Linear(4, 21),
            second=nn.Linear(25, 7),
            wide=nn.Linear(7, 130),
            third=nn.Linear(130, 3, bias=False),
            a=nn.Parameter(torch.ones(3, 3)),
        ),
        state(6, 3),
    ),
    "stacked": (Field(stacked, a=nn.Parameter(torch.ones(3, 3))), state(4, 3)),
    "convolutions": (
        Field(
            lambda m, t, u: m.back(torch.tanh(m.norm(m.c(u)))) + m.group(u) * t,
            c=nn.Conv2d(4, 6, 3, padding=1),
            norm=nn.GroupNorm(2, 6),
            back=nn.Conv2d(6, 4, (1, 3), padding=(0, 1)),
            group=nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        ),
        state(2, 4, 5, 7),
    ),
    "strides": (
        Field(
            lambda m, t, u: m.c(u).reshape(2, 3, 4),
            c=nn.Conv1d(3, 6, 3, stride=2, padding=1),
        ),
        state(2, 3, 4),
    ),
    "normalizations": (
        Field(
            lambda m, t, u: m.layer(u) + m.plain(u) * m.batch(u),
            layer=nn.LayerNorm(5),
            plain=nn.LayerNorm(5, elementwise_affine=False),
            batch=nn.BatchNorm1d(5),
        )
        .double()
        .eval(),
        state(4, 5),
    ),
    "one number": (Field(lambda m, t, u: torch.sin(u * t) - u), state(1)),
    "constant": (
        Field(lambda m, t, u: torch.ones_like(u) * m.a, a=nn.Parameter(torch.ones(3))),
        state(2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", FIELDS)
def test_values_and_pullbacks(name: str, dtype: torch.dtype) -> None:
    field, start = FIELDS[name]
    field = field.to(dtype)
    found = []
    for compile in (True, False):
        u0, t0 = start.to(dtype).requires_grad_(), torch.tensor(0.1, dtype=dtype).requires_grad_()
        options = {"controller": psn.FixedStep(), "dt0": 0.02, "compile": compile}
        problem = psn.ODEProblem(field, u0, (t0, 0.14))
        end = psn.solve(problem, psn.Midpoint(), **options).u1
        weights = torch.linspace(-1.0, 2.0, end.numel(), dtype=dtype).reshape(end.shape)
        inputs = [u0, t0, *field.parameters()]
        bars = torch.autograd.grad((end * weights).sum(), inputs, allow_unused=True)
        zeros = [
            torch.zeros_like(x) if bar is None else bar for x, bar in zip(inputs, bars, strict=True)
        ]
        found.append([end.detach(), *zeros])
    bound = 1e-12 if dtype is D else 2e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * (1 + float(other.abs().max()))
        )


def test_the_fields_above_have_every_operation() -> None:
    used: set[str] = set()
    for field, start in FIELDS.values():
        program = translate(field.to(D), StateSpec.of(start)).program
        used |= {step.op for step in program.operations}
        used |= {step.attributes.get("activation", "identity") for step in program.operations}
    for names in GROUPS:
        vocabulary = Vocabulary(names).to(D)
        program = translate(vocabulary, StateSpec.of(vocabulary.state(D))).program
        used |= {step.op for step in program.operations}
    assert not set(OPERATIONS) - used


def test_functions_of_a_matrix_times_the_state_have_all_rows() -> None:
    """Where no entry is negative, `relu(A u)` is `A u`, and the flow is `exp(t A)`."""
    a = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.2, 0.0], [0.0, 0.7, 0.4]], dtype=D)
    start = torch.tensor([1.0, 0.5, 2.0], dtype=D, requires_grad=True)
    matrix = a.clone().requires_grad_()
    problem = psn.ODEProblem(lambda t, u: torch.relu(matrix @ u), start, (0.0, 1.0))
    found = psn.solve(problem, rtol=1e-10, atol=1e-10, compile=True, engine="torch").u1
    exact = torch.matrix_exp(matrix) @ start
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=0)
    gradients = (torch.autograd.grad(x.square().sum(), (start, matrix)) for x in (found, exact))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=0)
