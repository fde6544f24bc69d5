"""Fields that native code evaluates by some rows of a batch at a time, beside torch's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pysciml_node as psn
from pysciml_node.problems.state import StateSpec
from pysciml_node.torch_engine.native import emit
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.rows import by_rows, without_repetitions
from pysciml_node.translation.export import translate

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
BATCH, ROWS = 12, 4


@pytest.fixture(autouse=True)
def cut() -> Iterator[None]:
    """Four rows at a time, however small the field is."""
    with mock.patch.multiple(emit, _NEAR=0, _FEWEST_ROWS=2, _MOST_ROWS=5):
        yield


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


@pytest.mark.parametrize("function", [*ALONE, *TOGETHER])
def test_states_and_gradients_are_those_of_the_loop_in_python(function: Any) -> None:
    field, u0 = Field(function), start(function)
    for native, eager in zip(outcome(field, u0, True), outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [*ALONE, *TOGETHER])
def test_rows_are_taken_apart_where_none_depends_on_another(function: Any) -> None:
    u0 = start(function)
    translated = translate(Field(function), StateSpec.of(u0))
    rows = by_rows(translated.program, ROWS)
    assert (rows is not None) == (function in ALONE)


@pytest.mark.parametrize("function", ALONE)
def test_the_program_of_some_rows_has_the_values_of_these_rows(function: Any) -> None:
    field, u0 = Field(function), start(function)
    rows = by_rows(translate(field, StateSpec.of(u0)).program, ROWS)
    assert rows is not None
    if rows.held:  # these lie in the parameters of all rows, which torch cannot be told
        return
    some = {k: x[:ROWS] for k, x in u0.items()} if isinstance(u0, dict) else u0[:ROWS]
    pieces = [some[k] for k in u0] if isinstance(u0, dict) else [some]
    t, p = torch.tensor(0.3, dtype=D), torch.cat([x.reshape(-1) for x in parameters_of(field, u0)])
    value = field(t, u0)
    whole = [value[k] for k in u0] if isinstance(u0, dict) else [value]
    outputs = rows.program.evaluate(t, pieces, p)
    for given, all_rows in zip(outputs, whole, strict=True):
        torch.testing.assert_close(given.reshape(-1), all_rows[:ROWS].reshape(-1))


def parameters_of(field: nn.Module, u0: Any) -> list[Tensor]:
    return translate(field, StateSpec.of(u0)).parameters


def test_a_batch_of_a_prime_number_of_rows_is_taken_at_once() -> None:
    field, u0 = Field(net), start(net, 13)
    for native, eager in zip(outcome(field, u0, True), outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [20, 200, 2_000])
def test_values_of_some_rows_take_little_room_on_the_stack(width: int) -> None:
    """Threads have half a megabyte of it on some systems; longer rows are taken at once."""

    def wide(m: Any, t: Tensor, u: Tensor) -> Tensor:
        x = torch.tanh(u) * u
        return torch.sin(x) + torch.sigmoid(x * t)

    program = translate(Field(wide), StateSpec.of(torch.ones(BATCH, width, dtype=D))).program
    emitter, emitted = emit.whole_or_by_rows(program, D)
    assert (emitter.rows is not None) == (width < 2_000)
    rooms = [int(n) for n in re.findall(r"REAL s\[(\d+)\]", emitted.source)]
    assert 8 * max(rooms, default=0) <= 1.1 * 2**17


def test_products_of_two_rows_are_not_taken_apart_by_the_compiler() -> None:
    """A compiler that makes vectors of neighbouring statements (gcc 12) has mixed these up."""
    weight = nn.Parameter(torch.tensor([[0.3, 0.6, 0.3, -0.3], [-0.3, 0.3, 0.4, -0.2]], dtype=D))

    def pooled(m: Any, t: Tensor, u: Tensor) -> Tensor:
        shares = torch.softmax(u, 1)[..., None]
        products = weight @ (shares.detach() * shares)
        return -0.5 * u - torch.tanh(products.flatten(1).mean(1, keepdim=True))

    u0 = torch.randn(34, 4, dtype=D, generator=torch.Generator().manual_seed(2))
    field = Field(pooled)
    with mock.patch.object(emit, "_MOST_ROWS", 2):
        native = outcome(field, u0, True)
    for one, other in zip(native, outcome(field, u0, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_computed_twice_is_computed_once() -> None:
    def twice(m: Any, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ m.w.T) @ m.v.T + (torch.tanh(u @ m.w.T) @ m.v.T).sin()

    program = translate(Field(twice), StateSpec.of(start(twice))).program
    steps = [step.op for step in without_repetitions(program).operations]
    assert steps.count("linear") == 2
    field, u0 = Field(twice), start(twice)
    for native, eager in zip(outcome(field, u0, True), outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)
