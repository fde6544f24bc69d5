"""Distributions in the plane that flows are shown on."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.data.labelled import LabelledData, Splits


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    x, y = points.unbind(1)
    return torch.stack((cos * x - sin * y, sin * x + cos * y), 1)


def _eight_gaussians(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    part = torch.randint(8, (n,), generator=generator)
    angle = part * (math.pi / 4)
    centre = 4 * torch.stack((angle.cos(), angle.sin()), 1)
    return (centre + 0.5 * _normal(generator, n, 2)) / math.sqrt(2), part


def _checkerboard(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = 4 * _uniform(generator, n) - 2
    lower = torch.randint(2, (n,), generator=generator)
    y = _uniform(generator, n) - 2 * lower + x.floor() % 2
    return 2 * torch.stack((x, y), 1), lower


def _pinwheel(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    arm = torch.randint(5, (n,), generator=generator)
    points = _normal(generator, n, 2) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    angle = arm * (2 * math.pi / 5) + 0.25 * points[:, 0].exp()
    return 2 * _turned(points, angle), arm


def _two_spirals(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    arm = torch.randint(2, (n,), generator=generator)
    angle = _uniform(generator, n).sqrt() * 3 * math.pi
    points = torch.stack((-angle.cos(), angle.sin()), 1) * angle.unsqueeze(1)
    points = (points + 0.5 * _uniform(generator, n, 2)) / 3
    sign = (1 - 2 * arm).unsqueeze(1)
    return sign * points + 0.1 * _normal(generator, n, 2), arm


def _two_moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    moon = torch.randint(2, (n,), generator=generator)
    angle = math.pi * _uniform(generator, n)
    points = torch.stack((angle.cos() - 0.5, angle.sin() - 0.25), 1)
    # One is the other turned by half a circle.
    points = (1 - 2 * moon).unsqueeze(1) * points + 0.1 * _normal(generator, n, 2)
    return 2 * points, moon


_SHAPES: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "eight-gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "pinwheel": _pinwheel,
    "two-spirals": _two_spirals,
    "two-moons": _two_moons,
}
SHAPES = tuple(_SHAPES)


def plane(shape: str, n: int, *, generator: torch.Generator) -> LabelledData:
    """Points of a distribution in the plane, within about 4 of the origin.

    Args:
        shape: `"eight-gaussians"`, `"checkerboard"`, `"pinwheel"`, `"two-spirals"` or
            `"two-moons"`.
        n: how many points.
        generator: draws them.

    Returns:
        `x` of shape `(n, 2)` in float32, and in `y` which part of the shape each belongs to.

    Raises:
        ValueError: an unknown shape.

    Examples:
        >>> tuple(plane("pinwheel", 5, generator=torch.Generator().manual_seed(0)).x.shape)
        (5, 2)

    Reference:
        Grathwohl et al., FFJORD, arXiv 1810.01367, section 4.1, after its published toy data.
    """
    checks.choice("shape", shape, SHAPES)
    n = checks.whole("n", n, at_least=0)
    checks.instance(
        "generator", generator, torch.Generator, example="torch.Generator().manual_seed(0)"
    )
    x, y = _SHAPES[shape](n, generator)
    return LabelledData(x.float(), y)


def plane_splits(
    shape: str, *, train: int = 20_000, validation: int = 2_000, test: int = 5_000, seed: int = 0
) -> Splits[LabelledData]:
    """Training, validation and test points of a distribution in the plane.

    Args:
        shape: as for `plane`.
        train: how many points to train on.
        validation: how many to choose settings on.
        test: how many to report on.
        seed: of all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [plane(shape, n, generator=generator) for n in (train, validation, test)]
    return Splits(*parts)
