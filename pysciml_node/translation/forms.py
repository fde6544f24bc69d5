"""Operations in torch's own words, where its decomposition suits programs less, or is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions
from torch.nn import functional


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A. Vaswani et al., Attention Is All You Need, NeurIPS 2017, equation 1."""
    if dropout_p > 0 or enable_gqa:
        raise NotImplementedError
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.mT * factor
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """K. Cho et al., EMNLP 2014, with the reset gate as torch has it."""
    reset, update, new = functional.linear(input, w_ih, b_ih).chunk(3, -1)
    h_reset, h_update, h_new = functional.linear(hx, w_hh, b_hh).chunk(3, -1)
    candidate = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    return candidate + torch.sigmoid(update + h_update) * (hx - candidate)


def _lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S. Hochreiter, J. Schmidhuber, Neural Computation 9 (1997) 1735-1780, with a forget gate."""
    h, c = hx
    gates = functional.linear(input, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)
    into, forget, cell, out = gates.chunk(4, -1)
    kept = torch.sigmoid(forget) * c + torch.sigmoid(into) * torch.tanh(cell)
    return torch.sigmoid(out) * torch.tanh(kept), kept


def _lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As torch takes it apart, but never by the fused kernel that single precision has."""
    h, c = hx
    by_layers: Callable[..., Any] = decompositions.gather_params
    loop: Callable[..., Any] = decompositions._rnn_helper
    layers = by_layers(params, has_biases, h.size(2) != c.size(2))
    states = list(zip(h, c, strict=True))
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    out, last = loop(input, states, layers, *options, decompositions.one_layer_lstm)
    first, second = zip(*last, strict=True)
    return out, torch.stack(first, 0), torch.stack(second, 0)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return activation(functional.linear(input, w_ih, b_ih) + functional.linear(hx, w_hh, b_hh))

    return cell


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    shift = torch.finfo(input.dtype).eps if eps is None else eps
    out = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + shift)
    return out if weight is None else out * weight


def _rrelu(
    self: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Tensor:
    if training:
        raise NotImplementedError
    return functional.leaky_relu(self, (lower + upper) / 2)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return distances


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    sizes = [torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp_min(eps) for x in (x1, x2)]
    cosine: Tensor = (x1 / sizes[0] * (x2 / sizes[1])).sum(dim)
    return cosine


def _with_mean(spread: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def both(
        self: Tensor, dim: Any = None, *given: Any, keepdim: bool = False, **named: Any
    ) -> Any:
        if isinstance(dim, bool):
            return spread(self, dim), self.mean()
        keepdim = given[1] if len(given) > 1 else keepdim
        mean = self.mean() if dim is None else self.mean(dim, keepdim=keepdim)
        return spread(self, dim, *given[:1], keepdim=keepdim, **named), mean

    return both


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,kij,...j->...k", input1, weight, input2)
    return out if bias is None else out + bias


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        raise NotImplementedError
    return functional.group_norm(input, input.shape[1], weight, bias, eps)


def _each(values: int | Sequence[int], rank: int) -> list[int]:
    several = [values] if isinstance(values, int) else list(values)
    return several * rank if len(several) == 1 else several


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, fill: float, rank: int) -> Tensor:
    """The windows of a pooling, each along the last dimension."""
    sizes, margins = _each(kernel, rank), _each(padding, rank)
    steps = _each(stride, rank) if stride else sizes
    if any(margins):
        sides = [m for margin in reversed(margins) for m in (margin, margin)]
        x = functional.pad(x, sides, value=fill)
    first = x.dim() - rank
    for d in range(rank):
        x = x.unfold(first + d, sizes[d], steps[d])
    return x.flatten(-rank)


def _average(rank: int) -> Callable[..., Tensor]:
    def pool(
        self: Tensor,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        partial = any(_each(padding, rank)) and not count_include_pad
        if ceil_mode or partial or divisor_override is not None:
            raise NotImplementedError
        return _windows(self, kernel_size, stride, padding, 0.0, rank).mean(-1)

    return pool


def _greatest(rank: int) -> Callable[..., Tensor]:
    def pool(
        self: Tensor,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Tensor:
        if ceil_mode or any(d != 1 for d in _each(dilation, rank)):
            raise NotImplementedError
        return _windows(self, kernel_size, stride, padding, -math.inf, rank).max(-1)[0]

    return pool


def _transposed(rank: int) -> Callable[..., Tensor]:
    """A transposed convolution: of the input with zeros between, by the weight turned round."""

    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        x = input if input.dim() == rank + 2 else input.unsqueeze(0)
        steps, margins = _each(stride, rank), _each(padding, rank)
        ends, holes = _each(output_padding, rank), _each(dilation, rank)
        for d in range(rank):
            x = _apart(x, 2 + d, steps[d])
        reach = [h * (k - 1) - m for h, k, m in zip(holes, weight.shape[2:], margins, strict=True)]
        sides = [(low, low + end) for low, end in zip(reach, ends, strict=True)]
        x = functional.pad(x, [n for pair in reversed(sides) for n in pair])
        inputs, outputs = weight.shape[:2]
        turned = weight.flip(*range(2, 2 + rank)).reshape(
            groups, inputs // groups, outputs, *weight.shape[2:]
        )
        turned = turned.transpose(1, 2).flatten(0, 1)
        operation = functional.conv1d if rank == 1 else functional.conv2d
        out = operation(x, turned, bias, 1, 0, holes, groups)
        return out if input.dim() == rank + 2 else out.squeeze(0)

    return convolve


def _apart(x: Tensor, dim: int, step: int) -> Tensor:
    """With `step - 1` zeros between the entries along a dimension."""
    if step == 1:
        return x
    zeros = torch.zeros_like(x).unsqueeze(dim + 1)
    spaced = torch.cat([x.unsqueeze(dim + 1), *[zeros] * (step - 1)], dim + 1).flatten(dim, dim + 1)
    return spaced.narrow(dim, 0, (x.shape[dim] - 1) * step + 1)


def _softshrink_backward(grad_output: Tensor, self: Tensor, lambd: float) -> Tensor:
    return grad_output.masked_fill(self.abs() <= lambd, 0.0)


def _group_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """For the input alone."""
    if list(output_mask) != [True, False, False]:
        raise NotImplementedError
    if weight is not None:
        grad_out = grad_out * weight.reshape(-1, *[1] * (input.dim() - 2))
    g, x = (y.reshape(N, group, -1) for y in (grad_out, input))
    scale = rstd.unsqueeze(-1)
    normal = (x - mean.unsqueeze(-1)) * scale
    along = normal * (g * normal).mean(-1, keepdim=True)
    return (scale * (g - g.mean(-1, keepdim=True) - along)).reshape(input.shape), None, None


def _convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """For the input alone: the transposed convolution, with an entry more where some were left."""
    rank = len(stride)
    if transposed or rank > 2 or list(output_mask) != [True, False, False]:
        raise NotImplementedError
    axes = zip(
        input.shape[2:], grad_output.shape[2:], weight.shape[2:], stride, padding, dilation,
        strict=True,
    )  # fmt: skip
    ends = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in axes]
    turned = _transposed(rank)(grad_output, weight, None, stride, padding, ends, groups, dilation)
    return turned, None, None


def _softplus_backward(grad_output: Tensor, self: Tensor, beta: float, threshold: float) -> Tensor:
    """By the sigmoid: torch's exponentials overflow, where their quotient does not."""
    scaled = self * beta
    return torch.where(scaled > threshold, grad_output, grad_output * torch.sigmoid(scaled))


def _elu_backward(
    grad_output: Tensor,
    alpha: float,
    scale: float,
    input_scale: float,
    is_result: bool,
    self_or_result: Tensor,
) -> Tensor:
    """The exponential is taken of no positive number, where it is not used and may overflow."""
    if is_result:
        slope = self_or_result + alpha * scale
    else:
        slope = torch.exp(self_or_result.clamp(max=0) * input_scale) * (alpha * scale)
    rising = grad_output * slope * input_scale
    return torch.where(self_or_result <= 0, rising, grad_output * scale)


FORMS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "gru_cell": _gru_cell,
    "lstm_cell": _lstm_cell,
    "lstm": _lstm,
    "rnn_tanh_cell": _rnn_cell(torch.tanh),
    "rnn_relu_cell": _rnn_cell(torch.relu),
    "rms_norm": _rms_norm,
    "rrelu": _rrelu,
    "cdist": _cdist,
    "cosine_similarity": _cosine,
    "var_mean": _with_mean(torch.var),
    "std_mean": _with_mean(torch.std),
    "bilinear": _bilinear,
    "instance_norm": _instance_norm,
    "avg_pool1d": _average(1),
    "avg_pool2d": _average(2),
    "max_pool1d": _greatest(1),
    "max_pool2d": _greatest(2),
    "conv_transpose1d": _transposed(1),
    "conv_transpose2d": _transposed(2),
    "convolution_backward": _convolution_backward,
    "softshrink_backward": _softshrink_backward,
    "softplus_backward": _softplus_backward,
    "elu_backward": _elu_backward,
    "native_group_norm_backward": _group_norm_backward,
}
"""By the name of the operation, called as it is."""
