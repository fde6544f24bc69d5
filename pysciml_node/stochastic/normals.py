"""Standard normal numbers as a function of a seed and a place.

References: G. E. P. Box, M. E. Muller, Ann. Math. Stat. 29 (1958) 610-611; C. Doty-Humphrey,
PractRand, http://pracrand.sourceforge.net (SFC64); G. L. Steele, D. Lea, C. H. Flood, Fast
splittable pseudorandom number generators, OOPSLA 2014 (splitmix64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

_MASK = 2**64 - 1


def mixed(*words: int) -> int:
    """A 64-bit hash of integers (the finalizer of splitmix64, chained)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@cache
def _place() -> Any:
    """The class of the states that generators start from, each made of a hash.

    Made when first needed: `numpy.random` takes a tenth of a second to import.
    """
    from numpy.random.bit_generator import ISeedSequence

    class Place(ISeedSequence):
        def __init__(self, hashed: int) -> None:
            self._hashed = hashed

        def generate_state(self, n_words: int, dtype: Any = np.uint64) -> Any:
            """Words of 64 bits; numpy's generators ask for them."""
            return np.array([mixed(self._hashed, i) for i in range(n_words)], dtype=np.uint64)

    return Place


def words_of(hashed: int, count: int) -> Any:
    """Words of 64 bits that follow from a hash."""
    return np.random.SFC64(_place()(hashed)).random_raw(count)


class PlacedNormals:
    """Vectors of independent standard normal numbers, each for a place given by integers.

    On the CPU by SFC64, started from a hash of seed and place; elsewhere by the device's own
    generator, seeded with such a hash. Numbers agree on one kind of device only.

    Args:
        seed: chooses the numbers.
        dtype: float32 or float64.
        device: where they are made.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.dtype, self.device = seed, dtype, device

    def at(self, places: Sequence[tuple[int, ...]], size: int) -> Tensor:
        """`size` numbers for each of several places, `(len(places), size)`."""
        if self.device.type != "cpu":
            return self._generated(places, size)
        wide = self.dtype == torch.float64
        # Box and Muller's formula makes two numbers of two; two of 32 bits come from each word.
        count = 2 * ((size + 1) // 2) if wide else (size + 1) // 2
        words = [words_of(mixed(self.seed, *place), count) for place in places]
        together = words[0] if len(words) == 1 else np.concatenate(words)
        bits = torch.from_numpy(together.view(np.int64 if wide else np.int32))
        return normal(bits.view(len(places), 2, -1), self.dtype)[:, :size]

    def _generated(self, places: Sequence[tuple[int, ...]], size: int) -> Tensor:
        """By torch's generator for the device."""
        generator, rows = torch.Generator(self.device), []
        for place in places:
            generator.manual_seed(mixed(self.seed, *place) >> 1)
            rows.append(
                torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)
            )
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)


class GeneratedNormals(PlacedNormals):
    """The same by torch's generator on the CPU, too: faster, but it tells 2**32 seeds apart there.

    Two of 1,000 places have the same numbers in one case of ten thousand.
    """

    @override
    def at(self, places: Sequence[tuple[int, ...]], size: int) -> Tensor:
        return self._generated(places, size)


def normal(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal numbers, `(n, 2 m)`, from integers of all bits, `(n, 2, m)`."""
    scale = 2.0 ** (1 - torch.iinfo(bits.dtype).bits)
    uniform, angle = bits.to(dtype).unbind(1)
    # In (0, 1]: half a unit keeps the logarithm finite.
    radius = uniform.abs_().add_(0.5).mul_(scale).log_().mul_(-2).sqrt_()
    angle.mul_(math.pi * scale)
    return torch.cat((torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)), dim=-1)
