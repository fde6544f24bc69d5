"""A few long vectors and their linear combinations: all the linear algebra of a solver.

There are three ways to hold them, and the cheapest is taken. `StackedVectors` copies them into one
matrix, so a combination is a single fused call: for short vectors, and on other devices.
`BlockedVectors` keeps references and works through blocks that fit a core's cache, without copies:
for long vectors on a CPU, where memory bandwidth decides. `RecordedVectors` keeps autograd's graph.

A vector is flat, `(N,)`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.steps.alone import storage_uses
from pysciml_node.steps.norms import ErrorNorm

Real = float | Tensor

# Above `_LONG` entries blocks beat the copies into one matrix. Blocks have about `_BLOCK` entries:
# those of a few vectors fit a core's cache.
_LONG = 32_768
_BLOCK = 50_000
# So many terms are added one by one: with a graph they take less time than a matrix of them, and
# sums with a graph are those without to the last bit.
_FEW = 4


@functools.cache
def settle_heap() -> None:
    """Make the C library keep freed vectors, once for the process.

    glibc returns large freed blocks to the system and pages them in anew, zeroed, at each use. That
    takes half the time of a step with long states. Freeing one block raises glibc's threshold to
    that block's size (32 MB at most), for good. With another allocator it costs microseconds.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@dataclass(frozen=True)
class Weights:
    """Coefficients of a combination, as numbers and as a tensor of the state's dtype."""

    numbers: tuple[float, ...]
    tensor: Tensor

    @classmethod
    def of(cls, numbers: tuple[float, ...], like: Tensor) -> Weights:
        """Weights with the dtype and device of `like`."""
        return cls(numbers, torch.tensor(numbers, dtype=torch.float64).to(like))

    @functools.cached_property
    def terms(self) -> tuple[tuple[int, float], ...]:
        """The vectors that have a part in the sum, with their coefficients."""
        return tuple((j, w) for j, w in enumerate(self.numbers) if w != 0.0)


class Vectors(ABC):
    """Numbered vectors of one length."""

    @abstractmethod
    def put(self, i: int, vector: Tensor) -> None:
        """Store vector `i`, and forget the vectors after it."""

    @abstractmethod
    def get(self, i: int) -> Tensor:
        """Vector `i`, valid until it is replaced."""

    @abstractmethod
    def combine(self, base: Tensor | None, h: Real, weights: Weights) -> Tensor:
        """`base + h * sum_j weights_j v_j` over the first vectors, a new tensor."""

    @abstractmethod
    def combine_many(self, base: Tensor | None, h: Real, weights: Tensor) -> Tensor:
        """`combine` for each row of `weights`, shape `(m, n)`; returns `(m, N)`."""

    def raw_norm(self, weights: Weights, u: Tensor, u1: Tensor, norm: ErrorNorm) -> Tensor:
        """`norm.raw` of `sum_j weights_j v_j`; 0-d."""
        return norm.raw(self.combine(None, 1.0, weights), norm.scale(u, u1))

    def recycle(self, vector: Tensor) -> None:  # noqa: B027 - most holders have no use for it
        """Take back a vector that `combine` has made and the caller no longer needs."""


class StackedVectors(Vectors):
    """Vectors as the rows of one buffer `(count, N)`."""

    def __init__(self, count: int, like: Tensor) -> None:
        self._buffer = like.new_empty((count, like.numel()))
        self._rows = self._buffer.unbind()
        # The first i vectors as columns, made once: slicing costs more than the product.
        self._heads: dict[int, Tensor] = {}

    @override
    def put(self, i: int, vector: Tensor) -> None:
        self._rows[i].copy_(vector)

    @override
    def get(self, i: int) -> Tensor:
        return self._rows[i]

    @override
    def combine(self, base: Tensor | None, h: Real, weights: Weights) -> Tensor:
        assert not isinstance(h, Tensor)
        if base is not None and 0 < len(weights.terms) <= _FEW:
            return _one_by_one(base, h, weights, self._rows)
        count = len(weights.numbers)
        columns = self._heads.get(count)
        if columns is None:
            size = self._buffer.shape[1]
            columns = self._heads[count] = self._buffer.as_strided((size, count), (1, size))
        if base is None:
            return torch.addmv(self._rows[0], columns, weights.tensor, beta=0, alpha=h)
        return torch.addmv(base, columns, weights.tensor, alpha=h)

    @override
    def combine_many(self, base: Tensor | None, h: Real, weights: Tensor) -> Tensor:
        rows = self._buffer[: weights.shape[1]]
        scale = cast(float, h)
        if base is None:
            return torch.addmm(rows[:1], weights, rows, beta=0, alpha=scale)
        return torch.addmm(base.expand(weights.shape[0], -1), weights, rows, alpha=scale)


def _one_by_one(base: Tensor, h: float, weights: Weights, vectors: Sequence[Tensor]) -> Tensor:
    """`base + h * sum_j weights_j v_j`, term by term."""
    for j, weight in weights.terms:
        base = torch.add(base, vectors[j], alpha=h * weight)
    return base


class BlockedVectors(Vectors):
    """References to the vectors, combined block by block."""

    def __init__(self, like: Tensor) -> None:
        settle_heap()
        self._vectors: list[Tensor] = []
        self._versions: list[int] = []
        self._blocks: list[tuple[Tensor, ...]] = []
        self._size = math.ceil(like.numel() / round(like.numel() / _BLOCK + 0.5))
        self._scratch = [like.new_empty(self._size) for _ in range(3)]
        self._base: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._spare: Tensor | None = None
        self._uses = storage_uses(like.new_empty(1))

    @override
    def put(self, i: int, vector: Tensor) -> None:
        del self._vectors[i:], self._versions[i:], self._blocks[i:]
        # A view shares its base's version: it tells a constant field from one that reuses memory.
        held = zip(self._vectors, self._versions, strict=True)
        if any(v.data_ptr() == vector.data_ptr() and n != vector._version for v, n in held):
            raise RuntimeError(
                "the field returned the same memory for two evaluations, and so has overwritten "
                "its earlier result.\n  Return a new tensor each time, for example out.clone()."
            )
        self._vectors.append(vector)
        self._versions.append(vector._version)
        self._blocks.append(torch.split(vector, self._size))

    @override
    def get(self, i: int) -> Tensor:
        return self._vectors[i]

    @override
    def combine(self, base: Tensor | None, h: Real, weights: Weights) -> Tensor:
        terms = [(j, cast(float, h) * w) for j, w in weights.terms]
        like = self._vectors[0] if base is None else base
        if not terms:
            return torch.zeros_like(like) if base is None else base.clone()
        out, self._spare = self._spare, None
        if out is None:
            out = torch.empty_like(like)
        (i, w), *rest = terms
        starts = self._base_blocks(base)
        blocks = torch.split(out, self._size)
        # Go from the end: the last blocks of the last vector are still in the cache.
        for n in reversed(range(len(blocks))):
            block = blocks[n]
            if starts is None:
                torch.mul(self._blocks[i][n], w, out=block)
            else:
                torch.add(starts[n], self._blocks[i][n], alpha=w, out=block)
            for j, v in rest:
                block.add_(self._blocks[j][n], alpha=v)
        return out

    def _base_blocks(self, base: Tensor | None) -> tuple[Tensor, ...] | None:
        if base is None:
            return None
        if self._base is None or self._base[0] is not base:
            self._base = (base, torch.split(base, self._size))
        return self._base[1]

    @override
    def recycle(self, vector: Tensor) -> None:
        # Only if neither the field nor its output has kept it, or a view of it.
        if self._uses is not None and storage_uses(vector) == self._uses:
            self._spare = vector

    @override
    def combine_many(self, base: Tensor | None, h: Real, weights: Tensor) -> Tensor:
        rows = [self.combine(base, h, Weights(tuple(row.tolist()), row)) for row in weights]
        return torch.stack(rows)

    @override
    def raw_norm(self, weights: Weights, u: Tensor, u1: Tensor, norm: ErrorNorm) -> Tensor:
        if norm.shift is None:
            return super().raw_norm(weights, u, u1, norm)
        (i, w), *rest = weights.terms
        norms = []
        starts = torch.split(norm.counted(u), self._size)
        ends = torch.split(norm.counted(u1), self._size)
        for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
            size = start.numel()
            error, scale, end_size = (block[:size] for block in self._scratch)
            torch.mul(self._blocks[i][n][:size], w, out=error)
            for j, v in rest:
                error.add_(self._blocks[j][n][:size], alpha=v)
            torch.abs(start, out=scale)
            torch.maximum(scale, torch.abs(end, out=end_size), out=scale)
            error.div_(scale.add_(norm.shift))
            norms.append(torch.linalg.vector_norm(error))
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total


class RecordedVectors(Vectors):
    """Separate tensors with their autograd history.

    They may have another shape than flat ones, which a `combine` with a base then has too.
    """

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []

    @override
    def put(self, i: int, vector: Tensor) -> None:
        del self._vectors[i:]
        self._vectors.append(vector)

    @override
    def get(self, i: int) -> Tensor:
        return self._vectors[i]

    @override
    def combine(self, base: Tensor | None, h: Real, weights: Weights) -> Tensor:
        count = len(weights.numbers)
        if base is not None and not isinstance(h, Tensor):
            if 0 < len(weights.terms) <= _FEW or _is_long(base):
                # Long ones as blocks are: backward costs as much as the memory it moves.
                return _one_by_one(base, h, weights, self._vectors)
            # Few nodes in the graph: backward costs as much as the nodes it visits.
            flat = base if base.dim() == 1 else base.reshape(-1)
            total = torch.addmv(flat, self._rows(count).T, weights.tensor, alpha=h)
            return total if flat is base else total.view(base.shape)
        increment = h * torch.mv(self._rows(count).T, weights.tensor)
        return increment if base is None else base + increment

    @override
    def combine_many(self, base: Tensor | None, h: Real, weights: Tensor) -> Tensor:
        increment = h * (weights @ self._rows(weights.shape[1]))
        return increment if base is None else base + increment

    def _rows(self, count: int) -> Tensor:
        """The first vectors as rows, `(count, N)`."""
        rows = torch.stack(self._vectors[:count])
        return rows if rows.dim() == 2 else rows.reshape(count, -1)


def _is_long(like: Tensor) -> bool:
    """Whether copies of a vector would take longer than the sums."""
    return like.device.type == "cpu" and like.numel() > _LONG and not like.is_complex()


def vectors_like(like: Tensor, count: int) -> Vectors:
    """The cheapest holder of `count` vectors like this one, without a graph for autograd."""
    if _is_long(like):
        return BlockedVectors(like)
    return StackedVectors(count, like)
