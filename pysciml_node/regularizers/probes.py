"""Probes of a Jacobian: the vectors whose products stand for its trace and its norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from operator import is_
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.state import State, tensors_of

Distribution = Literal["rademacher", "gaussian"]

# Up to this many dimensions the exact Jacobian costs little more than a probe.
_SMALL = 4
# Entries of unit vectors that are kept for later solves.
_MOST_ENTRIES = 1 << 16


def batch_of(state: State) -> int:
    """The number of samples in a state: the length of its first axis.

    A state whose parts have one axis at most is a single system of coupled entries. Beside a part
    with more axes, a part with one axis holds a number for each sample.

    Raises:
        ValueError: parts of different batch sizes.
    """
    if isinstance(state, Tensor):
        return state.shape[0] if state.ndim > 1 else 1
    parts = list(tensors_of(state))
    if all(part.ndim < 2 for part in parts):
        return 1
    sizes = {part.shape[0] if part.ndim else None for part in parts}
    if len(sizes) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(
            f"the parts of a state that is regularized must have one batch size, but are of shapes "
            f"{shapes}.\n  Put the batch first in every part."
        )
    return parts[0].shape[0]


def samples_of(u: Tensor, batch: int) -> Tensor:
    """A state of `batch` samples as `(B, D)`: the axes after the batch are flattened."""
    return u.flatten(1) if u.ndim > 1 else u.reshape(batch, -1)


def squares(x: Tensor) -> Tensor:
    """Squared magnitude of each entry, real."""
    return x.real.square() + x.imag.square() if x.is_complex() else x.square()


def check_distribution(distribution: str) -> Distribution:
    """The name of a probe's distribution.

    Raises:
        ValueError: an unknown name.
    """
    known: tuple[Distribution, ...] = get_args(Distribution)
    return checks.choice("distribution", distribution, known)


class Probes:
    """The probes of one solve: made once, fixed through it, and shared.

    All that ask for equal probes get the same ones, and share their vector-Jacobian products too.

    Args:
        like: a state, `(B, *D)`, or `(D,)` for a single system.
        batch: number of samples in it.
    """

    def __init__(self, like: Tensor, batch: int) -> None:
        self.like, self.batch = like, batch
        self._basis: list[Tensor] | None = None
        self._random: dict[tuple[Distribution, int | None], Tensor] = {}

    @property
    def dimensions(self) -> int:
        """Entries of one sample."""
        return self.like.numel() // self.batch

    def of(
        self, exact: bool | None, distribution: Distribution, generator: torch.Generator | None
    ) -> list[Tensor]:
        """Unit vectors, whose products give the Jacobian itself, or one random probe.

        Args:
            exact: whether to take unit vectors; default where there are at most four dimensions.
            distribution: of the random probe's entries.
            generator: draws the probe. Without one, an earlier probe of this distribution is taken
                if there is any.
        """
        small = self.dimensions <= _SMALL
        if small if exact is None else exact:
            if self._basis is None:
                kept = kept_basis(self.like, self.batch)
                self._basis = basis_probes(self.like, self.batch) if kept is None else kept
            return self._basis
        drawn = [probe for key, probe in self._random.items() if key[0] == distribution]
        if generator is None and drawn:
            return [drawn[0]]
        key = (distribution, None if generator is None else id(generator))
        if key not in self._random:
            self._random[key] = draw_probe(self.like, distribution, generator)
        return [self._random[key]]

    def are_kept(self, vectors: Sequence[Tensor]) -> bool:
        """Whether later solves of such states get these very vectors."""
        kept = kept_basis(self.like, self.batch)
        return kept is not None and len(kept) == len(vectors) and all(map(is_, kept, vectors))


def draw_probe(
    like: Tensor, distribution: Distribution, generator: torch.Generator | None
) -> Tensor:
    """A random vector `e` with `E[e e^H] = I`, like a state; complex ones with `E[e e^T] = 0`."""
    options: dict[str, Any] = {"generator": generator, "device": like.device}
    if distribution == "gaussian":
        return torch.randn(like.shape, dtype=like.dtype, **options)
    if like.is_complex():
        signs = 2 * torch.randint(0, 2, (*like.shape, 2), **options) - 1
        return torch.view_as_complex(signs.to(like.dtype.to_real()) / math.sqrt(2))
    signs = torch.randint(0, 2, like.shape, **options)
    return (2 * signs - 1).to(like.dtype)


def kept_basis(like: Tensor, batch: int) -> list[Tensor] | None:
    """`basis_probes`, the same tensors for all states of a kind; `None` where they are large."""
    ordinary = not (
        like.is_inference()
        or torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )
    if not ordinary or like.numel() ** 2 // batch > _MOST_ENTRIES:
        return None
    return [*_known_basis(like.shape, like.dtype, like.device, batch)]


@functools.lru_cache(maxsize=16)
def _known_basis(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, batch: int
) -> tuple[Tensor, ...]:
    return tuple(basis_probes(torch.empty(shape, dtype=dtype, device=device), batch))


def basis_probes(like: Tensor, batch: int) -> list[Tensor]:
    """Vectors `e` with `sum e e^H = I` in a sample's space, each for the whole batch.

    They are the unit vectors. In a complex space there are as many more, times `i`, and all are
    divided by `sqrt(2)`: a field need not be holomorphic, and then its product with `i e` is not
    `i` times that with `e`.
    """
    flat = samples_of(like, batch)
    units: tuple[complex, ...] = (1.0, 1.0j) if like.is_complex() else (1.0,)
    probes = []
    for i in range(flat.shape[1]):
        for unit in units:
            probe = torch.zeros_like(flat)
            probe[:, i] = torch.tensor(unit / math.sqrt(len(units)), dtype=flat.dtype)
            probes.append(probe.reshape(like.shape).detach())
    return probes
