"""Modules that get their first buffers, parameters or modules in an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.steps.surroundings import Surroundings

D = torch.float64
FOUR: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}


class Making(nn.Module):
    """`-m u` with a number `m` that it makes in its first evaluation, of the time there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if not self.inner._buffers:
            self.inner.register_buffer("m", (1 + t).clone())
        return -u * self.inner.m


def evaluated(field: nn.Module) -> Surroundings:
    seen = Surroundings({"f": field, "p": None})
    field(torch.tensor(0.0, dtype=D), torch.ones(1, dtype=D))
    return seen


def test_they_are_changes_that_can_be_put_back() -> None:
    field = Making()
    seen = evaluated(field)
    assert seen.changed()
    assert [name for place in seen.changes() for name in place.changes()] == ["f.inner.m"]
    made = field.inner.m
    with seen.as_seen():
        assert not field.inner._buffers
    assert field.inner.m is made
    seen.put_back()
    assert not field.inner._buffers
    assert not seen.changed()


def test_they_are_left_to_the_field_once_the_solve_has_run() -> None:
    field = Making()
    seen = evaluated(field)
    seen.settle()
    assert not seen.plain
    assert not seen.changed()
    with seen.as_seen():
        assert field.inner._buffers


@pytest.mark.parametrize("kind", ["parameter", "module"])
def test_so_are_first_parameters_and_modules(kind: str) -> None:
    class Other(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            if kind == "parameter":
                self.w = nn.Parameter(torch.ones(1, dtype=D))
            else:
                self.w = nn.Tanh()
            return u

    field = Other()
    seen = evaluated(field)
    assert seen.changed()
    seen.put_back()
    assert not hasattr(field, "w")


@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint(memory=0)], ids=repr)
@pytest.mark.parametrize("batched", [True, False])
def test_members_have_what_the_first_one_makes(adjoint: psn.Adjoint, batched: bool) -> None:
    """`u1 = (1 - h m)^4`; where members go one by one nothing of the trial is left."""

    class Field(Making):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            value = super().forward(t, u)
            return value if batched or float(u.detach().sum()) > -100 else -value

    u0 = torch.ones(1, dtype=D, requires_grad=True)
    one = psn.ODEProblem(Field(), u0, (0.5, 1.5))
    members = psn.EnsembleProblem(one, u0.expand(3, 1))
    end = psn.solve(members, psn.Euler(), adjoint=adjoint, **FOUR).u1
    (slope,) = torch.autograd.grad(end.sum(), u0)
    torch.testing.assert_close(end, torch.full_like(end, (1 - 0.25 * 1.5) ** 4))
    assert float(slope) == pytest.approx(3 * (1 - 0.25 * 1.5) ** 4, rel=1e-12)


def test_derivatives_that_depend_on_a_buffer_made_in_between_are_refused() -> None:
    """Replayed steps would have the buffer that steps before it had not."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.tensor(0.0, dtype=D))
            self.inner = nn.Tanh()

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            factor = 2.0 if self.inner._buffers else 1.0
            if float(t) > 0.4 and not self.inner._buffers:
                self.inner.register_buffer("m", torch.zeros(1, dtype=D))
            return -u * (1 + factor * (self.k - self.k.detach()))

    for adjoint, refused in ((psn.DirectAdjoint(), False), (psn.DiscreteAdjoint(memory=0), True)):
        field = Late()
        one = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        end = psn.solve(one, psn.Euler(), adjoint=adjoint, **FOUR).u1.sum()
        if refused:
            with pytest.raises(RuntimeError, match=r"changes f\.inner\.m, and its derivatives"):
                torch.autograd.grad(end, field.k)
        else:
            (slope,) = torch.autograd.grad(end, field.k)
            assert float(slope) == pytest.approx(-(1 + 1 + 1 + 2) / 4 * 0.75**3, rel=1e-12)
