"""Distributions in the plane: where their points lie."""

import math

import pytest
import torch

from pysciml_node.data.plane import SHAPES, plane, plane_splits


def points(shape: str, n: int = 4000) -> torch.Tensor:
    return plane(shape, n, generator=torch.Generator().manual_seed(0)).x.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_points_follow_from_the_generator_and_stay_near_the_origin(shape):
    x = points(shape)
    assert torch.equal(x, points(shape))
    assert x.shape == (4000, 2)
    assert 0.5 < x.std().item() < 3
    assert x.abs().max().item() < 6


def test_the_gaussians_stand_on_a_circle():
    data = plane("eight-gaussians", 8000, generator=torch.Generator().manual_seed(0))
    for part in range(8):
        x = data.x[data.y == part].double()
        centre = (
            2
            * math.sqrt(2)
            * torch.tensor([math.cos(part * math.pi / 4), math.sin(part * math.pi / 4)]).double()
        )
        # Standard errors of a mean of about 1000 points of deviation 0.354.
        torch.testing.assert_close(x.mean(0), centre, rtol=0, atol=0.06)
        torch.testing.assert_close(x.std(0).mean().item(), 0.5 / math.sqrt(2), rtol=0, atol=0.03)


def test_the_checkerboard_has_eight_full_squares_of_sixteen():
    cells = ((points("checkerboard") + 4) / 2).floor().long()
    counts = torch.zeros(4, 4)
    for i, j in cells.clamp(0, 3).tolist():
        counts[i, j] += 1
    full = counts > 0
    assert full.sum() == 8
    assert torch.equal(full[:-1], ~full[1:])
    # Binomial counts of mean 500 within five deviations.
    assert (counts[full] - 500).abs().max() < 5 * math.sqrt(500 * 7 / 8)


@pytest.mark.parametrize(
    ("shape", "turns"), [("pinwheel", 5), ("two-spirals", 2), ("two-moons", 2)]
)
def test_arms_are_turned_copies_of_each_other(shape, turns):
    data = plane(shape, 20_000, generator=torch.Generator().manual_seed(0))
    z = torch.view_as_complex(data.x.double().contiguous())
    means = torch.stack([z[data.y == arm].mean() for arm in range(turns)])
    turn = complex(math.cos(2 * math.pi / turns), math.sin(2 * math.pi / turns))
    torch.testing.assert_close(means.roll(-1), means * turn, rtol=0, atol=0.1)


def test_parts_differ():
    parts = plane_splits("pinwheel", train=10, validation=5, test=5)
    assert [len(p) for p in (parts.train, parts.validation, parts.test)] == [10, 5, 5]
    assert not torch.equal(parts.validation.x, parts.test.x)


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match="shape must be one of"):
        plane("banana", 3, generator=torch.Generator())
