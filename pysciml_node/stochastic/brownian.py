"""Brownian motion that is a function of its seed: the same path, whoever asks, in any order.

A virtual Brownian tree: the interval is halved again and again, and each half's increment `W` and
space-time Levy area `H = (1/h) int (W_s - (s/h) W) ds` follow from the whole's by two normal
numbers, which a counter-based generator gives for the place in the tree. Nothing is stored but the
last branch that was looked at.

For halves of an interval of length `h`, with independent standard normals `n1, n2`,

    W_left = W/2 + 3/2 H + sqrt(h)/4 n1,         W_right = W - W_left,
    H_left, H_right = H/4 - sqrt(h)/8 n1 +- sqrt(h/48) n2.

References: J. Foster, T. Lyons, H. Oberhauser, SIAM J. Numer. Anal. 58 (2020) 1393-1421; A.
Jelincic, J. Foster, P. Kidger, arXiv 2405.06464; J. K. Salmon et al., Parallel random numbers: as
easy as 1, 2, 3, SC 2011 (Philox); G. E. P. Box, M. E. Muller, Ann. Math. Stat. 29 (1958) 610-611.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DEPTH = 32
"""Times are told apart to `2**-DEPTH` of the root interval."""

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Increment:
    """Brownian motion over an interval of length `h`.

    Attributes:
        h: length.
        w: `W(t + h) - W(t)`, shape `(M,)`.
        area: space-time Levy area `H`, shape `(M,)`: normal with variance `h / 12`, independent of
            `w`.
    """

    h: float
    w: Tensor
    area: Tensor

    def then(self, other: Increment) -> Increment:
        """This interval and the one that follows it, as one."""
        h = self.h + other.h
        area = (
            self.area * (self.h / h)
            + other.area * (other.h / h)
            + self.w * (other.h / (2 * h))
            - other.w * (self.h / (2 * h))
        )
        return Increment(h, self.w + other.w, area)


def _mixed(*words: int) -> int:
    """A 63-bit hash of integers (the finalizer of splitmix64, chained)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Normals:
    """Standard normal numbers as a function of a seed and a counter.

    On the CPU by Philox with the seed as its key; elsewhere by the device's own counter-based
    generator, seeded with a hash. Paths agree on one kind of device only.

    Args:
        seed: chooses the numbers.
        size: how many at a time.
        dtype: float32 or float64; others are drawn in float32.
        device: where they are made.
    """

    def __init__(self, seed: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.size, self.dtype, self.device = seed, size, dtype, device
        self._wide = dtype == torch.float64

    def pair(self, level: int, index: int) -> Tensor:
        """Two vectors of numbers for a place in the tree, shape `(2, size)`."""
        if self.device.type != "cpu":
            generator = torch.Generator(self.device)
            generator.manual_seed(_mixed(self.seed, level, index))
            drawn = torch.randn(
                (2, self.size),
                generator=generator,
                dtype=torch.float64 if self._wide else torch.float32,
                device=self.device,
            )
            return drawn.to(self.dtype)
        # The counter's first word counts the draws themselves.
        source = np.random.Philox(key=[self.seed, 0], counter=[0, 0, index, level])
        # Two numbers of 32 bits come from each word.
        words = source.random_raw(2 * self.size if self._wide else self.size)
        bits = words.view(np.int64 if self._wide else np.int32).reshape(2, self.size)
        return _normal(torch.from_numpy(bits)).to(self.dtype)

    def increment(self, level: int, index: int, h: float) -> Increment:
        """An increment over an interval of length `h` of which nothing is known."""
        first, second = self.pair(level, index).unbind()
        return Increment(h, first * math.sqrt(h), second * math.sqrt(h / 12))


def _normal(bits: Tensor) -> Tensor:
    """Normal numbers from integers of all bits, shape `(2, size)`, by Box and Muller's formula.

    Of 32 bits in float32, of 64 in float64. Several times faster than the sequential methods.
    """
    wide = bits.dtype == torch.int64
    scale = 2.0 ** (-63 if wide else -31)
    uniform, angle = bits.to(torch.float64 if wide else torch.float32).unbind()
    # In (0, 1]: half a unit keeps the logarithm finite.
    radius = uniform.abs_().add_(0.5).mul_(scale).log_().mul_(-2).sqrt_()
    angle.mul_(math.pi * scale)
    return torch.stack((torch.cos(angle), torch.sin(angle))).mul_(radius)


class BrownianPath:
    """`size` independent Brownian motions on `(t0, t0 + length)`, given by a seed.

    Args:
        normals: the numbers the path is made of.
        t0: start.
        length: length of the tree's root interval. Times that are a whole number of
            `length / 2**k` from `t0` are found in about `k` halvings, all others in `DEPTH`.
    """

    def __init__(self, normals: Normals, t0: float, length: float) -> None:
        self.normals, self.t0, self.length = normals, t0, length
        self._root: Increment | None = None
        # By level: the index of a parent, and its two halves.
        self._branch: dict[int, tuple[int, tuple[Increment, Increment]]] = {}

    def position(self, t: float) -> int:
        """A time as a whole number of the finest intervals."""
        return round(math.ldexp(min(max((t - self.t0) / self.length, 0.0), 1.0), DEPTH))

    def aligned(self, t: float, h: float, down: bool) -> float:
        """The end `t + h` of a step moved to a time that is found quickly.

        Steps keep three binary digits: they change by an eighth at most, or become shorter by a
        quarter at most where `down` says that they must not become longer.
        """
        unit = math.ldexp(1.0, math.floor(math.log2(h / self.length)) - 2)
        place = (t - self.t0 + h) / self.length / unit
        return self.t0 + (math.floor(place) if down else round(place)) * unit * self.length

    def increment(self, start: float, end: float) -> Increment:
        """The motion from `start` to `end`; bit for bit the same whenever it is asked for."""
        at, stop = self.position(start), self.position(end)
        total: Increment | None = None
        while at < stop:
            size = at & -at if at else 2**DEPTH
            while at + size > stop:
                size >>= 1
            level = DEPTH - size.bit_length() + 1
            piece = self._node(level, at // size)
            total = piece if total is None else total.then(piece)
            at += size
        if total is None:
            zero = torch.zeros(
                self.normals.size, dtype=self.normals.dtype, device=self.normals.device
            )
            return Increment(0.0, zero, zero)
        return total

    def _node(self, level: int, index: int) -> Increment:
        """The motion over interval `index` of the `2**level` equal ones."""
        known = level
        while known > 0:
            branch = self._branch.get(known)
            if branch is not None and branch[0] == index >> (level - known + 1):
                break
            known -= 1
        if known == 0:
            if self._root is None:
                self._root = self.normals.increment(0, 0, self.length)
            node = self._root
        else:
            node = self._branch[known][1][(index >> (level - known)) & 1]
        for depth in range(known + 1, level + 1):
            parent = index >> (level - depth + 1)
            halves = self._split(depth, parent, node)
            self._branch[depth] = (parent, halves)
            node = halves[(index >> (level - depth)) & 1]
        return node

    def _split(self, depth: int, parent: int, whole: Increment) -> tuple[Increment, Increment]:
        first, second = self.normals.pair(depth, parent).unbind()
        root = math.sqrt(whole.h)
        half = whole.h / 2
        left = whole.w / 2 + 1.5 * whole.area + root / 4 * first
        common = whole.area / 4 - root / 8 * first
        apart = math.sqrt(whole.h / 48) * second
        return (
            Increment(half, left, common + apart),
            Increment(half, whole.w - left, common - apart),
        )
