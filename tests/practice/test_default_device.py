"""A default device is the field's; the solver makes its own tensors where it needs them.

On a machine without others the device without values stands for one.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

ELSEWHERE = torch.device("meta")


def decay(t: Tensor, u: Tensor) -> Tensor:
    assert torch.get_default_device() == ELSEWHERE
    return -u


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint(), psn.GaussAdjoint()]
)
def test_solves_and_replays(adjoint: psn.Adjoint) -> None:
    u0 = torch.ones(2, 1, requires_grad=True)
    node = psn.NeuralODE(
        decay, rtol=1e-6, atol=1e-6, adjoint=adjoint, regularizers=[psn.KineticEnergy()]
    )
    with ELSEWHERE:
        solution = node(u0, saveat=[0.5, 1.0])
        dense = solution(0.25)
    torch.testing.assert_close(solution.u[0], u0.detach() * math.exp(-0.5))
    torch.testing.assert_close(dense, u0.detach() * math.exp(-0.25))
    (solution.u1 + dense).sum().backward()
    expected = torch.full_like(u0, math.exp(-1) + math.exp(-0.25))
    torch.testing.assert_close(u0.grad, expected)
    assert solution.penalty.item() == pytest.approx((1 - math.exp(-2)) / 2, rel=1e-4)


def test_flows_stochastic_solves_and_members() -> None:
    u0 = torch.ones(2, 2)
    flow = psn.CNF(decay, event_shape=2)
    problem = psn.SDEProblem(decay, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
    many = psn.EnsembleProblem(psn.ODEProblem(decay, u0[0], (0.0, 1.0)), u0)
    generator = torch.Generator()
    with ELSEWHERE:
        density = flow.log_prob(torch.zeros(1, 2, device="cpu"))
        moved = psn.solve(problem, generator=generator.manual_seed(0)).u1
        members = psn.solve(many).u1
    assert density.item() == pytest.approx(-math.log(2 * math.pi) - 2, abs=1e-4)
    assert moved.device.type == "cpu"
    torch.testing.assert_close(members, u0 * math.exp(-1))
