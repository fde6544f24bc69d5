"""The Brownian motions of a solve: a function of a seed, the same path whoever asks, in any order.

References: J. Foster, T. Lyons, H. Oberhauser, SIAM J. Numer. Anal. 58 (2020) 1393-1421; A.
Jelincic, J. Foster, P. Kidger, arXiv 2405.06464.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from typing_extensions import override

from pysciml_node.stochastic.normals import PlacedNormals
from pysciml_node.stochastic.ticks import Ticks
from pysciml_node.stochastic.virtual_tree import Increment, VirtualTree

DEPTH = 32
"""Times are told apart to `2**-DEPTH` of the root interval."""


class Path(ABC):
    """The Brownian motions of a solve.

    Attributes:
        length: of the interval that they are known on.
    """

    length: float

    @abstractmethod
    def increment(self, start: float, end: float) -> Increment:
        """The motion from `start` to `end`; bit for bit the same whenever it is asked for."""

    @abstractmethod
    def aligned(self, t: float, h: float, down: bool) -> float:
        """The end `t + h` of a step moved to a time that is found quickly.

        It changes by an eighth of `h` at most, or becomes earlier by a quarter at most where `down`
        says that steps must not become longer.
        """


class BrownianPath(Path):
    """`size` independent Brownian motions on `(t0, t0 + length)`, given by a seed.

    Args:
        normals: the numbers the path is made of.
        size: how many motions.
        t0: start.
        length: length of the tree's root interval, which is halved. Times that are a whole number
            of `length / 2**k` from `t0` are found in about `k` halvings, all others in `DEPTH`.
    """

    def __init__(self, normals: PlacedNormals, size: int, t0: float, length: float) -> None:
        self.normals, self.t0, self.length = normals, t0, length
        ticks = Ticks(DEPTH, 0, 1.0, t0, length)
        self.tree = VirtualTree(normals, size, (0, 2**DEPTH), ticks, area=True, depth=DEPTH)

    @override
    def aligned(self, t: float, h: float, down: bool) -> float:
        # Steps keep three binary digits.
        unit = math.ldexp(1.0, math.floor(math.log2(h / self.length)) - 2)
        place = (t - self.t0 + h) / self.length / unit
        return self.t0 + (math.floor(place) if down else round(place)) * unit * self.length

    @override
    def increment(self, start: float, end: float) -> Increment:
        return self.tree.motion(self._position(start), self._position(end))

    def _position(self, t: float) -> int:
        """A time as a whole number of the finest intervals."""
        return min(max(self.tree.ticks.at(t), 0), 1 << DEPTH)
