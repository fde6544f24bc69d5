"""Fields that count where nothing is theirs: in libraries, and in attributes of tensors."""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sloping import FOUR, D, problem, slope
from torch import Tensor, nn

import pysciml_node as psn

SWEEPS = psn.DiscreteAdjoint(memory=0)
AGAIN = [SWEEPS, psn.InterpolatingAdjoint(), psn.GaussAdjoint(), psn.BacksolveAdjoint()]


def number(k: Tensor) -> float:
    math.counted += 1  # type: ignore[attr-defined]
    return math.counted  # type: ignore[attr-defined,no-any-return]


def new(k: Tensor) -> float:
    if not hasattr(np.linalg, "counted_first"):
        np.linalg.counted_first = 0  # type: ignore[attr-defined]
    np.linalg.counted_first += 1  # type: ignore[attr-defined]
    return np.linalg.counted_first  # type: ignore[attr-defined,no-any-return]


def by_words(k: Tensor) -> float:
    setattr(math, "counted_too", getattr(math, "counted_too", 0) + 1)  # noqa: B010
    return math.counted_too  # type: ignore[attr-defined,no-any-return]


def items(k: Tensor) -> float:
    torch.counts[0] += 1  # type: ignore[attr-defined]
    return torch.counts[0]  # type: ignore[attr-defined,no-any-return]


def tensor(k: Tensor) -> Tensor:
    np.tensor_of_counts.add_(1)  # type: ignore[attr-defined]
    return np.tensor_of_counts.clone()  # type: ignore[attr-defined,no-any-return]


def of_class(k: Tensor) -> float:
    nn.Linear.counted = getattr(nn.Linear, "counted", 0) + 1  # type: ignore[assignment,operator]
    return nn.Linear.counted  # type: ignore[return-value]


def imported(k: Tensor) -> float:
    import counted_elsewhere  # type: ignore[import-not-found]

    counted_elsewhere.calls += 1
    return counted_elsewhere.calls  # type: ignore[no-any-return]


def imported_library(k: Tensor) -> float:
    import math as other

    other.counted += 1  # type: ignore[attr-defined]
    return other.counted  # type: ignore[attr-defined,no-any-return]


def environment(k: Tensor) -> float:
    os.environ["COUNTED"] = str(int(os.environ.get("COUNTED", "0")) + 1)
    return float(os.environ["COUNTED"])


def on_tensor(k: Tensor) -> float:
    if not hasattr(k, "calls"):
        k.calls = 0  # type: ignore[attr-defined]
    k.calls += 1  # type: ignore[attr-defined]
    return k.calls  # type: ignore[attr-defined,no-any-return]


def as_gradient(k: Tensor) -> float:
    k.grad = torch.ones_like(k) if k.grad is None else k.grad + 1
    return float(k.grad)


KINDS = [
    *(number, new, by_words, items, tensor, of_class, imported, imported_library),
    *(environment, on_tensor, as_gradient),
]


class Counting(nn.Module):
    """`-u`, whose derivative in `k` is `-m u` at evaluation `m`, or `-u`."""

    def __init__(self, count: Callable[[Tensor], Any], reads: bool = True) -> None:
        super().__init__()
        self.k, self.count = nn.Parameter(torch.tensor(0.0, dtype=D)), count
        self.reads = reads

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        m = self.count(self.k)
        return -u * (1 + (m if self.reads else 1.0) * (self.k - self.k.detach()))


@pytest.fixture(autouse=True)
def counts() -> Iterator[None]:
    other: Any = types.ModuleType("counted_elsewhere")
    other.calls, sys.modules["counted_elsewhere"] = 0, other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math, "counted", 0, raising=False)
        patch.setattr(torch, "counts", [0], raising=False)
        patch.setattr(np, "tensor_of_counts", torch.zeros(1, dtype=D), raising=False)
        yield
    del sys.modules["counted_elsewhere"]
    os.environ.pop("COUNTED", None)
    for owner in (np.linalg, math, nn.Linear):
        for name in ("counted", "counted_first", "counted_too"):
            if name in vars(owner):
                delattr(owner, name)


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
@pytest.mark.parametrize("count", KINDS)
def test_derivatives_that_depend_on_counts_are_refused(
    count: Callable[[Tensor], Any], adjoint: psn.Adjoint
) -> None:
    with pytest.raises(RuntimeError, match="and its derivatives"):
        slope(Counting(count), adjoint)


@pytest.mark.parametrize("count", KINDS)
def test_also_of_members_and_stochastic_equations(count: Callable[[Tensor], Any]) -> None:
    field, starts = Counting(count), torch.ones(2, 1, dtype=D)
    one = problem(field)
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, one.u0, (0.0, 1.0))
    for given in (noisy, psn.EnsembleProblem(noisy, starts), psn.EnsembleProblem(one, starts)):
        with pytest.raises(RuntimeError, match="and its derivatives"):
            slope(field, SWEEPS, given)


@pytest.mark.parametrize("count", KINDS)
def test_so_is_dense_output(count: Callable[[Tensor], Any]) -> None:
    direct = psn.DirectAdjoint()
    solution = psn.solve(problem(Counting(count)), psn.Euler(), adjoint=direct, **FOUR)
    with pytest.raises(RuntimeError, match="and its derivatives"):
        solution(0.1)


@pytest.mark.parametrize("count", [x for x in KINDS if x is not tensor])
def test_graphs_that_were_kept_are_those_of_the_solve(count: Callable[[Tensor], Any]) -> None:
    """`du/dk = -(1 + 2 + 3 + 4) h (1 - h)^3`."""
    field = Counting(count)
    assert slope(field, psn.DiscreteAdjoint()) == pytest.approx(-2.5 * 0.75**3, rel=1e-12)


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), *AGAIN], ids=repr)
@pytest.mark.parametrize("count", KINDS)
def test_counts_that_are_not_read_do_no_harm(
    count: Callable[[Tensor], Any], adjoint: psn.Adjoint
) -> None:
    """`du/dk = -4 h (1 - h)^3`."""
    found = slope(Counting(count, reads=False), adjoint)
    assert found == pytest.approx(-(0.75**3), rel=1e-12 if adjoint.discrete else 0.4)


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), *AGAIN], ids=repr)
def test_what_others_change_in_between_is_put_back_for_the_sweep(adjoint: psn.Adjoint) -> None:
    field = Counting(lambda k: math.counted)  # type: ignore[attr-defined]
    math.counted = 2  # type: ignore[attr-defined]
    end = psn.solve(problem(field), psn.Euler(), adjoint=adjoint, **FOUR).u1.sum()
    math.counted = 7  # type: ignore[attr-defined]
    (found,) = torch.autograd.grad(end, field.k)
    bound = 1e-12 if adjoint.discrete else 0.4
    assert float(found) == pytest.approx(-2 * 0.75**3, rel=bound)
    assert math.counted == 7  # type: ignore[attr-defined]


def test_derivatives_taken_inside_are_no_reading_of_gradients() -> None:
    """A field that takes some is not compared: it is evaluated as often as the statistics say."""
    calls = 0

    def f(t: Tensor, u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            x = u if u.requires_grad else u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(x.square().sum() / 2, x, create_graph=True)
        return -slope

    u0 = torch.ones(1, dtype=D, requires_grad=True)
    solution = psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), psn.Euler(), adjoint=SWEEPS, **FOUR)
    solution.u1.sum().backward()
    assert u0.grad is not None
    assert float(u0.grad) == pytest.approx(0.75**4, rel=1e-12)
