"""The operations that programs have, each a row: a function of its own part of one state.

Several rows together are one field, so that one library of native code, or one program in Julia,
serves the tests of all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Row = Callable[[Any, Tensor, Tensor], Tensor]
"""A function of the row's own module (or nothing), the time, and a state of shape (4, 6)."""

SHAPE = (4, 6)
INDEX = torch.arange(24).reshape(SHAPE) % 4
COLUMNS = torch.tensor([5, 0, 0, 3, 2, 5])
KEPT = torch.tensor([True, False, True, True, False, False])


def in_place(m: Any, t: Tensor, u: Tensor) -> Tensor:
    out = torch.zeros_like(u)
    out[:, 0] = u[:, 1]
    out[:, 1:3] = -u[:, :2]
    out[0, ::2] += t
    out[[1, 3], 4:] = u[[0, 1], :2].mul_(u[2, 3])
    return out


def written(m: Any, t: Tensor, u: Tensor) -> Tensor:
    out = torch.zeros_like(u)
    out[[0, 2]] = u[[1, 3]]
    out[u > 0] = 0.5
    out.index_put_((torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2])), u[0, :3], accumulate=True)
    return out


def looked_up(m: Any, t: Tensor, u: Tensor) -> Tensor:
    bins = torch.tensor([-0.6, 0.1, 0.9], dtype=u.dtype)
    rows = torch.bucketize(u.detach(), bins)
    return u.gather(0, rows) + torch.take(u, rows) * u[rows[:, 0]] + u.index_select(0, rows[:, 1])


def in_single(m: Any, t: Tensor, u: Tensor) -> Tensor:
    """Torch computes what is made of whole numbers and truths alone in single precision."""
    i = torch.bucketize(u.detach(), torch.tensor([-0.6, 0.1, 0.9], dtype=u.dtype)) + 2
    made = (i / 7 + 0.1) * torch.where(u > 0, 0.1, 0.3) - (u > 0) / 3
    return u * made + (u > 0).float().mean() * 0.7 + (i * 0.1 >= 0.3) * u


def interpolated(m: Any, t: Tensor, u: Tensor) -> Tensor:
    knots = torch.tensor([-1.0, -0.3, 0.4, 3.0], dtype=u.dtype)
    i = torch.searchsorted(knots, t, right=True).sub(1).clamp(0, 2)
    left, right = m.weight[i], m.weight.mT[:, i + 1]
    return u * (left + (t - knots[i]) / (knots[i + 1] - knots[i]) * (right - left))


def without_gradient(m: Any, t: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        size = u.abs().sum() + 1
    return u / size + u.detach() * t


def attention(m: Any, t: Tensor, u: Tensor) -> Tensor:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    heads = u.reshape(1, 4, 2, 3).transpose(1, 2)
    free = F.scaled_dot_product_attention(heads, heads, heads)
    hidden = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    later = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True, scale=0.3)
    return (free + hidden - 2 * later).transpose(1, 2).reshape(SHAPE)


def pooled(m: Any, t: Tensor, u: Tensor) -> Tensor:
    average = F.avg_pool1d(u, 2) + F.adaptive_avg_pool1d(u, 3)
    return torch.cat([average, F.max_pool1d(torch.relu(u), 3, 2, 1)], 1)


ROWS: dict[str, tuple[Row, nn.Module | None]] = {
    "softmax": (lambda m, t, u: torch.softmax(u, 1) + F.softmin(u, 0), None),
    "log_softmax": (lambda m, t, u: F.log_softmax(u, 1), None),
    "logsumexp": (lambda m, t, u: u * torch.logsumexp(3 * u, 1, keepdim=True), None),
    "attention": (attention, None),
    "GRUCell": (lambda m, t, u: m(u), nn.GRUCell(6, 6)),
    "LSTMCell": (lambda m, t, u: m(u, (u, t * u))[0], nn.LSTMCell(6, 6)),
    "RNNCell": (lambda m, t, u: m(u), nn.RNNCell(6, 6, nonlinearity="relu")),
    "GRU": (lambda m, t, u: m(u[None])[0][0], nn.GRU(6, 6)),
    "LSTM": (lambda m, t, u: m(u[:, None])[0][:, 0], nn.LSTM(6, 6)),
    "MultiheadAttention": (
        lambda m, t, u: m(u, u, u)[0],
        nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "TransformerEncoderLayer": (
        lambda m, t, u: m(u[None])[0],
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    ),
    "einsum": (lambda m, t, u: torch.einsum("ij,kj,kl->il", u, u, u), None),
    "outer": (lambda m, t, u: torch.outer(u[:, 0], u[1]) + torch.kron(u[:2, :2], u[:2, :3]), None),
    "cross": (lambda m, t, u: torch.linalg.cross(u[:, :3], u[:, 3:]).repeat(1, 2), None),
    "Bilinear": (lambda m, t, u: m(u, u), nn.Bilinear(6, 6, 6)),
    "norm of one": (
        lambda m, t, u: u.sin() + F.layer_norm(u[:1, :1], (1,), eps=0.1) * u,
        None,
    ),
    "no outputs": (
        lambda m, t, u: torch.cat([F.linear(u, u.new_zeros(0, 6)).tanh(), u.sin() * t], 1),
        None,
    ),
    "where": (lambda m, t, u: torch.where(u > t, u.exp(), u * u) + torch.where(u < 0, 0, u), None),
    "where hides": (lambda m, t, u: torch.where(u > 0, 1 / (u > 0).to(u), u), None),
    "comparisons": (
        lambda m, t, u: (
            (u >= t).to(u) * u + (u != 0) * t + torch.where((u <= 0.5) & ~(u == 0) | (u > 2), u, t)
        ),
        None,
    ),
    "logical": (
        lambda m, t, u: (
            u * (torch.logical_and(u > 0, u < 1) ^ torch.logical_not(u > -1)) + u.isnan() * 2.0
        ),
        None,
    ),
    "any, all": (
        lambda m, t, u: (
            torch.where((u > 1).any(1, keepdim=True), u, -u) + u * (u > -3).all() * (u > 0).sum()
        ),
        None,
    ),
    "masked_fill": (lambda m, t, u: u.masked_fill(u > 0, 0.5) * u, None),
    "clamp": (lambda m, t, u: torch.clamp(u, min=-u * u, max=u.abs() * t) + u.clamp(min=t), None),
    "cumsum": (lambda m, t, u: u.cumsum(1) + u.cumsum(0) * t, None),
    "cumprod": (lambda m, t, u: torch.relu(u).cumprod(1) + u.cumprod(0), None),
    "prod": (lambda m, t, u: u.prod(1, keepdim=True) + torch.relu(u).prod(0) + u * u.prod(), None),
    "gather": (lambda m, t, u: u.gather(0, INDEX) * u.gather(1, INDEX), None),
    "index": (lambda m, t, u: u[[3, 1, 0, 0]] * u[:, COLUMNS] + u[[0, 1], [2, 3]].sum(), None),
    "index by truths": (lambda m, t, u: u[:, KEPT].repeat(1, 2) * t, None),
    "index_select": (lambda m, t, u: u.index_select(1, COLUMNS) * u, None),
    "flip, roll": (lambda m, t, u: u.flip(1) * u.roll((1, -2), (0, 1)) + u.roll(5), None),
    "pad": (
        lambda m, t, u: (
            F.pad(u, (1, 2), value=0.3)[:, 2:-1]
            + F.pad(u[None], (1, 2), mode="circular")[0, :, :6]
            + F.pad(u[None], (2, 1), mode="reflect")[0, :, 3:]
            + F.pad(u, (0, 0, 1, 1))[2:]
            + F.pad(u[None], (2, 1), mode="replicate")[0, :, :6]
        ),
        None,
    ),
    "unfold": (lambda m, t, u: F.pad(u, (1, 1)).unfold(1, 3, 1).square().sum(-1), None),
    "tril, triu": (lambda m, t, u: u.tril() - u.triu(1) * t + torch.diag_embed(u)[:, 2], None),
    "repeat": (lambda m, t, u: u[:, :3].repeat_interleave(2, 1) * u[:2, :2].repeat(2, 3), None),
    "index_add": (
        lambda m, t, u: torch.ones_like(u).index_add(0, torch.tensor([0, 1, 1, 3]), u, alpha=2.0),
        None,
    ),
    "scatter_add": (lambda m, t, u: u.scatter_add(0, INDEX, u * u), None),
    "scatter": (lambda m, t, u: u.scatter(1, INDEX[:, :1], 0.5) * t, None),
    "in place": (in_place, None),
    "index_put": (written, None),
    "std, var": (lambda m, t, u: u / u.std(1, keepdim=True) + u.var() * t + u.var(0), None),
    "var_mean": (lambda m, t, u: sum(torch.var_mean(u, 1, keepdim=True)) * u, None),
    "amax, amin": (
        lambda m, t, u: (
            u.amax(1, keepdim=True) * torch.relu(u).amin(1, keepdim=True) + u * u.amax()
        ),
        None,
    ),
    "max, min": (
        lambda m, t, u: u.max(0).values * u + torch.relu(u).min(1, keepdim=True)[0] + u.max() * t,
        None,
    ),
    "norms": (
        lambda m, t, u: (
            u / u.norm(p=1, dim=1, keepdim=True)
            + u.norm(p=math.inf) * t
            + torch.cat([u[:2], 0 * u[2:]]).norm(dim=1, keepdim=True)
            + u.norm(p=3, dim=0)
        ),
        None,
    ),
    "normalize": (
        lambda m, t, u: F.normalize(u, dim=1) * F.cosine_similarity(u, u + t)[:, None],
        None,
    ),
    "cdist": (lambda m, t, u: torch.cdist(u, u) @ u, None),
    "addcmul": (
        lambda m, t, u: torch.addcmul(u, u, u, value=0.5) + torch.addcdiv(u, u, 2 + u * u),
        None,
    ),
    "lerp": (
        lambda m, t, u: torch.lerp(u, u * u, 0.3) + torch.hypot(u, u + 1) + torch.frac(u),
        None,
    ),
    "tan": (lambda m, t, u: torch.tan(u / 2) + torch.atan(u) + torch.atan2(u, 1 - u), None),
    "asin, acos": (lambda m, t, u: torch.asin(torch.tanh(u)) - torch.acos(torch.tanh(u) * t), None),
    "sinh, cosh": (lambda m, t, u: torch.sinh(u) + torch.cosh(u * t), None),
    "asinh": (
        lambda m, t, u: torch.asinh(u) + torch.acosh(1.5 + u * u) + torch.atanh(u.tanh() * t),
        None,
    ),
    "erfc": (
        lambda m, t, u: torch.erfc(u) + torch.special.expit(u) + torch.logit(u.sigmoid()),
        None,
    ),
    "logarithms": (
        lambda m, t, u: (
            torch.log2(1 + u * u)
            + torch.log10(1 + u * u)
            + torch.exp2(u)
            + torch.logaddexp(u, u * u)
            + torch.xlogy(u, 1 + u * u)
        ),
        None,
    ),
    "sign, floor": (
        lambda m, t, u: (
            u.sign() * u
            + (3 * u).floor() * u
            + (2 * u).round()
            + (2 * u).ceil() * t
            + (3 * u).trunc()
        ),
        None,
    ),
    "remainder": (
        lambda m, t, u: (
            (3 * u) % 0.7 + torch.remainder(u, 1 + u * u) + torch.fmod(3 * u, u * u + 0.3)
        ),
        None,
    ),
    "division": (lambda m, t, u: u * torch.div(u, 0.3, rounding_mode="floor"), None),
    "PReLU": (lambda m, t, u: m(u), nn.PReLU()),
    "CELU, GLU": (lambda m, t, u: F.celu(u, 2.0) + F.glu(torch.cat([u, u * t], 1)), None),
    "hard activations": (
        lambda m, t, u: F.hardswish(4 * u) + F.hardtanh(u) + F.hardsigmoid(4 * u),
        None,
    ),
    "shrinking activations": (
        lambda m, t, u: (
            F.softsign(u)
            + F.tanhshrink(u)
            + F.softshrink(u)
            + F.hardshrink(u)
            + F.rrelu(u)
            + F.threshold(u, 0.1, 2.0)
        ),
        None,
    ),
    "Embedding": (lambda m, t, u: m(torch.tensor([0, 2, 2, 1])) * u, nn.Embedding(3, 6)),
    "lookups": (looked_up, None),
    "whole numbers in single precision": (in_single, None),
    "interpolation in time": (interpolated, nn.Embedding(4, 6)),
    "RMSNorm": (lambda m, t, u: m(u), nn.RMSNorm(6, eps=1e-6)),
    "LayerNorm": (lambda m, t, u: m(u), nn.LayerNorm(6)),
    "GroupNorm": (lambda m, t, u: m(u), nn.GroupNorm(2, 6)),
    "InstanceNorm": (lambda m, t, u: m(u[None])[0], nn.InstanceNorm1d(4, affine=True)),
    "weight_norm": (lambda m, t, u: m(u), parametrizations.weight_norm(nn.Linear(6, 6))),
    "spectral_norm": (lambda m, t, u: m(u), parametrizations.spectral_norm(nn.Linear(6, 6)).eval()),
    "ConvTranspose": (
        lambda m, t, u: m(u[None, :, :3])[0, :, :6],
        nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
    ),
    "pooling": (pooled, None),
    "interpolate": (
        lambda m, t, u: (
            F.interpolate(u[None], scale_factor=2)[0, :, ::2]
            + F.interpolate(u[None], scale_factor=2, mode="linear")[0, :, 1::2]
        ),
        None,
    ),
    "detach": (without_gradient, None),
}


GROUPS = tuple(tuple(ROWS)[i : i + 10] for i in range(0, len(ROWS), 10))
"""Rows that one field has together."""

ROUNDED_BY_TORCH = {"hard activations": 1e-7}
"""Rows whose derivative torch itself rounds to single precision, a slope of 1/6, and how far."""


class Vocabulary(nn.Module):
    """Some of the rows, each on its own part of the state."""

    def __init__(self, names: Sequence[str] = tuple(ROWS)) -> None:
        super().__init__()
        rows = {name: ROWS[name] for name in names}
        self.rows = {name: row for name, (row, _) in rows.items()}
        self.parts = nn.ModuleDict({n: copy.deepcopy(m) for n, (_, m) in rows.items() if m})
        generator = torch.Generator().manual_seed(3)
        for x in self.parameters():
            x.data = 0.4 * torch.randn(x.shape, generator=generator)

    def forward(self, t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = dict(self.parts.items())
        return {name: row(parts.get(name), t, u[name]) for name, row in self.rows.items()}

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A state for every row."""
        made = {}
        for name in self.rows:
            generator = torch.Generator().manual_seed(list(ROWS).index(name))
            made[name] = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        return made
