"""Probes of a Jacobian: the vectors whose products stand for its trace and its norm."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Distribution = Literal["rademacher", "gaussian"]

# Up to this many dimensions the exact Jacobian costs little more than a probe.
_SMALL = 4


def samples_of(u: Tensor) -> Tensor:
    """A state as `(B, D)`: batch first, everything behind it flattened."""
    return u.reshape(u.shape[0], -1) if u.ndim else u.reshape(1, 1)


def check_distribution(distribution: str) -> Distribution:
    """The name of a probe's distribution.

    Raises:
        ValueError: an unknown one.
    """
    for known in get_args(Distribution):
        if distribution == known:
            return cast(Distribution, known)
    raise ValueError(f'distribution must be "rademacher" or "gaussian", but is {distribution!r}.')


class Probes:
    """The probes of one solve: made once, fixed through it, shared by all that ask for alike ones.

    Sharing them shares their vector-Jacobian products too.

    Args:
        like: a state.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._basis: list[Tensor] | None = None
        self._random: dict[tuple[Distribution, int | None], Tensor] = {}

    def of(
        self, exact: bool | None, distribution: Distribution, generator: torch.Generator | None
    ) -> list[Tensor]:
        """Unit vectors, whose products give the Jacobian itself, or one random probe.

        Args:
            exact: which; default unit vectors where there are at most four dimensions.
            distribution: of the random probe's entries.
            generator: draws it; without one a probe of that distribution that is there already is
                taken.
        """
        small = samples_of(self.like).shape[1] <= _SMALL
        if small if exact is None else exact:
            if self._basis is None:
                self._basis = basis_probes(self.like)
            return self._basis
        alike = [probe for key, probe in self._random.items() if key[0] == distribution]
        if generator is None and alike:
            return [alike[0]]
        key = (distribution, None if generator is None else id(generator))
        if key not in self._random:
            self._random[key] = draw_probe(self.like, distribution, generator)
        return [self._random[key]]


def draw_probe(
    like: Tensor, distribution: Distribution, generator: torch.Generator | None
) -> Tensor:
    """A random vector with unit covariance, like a state."""
    options: dict[str, Any] = {"generator": generator, "device": like.device}
    if distribution == "gaussian":
        return torch.randn(like.shape, dtype=like.dtype, **options)
    signs = torch.randint(0, 2, like.shape, **options)
    return (2 * signs - 1).to(like.dtype)


def basis_probes(like: Tensor) -> list[Tensor]:
    """The unit vectors of a sample's space, each for the whole batch."""
    flat = samples_of(like)
    probes = []
    for i in range(flat.shape[1]):
        probe = torch.zeros_like(flat)
        probe[:, i] = 1
        probes.append(probe.reshape(like.shape).detach())
    return probes
