"""What ensembles evaluate to look at a field leaves nothing behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
FOUR: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}
STARTS = torch.linspace(-1.0, 1.0, 96, dtype=D).view(4, 8, 3)


def members(field: Any) -> psn.EnsembleProblem:
    return psn.EnsembleProblem(psn.ODEProblem(field, STARTS[0], (0.0, 1.0)), STARTS)


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()], ids=repr)
@pytest.mark.parametrize("gradients", [False, True])
def test_running_statistics_are_those_of_members_one_by_one(
    gradients: bool, adjoint: psn.Adjoint
) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().train()

    together, alone = net(), net()
    with torch.set_grad_enabled(gradients):
        psn.solve(members(lambda t, u: together(u)), psn.Euler(), adjoint=adjoint, **FOUR)
        for u0 in STARTS:
            one = psn.ODEProblem(lambda t, u: alone(u), u0, (0.0, 1.0))
            psn.solve(one, psn.Euler(), adjoint=adjoint, **FOUR)
    for found, expected in zip(together.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Counting(nn.Module):
    """`-u`; counts its evaluations."""

    def __init__(self, mapped: bool) -> None:
        super().__init__()
        self.register_buffer("m", torch.zeros((), dtype=D))
        self.mapped = mapped

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.m += 1
        return -u if self.mapped or float(u.detach().sum()) < 100 else u


@pytest.mark.parametrize(("mapped", "count"), [(True, 4), (False, 16)])
def test_a_count_in_a_buffer_is_that_of_the_steps(mapped: bool, count: int) -> None:
    """Four steps of all members at once, or of each."""
    field = Counting(mapped)
    psn.solve(members(field), psn.Euler(), **FOUR)
    assert field.m == count


@pytest.mark.parametrize("drawn", [True, False])
def test_a_member_that_raises_leaves_the_random_numbers_of_its_own_evaluation(drawn: bool) -> None:
    def field(t: Tensor, u: Tensor) -> Tensor:
        if drawn:
            random.random()
            torch.rand(3)
        raise ZeroDivisionError

    def seed() -> None:
        random.seed(0)
        torch.manual_seed(0)

    seed()
    with pytest.raises(ZeroDivisionError):
        psn.solve(members(field), psn.Euler(), **FOUR)
    found = random.random(), torch.rand(())
    seed()
    with pytest.raises(ZeroDivisionError):
        psn.solve(members(field).member(0), psn.Euler(), **FOUR)
    assert found == (random.random(), torch.rand(()))
