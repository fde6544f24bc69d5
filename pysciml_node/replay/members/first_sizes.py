"""First step sizes of many members."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.elementwise import ARRAYS
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.first_step import first_size, trial_size
from pysciml_node.replay.members.norm import MembersNorm


def first_sizes(
    norm: MembersNorm,
    u: Tensor,
    speed: Tensor,
    change: Callable[[Array], Tensor],
    length: Array,
    direction: Array,
    order: float,
) -> Array:
    """First sizes from the field at the starts and one explicit Euler step, `(L,)`; may be NaN.

    Args:
        norm: of errors.
        u: states, `(L, N)`.
        speed: how fast they change, `(L, N)`.
        change: of the field over Euler steps of given sizes, `(L, N)`.
        length: of the intervals, `(L,)`.
        direction: 1 or -1, `(L,)`.
        order: of the local error.
    """
    d0, d1 = read(torch.stack((norm(u, u, u), norm(speed, u, u))))
    h0 = np.copysign(trial_size(ARRAYS, d0, d1, length), direction)
    sizes = np.where(np.isfinite(h0), h0, 0.0)
    d2 = read(norm(change(sizes), u, u)) / abs(h0)
    h1 = np.copysign(first_size(ARRAYS, abs(h0), d1, d2, order, length), direction)
    return np.where(np.isfinite(d1), h1, math.nan)


def read(x: Tensor) -> Array:
    """Numbers on the host."""
    found: Array = x.detach().cpu().numpy()
    return found if found.dtype == np.float64 else found.astype(np.float64)
