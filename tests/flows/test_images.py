"""Flows of images: inverses, determinants and bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.data import digits
from pysciml_node.flows import (
    CNF,
    Chain,
    Logit,
    MultiScale,
    Squeeze,
    Transform,
    bits_per_dimension,
    dequantize,
)
from pysciml_node.layers.timed import TimedField

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.rand(batch, *shape, dtype=torch.float64, generator=generator(seed))


def field(channels: int) -> TimedField:
    return TimedField.conv(
        channels, (3,), start_at_rest=False, generator=generator(channels)
    ).double()


def small(**options: Any) -> MultiScale:
    return MultiScale((1, 4, 4), field, scales=2, blocks=1, exact=True, **{**TIGHT, **options})


def log_det_by_hand(transform: Transform, x: Tensor) -> Tensor:
    def carried(flat: Tensor) -> Tensor:
        return transform.transform(flat.reshape(1, *x.shape[1:])).u.flatten()

    rows = [torch.autograd.functional.jacobian(carried, sample.flatten()) for sample in x]
    return torch.stack([torch.linalg.slogdet(row)[1] for row in rows])


@pytest.mark.parametrize("transform", [Logit(0.05), Squeeze(), Chain([Logit(1e-3), Squeeze()])])
def test_transforms_have_their_inverse_and_determinant(transform: Transform) -> None:
    x = images(3, 2, 4, 4)
    there = transform.transform(x)
    back = transform.inverse(there.u)
    torch.testing.assert_close(back.u, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=1e-9)
    torch.testing.assert_close(there.log_det, log_det_by_hand(transform, x), rtol=0, atol=1e-9)
    assert there.u.shape[1:] == transform.latent_shape(x.shape[1:])


def test_squeeze_makes_channels_of_neighbours() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    squeezed = Squeeze().transform(x).u
    assert squeezed[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert squeezed[0, :, 1, 1].tolist() == [10, 11, 14, 15]


def test_the_multi_scale_flow_is_invertible_with_its_determinant() -> None:
    flow = small(algorithm=psn.Vern7(), adjoint=psn.DirectAdjoint())
    x = images(1, 1, 4, 4)
    there = flow.transform(x)
    assert there.u.shape == (1, 16)
    torch.testing.assert_close(there.log_det, log_det_by_hand(flow, x), rtol=0, atol=1e-6)
    back = flow.inverse(there.u)
    torch.testing.assert_close(back.u, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.decode(there.u), x, rtol=0, atol=1e-7)


def test_a_multi_scale_flow_at_rest_is_the_logistic_distribution_of_its_base() -> None:
    """Bits per dimension of a known density: fields at rest leave the logit of the base."""
    flow = MultiScale((1, 8, 8), lambda channels: TimedField.conv(channels, (2,)).double())
    x = images(6, 1, 8, 8)
    alpha = 0.05
    y = alpha + (1 - 2 * alpha) * x
    normal = torch.distributions.Normal(0.0, 1.0)
    density = normal.log_prob(torch.logit(y)) + math.log(1 - 2 * alpha) - (y * (1 - y)).log()
    expected = -(density.sum((1, 2, 3)) / 64 - math.log(256)) / math.log(2)
    torch.testing.assert_close(bits_per_dimension(flow.log_prob(x), 64), expected)


@pytest.mark.parametrize(("side", "flows"), [(28, 10), (32, 14), (8, 6)])
def test_the_published_numbers_of_flows(side: int, flows: int) -> None:
    """Ten for MNIST and fourteen for CIFAR10, as the paper says."""
    flow = MultiScale((1, side, side), lambda channels: TimedField.conv(channels, (1,)))
    assert len(flow.flows()) == flows


def test_penalties_of_the_pieces_add_up() -> None:
    flow = small(regularizers=[psn.KineticEnergy(0.5), psn.JacobianFrobenius(0.25, exact=True)])
    x = images(2, 1, 4, 4)
    density, u = flow(x), flow.logit.transform(x).u
    first, squeeze, second = flow.scales[0].transforms
    pieces = [first.transform(u)]
    pieces.append(second.transform(squeeze.transform(pieces[0].u).u))
    pieces.append(flow.last.transform(pieces[1].u.chunk(2, 1)[0]))
    for name in ("KineticEnergy", "JacobianFrobenius"):
        expected = sum(piece.penalties[name] for piece in pieces)
        torch.testing.assert_close(density.penalties[name], expected)
    assert density.nfe == sum(piece.nfe for piece in pieces)
    torch.testing.assert_close(density.penalty, sum(piece.penalty for piece in pieces))
    assert flow.eval()(x).penalty.item() == 0


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_digits_come_back_to_tolerance(tolerance: float) -> None:
    """Pixels, 64 dimensions: the round trip is off by a small multiple of the tolerance."""
    pixels = (digits(dtype=torch.float64).test.x[:20] * 16).round().flatten(1)
    x = dequantize(pixels, 17, generator=generator())
    curved = TimedField.mlp(64, (32,), start_at_rest=False, generator=generator()).double()
    cnf = CNF(curved, exact=False, generator=generator(), rtol=tolerance, atol=tolerance)
    flow = Chain([Logit(1e-3), cnf], event_shape=64)
    there = flow.transform(x)
    torch.testing.assert_close(flow.decode(there.u), x, rtol=0, atol=20 * tolerance)
    u = flow.transforms[0].transform(x).u
    torch.testing.assert_close(cnf.decode(there.u), u, rtol=20 * tolerance, atol=20 * tolerance)


def test_schedules_of_shared_regularizers_are_stepped_once() -> None:
    regularizer = psn.KineticEnergy(psn.schedules.Exponential(1.0, 0.25, 2))
    flow = small(regularizers=[regularizer])
    flow.step_schedules()
    assert regularizer.current_weight == 0.5


def test_training_reaches_every_piece() -> None:
    flow = small(rtol=1e-4, atol=1e-4)
    bits_per_dimension(flow.log_prob(images(2, 1, 4, 4)), 16).mean().backward()
    assert all(bool(p.grad.any()) for p in flow.parameters())


def test_samples_are_images() -> None:
    flow = small(rtol=1e-4, atol=1e-4)
    x = flow.sample((3,), generator())
    assert x.shape == (3, 1, 4, 4)
    assert flow.log_prob(x).shape == (3,)


def test_dequantized_pixels_stay_in_their_cells() -> None:
    x = torch.arange(17.0).expand(200, 17)
    found = dequantize(x, 17, generator=generator())
    assert torch.equal((found * 17).floor(), x)
    # A uniform share of each cell: mean 1/2 and variance 1/12.
    share = found * 17 - x
    assert abs(share.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / share.numel())
    assert torch.equal(dequantize(x, 17, noise=False), (x + 0.5) / 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_of_loaders_are_whole_numbers_again(dtype: torch.dtype) -> None:
    """Divided by 255 and multiplied by it they are off by rounding, which is no other pixel."""
    whole = torch.arange(256, dtype=dtype)
    cells = dequantize(255 * (whole / 255), generator=generator())
    assert torch.equal((cells * 256).floor(), whole)


def test_uniform_pixels_take_all_their_bits() -> None:
    assert float(bits_per_dimension(torch.tensor(0.0), 10, levels=32)) == pytest.approx(5.0)
    # A density of 2^D halves the volume of each dimension: one bit less.
    log_prob = torch.tensor(10 * math.log(2))
    assert float(bits_per_dimension(log_prob, 10, levels=32)) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Logit(0.5), ValueError, "alpha"),
        (lambda: Logit().transform(torch.full((1, 2), 255.0)), ValueError, "x must lie in"),
        (lambda: dequantize(torch.arange(3)), TypeError, "floating-point"),
        (lambda: dequantize(torch.tensor([16.0]), 16), ValueError, r"\[0, 15\]"),
        (lambda: dequantize(torch.tensor([0.0, 0.5])), ValueError, r"\(255 \* x\).round\(\)"),
        (lambda: dequantize(digits().test.x, 17), ValueError, "whole numbers from 0 to 16"),
        (lambda: MultiScale((1, 6, 6), field, scales=3), ValueError, "cannot be halved 2 times"),
        (lambda: MultiScale((1, 8, 8), field, blocks=0), ValueError, "blocks must be a positive"),
        (lambda: CNF(field(1), event_shape=(1, 4, 4))(images(2, 1, 8, 8)), ValueError, "1, 4, 4"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
