"""States in parts of native solves that were before: C reads each part, and makes each anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native import at_once
from pysciml_node.torch_engine.native.compiler import available

pytestmark = [
    pytest.mark.skipif(not available()[0], reason=available()[1]),
    pytest.mark.skipif(
        not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no lock"
    ),
]
D = torch.float64


class Named(NamedTuple):
    """A state in parts."""

    u: Tensor
    v: Tensor


def made_of(kind: Any, u: Tensor, v: Tensor) -> Any:
    return {"u": u, "v": v} if kind is dict else (u, v) if kind is tuple else Named(u, v)


def parts_of(state: Any) -> tuple[Tensor, Tensor]:
    u, v = state.values() if isinstance(state, dict) else state
    return u, v


class Chain(nn.Module):
    """`u' = -k u`, `v' = -k sum(u)`, so that `v + sum(u)` grows by `-2 k sum(u)`."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.75, dtype=D))

    def forward(self, t: Tensor, state: Any) -> Any:
        """The derivatives, in the structure of the state: `(3, 2)` and `(1,)`."""
        kind = dict if isinstance(state, dict) else type(state)
        u, _ = parts_of(state)
        return made_of(kind, -self.k * u, -self.k * u.sum().reshape(1))


def exact(k: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The parts at time 1: what leaves `v` is what leaves the sum of `u`."""
    left = torch.exp(-k)
    return left * u, v - (1 - left) * u.sum()


def solved(field: Chain, state: Any, **options: Any) -> psn.Solution:
    problem = psn.ODEProblem(field, state, (0.0, 1.0))
    return psn.solve(problem, compile=True, engine="torch", rtol=1e-10, atol=1e-10, **options)


@pytest.fixture(params=[dict, tuple, Named])
def kind(request: Any) -> Any:
    return request.param


@pytest.fixture
def field(kind: Any) -> Iterator[Chain]:
    """One that has been solved, and whose later solves may take no other way."""
    field = Chain()
    for recorded in (False, False, True):
        with torch.set_grad_enabled(recorded):
            solved(field, made_of(kind, torch.ones(3, 2).to(D), torch.ones(1).to(D)))
    with mock.patch.object(at_once._Flown, "made", side_effect=AssertionError):
        yield field


def start() -> tuple[Tensor, Tensor]:
    u = torch.tensor([[1.0, 2.0], [-3.0, 4.0], [5.0, -6.5]], dtype=D)
    return u.requires_grad_(), torch.tensor([0.5], dtype=D).requires_grad_()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda u, v: u.sin().sum() + v.exp().sum(),
    "the first": lambda u, v: u.square().sum(),
    "the last": lambda u, v: v.square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_arrive_at_and_go_to_each_part(kind: Any, field: Chain, loss: str) -> None:
    u, v = start()
    for sources in ((u, v, field.k), (u,), (v,), (field.k,)):
        for x in (u, v):
            x.requires_grad_(any(x is y for y in sources))
        found = parts_of(solved(field, made_of(kind, u, v)).u1)
        expected = exact(field.k, u, v)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        bars = [
            torch.autograd.grad(LOSSES[loss](*parts), sources, allow_unused=True)
            for parts in (found, expected)
        ]
        for bar, known in zip(*bars, strict=True):
            known = torch.zeros_like(bar) if known is None else known
            torch.testing.assert_close(bar, known, rtol=1e-7, atol=1e-7)


LAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "spread": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "expanded": lambda x: x.detach()[:1].expand(x.shape),
}


@pytest.mark.parametrize("lay", LAYS)
def test_parts_may_lie_in_any_way(kind: Any, lay: str) -> None:
    field, (u, v) = Chain(), start()
    for _ in range(3):
        laid = LAYS[lay](u)
        solution = solved(field, made_of(kind, laid, v))
        expected = exact(field.k, laid, v)
        torch.testing.assert_close(parts_of(solution.u1), expected, rtol=1e-8, atol=1e-8)
        first, _ = parts_of(solution.u1)
        bar = torch.linspace(-1, 2, 6, dtype=D).reshape(3, 2)
        (found,) = torch.autograd.grad(first, field.k, LAYS[lay](bar), retain_graph=True)
        (known,) = torch.autograd.grad(expected[0], field.k, LAYS[lay](bar))
        torch.testing.assert_close(found, known, rtol=1e-7, atol=1e-7)


def test_parts_of_the_end_have_memory_of_their_own(kind: Any, field: Chain) -> None:
    u, v = start()
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            solution = solved(field, made_of(kind, u, v))
        ends = [x.detach() for x in parts_of(solution.u1)]
        before = [x.clone() for x in ends]
        ends[0].zero_()
        assert torch.equal(ends[1], before[1])
        assert torch.equal(parts_of(solution.u)[0][-1].detach(), before[0])
        assert torch.equal(parts_of(solution.u)[0][0], u)


@pytest.mark.parametrize("recorded", [False, True])
def test_parts_that_were_exchanged_are_looked_at(recorded: bool) -> None:
    field, (u, v) = Chain(), start()
    problem = psn.ODEProblem(field, {"u": u.detach(), "v": v.detach()}, (0.0, 1.0))
    state: Any = problem.u0

    def run() -> Any:
        with torch.set_grad_enabled(recorded):
            return psn.solve(problem, compile=True, engine="torch", rtol=1e-10, atol=1e-10).u1

    for _ in range(3):
        run()
    state["u"] = torch.ones(3, 2, dtype=D)
    torch.testing.assert_close(parts_of(run())[0], exact(field.k, state["u"], v)[0])
    with torch.inference_mode():
        state["u"] = 2 * torch.ones(3, 2, dtype=D)
    torch.testing.assert_close(parts_of(run())[0], exact(field.k, state["u"].clone(), v)[0])
    state["u"] = torch.ones(1, 2, dtype=D)
    with pytest.raises(ValueError, match="u0 must have the"):
        run()


def test_batches_of_cotangents_are_as_one_by_one(kind: Any) -> None:
    field, (u, v) = Chain(), start()
    for _ in range(3):
        ends = parts_of(solved(field, made_of(kind, u, v)).u1)
        bars = torch.eye(6, dtype=D).reshape(6, 3, 2), torch.arange(6.0).to(D)[:, None]
        given = {"retain_graph": True, "grad_outputs": bars, "is_grads_batched": True}
        rows = torch.autograd.grad(ends, (u, v, field.k), **given)
        for i, pair in enumerate(zip(*bars, strict=True)):
            one = torch.autograd.grad(ends, (u, v, field.k), pair, retain_graph=True)
            torch.testing.assert_close(tuple(x[i] for x in rows), one, rtol=1e-12, atol=1e-12)
        (bar,) = torch.autograd.grad(ends[0].sum(), field.k, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(bar, field.k)
