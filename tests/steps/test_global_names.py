"""Modules that name one another are walked once each."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import pysciml_node as psn


def test_modules_that_name_one_another(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    first, second = types.ModuleType("first_of_two"), types.ModuleType("second_of_two")
    first.second, second.first = second, first  # type: ignore[attr-defined]
    second.rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)  # type: ignore[attr-defined]
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(
        "def f(t, u):\n    return -second.rate * first_again().second.rate / second.rate * u",
        first.__dict__,
    )
    exec("def first_again():\n    return second.first", first.__dict__)
    problem = psn.ODEProblem(first.f, torch.ones(1, dtype=torch.float64), (0.0, 1.0))
    psn.solve(problem, rtol=1e-9, atol=1e-9).u1.sum().backward()
    exact = -torch.exp(torch.tensor(-2.0, dtype=torch.float64))
    torch.testing.assert_close(second.rate.grad, exact, rtol=1e-7, atol=0)


other = torch.nn.Linear(1, 1).double()


class _NamesAlike(torch.nn.Module):
    """Its attribute has the name of somebody else's global."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(1, 1).double()
        self.spare = torch.nn.Linear(1, 1).double()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.other(u)


@pytest.mark.parametrize(
    "adjoint",
    [psn.DiscreteAdjoint(), psn.InterpolatingAdjoint(), psn.BacksolveAdjoint(), psn.GaussAdjoint()],
)
def test_what_a_field_does_not_use_gets_no_gradient(adjoint: psn.Adjoint) -> None:
    field = _NamesAlike()
    problem = psn.ODEProblem(field, torch.ones(3, 1, dtype=torch.float64), (0.0, 1.0))
    psn.solve(problem, adjoint=adjoint, engine="torch").u1.sum().backward()
    assert field.other.weight.grad is not None
    # Zeros would move them in an optimizer with momentum or weight decay.
    assert other.weight.grad is None
    assert field.spare.weight.grad is None
