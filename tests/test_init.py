import pytest
import torch
from torch import nn

import pysciml_node as psn
from pysciml_node.init import scale_for_horizon_
from pysciml_node.layers.timed import TimedField


class Field(nn.Module):
    """Autonomous, one hidden layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, t, u):
        return self.net(u)


def end(field, T, u0):
    return psn.solve(psn.ODEProblem(field, u0, (0.0, T)), psn.Tsit5(), rtol=1e-10, atol=1e-10).u1


@pytest.mark.parametrize("T", [0.25, 4.0, 10.0])
def test_the_flow_does_not_depend_on_the_horizon(T):
    u0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    expected = end(Field(), 1.0, u0)
    scaled = scale_for_horizon_(Field(), T)
    torch.testing.assert_close(end(scaled, T, u0), expected, rtol=1e-8, atol=1e-8)


def test_twice_is_once():
    once, twice = scale_for_horizon_(Field(), 5.0), Field()
    for T in (3.0, 5.0, 5.0):
        scale_for_horizon_(twice, T)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_only_the_last_layer_changes_and_previous_overrides():
    field, before = Field(), Field()
    scale_for_horizon_(field, 2.0)
    assert torch.equal(field.net[0].weight, before.net[0].weight)
    torch.testing.assert_close(field.net[2].weight, before.net[2].weight / 2)
    torch.testing.assert_close(field.net[2].bias, before.net[2].bias / 2)
    scale_for_horizon_(field, 2.0, previous=1.0)
    torch.testing.assert_close(field.net[2].weight, before.net[2].weight / 4)


def test_through_a_neural_ode():
    node = psn.NeuralODE(Field())
    before = node.field.net[2].weight.clone()
    assert scale_for_horizon_(node, 4.0) is node
    assert torch.equal(node.field.net[2].weight, before / 4)


def test_what_cannot_be_scaled_is_refused():
    with pytest.raises(ValueError, match="followed by Tanh"):
        scale_for_horizon_(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), 2.0)
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        scale_for_horizon_(nn.Tanh(), 2.0)
    for T in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive and finite"):
            scale_for_horizon_(Field(), T)


@pytest.mark.parametrize("time", ["ignore", "concat", "concatsquash"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_layers_that_see_the_time_are_scaled_as_a_whole(kind, time):
    make, shape = (TimedField.mlp, (5, 3)) if kind == "mlp" else (TimedField.conv, (5, 3, 4, 4))
    g = torch.Generator().manual_seed(0)
    field = make(3, (8,), time=time, start_at_rest=False, generator=g).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, generator=g)
    t, u = torch.tensor(0.7).double(), torch.randn(*shape, generator=g, dtype=torch.float64)
    before = field(t, u)
    torch.testing.assert_close(scale_for_horizon_(field, 4.0)(t, u), before / 4)


def test_a_weight_made_of_other_parameters_is_refused():
    for normalize in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        field = nn.Sequential(nn.Tanh(), normalize(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match="computed from other parameters"):
            scale_for_horizon_(field, 2.0)


def test_a_tied_last_layer_is_refused():
    field = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    field[2].weight = field[0].weight
    with pytest.raises(ValueError, match="shares parameters"):
        scale_for_horizon_(field, 2.0)
