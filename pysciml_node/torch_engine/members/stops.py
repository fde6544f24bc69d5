"""Where the steps of members end: at stops, and at the ends of their intervals."""

from __future__ import annotations

import numpy as np

from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array


class Stops:
    """The stops of the members that are under way, each in its order of integration, its end last.

    Args:
        options: give the intervals, the stops, and the grid of fixed steps.
        own: stops of each member instead of these, `(M, S)`, infinite ones where there are fewer.

    Attributes:
        direction: 1 for members that go forward in time and -1 for those that go backward, `(L,)`.
        length: of their intervals, `(L,)`.
    """

    def __init__(self, options: MemberOptions, own: Array | None = None) -> None:
        t0, t1 = options.spans
        self.direction, self.length = np.sign(t1 - t0), abs(t1 - t0)
        common = options.common
        grid = common.controller.times if isinstance(common.controller, FixedStep) else ()
        marks = np.array([sorted({*grid, *common.tstops})]) if own is None else own
        inside = (np.minimum(t0, t1)[:, None] < marks) & (marks < np.maximum(t0, t1)[:, None])
        self._count = inside.sum(1)
        # Backward ones meet them from the last to the first; those outside come after all others.
        order = np.where(self.direction > 0, 1, -1)[:, None] * marks
        table = np.sort(np.where(inside, order, np.inf), axis=1)
        table = np.where(np.isfinite(table), table * self.direction[:, None], np.inf)
        self._table = np.concatenate((table, np.full((len(t0), 1), np.inf)), axis=1)
        self._table[np.arange(len(t0)), self._count] = t1

    def next(self, passed: Array) -> Array:
        """The stop that comes next, `(L,)`, where `passed` of them lie behind."""
        ends: Array = self._table[np.arange(len(passed)), passed]
        return ends

    def last(self, passed: Array) -> Array:
        """Whether this is the end of the interval, `(L,)`."""
        done: Array = passed == self._count
        return done

    def keep(self, rows: Array) -> None:
        """Go on with some of the members."""
        self._table, self._count = self._table[rows], self._count[rows]
        self.direction, self.length = self.direction[rows], self.length[rows]
