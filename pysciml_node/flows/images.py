"""Flows of images: from whole numbers to densities, and through several scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pysciml_node import checks
from pysciml_node.flows.base import Base, Chain, Flow, Mapped, Transform, Transforms
from pysciml_node.flows.cnf import CNF


def dequantize(
    x: Tensor, levels: int = 256, *, generator: torch.Generator | None = None, noise: bool = True
) -> Tensor:
    """Whole numbers `0 .. levels - 1` as points of [0, 1]: `(x + e) / levels`, `e` uniform.

    The density of the result, times the volume `levels^-D` of a cell, is on average a lower bound
    of the probability of the whole numbers.

    Args:
        x: pixels as whole numbers, in a floating-point dtype.
        levels: how many values a pixel has.
        generator: draws the noise; default torch's own.
        noise: without it the cells' centres, `e = 1/2`, as the RNODE code takes at test time.

    Returns:
        Of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not of a floating-point dtype.
        ValueError: pixels outside their range, or between whole numbers, as those in [0, 1] are
            that the loaders of `pysciml_node.data` return.

    Reference: Theis, van den Oord, Bethge, A note on the evaluation of generative models, arXiv
    1511.01844, section 3.1.
    """
    x = checks.tensor("x", x)
    levels = checks.whole("levels", levels, at_least=2, at_most=2**52)
    checks.generator("generator", generator)
    noise = checks.flag("noise", noise)
    if not x.is_floating_point():
        raise TypeError(
            f"x must be of a floating-point dtype, but is {x.dtype}.\n  Convert it: x.float()."
        )
    _check_range("x", x, 0, levels - 1)
    off = (x.detach() - x.detach().round()).abs()
    # Pixels that were divided by levels - 1 and multiplied again may be off by rounding.
    if bool((off > 4 * torch.finfo(x.dtype).eps * levels).any()):
        raise ValueError(
            f"x must hold whole numbers from 0 to {levels - 1}, but one is off by "
            f"{float(off.max()):.3g}.\n"
            f"  Of pixels in [0, 1] pass ({levels - 1} * x).round()."
        )
    x = x.round()
    if not noise:
        return (x + 0.5) / levels
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (x + drawn) / levels


def bits_per_dimension(log_prob: Tensor, dimensions: int, levels: int = 256) -> Tensor:
    """Bits that a pixel of `levels` values takes: `(ln(levels) - log p(x) / D) / ln 2`.

    Args:
        log_prob: log-density in nats of images with pixels in [0, 1].
        dimensions: `D`, the pixels of an image times its channels.
        levels: how many values a pixel has.

    Examples:
        >>> import torch
        >>> float(bits_per_dimension(torch.tensor(0.0), 64, levels=16))  # uniform on [0, 1]
        4.0
    """
    number = None if isinstance(log_prob, Tensor) else checks.as_float(log_prob)
    nats = checks.tensor("log_prob", log_prob, real=True) if number is None else number
    dimensions = checks.whole("dimensions", dimensions)
    levels = checks.whole("levels", levels)
    return (math.log(levels) - nats / dimensions) / math.log(2)


def _check_range(name: str, x: Tensor, low: float, high: float) -> None:
    if x.numel() == 0:
        return
    least, most = (float(end) for end in torch.aminmax(x.detach()))
    if not (low <= least and most <= high):
        raise ValueError(
            f"{name} must lie in [{low}, {high}], but has {least} to {most}.\n"
            f"  Scale it: low + (high - low) * ({name} - {name}.min()) / "
            f"({name}.max() - {name}.min())."
        )


class Logit(Transform):
    """Points of [0, 1] to the line: `logit(alpha + (1 - 2 alpha) x)`.

    Args:
        alpha: keeps the ends finite; 1e-5 for MNIST and 0.05 for other images in the RNODE code.

    Raises:
        ValueError: `alpha` outside (0, 1/2).

    Reference: Dinh, Sohl-Dickstein, Bengio, Density estimation using Real NVP, arXiv 1605.08803,
    section 4.1.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        self.alpha = checks.number("alpha", alpha, above=0, below=0.5)

    def transform(self, x: Tensor) -> Mapped:
        """Carry points of [0, 1] to the line."""
        x = checks.tensor("x", x, floating=True)
        if not x.ndim:
            checks.refuse("x", "a batch of samples", x, "A single one is x[None].", ValueError)
        # What `inverse` gives may lie a little outside.
        margin = self.alpha / (1 - 2 * self.alpha)
        _check_range("x", x, -margin, 1 + margin)
        return self._mapped(torch.logit(self.alpha + (1 - 2 * self.alpha) * x), x, 1)

    def inverse(self, z: Tensor) -> Mapped:
        """Carry points of the line back; far out they land up to `alpha` outside [0, 1]."""
        z = checks.tensor("z", z, floating=True)
        x = (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)
        return self._mapped(x, x, -1)

    def _mapped(self, u: Tensor, x: Tensor, sign: int) -> Mapped:
        y = self.alpha + (1 - 2 * self.alpha) * x
        slope = math.log(1 - 2 * self.alpha) - torch.log(y) - torch.log1p(-y)
        return Mapped(
            u, sign * (slope.flatten(1).sum(1) if slope.ndim > 1 else slope), u.new_zeros(())
        )

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"alpha={self.alpha}"


class Squeeze(Transform):
    """Blocks of 2x2 pixels as channels: `(B, C, 2H, 2W)` to `(B, 4C, H, W)`.

    Reference: arXiv 1605.08803, section 3.6.
    """

    def transform(self, x: Tensor) -> Mapped:
        """Carry pixels to channels."""
        x = checks.tensor("x", x, axes=4)
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"x must have an even height and width, but has shape {tuple(x.shape)}.\n"
                "  Pad it: torch.nn.functional.pad(x, (0, 1, 0, 1))."
            )
        return Mapped.start(functional.pixel_unshuffle(x, 2))

    def inverse(self, z: Tensor) -> Mapped:
        """Carry channels to pixels."""
        z = checks.tensor("z", z, axes=4)
        if z.shape[1] % 4:
            raise ValueError(
                f"z must have a multiple of 4 channels, but has shape {tuple(z.shape)}.\n"
                "  A squeeze makes four channels of each: give what transform returned."
            )
        return Mapped.start(functional.pixel_shuffle(z, 2))

    def latent_shape(self, event_shape: torch.Size) -> torch.Size:
        """Shape of one transformed image."""
        channels, height, width = event_shape
        return torch.Size((4 * channels, height // 2, width // 2))


class MultiScale(Flow):
    """Continuous flows at several scales, half of the channels leaving for the base after each.

    At each scale but the last: `blocks` flows, a squeeze, `blocks` flows, and half of the channels
    are done; at the last scale `blocks` flows. MNIST with its three scales has ten flows, CIFAR10
    with four has fourteen.

    Args:
        image_shape: channels, height and width.
        make_field: the field of a flow with that many channels, for example
            `lambda channels: TimedField.conv(channels, (64, 64, 64))`.
        scales: default as many as halvings of the smaller side leave it at least 4 before.
        blocks: flows before, and after, a squeeze.
        alpha: of the logit transform of pixels in [0, 1] that comes first; `None` leaves it out.
        base: distribution of the flat latent vector, or a module that makes it; default a standard
            normal one.
        options: further arguments of each `CNF`. Regularizers and generators are shared by all of
            them; the penalties of the flows add up.

    Raises:
        ValueError: an image that cannot be halved as often as asked for.

    Examples:
        >>> import torch
        >>> from pysciml_node.layers.timed import TimedField
        >>> flow = MultiScale((1, 8, 8), lambda channels: TimedField.conv(channels, (4,)))
        >>> len(flow.flows()), flow.sample((3,)).shape
        (6, torch.Size([3, 1, 8, 8]))

    Reference: Finlay et al., How to train your neural ODE, arXiv 2002.02798, section 4; its code.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        make_field: Callable[[int], Callable[..., Tensor]],
        *,
        scales: int | None = None,
        blocks: int = 2,
        alpha: float | None = 0.05,
        base: Base | None = None,
        **options: Any,
    ) -> None:
        image_shape = checks.shape("image_shape", image_shape, axes=3)
        super().__init__(image_shape, base)
        self.image_shape = image_shape
        channels, height, width = image_shape
        if min(image_shape) < 1:
            hint = "Write (1, 28, 28): channels, height and width."
            checks.refuse("image_shape", "positive sizes", image_shape, hint, ValueError)
        scales = _scales(height, width) if scales is None else checks.whole("scales", scales)
        blocks = checks.whole("blocks", blocks)
        checks.function("make_field", make_field, "channels")
        if height % 2 ** (scales - 1) or width % 2 ** (scales - 1):
            raise ValueError(
                f"image_shape of {height}x{width} pixels cannot be halved {scales - 1} times for "
                f"scales={scales}.\n  Give fewer scales, or pad the image."
            )
        self.logit = Chain([] if alpha is None else [Logit(alpha)])

        def flows(channels: int) -> list[Transform]:
            return [CNF(make_field(channels), **options) for _ in range(blocks)]

        squeezing: list[Transform] = []
        for _ in range(scales - 1):
            squeezing.append(Chain([*flows(channels), Squeeze(), *flows(4 * channels)]))
            channels *= 2
        self.scales = Transforms(squeezing)
        self.last = Chain(flows(channels))

    def flows(self) -> list[CNF]:
        """The continuous flows, in the order in which data pass them."""
        return [module for module in self.modules() if isinstance(module, CNF)]

    def transform(self, x: Tensor) -> Mapped:
        """Carry images `(B, C, H, W)` to latent vectors `(B, C * H * W)`."""
        mapped = self.logit.transform(x)
        done = []
        for scale in self.scales:
            mapped = mapped.then(scale.transform(mapped.u))
            kept, leaving = mapped.u.chunk(2, 1)
            done.append(leaving.flatten(1))
            mapped = mapped.then(Mapped.start(kept))
        mapped = mapped.then(self.last.transform(mapped.u))
        return mapped.then(Mapped.start(torch.cat([*done, mapped.u.flatten(1)], 1)))

    def inverse(self, z: Tensor) -> Mapped:
        """Carry latent vectors back to images."""
        *done, last = self._split(z)
        mapped = self.last.inverse(last)
        for scale, leaving in zip(reversed(self.scales), reversed(done), strict=True):
            mapped = mapped.then(scale.inverse(torch.cat((mapped.u, leaving), 1)))
        return mapped.then(self.logit.inverse(mapped.u))

    def decode(self, z: Tensor) -> Tensor:
        """The images of `inverse`, by plain solves."""
        *done, last = self._split(z)
        u: Tensor = self.last.decode(last)
        for scale, leaving in zip(reversed(self.scales), reversed(done), strict=True):
            u = scale.decode(torch.cat((u, leaving), 1))
        return self.logit.decode(u)

    def latent_shape(self, event_shape: torch.Size) -> torch.Size:
        """Shape of one latent vector."""
        return torch.Size((math.prod(event_shape),))

    def _split(self, z: Tensor) -> list[Tensor]:
        """The parts of a latent vector as images: what left after each scale, then the rest."""
        channels, height, width = self.image_shape
        shapes = []
        for _ in self.scales:
            channels, height, width = 2 * channels, height // 2, width // 2
            shapes.append((channels, height, width))
        shapes.append((channels, height, width))
        pieces = torch.split(z, [math.prod(shape) for shape in shapes], 1)
        return [piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _scales(height: int, width: int) -> int:
    """Scales of an image: halvings, rounded down, while both sides are at least 4."""
    side, scales = min(height, width), 0
    while side >= 4:
        side //= 2
        scales += 1
    return max(scales, 1)
