"""The Brownian paths of many members at once: those of `BrownianPath`, without a tree of objects.

A path's root interval is halved, and its halves again, so that times are binary numbers. A query
for the motion from `a` to `b` follows the digits of both through the halvings. Once they part, it
adds what lies to the right of `a`'s way and to the left of `b`'s. All members go down together. The
numbers drawn on the last two ways are kept: the next query mostly follows one of them.

Motions are sums here, `W` and `J = int (W_s - W_start) ds`, of which `H = J / h - W / 2` is Levy's
space-time area. The root interval has length one; its true length scales the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.stochastic.brownian import DEPTH
from pysciml_node.stochastic.members.normals import normals_at

# Numbers of the last two ways are kept up to this many bytes.
_MOST_KEPT = 2**28
_C = 1 / (4 * math.sqrt(3))
_FRACTION = (1 << DEPTH) - 1
# The way to the start gathers the halves to its right, that to the end those to its left.
_SIDES = np.array([[False], [True]])


@dataclass(frozen=True)
class Motions:
    """Brownian motion of some members, each over an interval of its own.

    Attributes:
        h: lengths, `(L,)`.
        w: increments, `(L, N)`.
        area: space-time Levy areas, `(L, N)`.
    """

    h: Array
    w: Tensor
    area: Tensor


class BrownianPaths:
    """`size` Brownian motions for each member, given by its seed.

    Args:
        seeds: of the members.
        size: how many motions each has.
        spans: starts and ends of the members' intervals, `(M,)` each.
        length: lengths of the root intervals, `(M,)`.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        seeds: tuple[int, ...],
        size: int,
        spans: tuple[Array, Array],
        length: Array,
        dtype: torch.dtype,
    ) -> None:
        self._seeds = np.array(seeds, dtype=np.uint64)
        self.size, self.length, self._dtype = size, length, dtype
        self.t0, self.span = spans[0], spans[1] - spans[0]
        self._rates = 2.0**DEPTH / length
        whole = (np.full(len(seeds), 2**DEPTH, dtype=np.int64),)
        zero = np.zeros(len(seeds), dtype=np.int64)
        self._root = self._draw(np.arange(len(seeds)), (zero, zero, *whole))
        # By way (of starts, of ends), halving and member: the cell that was halved, its numbers.
        self._cells = np.full((2, 0, len(seeds)), -1, dtype=np.int64)
        self._numbers = np.empty((2, 0, len(seeds), 2 * size), dtype=self._root.dtype)
        self._kept = self._numbers.itemsize * 4 * size * len(seeds) * DEPTH <= _MOST_KEPT

    def _draw(self, rows: Array, places: tuple[Array, ...]) -> Array:
        numbers = normals_at(self._seeds[rows], places, 2 * self.size, self._dtype)
        drawn: Array = numbers.numpy()
        return drawn

    def aligned(self, rows: Array, t: Array, h: Array, down: Array) -> Array:
        """Ends `t + h` of steps, moved as `BrownianPath.aligned` does.

        Args:
            rows: which members, `(L,)`.
            t: starts, `(L,)`.
            h: proposed sizes, `(L,)`.
            down: where steps must not become longer, `(L,)`.
        """
        length, t0 = self.length[rows], self.t0[rows]
        unit = np.ldexp(1.0, np.floor(np.log2(h / length)).astype(np.int64) - 2)
        place = (t - t0 + h) / length / unit
        ends: Array = t0 + np.where(down, np.floor(place), np.rint(place)) * unit * length
        return ends

    def _ticks(self, rows: Array, t: Array) -> Array:
        at = np.rint((t - self.t0[rows]) * self._rates[rows]).astype(np.int64)
        ticks: Array = np.clip(at, 0, 1 << DEPTH)
        return ticks

    def increments(self, rows: Array, start: Array, end: Array) -> Motions:
        """The motions of some members, which may be named several times.

        Args:
            rows: which members, `(L,)`.
            start: of the intervals, `(L,)`.
            end: of these, `(L,)`.
        """
        times = np.stack([self._ticks(rows, start), self._ticks(rows, end)])
        w, j = self._down(rows, times)
        share = (times[1] - times[0]) / 2.0**DEPTH
        length = self.length[rows]
        scale = np.sqrt(length)[:, None].astype(w.dtype)
        h = np.maximum(share, 0.5**DEPTH)[:, None].astype(w.dtype)
        area = torch.from_numpy((j / h - w / 2) * scale)
        return Motions(share * length, torch.from_numpy(w * scale), area)

    def _down(self, rows: Array, times: Array) -> tuple[Array, Array]:
        """`W` and `J` of unit root intervals from `times[0]` to `times[1]`, `(L, N)` each."""
        # A time is found once the digits behind are zero; those of the root's ends all are.
        digits = np.where(times & _FRACTION, DEPTH - _trailing_zeros(times), 0)
        apart = _halvings_together(times)
        depths = np.maximum(digits, apart + 1)
        last = int(depths.max(initial=0))
        numbers = self._along(rows, times, depths, last)
        root, size = self._root[rows], self.size
        w = np.broadcast_to(root[:, :size], (2, len(rows), size)).copy()
        area = np.broadcast_to(root[:, size:] * math.sqrt(1 / 12), w.shape).copy()
        gathered = _Gathered.none(w)
        at_end = (times == 1 << DEPTH) & _SIDES
        for d in range(last):
            right = ((times >> (DEPTH - 1 - d)) & 1).astype(bool)
            going = (d < depths) & ~at_end
            own, beside = _halved(w, area, numbers[:, d], right, d)
            adding = going & (d > apart) & (right == _SIDES)
            if adding.any():
                gathered.add(*beside, adding[:, :, None], 0.5 ** (d + 1))
            mask = going[:, :, None]
            w, area = np.where(mask, own[0], w), np.where(mask, own[1], area)
        # First of all comes the cell that the way to the start has ended in.
        h = (0.5 ** depths[0].astype(w.dtype))[:, None]
        total_w, total_j = gathered.behind(w[0], h * (area[0] + w[0] / 2))
        nothing = (times[0] >= times[1])[:, None]
        return np.where(nothing, 0, total_w), np.where(nothing, 0, total_j)

    def _along(self, rows: Array, times: Array, depths: Array, last: int) -> Array:
        """The numbers of the cells that are halved on the ways, `(2, last, L, 2 N)`."""
        shifts = DEPTH - np.arange(last)[:, None]
        cells = times[:, None] >> shifts
        needed = np.arange(last)[:, None] < depths[:, None]
        kept_cells = np.full(cells.shape, -1, dtype=np.int64)
        shape = (*cells.shape, 2 * self.size)
        numbers = np.zeros(shape, dtype=self._root.dtype)
        known = min(last, self._cells.shape[1])
        if known and self._kept:
            kept_cells[:, :known] = self._cells[:, :known, rows]
            numbers[:, :known] = self._numbers[:, :known, rows]
        missing = needed & (kept_cells != cells)
        if known and self._kept:
            # The way to an end is often the next one to a start.
            for this, other in ((0, 1), (1, 0)):
                there = self._cells[other][:known, rows] == cells[this, :known]
                there &= missing[this, :known]
                d, at = np.nonzero(there)
                numbers[this, d, at] = self._numbers[other, d, rows[at]]
                missing[this, :known] &= ~there
        # Cells that both ways pass through are drawn once.
        shared = missing[1] & needed[0] & (cells[0] == cells[1])
        missing[1] &= ~shared
        way, d, at = np.nonzero(missing)
        if len(at):
            cell, width = cells[way, d, at], np.int64(1) << (DEPTH - d)
            numbers[way, d, at] = self._draw(rows[at], (cell * width, (cell + 1) * width))
        d, at = np.nonzero(shared)
        numbers[1, d, at] = numbers[0, d, at]
        if self._kept:
            self._keep(rows, np.where(needed, cells, kept_cells), numbers, last)
        return numbers

    def _keep(self, rows: Array, cells: Array, numbers: Array, last: int) -> None:
        """Keep the numbers of these ways for the next query."""
        more = last - self._cells.shape[1]
        if more > 0:
            count = len(self._seeds)
            none = np.full((2, more, count), -1, dtype=np.int64)
            empty = np.empty((2, more, count, 2 * self.size), dtype=numbers.dtype)
            self._cells = np.concatenate((self._cells, none), axis=1)
            self._numbers = np.concatenate((self._numbers, empty), axis=1)
        self._cells[:, :last, rows] = cells
        self._numbers[:, :last, rows] = numbers


@dataclass
class _Gathered:
    """What lies between two times, gathered from the middle outward: sums over each side.

    Attributes:
        w: `W` to the left and to the right of where the ways part, `(2, L, N)`.
        j: `J` of these, `(2, L, N)`.
        h: their lengths, `(2, L, 1)`.
    """

    w: Array
    j: Array
    h: Array

    @classmethod
    def none(cls, like: Array) -> _Gathered:
        """Nothing so far."""
        return cls(np.zeros_like(like), np.zeros_like(like), np.zeros_like(like[:, :, :1]))

    def add(self, w: Array, area: Array, mask: Array, h: float) -> None:
        """Add cells of length `h`: in front of what lies left, behind what lies right."""
        w = np.where(mask, w, 0)
        j = np.where(mask, h * (area + w / 2), 0)
        lengths = np.where(mask, h, 0)
        self.j[0] += j[0] + w[0] * self.h[0]
        self.j[1] += j[1] + self.w[1] * lengths[1]
        self.w += w
        self.h += lengths

    def behind(self, w: Array, j: Array) -> tuple[Array, Array]:
        """All of it, behind a first cell."""
        for side in (0, 1):
            j = j + w * self.h[side] + self.j[side]
            w = w + self.w[side]
        return w, j


def _halved(
    w: Array, area: Array, numbers: Array, right: Array, depth: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Increment and area of one half of each cell, and those of the other half.

    The formulas of `virtual_tree` with halves of equal length.

    Args:
        w: of the cells, `(2, L, N)`.
        area: of these.
        numbers: theirs, `(2, L, 2 N)`.
        right: whether the first of these is the right one, `(2, L)`.
        depth: how often the root was halved before.
    """
    n1, n2 = np.split(numbers, 2, axis=2)
    root = math.sqrt(0.5**depth)
    half, tilt = w / 2, 1.5 * area + n1 * (root / 4)
    mean, turn = area / 4 - n1 * (root / 8), n2 * (root * _C)
    sign = np.where(right, -1, 1)[:, :, None].astype(w.dtype)
    tilt, turn = sign * tilt, sign * turn
    return (half + tilt, mean + turn), (half - tilt, mean - turn)


def _trailing_zeros(x: Array) -> Array:
    """How many zeros a binary number ends in; of zero itself some."""
    lowest = np.maximum(x & -x, 1)
    zeros: Array = np.log2(lowest.astype(np.float64)).astype(np.int64)
    return zeros


def _halvings_together(times: Array) -> Array:
    """The last halving, `(L,)`, that comes before the ways to both times part; -1 for none.

    The way to the end of the root interval parts before the first.
    """
    differing = (times[0] ^ times[1]) & _FRACTION
    highest = np.floor(np.log2(np.maximum(differing, 1).astype(np.float64))).astype(np.int64)
    together: Array = np.where(times[1] == 1 << DEPTH, -1, DEPTH - 1 - highest)
    return together
