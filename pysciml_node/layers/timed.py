"""Layers of fields that depend on time, and fields made of them.

Each is called as `layer(t, x)` with the time as a 0-d tensor.

Reference: Grathwohl et al., FFJORD: Free-form Continuous Dynamics for Scalable Reversible
Generative Models, arXiv 1810.01367, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node import checks

TimeDependence = Literal["ignore", "concat", "concatsquash"]


def glorot_linear(
    inputs: int, outputs: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Glorot-uniform weights `(outputs, inputs)` and zero biases `(outputs,)`.

    Args:
        inputs: features in.
        outputs: features out.
        generator: source of the weights; default torch's own.

    Returns:
        Weights and biases.

    Reference:
        X. Glorot, Y. Bengio, AISTATS 2010, equation 16; the default of Lux's `Dense`.
    """
    weight = torch.empty(outputs, inputs)
    nn.init.xavier_uniform_(weight, generator=generator)
    return weight, torch.zeros(outputs)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta")  # draws no numbers
    weight, bias = glorot_linear(inputs, outputs, generator)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _conv2d(
    inputs: int, outputs: int, kernel_size: int, generator: torch.Generator | None
) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    if kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd to keep the image's size, but is {kernel_size}.\n"
            f"  Write kernel_size={kernel_size + 1}."
        )
    layer = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, device="meta")
    weight = torch.empty(layer.weight.shape)
    nn.init.xavier_uniform_(weight, generator=generator)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(outputs))
    return layer


class _Layer(nn.Module):
    """A function of time and state, in which no derivatives are taken."""

    ends_at_arguments = True


class Ignore(_Layer):
    """A layer that does not see the time.

    Args:
        layer: the layer of the state.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The layer's output."""
        out: Tensor = self.layer(x)
        return out


class IgnoreLinear(Ignore):
    """`W x + b`, from `(B, inputs)` to `(B, outputs)`."""

    def __init__(
        self, inputs: int, outputs: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(_linear(inputs, outputs, generator))


class IgnoreConv2d(Ignore):
    """A convolution `(B, inputs, H, W)` to `(B, outputs, H, W)`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(_conv2d(inputs, outputs, kernel_size, generator))


class ConcatLinear(_Layer):
    """An affine map of the state with the time appended: `W [x; t] + b`.

    The column of `W` that multiplies `t` is kept apart and added to the bias, `b + t w`,
    which gives the same map without copying the batch to append a column.

    Args:
        inputs: features in, without the time.
        outputs: features out.
        generator: source of the initial weights; default torch's own.
    """

    def __init__(
        self, inputs: int, outputs: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        weight, bias = glorot_linear(inputs + 1, outputs, generator)
        self.weight = nn.Parameter(weight[:, :-1].clone())
        self.time_weight = nn.Parameter(weight[:, -1].clone())
        self.bias = nn.Parameter(bias)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Map `x` of shape `(B, inputs)` at time `t` to `(B, outputs)`."""
        return functional.linear(x, self.weight, self.bias + t * self.time_weight)

    def output_parameters(self) -> list[nn.Parameter]:
        """The parameters that the output is proportional to."""
        return [self.weight, self.time_weight, self.bias]


class ConcatConv2d(_Layer):
    """A convolution of the image with the time appended as a channel, zero padding around both.

    Args:
        inputs: channels in, without the time.
        outputs: channels out.
        kernel_size: odd; height and width are kept.
        generator: source of the initial weights; default torch's own.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.layer = _conv2d(inputs + 1, outputs, kernel_size, generator)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Map `x` of shape `(B, inputs, H, W)` at time `t` to `(B, outputs, H, W)`."""
        time = t.to(x.dtype).expand(x.shape[0], 1, *x.shape[2:])
        out: Tensor = self.layer(torch.cat((x, time), 1))
        return out


class ConcatSquash(_Layer):
    """A layer gated and shifted by the time: `layer(x) * sigmoid(w t + c) + v t`.

    Args:
        layer: the layer of the state.
        outputs: its features or channels.
        generator: source of the initial `w` and `v`; default torch's own.
    """

    def __init__(
        self, layer: nn.Module, outputs: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        gate, zero = glorot_linear(1, outputs, generator)
        shift, _ = glorot_linear(1, outputs, generator)
        self.gate_weight, self.gate_bias = nn.Parameter(gate.flatten()), nn.Parameter(zero)
        self.shift_weight = nn.Parameter(shift.flatten())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The gated output."""
        out: Tensor = self.layer(x)
        shape = (-1, *[1] * (out.ndim - 2))
        gate = torch.sigmoid(self.gate_bias + t * self.gate_weight).view(shape)
        return out * gate + (t * self.shift_weight).view(shape)

    def output_parameters(self) -> list[nn.Parameter]:
        """The parameters of layer and shift; the output is proportional to these alone."""
        return [*self.layer.parameters(), self.shift_weight]


class ConcatSquashLinear(ConcatSquash):
    """`(W x + b) * sigmoid(w t + c) + v t`, from `(B, inputs)` to `(B, outputs)`."""

    def __init__(
        self, inputs: int, outputs: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(_linear(inputs, outputs, generator), outputs, generator=generator)


class ConcatSquashConv2d(ConcatSquash):
    """A gated and shifted convolution, `(B, inputs, H, W)` to `(B, outputs, H, W)`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        layer = _conv2d(inputs, outputs, kernel_size, generator)
        super().__init__(layer, outputs, generator=generator)


_LINEAR: dict[TimeDependence, type[nn.Module]] = {
    "ignore": IgnoreLinear,
    "concat": ConcatLinear,
    "concatsquash": ConcatSquashLinear,
}
_CONV2D: dict[TimeDependence, type[nn.Module]] = {
    "ignore": IgnoreConv2d,
    "concat": ConcatConv2d,
    "concatsquash": ConcatSquashConv2d,
}


class TimedField(_Layer):
    """A vector field made of layers `layer(t, x)` with an activation between them.

    Args:
        layers: from the state back to the state.
        activation: applied after every layer but the last.
        start_at_rest: set the last layer's weights to zero, so that the field starts as zero.

    Examples:
        >>> import torch
        >>> field = TimedField.mlp(2, (16, 16))
        >>> field(torch.tensor(0.5), torch.ones(3, 2)).abs().max().item()
        0.0
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        activation: Callable[[Tensor], Tensor],
        *,
        start_at_rest: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = checks.function("activation", activation, "x")
        if checks.flag("start_at_rest", start_at_rest):
            for parameter in self.layers[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative of the state `u` at time `t`."""
        *inner, last = self.layers
        for layer in inner:
            u = self.activation(layer(t, u))
        out: Tensor = last(t, u)
        return out

    @classmethod
    def mlp(
        cls,
        features: int,
        hidden: Sequence[int],
        *,
        time: TimeDependence = "concat",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        start_at_rest: bool = True,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A field of linear layers for states `(B, features)`.

        Args:
            features: size of the state.
            hidden: widths of the hidden layers.
            time: how the layers see the time.
            activation: between them.
            start_at_rest: start as the zero field.
            generator: source of the initial weights; default torch's own.
        """
        kind = _kind(_LINEAR, time)
        sizes = _sizes("features", features, hidden, generator)
        layers = [kind(a, b, generator=generator) for a, b in pairwise(sizes)]
        return cls(layers, activation, start_at_rest=start_at_rest)

    @classmethod
    def conv(
        cls,
        channels: int,
        hidden: Sequence[int],
        *,
        kernel_size: int = 3,
        time: TimeDependence = "concat",
        activation: Callable[[Tensor], Tensor] = functional.softplus,
        start_at_rest: bool = True,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A field of convolutions for states `(B, channels, H, W)`.

        Args:
            channels: of the state.
            hidden: channels of the hidden layers.
            kernel_size: odd.
            time: how the layers see the time.
            activation: between them.
            start_at_rest: start as the zero field.
            generator: source of the initial weights; default torch's own.
        """
        kind = _kind(_CONV2D, time)
        checks.whole("kernel_size", kernel_size)
        sizes = _sizes("channels", channels, hidden, generator)
        layers = [kind(a, b, kernel_size, generator=generator) for a, b in pairwise(sizes)]
        return cls(layers, activation, start_at_rest=start_at_rest)


def _kind(
    kinds: dict[TimeDependence, type[nn.Module]], time: TimeDependence
) -> Callable[..., nn.Module]:
    return kinds[checks.choice("time", time, kinds)]


def _sizes(
    name: str, outer: int, hidden: Sequence[int], generator: torch.Generator | None
) -> list[int]:
    """The sizes between the layers of a field, ends included."""
    checks.generator("generator", generator)
    outer = checks.whole(name, outer)
    inner = checks.shape("hidden", hidden)
    if 0 in inner:
        hint = "Write hidden=() for a field without hidden layers."
        checks.refuse("hidden", "positive sizes", inner, hint, ValueError)
    return [outer, *inner, outer]
