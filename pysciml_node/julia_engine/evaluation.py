"""Single evaluations of a field in Julia, as operations that autograd knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import CODES, device_code
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.modes import uncompiled
from pysciml_node.steps.autograd import pulled


def evaluate(field: Handle, t: Tensor, u: Tensor, p: Tensor, packages: tuple[str, ...]) -> Tensor:
    """The derivative at `(t, u)`, differentiable once.

    Args:
        field: in Julia.
        t: the time.
        u: the state, real; the result is like it.
        p: the field's flat parameters.
        packages: Julia packages that its vector-Jacobian product needs.
    """
    value: Tensor = _Evaluate.apply(field, packages, t, u, p)  # type: ignore[no-untyped-call]
    return value


class _Evaluate(torch.autograd.Function):
    """One evaluation in Julia, and its pullback there."""

    @staticmethod
    @override
    def forward(
        ctx: Any, field: Handle, packages: tuple[str, ...], t: Tensor, u: Tensor, p: Tensor
    ) -> Tensor:
        ctx.field, ctx.packages = field, packages
        ctx.save_for_backward(t, u, p)
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        enter("evaluate_once!", du=out, **_arguments(field, t, u, p))
        return out

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        t, u, p = ctx.saved_tensors
        runtime.require(*ctx.packages)

        def pull(cotangent: Tensor) -> tuple[Tensor | None, ...]:
            u_bar = torch.empty_like(u, memory_format=torch.contiguous_format)
            p_bar = torch.zeros_like(p, memory_format=torch.contiguous_format)
            v, given = cotangent.contiguous(), _arguments(ctx.field, t, u, p)
            t_bar = enter("pull_once!", v=v, ubar=u_bar, pbar=p_bar, **given)
            return t.new_tensor(t_bar), u_bar, p_bar

        return (None, None, *pulled(pull, (t, u, p), *cotangents))


def _arguments(field: Handle, t: Tensor, u: Tensor, p: Tensor) -> dict[str, Any]:
    """What both entries take: the field, and where to evaluate it."""
    return {
        "field": field,
        "dtype": CODES[u.dtype],
        "device": device_code(u.device),
        "n": u.numel(),
        "u": u.contiguous(),
        "np": p.numel(),
        "p": p.contiguous(),
        "t": t,
    }
