"""The states that torchdiffeq takes: parts of any shapes, brought to one dtype as it does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a state lies in a flat vector.

    Attributes:
        shapes: of its parts.
        single: whether it is one tensor rather than a tuple.
    """

    shapes: tuple[torch.Size, ...]
    single: bool

    @classmethod
    def of(cls, y: Any) -> Layout:
        """That of a state."""
        if isinstance(y, Tensor):
            return cls((y.shape,), True)
        return cls(tuple(part.shape for part in y), False)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of entries of the parts."""
        return tuple(shape.numel() for shape in self.shapes)

    def flat(self, y: Any) -> Tensor:
        """A state as a vector `(N,)`."""
        if self.single:
            vector: Tensor = y.reshape(-1)
            return vector
        return torch.cat([part if part.ndim == 1 else part.reshape(-1) for part in y])

    def state(self, vector: Tensor, lead: tuple[int, ...] = ()) -> Any:
        """A vector `(*lead, N)` as a state with leading dimensions."""
        if self.single:
            return vector.reshape((*lead, *self.shapes[0]))
        pieces = torch.split(vector, list(self.sizes), dim=-1)
        shaped = zip(pieces, self.shapes, strict=True)
        return tuple(
            # A vector's part has its shape already.
            piece if len(shape) == 1 else piece.reshape((*lead, *shape))
            for piece, shape in shaped
        )


def promoted(y: Any) -> Any:
    """A state whose parts have one dtype: that to which theirs are promoted."""
    if isinstance(y, Tensor) or len({part.dtype for part in y}) == 1:
        return y
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in y))
    return tuple(part.to(dtype) for part in y)


class Fitted:
    """A field whose output is brought to the state's dtype and shapes.

    torchdiffeq adds what the field returns to the state, and so lets it broadcast; of a tuple it
    joins the parts, whatever their shapes are.

    Args:
        func: the field.
        y0: a state.
    """

    def __init__(self, func: Callable[..., Any], y0: Any) -> None:
        self.func = func
        parts = (y0,) if isinstance(y0, Tensor) else y0
        self.shapes, self.dtype = tuple(part.shape for part in parts), parts[0].dtype
        self.single = isinstance(y0, Tensor)

    def __call__(self, t: Tensor, y: Any) -> Any:
        """Evaluate the field."""
        out = self.func(t, y)
        if self.single:
            return self._fit(out, self.shapes[0])
        if not isinstance(out, tuple | list) or len(out) != len(self.shapes):
            return out
        return tuple(self._fit(part, shape) for part, shape in zip(out, self.shapes, strict=True))

    def _fit(self, part: Any, shape: torch.Size) -> Any:
        if not isinstance(part, Tensor) or (part.shape == shape and part.dtype == self.dtype):
            return part
        if part.is_complex() and not self.dtype.is_complex:
            return part
        if part.shape != shape:
            same = part.numel() == shape.numel() and not self.single
            if same:
                part = part.reshape(shape)
            elif _broadcasts(part.shape, shape):
                part = part.expand(shape)
        return part.to(self.dtype)


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return all(size in (1, wanted) for size, wanted in pairs)


def rms(part: Tensor) -> Tensor:
    """Root-mean-square of a tensor; 0 of one without entries."""
    norm: Tensor = torch.linalg.vector_norm(part) / math.sqrt(max(part.numel(), 1))
    return norm


def mixed(parts: Sequence[Tensor]) -> Tensor | float:
    """The largest root-mean-square of the parts of a tuple."""
    return torch.stack([rms(part) for part in parts]).max() if parts else 0.0
