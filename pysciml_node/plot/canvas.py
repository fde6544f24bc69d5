"""Axes to draw into, and tensors as matplotlib takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node._optional import require

Array = np.ndarray[Any, Any]


def pyplot() -> Any:
    """The module `matplotlib.pyplot`."""
    return require("matplotlib.pyplot", extra="plots", purpose="draw")


def axes_or_current(axes: Any) -> Any:
    """The axes that were given, or matplotlib's current ones."""
    return pyplot().gca() if axes is None else axes


def array(values: Any) -> Array:
    """A tensor, or numbers, as an array without its graph."""
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().numpy())
    return np.asarray(values)


def tensors_by_name(state: Any, prefix: str = "u") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state with the names that a legend gives them."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from tensors_by_name(value, str(key))
    else:
        for i, value in enumerate(state):
            yield from tensors_by_name(value, f"{prefix}[{i}]")


def columns(state: Any, most: int) -> list[tuple[str, Array]]:
    """The entries of states along time, each `(T,)`, with their names.

    Args:
        state: tensors of shape `(T, ...)` in the structure of `u0`; the modulus of complex ones.
        most: how many entries are drawn at most.
    """
    named: list[tuple[str, Array]] = []
    for name, tensor in tensors_by_name(state):
        flat = tensor.detach().reshape(len(tensor), -1)
        flat = flat.abs() if flat.is_complex() else flat
        for i in range(min(flat.shape[1], most - len(named))):
            label = name if flat.shape[1] == 1 else f"{name}[{_index(i, tensor.shape[1:])}]"
            named.append((label, array(flat[:, i])))
    return named


def _index(i: int, shape: Sequence[int]) -> str:
    return ", ".join(str(int(k)) for k in np.unravel_index(i, tuple(shape)))


def grid(bounds: Sequence[float], resolution: int) -> tuple[Tensor, tuple[float, ...]]:
    """Points of a rectangle of the plane, `(resolution**2, 2)`, row by row, and its bounds."""
    x0, x1, y0, y1 = checks.numbers("bounds", bounds)
    x = torch.linspace(x0, x1, resolution)
    y = torch.linspace(y0, y1, resolution)
    return torch.cartesian_prod(y, x).flip(1), (x0, x1, y0, y1)
