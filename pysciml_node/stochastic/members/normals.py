"""The numbers of `PlacedNormals` for many seeds and places at once.

Hash and generator are those of `stochastic.normals`, written for arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.stochastic.normals import normal, words_of

_U = np.uint64
# A generator for each place draws more numbers than these faster than one pass over all places.
_FEW = 48


def mixed_all(*words: Any) -> Array:
    """The hashes `stochastic.normals.mixed` of arrays of integers, entry by entry."""
    state: Any = _U(0)
    for word in words:
        state = state + np.asarray(word, dtype=_U) + _U(0x9E3779B97F4A7C15)
        state = (state ^ (state >> _U(30))) * _U(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> _U(27))) * _U(0x94D049BB133111EB)
        state = state ^ (state >> _U(31))
    hashes: Array = state
    return hashes


def _words(hashes: Array, count: int) -> Array:
    """Words of 64 bits of SFC64 started from each hash, `(n, count)`."""
    if count > _FEW:
        return np.stack([words_of(int(x), count) for x in hashes])
    a, b, c = (mixed_all(hashes, i) for i in range(3))
    words = np.empty((count, len(hashes)), dtype=_U)
    # The first twelve are thrown away, as numpy does.
    for i in range(-12, count):
        out = a + b + _U(13 + i)
        a = b ^ (b >> _U(11))
        b = c + (c << _U(3))
        c = ((c << _U(24)) | (c >> _U(40))) + out
        if i >= 0:
            words[i] = out
    return np.ascontiguousarray(words.T)


def normals_at(seeds: Array, places: tuple[Array, ...], size: int, dtype: torch.dtype) -> Tensor:
    """`size` standard normal numbers for each seed and place, `(n, size)`.

    Args:
        seeds: one for each, `(n,)` of 64 bits.
        places: the integers of the places, `(n,)` each.
        size: how many numbers.
        dtype: float32 or float64.
    """
    wide = dtype == torch.float64
    count = 2 * ((size + 1) // 2) if wide else (size + 1) // 2
    with np.errstate(over="ignore"):
        words = _words(mixed_all(seeds, *places), count)
    bits = torch.from_numpy(words.view(np.int64 if wide else np.int32))
    return normal(bits.view(len(seeds), 2, -1), dtype)[:, :size]
