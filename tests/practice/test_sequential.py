"""Layers among the layers of a model, and models as fields."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def test_a_layer_of_a_sequence() -> None:
    node = psn.NeuralODE(net(), output="u1", regularizers=[psn.KineticEnergy(weight=2.0)])
    model = nn.Sequential(node, nn.Linear(2, 1, dtype=D))
    x = torch.ones(4, 2, dtype=D)
    out = model(x)
    assert out.shape == (4, 1)
    assert node.last is not None
    (out.sum() + node.penalty).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(node.field, nn.Sequential)
    plain = psn.NeuralODE(node.field, regularizers=[psn.KineticEnergy(weight=2.0)])
    torch.testing.assert_close(node.penalty, plain(x).penalty)
    torch.testing.assert_close(out, model[1](plain(x).u1))
    assert pickle.loads(pickle.dumps(node)).last is None


def test_a_layer_that_returns_solutions_keeps_none() -> None:
    node = psn.NeuralODE(net())
    assert isinstance(node(torch.ones(1, 2, dtype=D)), psn.Solution)
    assert node.last is None
    with pytest.raises(AttributeError, match=r"solution\.penalty"):
        node.penalty  # noqa: B018
    with pytest.raises(ValueError, match="output"):
        psn.NeuralODE(net(), output="u")  # type: ignore[call-overload]


def test_a_field_of_the_state_alone() -> None:
    f = net()
    x = torch.ones(4, 2, dtype=D)
    expected = psn.NeuralODE(lambda t, u: f(u))(x)
    node = psn.NeuralODE(f)
    torch.testing.assert_close(node(x).u1, expected.u1, rtol=0, atol=0)
    assert len(list(node.parameters())) == 4
    decay = psn.NeuralODE(lambda u: -u, rtol=1e-9, atol=1e-9)
    assert decay(x).u1[0, 0].item() == pytest.approx(math.exp(-1), rel=1e-8)
    with pytest.raises(ValueError, match="takes one argument"):
        node(x, torch.ones(1, dtype=D))


def test_fields_of_two_arguments_and_of_any_number_are_given_both() -> None:
    def varying(*arguments: Any) -> Tensor:
        t, u = arguments
        return -u * t

    def defaulted(t: Tensor, u: Tensor, scale: float = 1.0) -> Tensor:
        return -u * t * scale

    for f in (varying, defaulted):
        u1 = psn.NeuralODE(f, rtol=1e-9, atol=1e-9)(torch.ones(1, 1, dtype=D)).u1
        assert u1.item() == pytest.approx(math.exp(-0.5), rel=1e-8)


def test_stochastic_layers_and_flows() -> None:
    node = psn.NeuralSDE(net(), nn.Linear(2, 2, dtype=D), output="u1")
    model = nn.Sequential(node, nn.Linear(2, 1, dtype=D))
    model(torch.ones(4, 2, dtype=D)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    flow = psn.CNF(net(), event_shape=2)
    flow.log_prob(torch.zeros(3, 2, dtype=D)).sum().backward()
    # The last bias moves all samples alike.
    assert all(p.grad is not None for p in flow.parameters())
