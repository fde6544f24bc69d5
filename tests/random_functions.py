"""Functions of which random fields are made, in tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, torch.sigmoid, torch.sin, torch.cos, F.silu, F.gelu, F.softplus, F.mish, torch.erf,
    lambda x: torch.exp(-x * x), lambda x: 1 / (1.5 + torch.sin(x)), lambda x: (1 + x * x).sqrt(),
    lambda x: torch.log1p(x * x), lambda x: (2 + torch.cos(x)) ** 1.3, lambda x: x**3 / 3,
    torch.atan, lambda x: F.gelu(x, approximate="tanh"), lambda x: x.detach() * x,
    F.logsigmoid, lambda x: torch.asinh(x) - torch.sinh(x / 2), lambda x: torch.rsqrt(1 + x * x),
    lambda x: x - 0.37, lambda x: 1.7 * x + 0.2, lambda x: 0.3 - x, torch.neg, torch.square,
]  # fmt: skip
# A shift that no sum of simple numbers meets.
ODD = 0.1234567
KINKED: list[Callable[[Tensor], Tensor]] = [
    torch.relu, F.elu, torch.abs, lambda x: F.leaky_relu(x, 0.3), lambda x: x.clamp(-0.7, 0.4),
    lambda x: torch.where(x > ODD, x, x * x), lambda x: (3 * x + ODD).floor() * x,
    lambda x: x.masked_fill(x < ODD, 0.3), lambda x: torch.sign(x + ODD) * x, F.hardtanh, F.selu,
    lambda x: x * ((x > ODD) & (x < 0.9)), lambda x: torch.remainder(x + ODD, 0.7), F.softshrink,
]  # fmt: skip
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.mul, lambda a, b: a / (1.5 + torch.tanh(b)),
    lambda a, b: torch.maximum(a + ODD, b), lambda a, b: torch.minimum(a, b - ODD),
    lambda a, b: torch.where(a > b + ODD, a, b), lambda a, b: a - 0.4 * b,
    lambda a, b: torch.addcmul(a, a, b, value=0.5), lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: (2 + torch.sin(a)) ** b.tanh(), lambda a, b: torch.atan2(a, 2 + b * b),
    lambda a, b: torch.hypot(a, 1 + b.abs()), torch.add, torch.mul,
]  # fmt: skip
# Along one axis, with the same shape afterwards.
ALONG: list[Callable[[Tensor, int], Tensor]] = [
    torch.softmax, torch.log_softmax, torch.cumsum, lambda x, d: x.flip(d),
    lambda x, d: x.roll(1, d),
    lambda x, d: (x.tanh() + 0.5).cumprod(d), lambda x, d: F.normalize(x + ODD, dim=d),
    lambda x, d: x - x.mean(d, keepdim=True), lambda x, d: x.roll(-2, d) * 0.5 + x,
]  # fmt: skip
# One axis less, or of one entry.
REDUCED: list[Callable[..., Tensor]] = [
    torch.sum, torch.mean, torch.logsumexp,
    lambda x, d, keepdim: (x + ODD * torch.arange(x.shape[d]).view(_along(x, d))).amax(d, keepdim),
    lambda x, d, keepdim: (x.tanh() + 0.5).prod(d, keepdim),
    lambda x, d, keepdim: x.var(d, unbiased=False, keepdim=keepdim),
    lambda x, d, keepdim: (x + ODD).norm(dim=d, keepdim=keepdim),
]  # fmt: skip


def _along(x: Tensor, dim: int) -> list[int]:
    return [-1 if i == dim % x.ndim else 1 for i in range(x.ndim)]


MOVED: list[Any] = [
    None, None,
    lambda x, d: x.unsqueeze(d).expand(*x.shape[: d % x.ndim + 1], 2, *x.shape[d % x.ndim + 1 :])
    if d < -1 else x.unsqueeze(-1).expand(*x.shape, 2),
    lambda x, d: x.unsqueeze(-1),
    lambda x, d: x.repeat_interleave(2, d),
    lambda x, d: torch.cat([part * (n + 1) for n, part in enumerate(x.unbind(d))][::-1], d + 1)
    if d < -1 else torch.stack(x.unbind(d)[::-1], d),
    lambda x, d: F.pad(x, (1, 2), value=0.3),
    lambda x, d: F.pad(x, (0, -1)) if x.shape[-1] > 1 else x,
    lambda x, d: x.unfold(d, min(3, x.shape[d]), 1),
    lambda x, d: torch.cat(x.chunk(2, d)[::-1], d),
    lambda x, d: x.tril() if x.ndim > 1 else x.cumsum(0),
    lambda x, d: x.select(d, x.shape[d] - 1),
]  # fmt: skip
