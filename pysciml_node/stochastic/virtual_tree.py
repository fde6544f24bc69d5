"""Brownian motion between any two times, as a function of its seed alone.

The interval is split, and its parts again, until a part begins or ends at a time that is asked for.
Where an interval is split depends on its ends alone: at the roundest number near its middle. So
times such as 0.1, 0.02 or 3/64 are found after few splits; and the path does not depend on which
times are asked for, or in which order. Nothing has to be stored; the last branch is, for speed.

An interval of length `h = l + r` has the increment `W` and the space-time Levy area
`H = (1/h) int (W_s - (s/h) W) ds`. With independent standard normals `n1, n2` its parts have

    W_left = (l/h) W + (6 l r / h^2) H + 2 (a l + b r) / h n1,    W_right = W - W_left,
    H_left = (l/h)^2 H - a n1 + c r n2,    H_right = (r/h)^2 H - b n1 - c l n2,
    v = (l r / (l^3 + r^3))^(1/2) / 2,    a = v l^2 / h,    b = v r^2 / h,    c = v / 3^(1/2).

References: J. Foster, T. Lyons, H. Oberhauser, SIAM J. Numer. Anal. 58 (2020) 1393-1421, theorem
3.4; J. G. Gaines, T. J. Lyons, SIAM J. Appl. Math. 57 (1997) 1455-1484.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pysciml_node.stochastic.normals import PlacedNormals
from pysciml_node.stochastic.ticks import Ticks

# Numbers that are drawn together, at most: few calls for small motions, little memory for large.
TOGETHER = 2**14


@dataclass(frozen=True)
class Increment:
    """Brownian motion over an interval of length `h`.

    Attributes:
        h: length.
        w: increment `W`, `(M,)`.
        area: space-time Levy area `H`, `(M,)`: normal with variance `h / 12`, independent of `w`;
            `None` where it is not looked for.
    """

    h: float
    w: Tensor
    area: Tensor | None

    def to(self, like: Tensor) -> Increment:
        """The same in the dtype and on the device of a tensor."""
        area = None if self.area is None else self.area.to(like)
        return Increment(self.h, self.w.to(like), area)

    def then(self, other: Increment) -> Increment:
        """This interval and the one that follows it, as one."""
        h = self.h + other.h
        if self.area is None or other.area is None or h == 0.0:
            return Increment(h, self.w + other.w, self.area)
        one, two = self.h / h, other.h / h
        area = self.area * one + other.area * two + (self.w * two - other.w * one) / 2
        return Increment(h, self.w + other.w, area)


class VirtualTree:
    """`size` independent Brownian motions over an interval, given by a seed.

    Times are whole numbers of ticks.

    Args:
        normals: the numbers that the motions are made of.
        size: how many motions.
        ends: start and end of the interval.
        ticks: length of a tick, and where intervals are split.
        area: whether space-time Levy areas are asked for: they take twice as many numbers, and
            give other paths.
        depth: splits that are kept, at most; each has two vectors, with areas four.
    """

    def __init__(
        self,
        normals: PlacedNormals,
        size: int,
        ends: tuple[int, int],
        ticks: Ticks,
        *,
        area: bool,
        depth: int,
    ) -> None:
        self.normals, self.size, self.ends, self.ticks = normals, size, ends, ticks
        self._rows = 2 if area else 1
        self._depth = depth
        self._root: Increment | None = None
        # By depth: the interval that was split there last, where, and its parts.
        self._branch: dict[int, tuple[tuple[int, int], int, Increment, Increment]] = {}
        # What a query has drawn and worked out ahead.
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self._middles: dict[tuple[int, int], int] = {}
        self._last = ends[0]

    def given(self, w: Tensor | None, area: Tensor | None) -> None:
        """Set the whole interval's increment or area; what is `None` is drawn."""
        if w is not None and (area is not None or self._rows == 1):
            h = (self.ends[1] - self.ends[0]) * self.ticks.length
            self._root = Increment(h, w, area)
            return
        drawn = self.root()
        self._root = Increment(
            drawn.h, drawn.w if w is None else w, drawn.area if area is None else area
        )

    def root(self) -> Increment:
        """The whole interval."""
        if self._root is None:
            start, stop = self.ends
            h = (stop - start) * self.ticks.length
            # Another place than that of the interval's split.
            drawn = self.normals.at([(0, start, stop)], self._rows * self.size)
            numbers = drawn.view(self._rows, self.size)
            area = numbers[1] * math.sqrt(h / 12) if self._rows == 2 else None
            self._root = Increment(h, numbers[0] * math.sqrt(h), area)
        return self._root

    def motion(self, start: int, stop: int) -> Increment:
        """The motion from `start` to `stop`, which lie in the interval."""
        if start >= stop:
            zero = torch.zeros(self.size, dtype=self.normals.dtype, device=self.normals.device)
            return Increment(0.0, zero, zero if self._rows == 2 else None)
        root = self.root()
        if self._rows * self.size * 4 <= TOGETHER:
            self._draw_toward(start)
            self._draw_toward(stop)
        # The end that the next interval begins with is looked for last: its branch is kept.
        forward, self._last = start >= self._last, start
        motion = self._over(0, self.ends, root, (start, stop), forward)
        self._drawn.clear()
        self._middles.clear()
        return motion

    def first_between(self, low: int, high: int) -> int:
        """The place from `low` to `high` that takes the fewest splits to find."""
        cell, depth = self.ends, 0
        if low <= cell[0] or high >= cell[1]:
            return cell[0] if low <= cell[0] else cell[1]
        while True:
            middle, _ = self._middle(depth, cell)
            if low <= middle <= high:
                return middle
            cell = (middle, cell[1]) if middle < low else (cell[0], middle)
            depth += 1

    def _over(
        self,
        depth: int,
        cell: tuple[int, int],
        whole: Increment,
        wanted: tuple[int, int],
        forward: bool,
    ) -> Increment:
        """The motion over a part of a cell."""
        if wanted == cell:
            return whole
        start, stop = wanted
        middle, left, right = self._parts(depth, cell, whole)
        below, above = (cell[0], middle), (middle, cell[1])
        depth += 1
        if stop <= middle:
            return self._over(depth, below, left, wanted, forward)
        if start >= middle:
            return self._over(depth, above, right, wanted, forward)
        if forward:
            first = self._over(depth, below, left, (start, middle), forward)
            return first.then(self._over(depth, above, right, (middle, stop), forward))
        second = self._over(depth, above, right, (middle, stop), forward)
        return self._over(depth, below, left, (start, middle), forward).then(second)

    def _parts(
        self, depth: int, cell: tuple[int, int], whole: Increment
    ) -> tuple[int, Increment, Increment]:
        """Where a cell is split, and its parts."""
        kept = self._branch.get(depth)
        if kept is not None and kept[0] == cell:
            return kept[1:]
        middle, _ = self._middle(depth, cell)
        tick = self.ticks.length
        numbers = self._numbers(*cell)
        parts = _split(whole, (middle - cell[0]) * tick, (cell[1] - middle) * tick, numbers)
        if depth < self._depth:
            self._branch[depth] = (cell, middle, *parts)
        return middle, *parts

    def _numbers(self, start: int, stop: int) -> Tensor:
        """The numbers of a cell, `(1 or 2, M)`."""
        drawn = self._drawn.pop((start, stop), None)
        if drawn is None:
            drawn = self.normals.at([(start, stop)], self._rows * self.size)[0]
        return drawn.view(self._rows, self.size)

    def _middle(self, depth: int, cell: tuple[int, int]) -> tuple[int, bool]:
        """Where a cell is split, and whether its parts are kept."""
        kept = self._branch.get(depth)
        if kept is not None and kept[0] == cell:
            return kept[1], True
        middle = self._middles.get(cell)
        if middle is None:
            middle = self._middles[cell] = self.ticks.split(*cell)
        return middle, False

    def _draw_toward(self, time: int) -> None:
        """Draw the numbers of all splits on the way to a time in few calls."""
        cell, depth = self.ends, 0
        missing: list[tuple[int, int]] = []
        while cell[0] < time < cell[1]:
            middle, known = self._middle(depth, cell)
            if not known and cell not in self._drawn:
                missing.append(cell)
            cell = (cell[0], middle) if time <= middle else (middle, cell[1])
            depth += 1
        count = max(1, TOGETHER // (self._rows * max(1, self.size)))
        for first in range(0, len(missing), count):
            cells = missing[first : first + count]
            drawn = self.normals.at(cells, self._rows * self.size)
            self._drawn.update(zip(cells, drawn, strict=True))


def _split(
    whole: Increment, left: float, right: float, numbers: Tensor
) -> tuple[Increment, Increment]:
    """The parts of an interval, of lengths `left` and `right`."""
    h = whole.h
    if whole.area is None:
        before = torch.add(whole.w * (left / h), numbers[0], alpha=math.sqrt(left * right / h))
        return Increment(left, before, None), Increment(right, whole.w - before, None)
    n1, n2 = numbers.unbind()
    # Lengths as shares of the whole, so that their cubes stay in range.
    one, two, root = left / h, right / h, math.sqrt(h)
    v = math.sqrt(one * two / (one**3 + two**3)) / 2 * root
    a, b, c = v * one**2, v * two**2, v / math.sqrt(3)
    before = whole.w * one + whole.area * (6 * one * two) + n1 * (2 * (a * one + b * two))
    below = whole.area * one**2 - n1 * a + n2 * (c * two)
    above = whole.area * two**2 - n1 * b - n2 * (c * one)
    return Increment(left, before, below), Increment(right, whole.w - before, above)
