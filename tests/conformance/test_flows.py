"""Continuous normalizing flows on every engine: densities, gradients and penalties."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.flows import CNF
from pysciml_node.layers.timed import TimedField


def points() -> Tensor:
    return torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_linear_flow_has_its_exact_density(engine: str) -> None:
    a = torch.tensor([[0.4, -1.0], [0.7, 0.2]], dtype=torch.float64)
    flow = CNF(lambda t, u: u @ a.T, event_shape=2, engine=engine, rtol=1e-9, atol=1e-9)
    base = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = flow.decode(base)
        found = flow.log_prob(x)
    expected = -base.square().sum(1) / 2 - math.log(2 * math.pi) + a.trace()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradients_and_penalties_are_those_of_direct_differentiation(engine: str) -> None:
    def train(chosen: str, adjoint: psn.DirectAdjoint | psn.DiscreteAdjoint) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        field = TimedField.mlp(2, (5,), start_at_rest=False, generator=generator).double()
        flow = CNF(
            field,
            exact=False,
            generator=generator,
            regularizers=[psn.KineticEnergy(0.1), psn.JacobianFrobenius(0.2, exact=False)],
            adjoint=adjoint,
            engine=chosen,
            rtol=1e-10,
            atol=1e-10,
        )
        density = flow(points())
        (-density.log_prob.mean() + density.penalty).backward()
        gradients = [p.grad for p in field.parameters() if p.grad is not None]
        return [density.log_prob, *density.penalties.values(), *gradients]

    found = train(engine, psn.DiscreteAdjoint())
    for value, expected in zip(found, train("torch", psn.DirectAdjoint()), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
