"""Initialisations that suit a vector field to the horizon it is integrated over."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from pysciml_node import checks

_HORIZON = "_psn_horizon"
_LINEAR = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPARENT = (nn.Identity, nn.Flatten, nn.Unflatten)


@torch.no_grad()
def scale_for_horizon_(module: nn.Module, T: float, *, previous: float | None = None) -> nn.Module:
    """Scale a vector field so that the flow of its ODE over `[0, T]` does not depend on `T`.

    For an autonomous field, `h' = f(h)/T` over `[0, T]` is `h' = f(h)` over `[0, 1]` with time
    rescaled. So every output is the same, and with it the kernels at initialisation, which depend
    on `T sigma_w` alone. The field is the output of its last linear layer, so that layer's weight
    and bias are divided by `T`. The standard deviation of the weights goes like `1/T`, their
    variance like `1/T^2`. (A variance of `1/T` would leave `T sigma_w = sqrt T`, and the variance
    of the output would grow with the horizon.) Earlier layers cannot be scaled instead, because a
    nonlinearity follows them.

    The layer remembers the horizon. Calling again with the same `T` changes nothing; another `T`
    moves the field from the old horizon to the new one, and a trained autonomous field keeps its
    flow map. A field that depends on time sees times up to `T` instead of up to 1: rescale its time
    argument as well.

    Args:
        module: the vector field, or a module that holds it as `.field` (`NeuralODE`). Its last
            linear or convolutional layer, in order of registration, must produce its output.
        T: length of the horizon, positive.
        previous: horizon that the weights suit now. The default is the one that the last call
            remembered, 1 at first. Pass 1 after re-initialising the weights.

    Returns:
        The module, changed in place.

    Raises:
        ValueError: if `T` is not positive, or the last linear layer is not the end of an
            `nn.Sequential` (a nonlinear layer follows: no scaling of weights is exact), shares its
            parameters with an earlier layer or computes its weight from others, or there is no
            linear layer.

    Examples:
        >>> field = nn.Sequential(nn.Tanh(), nn.Linear(2, 2))
        >>> before = field[1].weight.clone()
        >>> torch.equal(scale_for_horizon_(field, 4.0)[1].weight, before / 4)
        True

    Reference: Gao, Sun, Liu and Gao, arXiv 2509.22436 (scale of the weights against the horizon).
    """
    checks.instance(
        "module", module, nn.Module, example="torch.nn.Linear(2, 2)", noun="an nn.Module"
    )
    T = checks.number("T", T, above=0)
    previous = None if previous is None else checks.number("previous", previous, above=0)
    inner = getattr(module, "field", module)
    field = inner if isinstance(inner, nn.Module) else module
    layer = _last_linear(field)
    scaled = _output_parameters(layer)
    _check_own(field, layer, scaled)
    before = previous if previous is not None else cast(float, getattr(layer, _HORIZON, 1.0))
    for parameter in scaled:
        parameter.mul_(before / T)
    setattr(layer, _HORIZON, float(T))
    return module


def _output_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a layer's output is proportional to."""
    named = getattr(layer, "output_parameters", None)
    parameters: list[nn.Parameter] = named() if named else list(layer.parameters(recurse=False))
    return parameters


def _check_own(field: nn.Module, layer: nn.Module, scaled: list[nn.Parameter]) -> None:
    """Refuse parameters that other layers use too, and weights computed from others."""
    parts = list(layer.modules())
    weighted = [part for part in parts if getattr(part, "weight", None) is not None]
    if any("weight" not in part._parameters for part in weighted):
        raise ValueError(
            f"the weight of the last layer, {type(layer).__name__}, is computed from other "
            "parameters (weight or spectral normalization), so scaling these does not scale it.\n"
            "  Divide the field's output by T yourself."
        )
    inside = {id(part) for part in parts}
    elsewhere = [part for part in field.modules() if id(part) not in inside]
    used = {id(parameter) for part in elsewhere for parameter in part._parameters.values()}
    if any(id(parameter) in used for parameter in scaled):
        raise ValueError(
            f"the last layer, {type(layer).__name__}, shares parameters with an earlier one, which "
            "must not be scaled.\n  Untie them, or divide the field's output by T yourself."
        )


def _last_linear(field: nn.Module) -> nn.Module:
    whole = [layer for layer in field.modules() if hasattr(layer, "output_parameters")]
    inside = {id(part) for layer in whole for part in layer.modules() if part is not layer}
    layers = [
        layer
        for layer in field.modules()
        if (isinstance(layer, _LINEAR) and id(layer) not in inside) or layer in whole
    ]
    if not layers:
        raise ValueError(
            f"module {type(field).__name__} has no linear or convolutional layer to scale.\n"
            "  Divide the field's output by T yourself."
        )
    last = layers[-1]
    for container in field.modules():
        if isinstance(container, nn.Sequential):
            _check_end(container, last)
    return last


def _check_end(container: nn.Sequential, last: nn.Module) -> None:
    inside = [any(layer is last for layer in child.modules()) for child in container]
    if not any(inside):
        return
    behind = list(container)[inside.index(True) + 1 :]
    for layer in behind:
        if not isinstance(layer, _TRANSPARENT):
            raise ValueError(
                "module must end with a linear layer, but the last linear layer is followed by "
                f"{type(layer).__name__}, so scaling its weights does not scale the field.\n"
                "  End the field with a linear layer."
            )
