"""Programs run in Julia, by pointers to torch's memory, for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.julia_engine.process import runtime
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.export import TranslatedModule, translate

SOURCE = """
function (json, double, n, m, t, u, p, v, du, ubar, pbar)
    T = double ? Float64 : Float32
    wrap(x, n) = unsafe_wrap(Vector{T}, Ptr{T}(UInt(x)), n)
    f = program(json, T)
    state, parameters = wrap(u, n), wrap(p, m)
    evaluate!(wrap(du, n), f, state, parameters, t)
    linearized = zeros(T, n)
    linearize!(linearized, f, state, parameters, t, 1)
    isapprox(linearized, wrap(du, n); nans=true) || error("linearize! and evaluate! differ")
    return vjp!(wrap(ubar, n), wrap(pbar, m), f, state, parameters, t, 1, wrap(v, n))
end
"""


@cache
def _pull() -> Callable[..., float]:
    function: Callable[..., float] = runtime._runtime.module.seval(SOURCE)
    return function


def pull(
    translated: TranslatedModule, t: float, u: Tensor, p: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivative and cotangents `(ubar, pbar, tbar)` of a program, all vectors flat."""
    du, ubar, pbar = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(p)
    numbers = (u, p, v, du, ubar, pbar)
    tbar = _pull()(
        translated.json,
        u.dtype == torch.float64,
        u.numel(),
        p.numel(),
        t,
        *(x.data_ptr() for x in numbers),
    )
    return du, ubar, pbar, torch.tensor(tbar, dtype=u.dtype)


def flat(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([like.new_empty(0), *(x.detach().reshape(-1) for x in tensors)])


def compare(
    module: nn.Module, u: Any, t: float = 0.37, seed: int = 12345
) -> dict[str, tuple[Tensor, Tensor]]:
    """Julia's and torch's derivative and cotangents of a module: name to (found, expected)."""
    spec = StateSpec.of(u)
    translated = translate(module, spec)
    time = torch.tensor(t, dtype=spec.dtype, requires_grad=True)
    state = spec.flatten(u).clone().requires_grad_()
    expected = spec.flatten(module(time, spec.unflatten(state)))
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(state.shape, dtype=spec.dtype, generator=generator)
    trained = [p for p in translated.parameters if p.requires_grad]
    inputs = [state, time, *trained]
    if expected.requires_grad:
        gradients = torch.autograd.grad(
            expected, inputs, v, allow_unused=True, materialize_grads=True
        )
    else:
        gradients = tuple(torch.zeros_like(x) for x in inputs)
    by_tensor = dict(zip(map(id, trained), gradients[2:], strict=True))
    pbar = [by_tensor.get(id(x), torch.zeros_like(x)) for x in translated.parameters]
    found = pull(translated, t, state.detach(), flat(translated.parameters, state.detach()), v)
    return {
        "du": (found[0], expected.detach()),
        "ubar": (found[1], gradients[0]),
        "pbar": (found[2], flat(pbar, state.detach())),
        "tbar": (found[3], gradients[1]),
    }


def assert_parity(module: nn.Module, u: Any, t: float = 0.37, scale: float = 1.0) -> None:
    """Equal up to rounding: 1e-14 (float64) or 2e-6 (float32) times `scale`.

    Relative to the largest entry; for the time's cotangent, a sum over the state, to the sum of
    the sizes of its terms.
    """
    spec = StateSpec.of(u)
    for name, (found, expected) in compare(module, u, t).items():
        tolerance = scale * (1e-14 if expected.dtype == torch.float64 else 2e-6)
        size = float(expected.abs().max()) if expected.numel() else 0.0
        if name == "tbar":
            size = max(size, _time_dependence(module, spec, u, t))
        error = float((found - expected).abs().max()) if expected.numel() else 0.0
        assert error <= tolerance * max(size, 1e-3), f"{name}: {error} where values are {size}"


@torch.no_grad()
def _time_dependence(module: nn.Module, spec: StateSpec, u: Any, t: float) -> float:
    """About `sum(abs(df/dt))`."""
    times = torch.tensor([t - 1e-2, t + 1e-2], dtype=spec.dtype)
    before, after = (spec.flatten(module(time, u)) for time in times)
    return float((after - before).abs().sum()) / 2e-2
