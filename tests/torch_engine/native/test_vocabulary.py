"""Native code of the whole vocabulary: solves and their gradients beside torch's, by rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from vocabulary import GROUPS, ROUNDED_BY_TORCH, ROWS, Vocabulary

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

ROUNDED = (
    *("softmax", "GRUCell", "where", "cumprod", "tan", "asin, acos", "asinh", "erfc", "remainder"),
)


@functools.cache
def solved(names: tuple[str, ...], dtype: torch.dtype, compile: bool) -> dict[str, Tensor]:
    """By rows: the end of two steps, and gradients by the start, the parameters and the time."""
    field = Vocabulary(names).to(dtype)
    u0 = {name: x.requires_grad_() for name, x in field.state(dtype).items()}
    t0 = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    options: Any = {"controller": psn.FixedStep(), "dt0": 1e-3, "compile": compile}
    end = psn.solve(psn.ODEProblem(field, u0, (t0, 0.102)), psn.Midpoint(), **options).u1
    weights = torch.linspace(-1.0, 2.0, 24, dtype=dtype).reshape(4, 6)
    # Parts do not meet: each row's gradient is its own.
    total = sum((x * weights).sum() for x in end.values())
    inputs = {
        **{f"{name}: by its start": x for name, x in u0.items()},
        **{f"{name.split('.')[1]}: by {name}": x for name, x in field.named_parameters()},
        "time": t0,
    }
    bars = torch.autograd.grad(total, list(inputs.values()))
    return {f"{n}: end": x.detach() for n, x in end.items()} | dict(zip(inputs, bars, strict=True))


def assert_same(names: tuple[str, ...], row: str, dtype: torch.dtype) -> None:
    native, eager = (solved(names, dtype, compile) for compile in (True, False))
    bound = ROUNDED_BY_TORCH.get(row, 1e-12) if dtype is torch.float64 else 2e-4
    for key in (key for key in native if key.partition(":")[0] == row):
        size = float(eager[key].abs().max())
        torch.testing.assert_close(native[key], eager[key], rtol=bound, atol=bound * (1e-3 + size))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_that_of_torch(row: str) -> None:
    assert_same(next(names for names in GROUPS if row in names), row, torch.float64)


@pytest.mark.parametrize("row", ROUNDED)
def test_a_row_in_single_precision_is_that_of_torch(row: str) -> None:
    assert_same(ROUNDED, row, torch.float32)


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_the_gradient_by_the_time_is_that_of_torch(names: tuple[str, ...]) -> None:
    assert_same(names, "time", torch.float64)


def coupled(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """A choice, places from and to which entries move, a greatest entry: of a member, `(6,)`."""
    near = u.roll(1) - 2 * u + u.flip(0) + torch.nn.functional.pad(u[1:], (0, 1), value=0.2)
    sent = torch.zeros_like(u).index_add(0, torch.tensor([0, 0, 2, 1, 5, 4]), u * p)
    return torch.where(u > t, near, sent) * torch.softmax(u, 0) - p[[1, 1, 0, 3, 4, 2]]


def test_members_abreast_are_those_of_torch() -> None:
    found = []
    for compile in (True, False):
        generator = torch.Generator().manual_seed(2)
        u0, p = (
            torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(2)
        )
        problem = psn.ODEProblem(coupled, u0[0].detach(), (0.0, 0.3), p=p[0].detach())
        options: Any = {"controller": psn.FixedStep(), "dt0": 0.05, "compile": compile}
        end = psn.solve(psn.EnsembleProblem(problem, u0, p), psn.Tsit5(), **options).u1
        weights = torch.linspace(-1.0, 2.0, 66, dtype=torch.float64).reshape(11, 6)
        found.append((end.detach(), *torch.autograd.grad((end * weights).sum(), (u0, p))))
    for native, eager in zip(*found, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)
