"""From what a user calls an activation to its Gaussian expectations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pysciml_node.kernels.expectations import (
    Erf,
    Exponential,
    GaussianExpectation,
    Identity,
    LeakyReLU,
    Sinusoid,
)
from pysciml_node.kernels.hermite import HermiteSeries, Polynomial
from pysciml_node.kernels.kinked import KinkedSeries, jumps_at_zero

Elementwise: TypeAlias = Callable[[Tensor], Tensor]
Activation: TypeAlias = str | Elementwise | GaussianExpectation

_FUNCTIONS: dict[str, Elementwise] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "abs": torch.abs,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "identity": nn.Identity(),
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "quadratic": Polynomial((0.0, 0.0, 0.5)),
}
_ALIASES = {"linear": "identity", "sine": "sin", "cosine": "cos", "swish": "silu"}

_CLOSED: dict[str, GaussianExpectation] = {
    "relu": LeakyReLU(),
    "leaky_relu": LeakyReLU(0.01),
    "abs": LeakyReLU(-1.0),
    "erf": Erf(),
    "sin": Sinusoid(),
    "cos": Sinusoid(phase=math.pi / 2),
    "exp": Exponential(),
    "identity": Identity(),
}
_SAME: dict[object, str] = {
    torch.relu: "relu",
    F.relu: "relu",
    F.leaky_relu: "leaky_relu",
    torch.abs: "abs",
    torch.erf: "erf",
    torch.sin: "sin",
    torch.cos: "cos",
    torch.exp: "exp",
}


def _known_name(name: str) -> str:
    key = _ALIASES.get(name.lower(), name.lower())
    if key not in _FUNCTIONS:
        known = ", ".join(sorted([*_FUNCTIONS, *_ALIASES]))
        raise ValueError(
            f"activation {name!r} is not known by name. Known: {known}. "
            "Pass any other activation as a callable or an nn.Module."
        )
    return key


def as_function(activation: Activation) -> Elementwise:
    """The activation as a callable on tensors.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something that is neither a name nor callable.
    """
    if isinstance(activation, str):
        return _FUNCTIONS[_known_name(activation)]
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation).double()  # kernels are computed in float64
    if callable(activation):
        return activation
    raise TypeError(
        f"activation must be a name, a callable or an nn.Module, but is a "
        f"{type(activation).__name__}."
    )


def describe(activation: Activation) -> str:
    """A short name for messages."""
    if isinstance(activation, str):
        return _known_name(activation)
    if isinstance(activation, nn.Module | Polynomial):
        return str(activation)
    return getattr(activation, "__name__", type(activation).__name__)


def resolve(activation: Activation, rtol: float) -> GaussianExpectation:
    """The Gaussian expectations of an activation: closed form if there is one, series otherwise.

    Args:
        activation: a name, a callable on tensors (elementwise), an `nn.Module`, or one of the
            expectation classes of this package (`Polynomial`, `Sinusoid`, ...).
        rtol: accuracy of a series, see `HermiteSeries`.
    """
    if isinstance(activation, GaussianExpectation):
        return activation
    fn = as_function(activation)
    if isinstance(fn, Polynomial):
        return fn
    if isinstance(fn, nn.Module):
        closed = _closed_module(fn)
    else:
        name = _known_name(activation) if isinstance(activation, str) else _SAME.get(fn, "")
        closed = _CLOSED.get(name)
    if closed is not None:
        return closed
    jumps = jumps_at_zero(fn)
    if any(jumps):
        return KinkedSeries.of(fn, jumps, rtol, describe(activation))
    return HermiteSeries(fn, rtol, describe(activation))


def _closed_module(module: nn.Module) -> GaussianExpectation | None:
    if isinstance(module, nn.Identity):
        return Identity()
    if isinstance(module, nn.ReLU):
        return LeakyReLU()
    if isinstance(module, nn.LeakyReLU):
        return LeakyReLU(module.negative_slope)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return LeakyReLU(float(module.weight.detach()))
    return None
