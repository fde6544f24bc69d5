"""Pictures of trained flows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.published.flow_model import ImageFlow, PlaneFlow
from pysciml_node.experiments.reporting.figures import new_figure, save_figure
from pysciml_node.experiments.trainer.evaluation import evaluation_mode
from pysciml_node.experiments.trainer.training import Trainer
from pysciml_node.flows import CNF

_SIDE, _CELLS = 4.5, 120


def _square(axes: Any, title: str) -> None:
    axes.set(xlim=(-_SIDE, _SIDE), ylim=(-_SIDE, _SIDE), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)


def density_grid(flow: CNF, side: float = _SIDE, cells: int = _CELLS) -> Tensor:
    """The density at the centres of a square's cells, `(cells, cells)`, rows from below.

    Args:
        flow: of points in the plane.
        side: half of the square's side.
        cells: along a side.
    """
    step = 2 * side / cells
    like = next(flow.parameters())
    line = torch.linspace(-side + step / 2, side - step / 2, cells).to(like)
    y, x = torch.meshgrid(line, line, indexing="ij")
    with evaluation_mode(flow):
        points = torch.stack((x.flatten(), y.flatten()), 1)
        return flow.log_prob(points).exp().reshape(cells, cells)


def paths(flow: CNF, x: Tensor, times: int = 41) -> tuple[Tensor, float]:
    """The paths of data points, and how much longer than straight lines they are.

    Args:
        flow: trained or not.
        x: data `(B, *E)`.
        times: points of a path.

    Returns:
        The paths `(times, B, *E)`, and the mean over the data of the ratio of the path's length to
        the distance of its ends.
    """
    with evaluation_mode(flow):
        t0, t1 = (float(t) for t in flow.node.tspan)
        u = flow.node(x.to(next(flow.parameters())))(torch.linspace(t0, t1, times))
    lengths = (u[1:] - u[:-1]).flatten(2).norm(dim=2).sum(0)
    distances = (u[-1] - u[0]).flatten(1).norm(dim=1)
    return u, float((lengths / distances).mean())


def draw_plane(trainer: Trainer, data: Splits[LabelledData], path: Path) -> None:
    """Data, density, samples and paths of a flow in the plane.

    Args:
        trainer: a trained run.
        data: its parts.
        path: file to write; its ending names the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    model = checks.instance(
        "the trainer's model", trainer.model, PlaneFlow, example="PlaneFlow(settings, run)"
    )
    figure, axes = new_figure(4)
    shown = data.test.x[:2000]
    with evaluation_mode(model):
        grid = density_grid(model.cnf)
        samples = model.cnf.sample((len(shown),), torch.Generator().manual_seed(0))
        u, longer = paths(model.cnf, shown[:60])
    for place, title, points, color in (
        (axes[0], "data", shown, "#444444"),
        (axes[2], "samples", samples, "#0072b2"),
    ):
        place.scatter(*points.T.numpy(), s=1, color=color)
        _square(place, title)
    extent = (-_SIDE, _SIDE, -_SIDE, _SIDE)
    axes[1].imshow(grid.numpy(), extent=extent, origin="lower", cmap="viridis")
    _square(axes[1], "density")
    for line in u.unbind(1):
        axes[3].plot(*line.T.numpy(), color="#999999", linewidth=0.7)
    axes[3].scatter(*u[0].T.numpy(), s=6, color="#444444", zorder=3)
    axes[3].scatter(*u[-1].T.numpy(), s=6, color="#d55e00", zorder=3)
    _square(axes[3], f"from data to base: {longer:.2f} times straight lines")
    save_figure(figure, path)


def draw_images(trainer: Trainer, data: Splits[LabelledData], path: Path, side: int = 10) -> None:
    """Images of the data beside samples of a flow.

    Args:
        trainer: a trained run.
        data: its parts.
        path: file to write; its ending names the format.
        side: images along a side of each square.

    Raises:
        ImportError: matplotlib is not installed.
    """
    model = checks.instance(
        "the trainer's model", trainer.model, ImageFlow, example="ImageFlow(shape, settings, run)"
    )
    figure, axes = new_figure(2)
    height, width = data.test.x.shape[1:]
    with evaluation_mode(model):
        samples = model.flow.sample((side**2,), torch.Generator().manual_seed(0))
    for place, title, images in (
        (axes[0], "data", data.test.x[: side**2]),
        (axes[1], "samples", samples.reshape(-1, height, width)),
    ):
        rows = [torch.cat(list(row), 1) for row in torch.split(images, side)]
        full = [row for row in rows if row.shape[1] == side * width]
        place.imshow(torch.cat(full).numpy(), vmin=0, vmax=1, cmap="gray_r")
        place.set(xticks=[], yticks=[])
        place.set_title(title, fontsize=9)
    save_figure(figure, path)
