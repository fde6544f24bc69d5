"""Fields that overwrite a tensor at each evaluation, which torch does not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
FOUR: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}
STEPS = [psn.DirectAdjoint(), psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0)]
EQUATIONS = [psn.GaussAdjoint(), psn.InterpolatingAdjoint(), psn.BacksolveAdjoint()]


class Plain(nn.Module):
    """`-k (1 + t) u`."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=D))
        self.register_buffer("b", torch.zeros(1, dtype=D))
        self.array = np.zeros(1)

    def factor(self, t: Tensor) -> Tensor:
        return 1 + t

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * self.factor(t) * u


class ByData(Plain):
    def factor(self, t: Tensor) -> Tensor:
        self.b.data.copy_(1 + t.detach())
        return self.b


class ByNumPy(Plain):
    def factor(self, t: Tensor) -> Tensor:
        self.array[0] = 1 + float(t)
        return torch.from_numpy(self.array)


class Cloned(ByData):
    def factor(self, t: Tensor) -> Tensor:
        return super().factor(t).clone()


class Same(ByData):
    """`-2 k u`."""

    def factor(self, t: Tensor) -> Tensor:
        self.b.data.fill_(2.0)
        return self.b


class SameInNew(Plain):
    def factor(self, t: Tensor) -> Tensor:
        return torch.full((1,), 2.0, dtype=D)


def problems(field: nn.Module, u0: Tensor) -> list[tuple[Any, Any]]:
    one = psn.ODEProblem(field, u0, (0.0, 1.0))
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * torch.ones_like(u), u0, (0.0, 1.0))
    return [
        (one, psn.RK4()),
        (psn.EnsembleProblem(one, u0.expand(2, 1)), psn.RK4()),
        (noisy, psn.SRIW1()),
    ]


def gradients(field: Plain, which: int, adjoint: psn.Adjoint) -> tuple[Tensor, ...]:
    u0 = torch.ones(1, dtype=D, requires_grad=True)
    problem, algorithm = problems(field, u0)[which]
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
    if which == 2:
        options["generator"] = torch.Generator().manual_seed(0)
    end = psn.solve(problem, algorithm, **options).u1.sum()
    return torch.autograd.grad(end, [field.k, u0])


@pytest.mark.parametrize("adjoint", STEPS, ids=repr)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("kind", [ByData, ByNumPy])
def test_graphs_that_read_it_are_refused(
    kind: type[Plain], which: int, adjoint: psn.Adjoint
) -> None:
    """They had the numbers of the last evaluation in all others."""
    with pytest.raises(RuntimeError, match=r"the field overwrites \w+\.(b|array) at its evaluat"):
        gradients(kind(), which, adjoint)


@pytest.mark.parametrize("adjoint", EQUATIONS, ids=repr)
@pytest.mark.parametrize("which", range(2))
def test_graphs_of_one_evaluation_have_its_numbers(which: int, adjoint: psn.Adjoint) -> None:
    found, expected = (gradients(kind(), which, adjoint) for kind in (ByData, Plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("adjoint", STEPS, ids=repr)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(("kind", "like"), [(Cloned, Plain), (Same, SameInNew)])
def test_copies_and_equal_numbers_do_no_harm(
    kind: type[Plain], like: type[Plain], which: int, adjoint: psn.Adjoint
) -> None:
    found, expected = (gradients(x(), which, adjoint) for x in (kind, like))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
