"""What products, convolutions and normalizations become in a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pysciml_node.translation.builder import Builder, Joined, Shape, Traced, View
from pysciml_node.translation.operations import HANDLERS, handles, reduced, refuse


def _stored(g: Builder, weight: View) -> tuple[View, bool]:
    """A weight `(outputs, inputs)` as it lies in memory, and whether its inputs are together."""
    turned = weight.transposed
    if weight.stride[-1] != 1 and turned.stride[-1] == 1 and turned.stride[-2] == turned.shape[-1]:
        return g.whole(turned), False
    return g.whole(weight), True


def _pieces(
    g: Builder, x: Traced, rows: int
) -> tuple[list[tuple[int, Shape]], list[list[int]], list[tuple[int, Shape]], list[int]]:
    """The inputs of a product: pieces with their columns, and single numbers with theirs."""
    views: list[tuple[int, Shape]] = []
    singles: list[tuple[int, Shape]] = []
    columns, places = [], []
    start = 0
    joined = isinstance(x, Joined) and x.dim == len(x.shape) - 1
    for piece in x.pieces if isinstance(x, Joined) and joined else [g.whole(x)]:
        width = piece.shape[-1]
        if joined and piece.is_single:
            single = g.whole(piece.core()).id
            singles += [(single, (1,))] * width
            places += list(range(start, start + width))
        else:
            views.append((g.whole(piece).id, (rows, width)))
            columns.append([start, width])
        start += width
    return views, columns, singles, places


def _rows(x: View) -> list[tuple[int, int]]:
    """Strides and lengths of the dimensions before the last one."""
    return list(zip(x.stride[:-1], x.shape[:-1], strict=True))


@handles("linear")
def linear(g: Builder, input: Traced, weight: Traced, bias: Traced | None) -> View:
    """`input @ weight.mT + bias`; of rows that are one and the same, once."""
    *lead, inputs = input.shape
    if isinstance(input, View) and any(s == 0 and n > 1 for s, n in _rows(input)):
        once = tuple(1 if s == 0 else n for s, n in _rows(input))
        product = linear(g, replace(input, shape=(*once, inputs)), weight, bias)
        return product.expand((*lead, weight.shape[0]))
    stored, by_input = _stored(g, weight if isinstance(weight, View) else g.whole(weight))
    outputs = weight.shape[0]
    views, columns, singles, places = _pieces(g, input, math.prod(lead))
    operands = [*views, *singles, (stored.id, stored.shape)]
    if bias is not None:
        operands.append((g.whole(bias).id, (outputs,)))
    return g.emit(
        "linear",
        operands,
        (*lead, outputs),
        columns=columns,
        scalars=places,
        by_input=by_input,
        bias=bias is not None,
        activation="identity",
        in_features=inputs,
        out_features=outputs,
    )


def _view(g: Builder, x: Traced) -> View:
    return x if isinstance(x, View) else g.whole(x)


@handles("mm", "matmul", "bmm")
def matmul(
    g: Builder,
    self: Traced,
    other: Traced | None = None,
    mat2: Traced | None = None,
    **_: Any,
) -> View:
    """`self @ other` for vectors, matrices and stacks of them."""
    right = _view(g, mat2 if other is None else other)  # type: ignore[arg-type]
    if len(right.shape) == 1:
        column = View(right.id, (right.shape[0], 1), (right.stride[0], 1), right.offset)
        out = matmul(g, self, column)
        return out.reshape(out.shape[:-1])
    if len(self.shape) == 1:
        left = _view(g, self)
        row = View(left.id, (1, left.shape[0]), (0, left.stride[0]), left.offset)
        out = matmul(g, row, right)
        return out.reshape((*out.shape[:-2], out.shape[-1]))
    if len(right.shape) == 2:
        return linear(g, self, right.transposed, None)
    return _batched(g, _view(g, self), right)


def _batched(g: Builder, left: View, right: View) -> View:
    """Products of the matrices of two stacks."""
    lead = tuple(max(a, b) for a, b in _aligned(left.shape[:-2], right.shape[:-2]))
    batch, (rows, inner), columns = math.prod(lead), left.shape[-2:], right.shape[-1]
    operands, turned, shared = [], [], []
    for view in (left, right):
        common = math.prod(view.shape[:-2]) == 1
        matrices = view if common else view.expand((*lead, *view.shape[-2:]))
        flipped = matrices.stride[-1] != 1 and matrices.stride[-2] == 1
        stored = g.whole(matrices.transposed if flipped else matrices)
        operands.append((stored.id, (1 if common else batch, *stored.shape[-2:])))
        turned.append(flipped)
        shared.append(common)
    return g.emit(
        "bmm",
        operands,
        (*lead, rows, columns),
        batch=batch,
        rows=rows,
        inner=inner,
        columns=columns,
        transposed_a=turned[0],
        transposed_b=turned[1],
        shared_a=shared[0],
        shared_b=shared[1],
    )


def _aligned(a: Shape, b: Shape) -> list[tuple[int, int]]:
    rank = max(len(a), len(b))
    first, second = ((1,) * (rank - len(shape)) + shape for shape in (a, b))
    return list(zip(first, second, strict=True))


@handles("addmm")
def addmm(
    g: Builder, self: Traced, mat1: Traced, mat2: Traced, beta: float, alpha: float
) -> Traced:
    """`beta * self + alpha * mat1 @ mat2`."""
    weight = _view(g, mat2).transposed
    if beta == 1 and alpha == 1 and self.shape == (weight.shape[0],):
        return linear(g, mat1, weight, self)
    product = g.affine(linear(g, mat1, weight, None), float(alpha))
    return g.binary("add", product, g.affine(self, float(beta)))


@handles("mv")
def mv(g: Builder, self: Traced, vec: Traced) -> View:
    """`self @ vec`."""
    return matmul(g, self, vec)


@handles("dot")
def dot(g: Builder, self: Traced, tensor: Traced) -> View:
    """`self @ tensor`."""
    return matmul(g, self, tensor)


@handles("conv1d", "conv2d")
def conv(
    g: Builder,
    input: Traced,
    weight: Traced,
    bias: Traced | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> View:
    """Cross-correlation in one or two dimensions."""
    rank = len(weight.shape) - 2
    unbatched = len(input.shape) == rank + 1
    x = g.whole(input)
    shape = (1, *x.shape) if unbatched else x.shape
    steps, holes = (_each(value, rank) for value in (stride, dilation))
    margins = _padding(padding, weight.shape[2:], holes, rank)
    sizes = zip(shape[2:], weight.shape[2:], steps, margins, holes, strict=True)
    out = [(n + 2 * m - d * (k - 1) - 1) // s + 1 for n, k, s, m, d in sizes]
    high = [1] * (2 - rank)
    operands = [
        (x.id, (*shape[:2], *high, *shape[2:])),
        (g.whole(weight).id, (*weight.shape[:2], *high, *weight.shape[2:])),
    ]
    if bias is not None:
        operands.append((g.whole(bias).id, bias.shape))
    result = g.emit(
        "conv",
        operands,
        (shape[0], weight.shape[0], *high, *out),
        stride=[*high, *steps],
        padding=[0] * (2 - rank) + margins,
        dilation=[*high, *holes],
    )
    lead = () if unbatched else (shape[0],)
    return result.reshape((*lead, weight.shape[0], *out))


@handles("convolution")
def _convolution(
    g: Builder,
    input: Traced,
    weight: Traced,
    bias: Traced | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> View:
    if transposed or len(weight.shape) > 4:
        raise refuse("a convolution in three dimensions, or a transposed one", "aten.convolution")
    return conv(g, input, weight, bias, stride, padding, dilation, groups)


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _padding(padding: Any, kernel: Shape, dilation: list[int], rank: int) -> list[int]:
    if padding == "valid":
        return [0] * rank
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(total % 2 for total in totals):
            raise refuse('padding="same" that is wider on one side', "aten.conv")
        return [total // 2 for total in totals]
    return _each(padding, rank)


def _normalize(
    g: Builder, x: Traced, weight: Traced | None, bias: Traced | None, **attributes: Any
) -> View:
    operands = [(g.whole(x).id, x.shape)]
    for extra in (weight, bias):
        if extra is not None:
            operands.append((g.whole(extra).id, extra.shape))
    given = {"weight": weight is not None, "bias": bias is not None}
    return g.emit("norm", operands, x.shape, **given, **attributes)


@handles("group_norm")
def group_norm(
    g: Builder,
    input: Traced,
    num_groups: int,
    weight: Traced | None,
    bias: Traced | None,
    eps: float,
    **_: Any,
) -> View:
    """Normalization over groups of channels."""
    channels, pixels = input.shape[1] // num_groups, math.prod(input.shape[2:])
    return _normalize(
        g, input, weight, bias, groups=num_groups, channels=channels, pixels=pixels, eps=eps
    )


@handles("layer_norm")
def layer_norm(
    g: Builder,
    input: Traced,
    normalized_shape: Sequence[int],
    weight: Traced | None,
    bias: Traced | None,
    eps: float,
    **_: Any,
) -> View:
    """Normalization over the last dimensions."""
    channels = math.prod(normalized_shape)
    return _normalize(g, input, weight, bias, groups=1, channels=channels, pixels=1, eps=eps)


@handles("native_group_norm", "native_layer_norm")
def _native_norm(
    g: Builder,
    input: Traced,
    weight: Traced | None,
    bias: Traced | None,
    eps: float,
    group: int | None = None,
    normalized_shape: Sequence[int] = (),
    **_: Any,
) -> list[Any]:
    x = g.whole(input)
    if group is None:
        made = layer_norm(g, input, normalized_shape, weight, bias, eps)
        dims = [-1 - i for i in range(len(normalized_shape))]
        return [made, *_moments(g, x, dims, True, eps)]
    made = group_norm(g, input, group, weight, bias, eps)
    rows = x.reshape((x.shape[0], group, math.prod(x.shape[1:]) // group))
    return [made, *_moments(g, rows, [-1], False, eps)]


def _moments(g: Builder, x: View, dims: list[int], keepdim: bool, eps: float) -> list[View]:
    """Mean and reciprocal standard deviation along some dimensions, as derivatives need them."""
    mean = reduced(g, x, dims, True, "mean")
    variance = reduced(g, g.unary("square", g.binary("sub", x, mean)), dims, True, "mean")
    moments = [mean, g.unary("rsqrt", g.affine(variance, 1.0, eps))]
    shape = tuple(n for d, n in enumerate(mean.shape) if d - len(mean.shape) not in dims)
    return moments if keepdim else [x.reshape(shape) for x in moments]


@handles("batch_norm")
def batch_norm(
    g: Builder,
    input: Traced,
    weight: Traced | None,
    bias: Traced | None,
    running_mean: Traced | None,
    running_var: Traced | None,
    training: bool,
    eps: float,
    **_: Any,
) -> Traced:
    """Normalization by running statistics."""
    if training or running_mean is None or running_var is None:
        raise refuse("batch normalization by the statistics of the batch", "aten.batch_norm")
    shape = (1, input.shape[1], *[1] * (len(input.shape) - 2))

    def channelwise(x: Traced) -> View:
        return g.whole(x).reshape(shape)

    scale: Traced = g.unary("rsqrt", g.affine(channelwise(running_var), 1.0, eps))
    if weight is not None:
        scale = g.binary("mul", scale, channelwise(weight))
    out = g.binary("mul", g.binary("sub", input, channelwise(running_mean)), scale)
    return out if bias is None else g.binary("add", out, channelwise(bias))


__all__ = ["HANDLERS"]
