"""Brownian motions on a grid of equal steps: what a solve of fixed steps needs of them, quickly."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.stochastic.brownian import Path
from pysciml_node.stochastic.normals import GeneratedNormals
from pysciml_node.stochastic.ticks import Ticks
from pysciml_node.stochastic.virtual_tree import TOGETHER, Increment, VirtualTree

# Splits of one step that are kept.
_DEPTH = 32


class GridPath(Path):
    """`size` independent Brownian motions from `t0`, drawn step by step.

    A step's increment is one draw of torch's generator, seeded by its place, so it is the same
    whenever it is asked for. Small ones are drawn many at a time. A part of a step is found by
    splitting it. Another `dt` gives another path.

    Args:
        seed: chooses the path.
        size: how many motions.
        like: has their dtype and device.
        t0: start.
        dt: size of the steps.
        length: of the interval.
        area: whether space-time Levy areas are asked for.
    """

    def __init__(
        self, seed: int, size: int, like: Tensor, t0: float, dt: float, length: float, *, area: bool
    ) -> None:
        self.length, self._dt, self._size = length, dt, size
        self._seed, self._like = seed, like
        self._rows = 2 if area else 1
        self._ticks = Ticks.of_steps(t0, dt, max(length, dt))
        self._whole = round(dt / self._ticks.length)
        steps = math.ceil(length / dt)
        self._together = max(1, min(steps, TOGETHER // (self._rows * max(1, size))))
        self._generator = torch.Generator(like.device)
        self._normals = GeneratedNormals(seed, like.dtype, like.device)
        # The steps drawn last, by the place of the first; the step that was split last.
        self._drawn: tuple[int, list[Increment]] = (-1, [])
        self._split: tuple[int, VirtualTree | None] = (-1, None)

    @override
    def aligned(self, t: float, h: float, down: bool) -> float:
        return t + h

    @override
    def increment(self, start: float, end: float) -> Increment:
        a, b = self._ticks.at(start), self._ticks.at(end)
        n, inside = divmod(a, self._whole)
        if not inside and b - a == self._whole:
            return self._step(n)
        found: Increment | None = None
        while found is None or a < b:
            stop = min(b, (n + 1) * self._whole)
            part = self._part(n, a, stop)
            found = part if found is None else found.then(part)
            a, n = stop, n + 1
        return found

    def _step(self, n: int) -> Increment:
        """The motion over a whole step."""
        group, place = divmod(n, self._together)
        if self._drawn[0] != group:
            self._drawn = group, self._draw(group)
        return self._drawn[1][place]

    def _draw(self, group: int) -> list[Increment]:
        """The motions over a group of steps that follow each other."""
        like, shape = self._like, (self._rows, self._together, self._size)
        # What is kept must not belong to one caller's mode.
        with torch.inference_mode(False):
            generator = self._generator.manual_seed((self._seed + group) % 2**63)
            numbers = torch.randn(
                shape, generator=generator, dtype=like.dtype, device=like.device
            ).mul_(math.sqrt(self._dt))
            if self._rows == 1:
                return [Increment(self._dt, w, None) for w in numbers[0].unbind()]
            areas = numbers[1].mul_(1 / math.sqrt(12))
            pairs = zip(numbers[0].unbind(), areas.unbind(), strict=True)
            return [Increment(self._dt, w, area) for w, area in pairs]

    def _part(self, n: int, start: int, stop: int) -> Increment:
        """The motion over a part of a step, from one tick to another."""
        if stop - start == self._whole:
            return self._step(n)
        place, tree = self._split
        if tree is None or place != n:
            ends = n * self._whole, (n + 1) * self._whole
            area = self._rows == 2
            tree = VirtualTree(
                self._normals, self._size, ends, self._ticks, area=area, depth=_DEPTH
            )
            step = self._step(n)
            tree.given(step.w, step.area)
            self._split = n, tree
        with torch.inference_mode(False):
            return tree.motion(start, stop)
