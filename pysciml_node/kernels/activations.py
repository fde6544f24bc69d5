"""From what a user calls an activation to its Gaussian expectations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pysciml_node import checks
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


def _known_name(name: str, argument: str = "activation") -> str:
    key = _ALIASES.get(name.lower(), name.lower())
    if key not in _FUNCTIONS:
        words = sorted([*_FUNCTIONS, *_ALIASES])
        near = checks.did_you_mean(name, words)
        raise ValueError(
            f"{argument} {name!r} is not known by name. Known: {', '.join(words)}.\n"
            f"  {near or 'Pass any other activation as a callable or an nn.Module.'}"
        )
    return key


def as_function(activation: Activation, argument: str = "activation") -> Elementwise:
    """The activation as a callable on tensors.

    Args:
        activation: as it was given.
        argument: its name in messages.

    Raises:
        ValueError: for an unknown name, or a function of several entries or of chance.
        TypeError: for something that is neither a name nor callable, or no elementwise function.
    """
    if isinstance(activation, str):
        return _FUNCTIONS[_known_name(activation, argument)]
    if not callable(activation):
        expected, hint = "a name, a callable or an nn.Module", f'Write {argument}="relu".'
        checks.refuse(argument, expected, activation, hint)
    function = checks.function(argument, activation, "u")
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).double()  # kernels are computed in float64
        for part in function.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]
    return _elementwise(function, argument)


def _elementwise(function: Elementwise, argument: str) -> Elementwise:
    """A function of each entry by itself; one that writes to its input gets a copy."""
    probe = torch.linspace(-2.1, 2.3, 60, dtype=torch.float64).reshape(12, 5)
    given = probe.clone()
    wanted = f"{argument} must be a function of each entry of a tensor"
    try:
        with torch.no_grad():
            value = function(given)
            alone = [function(entry) for entry in probe.clone().reshape(-1, 1, 1)]
    except Exception as error:  # whatever the user's function raises
        raise TypeError(
            f"{wanted}, but fails for one of shape (12, 5) and dtype float64: {error}\n"
            "  Kernels are computed in float64: let the function follow its input's dtype."
        ) from error
    if not isinstance(value, Tensor) or value.shape != probe.shape or value.is_complex():
        raise TypeError(
            f"{wanted}, but gives {checks.shown(value)} for one of shape (12, 5).\n"
            "  Return a real tensor of the input's shape."
        )
    one_by_one = torch.cat(alone).reshape(probe.shape)
    if not torch.allclose(value, one_by_one, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError(
            f"{wanted}, but its value there depends on what stands beside it, or on chance.\n"
            "  Softmax and normalizations are no activations in this sense; of one that draws "
            "random numbers pass activation.eval()."
        )
    return function if torch.equal(given, probe) else lambda u: function(u.clone())


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
