"""Between which times the field may be seen in a step."""

from __future__ import annotations

import numpy as np
import torch

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array


class StepLimits:
    """The ends of the members' intervals, and what stops leave of a step: the field may jump there.

    Args:
        options: give the intervals and the stops.
        dtype: of the times that the field is given.

    Attributes:
        stops: how many stops there are.
    """

    def __init__(self, options: MemberOptions, dtype: torch.dtype) -> None:
        self.low, self.high = np.minimum(*options.spans), np.maximum(*options.spans)
        self._stops = np.sort(np.array(options.common.tstops))
        self.stops = len(self._stops)
        # The last time before each stop, and the first after it.
        near = self._stops.astype(np.float64 if dtype == torch.float64 else np.float32)
        self._before = np.nextafter(near, near.dtype.type(-np.inf)).astype(np.float64)
        self._after = np.nextafter(near, near.dtype.type(np.inf)).astype(np.float64)

    def __call__(self, rows: Array, t: Array, h: Array) -> tuple[Array, Array]:
        """The earliest and the latest time in steps of some members, `(L,)` each.

        Args:
            rows: which members, `(L,)`.
            t: starts of their steps, `(L,)`.
            h: sizes of these, `(L,)`.
        """
        low, high = self.low[rows], self.high[rows]
        if not self.stops:
            return low, high
        near = 1e-9 * abs(h)
        earliest = self._beside(self._after, np.minimum(t, t + h), near, low, high, low)
        latest = self._beside(self._before, np.maximum(t, t + h), near, low, high, high)
        return earliest, latest

    def _beside(
        self, side: Array, end: Array, near: Array, low: Array, high: Array, otherwise: Array
    ) -> Array:
        """The time beside a stop that a step ends on; `otherwise` where it ends on none."""
        stops = self._stops
        i = np.minimum(np.searchsorted(stops, end - near), len(stops) - 1)
        hit = (abs(stops[i] - end) < near) & (low < stops[i]) & (stops[i] < high)
        return np.where(hit, side[i], otherwise)
