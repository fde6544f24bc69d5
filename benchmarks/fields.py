"""The fields that are timed, for torch and for JAX."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Twinned(nn.Module):
    """A field with a twin."""

    @abstractmethod
    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same field for JAX, `f(t, y, p)` with the parameters in their order."""


def _uniform(layers: tuple[nn.Linear, ...], generator: torch.Generator) -> None:
    for layer in layers:
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


class SpiralField(Twinned):
    """`MLP(y**3)`, 2-50-2 with tanh: the field of torchdiffeq's spiral demo."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(2, 50)
        self.second = nn.Linear(50, 2)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=0.1, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the derivative at `y`, shape `(B, 2)`."""
        out: Tensor = self.second(torch.tanh(self.first(y**3)))
        return out

    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same for JAX."""
        jnp = jax.numpy

        def field(t: Any, y: Any, p: Any) -> Any:
            return jnp.tanh(y**3 @ p[0].T + p[1]) @ p[2].T + p[3]

        return field


class TimeField(Twinned):
    """`tanh(W2 [tanh(W1 [x, t]), t])`, 784-100-784: the field of the MNIST experiments.

    Reference: A. Pal, A. Edelman, C. Rackauckas, Locally regularized neural differential equations,
    ICML 2023.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(785, 100)
        self.second = nn.Linear(101, 784)
        _uniform((self.first, self.second), generator)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate the derivative at `x`, shape `(B, 784)`, and `t`, shape `()` or `(B,)`."""
        time = t.reshape(-1, 1).expand(x.shape[0], 1).to(x)
        hidden = torch.tanh(self.first(torch.cat([x, time], 1)))
        return torch.tanh(self.second(torch.cat([hidden, time], 1)))

    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same for JAX."""
        jnp = jax.numpy

        def field(t: Any, x: Any, p: Any) -> Any:
            time = jnp.broadcast_to(t, (x.shape[0], 1)).astype(x.dtype)
            hidden = jnp.tanh(jnp.concatenate([x, time], 1) @ p[0].T + p[1])
            return jnp.tanh(jnp.concatenate([hidden, time], 1) @ p[2].T + p[3])

        return field


class PreyField(Twinned):
    """`(1.3 x, -1.8 y) + net(x, y) / 10`, 2-5-5-2 with tanh: a universal differential equation.

    Reference: C. Rackauckas et al., Universal differential equations for scientific machine
    learning, arXiv:2001.04385.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        _uniform((self.first, self.second, self.third), generator)
        self.register_buffer("rates", torch.tensor([1.3, -1.8]))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative at `u`, shape `(B, 2)`."""
        hidden = torch.tanh(self.second(torch.tanh(self.first(u))))
        out: Tensor = self.rates * u + 0.1 * self.third(hidden)
        return out

    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same for JAX."""
        jnp = jax.numpy
        rates = jnp.asarray(self.rates.numpy())

        def field(t: Any, u: Any, p: Any) -> Any:
            hidden = jnp.tanh(jnp.tanh(u @ p[0].T + p[1]) @ p[2].T + p[3])
            return rates * u + 0.1 * (hidden @ p[4].T + p[5])

        return field


class RobertsonField(Twinned):
    """`A -> B`, `2 B -> B + C`, `B + C -> A + C` at the rates 0.04, 3e7 and 1e4, which are trained.

    Reference: E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, equation IV.1.4.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.04, 3e7, 1e4]).log())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the derivative at `y`, shape `(B, 3)`."""
        k, (a, b, c) = self.rates.exp(), y.unbind(1)
        back, square = k[2] * b * c - k[0] * a, k[1] * b * b
        return torch.stack([back, -back - square, square], 1)

    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same for JAX."""

        def field(t: Any, y: Any, p: Any) -> Any:
            k, a, b, c = jax.numpy.exp(p[0]), y[:, 0], y[:, 1], y[:, 2]
            back, square = k[2] * b * c - k[0] * a, k[1] * b * b
            return jax.numpy.stack([back, -back - square, square], 1)

        return field


class PlaneField(nn.Module):
    """`W2 tanh(W1 u + t w)`, 2-64-2: a field in the plane."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 64), nn.Linear(64, 2)
        _uniform((self.first, self.second), generator)
        self.time = nn.Parameter(torch.randn(64, generator=generator))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative at `u`, shape `(B, 2)`."""
        out: Tensor = self.second(torch.tanh(self.first(u) + t.reshape(-1, 1) * self.time))
        return out


class FlowField(Twinned):
    """A field in the plane, and its trace, by a vector-Jacobian product for each dimension.

    Attributes:
        inner: the field in the plane.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = PlaneField(generator)

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """Derivatives of points and log-determinants, `(B, 3)`."""
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            u = state[:, :2]
            u = u if u.requires_grad else u.requires_grad_()
            f = self.inner(t, u)
            trace = torch.zeros_like(f[:, 0])
            for i in range(2):
                (row,) = torch.autograd.grad(
                    f[:, i].sum(), u, create_graph=recorded, retain_graph=True
                )
                trace = trace + row[:, i]
        out = torch.cat([f, trace[:, None]], 1)
        return out if recorded else out.detach()

    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same for JAX."""
        jnp = jax.numpy

        def field(t: Any, state: Any, p: Any) -> Any:
            time, w1, b1, w2, b2 = p

            def plane(u: Any) -> Any:
                return jnp.tanh(u @ w1.T + b1 + t * time) @ w2.T + b2

            f, pull = jax.vjp(plane, state[:, :2])
            units = (jnp.zeros_like(f).at[:, i].set(1.0) for i in range(2))
            trace = sum(pull(e)[0][:, i] for i, e in enumerate(units))
            return jnp.concatenate([f, trace[:, None]], 1)

        return field


class LatentField(Twinned):
    """4-20-20-4 with ELU: the field of torchdiffeq's latent ODE.

    Reference: R. T. Q. Chen et al., Neural Ordinary Differential Equations, NeurIPS 2018.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 4)
        _uniform((self.first, self.second, self.third), generator)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative at `u`, shape `(B, 4)`."""
        out: Tensor = self.third(functional.elu(self.second(functional.elu(self.first(u)))))
        return out

    def twin(self, jax: Any) -> Callable[[Any, Any, Any], Any]:
        """The same for JAX."""

        def field(t: Any, u: Any, p: Any) -> Any:
            hidden = jax.nn.elu(jax.nn.elu(u @ p[0].T + p[1]) @ p[2].T + p[3])
            return hidden @ p[4].T + p[5]

        return field
