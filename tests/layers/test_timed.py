"""Layers that see the time, against what they stand for."""

import pytest
import torch
from torch import Tensor, nn

from pysciml_node.layers.timed import (
    ConcatConv2d,
    ConcatLinear,
    ConcatSquashConv2d,
    ConcatSquashLinear,
    IgnoreConv2d,
    IgnoreLinear,
    TimedField,
)

LINEAR = (IgnoreLinear, ConcatLinear, ConcatSquashLinear)
CONV2D = (IgnoreConv2d, ConcatConv2d, ConcatSquashConv2d)
TIMES = ("ignore", "concat", "concatsquash")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_time_dependent_layer_is_the_affine_map_of_state_and_time():
    layer = ConcatLinear(3, 2, generator=generator())
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.3, -0.2]))
    t, x = torch.tensor(0.7), torch.randn(4, 3, generator=generator(1))
    matrix = torch.cat([layer.weight, layer.time_weight.unsqueeze(1)], dim=1)
    extended = torch.cat([x, t.expand(4, 1)], dim=1)
    torch.testing.assert_close(layer(t, x), extended @ matrix.T + layer.bias)


def test_initial_weights_are_glorot_uniform_with_the_time_as_an_input():
    layer = ConcatLinear(199, 300, generator=generator())
    bound = (6.0 / (200 + 300)) ** 0.5
    entries = torch.cat([layer.weight.flatten(), layer.time_weight]).detach()
    assert float(entries.abs().max()) <= bound
    # Uniform on [-b, b] has variance b^2 / 3; 60,000 entries put the estimate within 2 %.
    assert float(entries.var()) == pytest.approx(bound**2 / 3, rel=0.02)
    assert not layer.bias.any()


def test_the_time_channel_of_a_convolution_is_padded_with_zeros():
    """A kernel of ones counts the pixels around, all of them of the value `t`."""
    layer = ConcatConv2d(1, 1, generator=generator())
    with torch.no_grad():
        layer.layer.weight.fill_(1.0)
    out = layer(torch.tensor(0.5), torch.zeros(1, 1, 3, 3))
    expected = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]) / 2
    torch.testing.assert_close(out[0, 0], expected)


def test_concatsquash_gates_and_shifts():
    layer = ConcatSquashLinear(3, 2, generator=generator())
    t, x = torch.tensor(0.7), torch.randn(4, 3, generator=generator(1))
    gate = torch.sigmoid(layer.gate_weight * t + layer.gate_bias)
    torch.testing.assert_close(layer(t, x), layer.layer(x) * gate + t * layer.shift_weight)


@pytest.mark.parametrize("kind", [*LINEAR, *CONV2D])
def test_shapes_and_dependence_on_time(kind):
    layer = kind(3, 5, generator=generator())
    shape = (4, 3) if kind in LINEAR else (4, 3, 6, 7)
    x = torch.randn(shape, generator=generator(1))
    early, late = (layer(torch.tensor(t), x) for t in (0.1, 0.9))
    assert early.shape == (4, 5, *shape[2:])
    assert torch.equal(early, late) == (kind in (IgnoreLinear, IgnoreConv2d))


@pytest.mark.parametrize("kind", [*LINEAR, *CONV2D])
def test_the_generator_alone_decides_the_weights(kind):
    torch.manual_seed(1)
    first = kind(3, 5, generator=generator(3))
    torch.manual_seed(2)
    second = kind(3, 5, generator=generator(3))
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("start_at_rest", [True, False])
def test_fields_keep_the_shape_and_may_start_at_rest(time: str, start_at_rest: bool):
    def check(field: nn.Module, u: Tensor) -> None:
        out = field(torch.tensor(0.3), u)
        assert out.shape == u.shape
        assert bool(out.any()) != start_at_rest

    options = {"time": time, "start_at_rest": start_at_rest, "generator": generator()}
    check(TimedField.mlp(3, (8, 8), **options), torch.ones(4, 3))
    check(TimedField.conv(2, (8,), **options), torch.ones(4, 2, 5, 5))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="time must be one of"):
        TimedField.mlp(2, (3,), time="multiply")
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        TimedField.conv(2, (3,), kernel_size=4)
