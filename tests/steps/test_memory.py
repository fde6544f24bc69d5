"""Fields that write to tensors of their own at every evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pysciml_node as psn

D = torch.float64
ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DiscreteAdjoint(memory=0),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]
FOUR = {"controller": psn.FixedStep(), "dt0": 0.25}


class Remembering(nn.Module):
    """`-u`, whose derivative in `k` is `-m u` at evaluation `m`."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.0, dtype=D))
        self.register_buffer("m", torch.zeros(1, dtype=D))
        self.reads = reads

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.m += 1
        m = self.m.clone() if self.reads else 1.0
        return -u * (1 + m * (self.k - self.k.detach()))


def slope(field: Remembering, adjoint: psn.Adjoint, problem: psn.Problem | None = None) -> float:
    if problem is None:
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    algorithm = psn.EM() if isinstance(problem, psn.SDEProblem) else psn.Euler()
    generator = {"generator": torch.Generator()} if algorithm == psn.EM() else {}
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR, **generator}
    end = psn.solve(problem, algorithm, **options).u1.sum()
    return float(torch.autograd.grad(end, field.k)[0])


def test_steps_of_euler_have_the_derivative_of_their_own_evaluations() -> None:
    """`du/dk = -(1 + 2 + 3 + 4) h (1 - h)^3`."""
    found = slope(Remembering(), psn.DirectAdjoint())
    assert found == pytest.approx(-2.5 * 0.75**3, rel=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_derivatives_that_depend_on_earlier_evaluations_are_refused(adjoint: psn.Adjoint) -> None:
    """Their values do not: a replay reproduces the solve, and its derivatives are others."""
    with pytest.raises(RuntimeError, match=r"^the field has written to \w+\.m, and its derivat"):
        slope(Remembering(), adjoint)


def test_also_of_members_and_stochastic_equations() -> None:
    field, u0 = Remembering(), torch.ones(1, dtype=D)
    one = psn.ODEProblem(field, u0, (0.0, 1.0))
    members = psn.EnsembleProblem(one, torch.ones(2, 1, dtype=D))
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
    for problem in (members, noisy):
        with pytest.raises(RuntimeError, match="has written to"):
            slope(field, psn.DiscreteAdjoint(), problem)


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=repr)
def test_a_count_that_is_not_read_does_no_harm(adjoint: psn.Adjoint) -> None:
    """`du/dk = -4 h (1 - h)^3`, and the sweep leaves the count as it was."""
    field = Remembering(reads=False)
    assert slope(field, adjoint) == pytest.approx(-(0.75**3), rel=1e-12)
    assert field.m == 4


def test_running_statistics_do_no_harm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().train()
    u0, inputs = torch.randn(8, 3, dtype=D), [*net.parameters()]

    def gradients(adjoint: psn.Adjoint) -> tuple[Tensor, ...]:
        problem = psn.ODEProblem(lambda t, u: net(torch.tanh(u)), u0, (0.0, 1.0))
        options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
        end = psn.solve(problem, psn.RK4(), **options).u1
        return torch.autograd.grad(end.square().sum(), inputs)

    found = gradients(psn.DiscreteAdjoint())
    torch.testing.assert_close(found, gradients(psn.DirectAdjoint()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_spectral_normalization_in_train_mode_is_refused(adjoint: psn.Adjoint) -> None:
    """In single precision the iteration is seen in derivatives alone: they were off by 0.05."""
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(40, 40))
    with torch.no_grad():
        orthogonal, _ = torch.linalg.qr(torch.randn(40, 40))
        layer.parametrizations.weight.original.copy_(orthogonal * (1 + 1e-3 * torch.rand(40)))
    problem = psn.ODEProblem(lambda t, u: torch.tanh(layer(u)), torch.randn(4, 40), (0.0, 1.0))
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
    end = psn.solve(problem, psn.RK4(), **options).u1
    with pytest.raises(RuntimeError, match="has written to"):
        end.square().sum().backward()
