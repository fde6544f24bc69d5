"""What the field of a batch makes at its first evaluation, and keeps."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
TIGHT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-9}
Zeros = Callable[[Tensor], Tensor]


def in_buffer(module: nn.Module) -> Zeros:
    def zeros(u: Tensor) -> Tensor:
        if not hasattr(module, "zero"):
            module.register_buffer("zero", torch.zeros_like(u))
        return module.get_buffer("zero")

    return zeros


def in_object(module: Any) -> Zeros:
    def zeros(u: Tensor) -> Tensor:
        if not hasattr(module, "made"):
            module.made = SimpleNamespace(zero=torch.zeros_like(u))
        zero: Tensor = module.made.zero
        return zero

    return zeros


def in_set(module: Any) -> Zeros:
    kept = module.kept = set[Tensor]()

    def zeros(u: Tensor) -> Tensor:
        if not kept:
            kept.add(torch.zeros_like(u))
        return next(iter(kept))

    return zeros


def in_thread(module: nn.Module) -> Zeros:
    own = threading.local()

    def zeros(u: Tensor) -> Tensor:
        if not hasattr(own, "zero"):
            own.zero = torch.zeros_like(u)
        zero: Tensor = own.zero
        return zero

    return zeros


def in_class(module: Any) -> Zeros:
    class Kept:
        zero: Any = None

    def zeros(u: Tensor) -> Tensor:
        if Kept.zero is None:
            Kept.zero = torch.zeros_like(u)
        zero: Tensor = Kept.zero
        return zero

    return zeros


class Decay(nn.Module):
    """du/dt = -u, by zeros that are made once."""

    def __init__(self, place: Callable[[Any], Zeros]) -> None:
        super().__init__()
        self.zeros = place(self)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.zeros(u) - u


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint(), None])
@pytest.mark.parametrize("place", [in_buffer, in_object, in_set, in_thread, in_class])
def test_it_is_of_a_member(place: Callable[[Any], Zeros], adjoint: psn.Adjoint | None) -> None:
    """Made inside of torch.vmap, it was of no use to anybody afterwards."""
    field, starts = Decay(place), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D)
    starts.requires_grad_(adjoint is not None)
    problem = psn.ODEProblem(field, starts[0].detach(), (0.0, 1.0))
    options = TIGHT if adjoint is None else {**TIGHT, "adjoint": adjoint}
    for _ in range(2):
        found = psn.solve(psn.EnsembleProblem(problem, u0=starts), **options).u1
        torch.testing.assert_close(found, math.exp(-1) * starts, rtol=1e-8, atol=1e-8)
    if adjoint is not None:
        (slope,) = torch.autograd.grad(found.sum(), starts)
        expected = torch.full_like(slope, math.exp(-1))
        torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(field(torch.zeros(()), starts[1]), -starts[1])


def test_it_is_of_a_member_in_stochastic_equations() -> None:
    field, starts = Decay(in_buffer), torch.ones(2, 3, dtype=D)
    problem = psn.SDEProblem(field, lambda t, u: 0 * u, starts[0], (0.0, 1.0))
    ensemble = psn.EnsembleProblem(problem, u0=starts)
    found = psn.solve(ensemble, psn.EM(), dt0=0.25, controller=psn.FixedStep())
    torch.testing.assert_close(found.u1, 0.75**4 * starts)
    assert field.get_buffer("zero").shape == (3,)


def test_random_numbers_are_drawn_by_each_member() -> None:
    """No number is drawn, and left unused, before: it goes as in solves one after the other."""

    def noisy(t: Tensor, u: Tensor) -> Tensor:
        return torch.randn_like(u) - u

    starts = torch.ones(2, 3, dtype=D)
    problem = psn.ODEProblem(noisy, starts[0], (0.0, 1.0))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.5}
    with torch.no_grad():
        torch.manual_seed(0)
        alone = [psn.solve(problem, psn.RK4(), **options).u1 for _ in starts]
        torch.manual_seed(0)
        found = psn.solve(psn.EnsembleProblem(problem, u0=starts), psn.RK4(), **options)
    torch.testing.assert_close(found.u1, torch.stack(alone))
