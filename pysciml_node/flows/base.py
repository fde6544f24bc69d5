"""Invertible maps with known log-determinants, and the densities they carry."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pysciml_node import checks
from pysciml_node.flows.distribution import check_base, leaves_of
from pysciml_node.layers.neural_de import without_regularizers
from pysciml_node.regularizers.base import Regularizer
from pysciml_node.solutions.portable import walkable

Base = Distribution | nn.Module


@walkable
@dataclass(frozen=True)
class Mapped:
    """A batch carried through an invertible map.

    Attributes:
        u: the points that the batch was carried to, batch first.
        log_det: `log |det|` of the map's Jacobian for each sample, `(B,)`.
        penalty: weighted sum of the regularizers (0 in eval mode or without any).
        penalties: their unweighted values by name, summed over several solves.
        nfe: evaluations of vector fields.
    """

    u: Tensor
    log_det: Tensor
    penalty: Tensor
    penalties: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    nfe: int = 0

    @classmethod
    def start(cls, u: Tensor) -> Mapped:
        """The identity."""
        return cls(u, u.new_zeros(u.shape[0]), u.new_zeros(()))

    def then(self, step: Mapped) -> Mapped:
        """This map followed by another one, which has been applied to `self.u`."""
        penalties = dict(self.penalties)
        for name, value in step.penalties.items():
            penalties[name] = penalties[name] + value if name in penalties else value
        return Mapped(
            step.u,
            self.log_det + step.log_det,
            self.penalty + step.penalty,
            penalties,
            self.nfe + step.nfe,
        )


@walkable
@dataclass(frozen=True, kw_only=True)
class Density(Mapped):
    """The density of a batch under a flow; `u` is in the base distribution's space.

    Attributes:
        log_prob: in nats, `(B,)`.
    """

    log_prob: Tensor


class Transform(nn.Module, ABC):
    """An invertible map from data to the base distribution's space."""

    @abstractmethod
    def transform(self, x: Tensor) -> Mapped:
        """Carry data `(B, *E)` to the base's space."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Mapped:
        """Carry a batch of the base's space, `(B, *E)`, back to data."""

    def decode(self, z: Tensor) -> Tensor:
        """The data of `inverse`, without determinants and penalties where these cost time."""
        return self.inverse(z).u

    def latent_shape(self, event_shape: torch.Size) -> torch.Size:
        """Shape of one transformed sample."""
        return event_shape


class Transforms(nn.ModuleList):
    """Transforms in order, typed as such."""

    def __init__(self, transforms: Iterable[Transform] = ()) -> None:
        super().__init__(transforms)

    def __iter__(self) -> Iterator[Transform]:
        return iter(cast(Iterable[Transform], self._modules.values()))

    def __reversed__(self) -> Iterator[Transform]:
        return reversed(list(self))


class Flow(Transform):
    """A distribution: an invertible map carries its data to a base distribution.

    `log p(x) = log q(z) + log |det dz/dx|` with `z = transform(x)`. It is used like a distribution
    of `torch.distributions`, and trained like any module:

        density = flow(x)
        loss = -density.log_prob.mean() + density.penalty

    Args:
        event_shape: shape of one sample, or the number of entries of a vector. Without it every
            input is `(B, *E)`, and samples cannot be drawn.
        base: distribution of one transformed sample, with an empty batch shape, or a module that
            makes it at each call; default a standard normal one, of the parameters' dtype and
            device. Parameters of either are parameters of the flow.

    Raises:
        TypeError: `base` is no distribution.
        ValueError: `base` has another shape, or would not follow its parameters.
    """

    has_rsample = True
    batch_shape = torch.Size()

    def __init__(
        self, event_shape: int | Sequence[int] | None = None, base: Base | None = None
    ) -> None:
        super().__init__()
        if event_shape is not None:
            event_shape = checks.shape("event_shape", event_shape)
        distribution = None if base is None else check_base(base)
        if event_shape is None and distribution is not None:
            event_shape = distribution.event_shape
        self.event_shape = None if event_shape is None else torch.Size(event_shape)
        self.base = base
        self._leaves = leaves_of(base) if isinstance(base, Distribution) else []
        named = {leaf.parameter: leaf.name for leaf in self._leaves}
        for parameter, name in named.items():
            self.register_parameter(f"base_{name}", parameter)

    def base_distribution(self) -> Distribution | None:
        """The distribution of one transformed sample as its parameters are now, or the normal one.

        Raises:
            ValueError: a base whose parameters were moved without it.
        """
        for leaf in self._leaves:
            leaf.check()
        return None if self.base is None else check_base(self.base)

    def forward(self, x: Tensor) -> Density:
        """The density of a batch `(B, *E)`, with the penalties of training mode.

        A regularizer that moves the end of the interval, such as `RandomEndTime`, moves it here
        too: the result's `log_prob` is then what training maximizes, and the density is the
        method's `log_prob`.

        Args:
            x: data.

        Returns:
            Log-probabilities `(B,)`, the point in the base's space, penalties and costs.

        Raises:
            ValueError: samples of another shape.
        """
        x = checks.tensor("x", x, floating=True)
        if self.event_shape is not None and x.shape[1:] != self.event_shape:
            raise ValueError(
                f"x must have the shape (B, {', '.join(map(str, self.event_shape))}), but has "
                f"{tuple(x.shape)}.\n  A single sample is x[None]; log_prob takes any leading axes."
            )
        if self.event_shape is None and x.ndim < 2:
            raise ValueError(
                f"x must have the shape (B, *E), but has {tuple(x.shape)}.\n"
                "  A single sample is x[None]; samples of one number each are x[:, None]."
            )
        mapped = self.transform(x)
        parts = {field.name: getattr(mapped, field.name) for field in dataclasses.fields(Mapped)}
        return Density(**parts, log_prob=self._base_log_prob(mapped.u) + mapped.log_det)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, in training and in eval mode.

        Regularizers have no part in it.

        Args:
            x: data `(*S, *event_shape)`, or `(B, *E)` for a flow without `event_shape`.

        Returns:
            Shape `(*S,)`, or `(B,)`.

        Raises:
            ValueError: samples of another shape.
        """
        if self.event_shape is None:
            return self._unregularized(x)
        x = checks.tensor("x", x, floating=True)
        count = x.ndim - len(self.event_shape)
        if count < 0 or x.shape[count:] != self.event_shape:
            raise ValueError(
                f"the last axes of x must be {tuple(self.event_shape)}, but its shape is "
                f"{tuple(x.shape)}.\n  Write x.reshape(-1, *flow.event_shape)."
            )
        return self._unregularized(x.reshape(-1, *self.event_shape)).reshape(x.shape[:count])

    def _unregularized(self, x: Tensor) -> Tensor:
        with without_regularizers(self):
            density: Density = self(x)
        return density.log_prob

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples `(*sample_shape, *event_shape)` without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def rsample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples that are differentiable with respect to the parameters.

        Args:
            sample_shape: leading shape of the result.
            generator: draws from the standard normal base; default torch's own.

        Returns:
            Samples `(*sample_shape, *event_shape)`.

        Raises:
            ValueError: no `event_shape`, or a generator with a base of its own.
        """
        if self.event_shape is None:
            raise ValueError(
                f"this {type(self).__name__} does not know the shape of a sample.\n"
                "  Give it event_shape=..., or a base distribution."
            )
        shape = torch.Size(checks.shape("sample_shape", sample_shape))
        checks.generator("generator", generator)
        z = self._draw(math.prod(shape), self.latent_shape(self.event_shape), generator)
        return self.decode(z).reshape(*shape, *self.event_shape)

    def _base_log_prob(
        self,
        z: Tensor,  # (B, *E)
    ) -> Tensor:
        base = self.base_distribution()
        if base is not None:
            log_prob: Tensor = base.log_prob(z)
            return log_prob
        squares = (z.square() + math.log(2 * math.pi)).reshape(z.shape[0], -1)
        return -0.5 * squares.sum(1)

    def _draw(self, count: int, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        base = self.base_distribution()
        if base is not None:
            if generator is not None:
                raise ValueError(
                    "a base distribution of its own takes no generator.\n"
                    "  Leave out base=... for a standard normal one, or generator=..."
                )
            size = torch.Size((count,))
            drawn: Tensor = base.rsample(size) if base.has_rsample else base.sample(size)
            return drawn
        like: Any = next(iter(self.parameters()), torch.empty(0))
        return torch.randn(count, *shape, generator=generator, dtype=like.dtype, device=like.device)

    def step_schedules(self) -> None:
        """Count one training step of every regularizer's weight schedule."""
        for module in self.modules():
            if isinstance(module, Regularizer):
                module.step()


class Chain(Flow):
    """Transforms one after the other, from data to the base.

    Args:
        transforms: in the order in which data pass them.
        event_shape: shape of one sample of the data.
        base: as for `Flow`.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> from pysciml_node import flows
        >>> cnf = flows.CNF(lambda t, u: -u)
        >>> flow = flows.Chain([flows.Logit(), cnf], event_shape=3)
        >>> x = flow.sample((5,))
        >>> x.shape, flow.log_prob(x).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        event_shape: int | Sequence[int] | None = None,
        base: Base | None = None,
    ) -> None:
        super().__init__(event_shape, base)
        listed = checks.sequence(
            "transforms",
            transforms,
            Transform,  # type: ignore[type-abstract]
            example="CNF(field)",
        )
        self.transforms = Transforms(listed)

    def transform(self, x: Tensor) -> Mapped:
        """Carry data to the base's space."""
        mapped = Mapped.start(x)
        for step in self.transforms:
            mapped = mapped.then(step.transform(mapped.u))
        return mapped

    def inverse(self, z: Tensor) -> Mapped:
        """Carry a batch of the base's space back to data."""
        mapped = Mapped.start(z)
        for step in reversed(self.transforms):
            mapped = mapped.then(step.inverse(mapped.u))
        return mapped

    def decode(self, z: Tensor) -> Tensor:
        """The data of `inverse`, at the cost of the maps alone."""
        for step in reversed(self.transforms):
            z = step.decode(z)
        return z

    def latent_shape(self, event_shape: torch.Size) -> torch.Size:
        """Shape of one transformed sample."""
        for step in self.transforms:
            event_shape = step.latent_shape(event_shape)
        return event_shape
