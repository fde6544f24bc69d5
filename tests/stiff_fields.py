"""What tests of native stiff solves share: fields, and how two solves of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conformance import stiff_problems as known
from torch import Tensor, nn
from torch.nn import functional

import pysciml_node as psn

D = torch.float64


def tensor(*values: float, gradient: bool = False) -> Tensor:
    made = torch.tensor(values, dtype=D)
    made = made if len(values) > 1 else made[0]
    return made.clone().requires_grad_(gradient)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class Driven(nn.Module):
    """A stiff driven field of a module's parameters, a buffer and `p`."""

    shift: Tensor

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random(width, width, seed=1) - 3 * torch.eye(width, dtype=D))
        self.net = nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, width)).double()
        with torch.no_grad():
            for i, x in enumerate(self.net.parameters()):
                x.copy_(random(*x.shape, seed=i) / 2)
        self.register_buffer("shift", torch.linspace(-1, 1, width, dtype=D))

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Any]) -> Tensor:
        fast = u @ self.matrix.T * p["gain"]
        return fast + self.net(u) + p["n"] * self.shift * torch.sin(t * p["rate"])


def driven(batch: int, width: int) -> tuple[Any, Any, Any, list[Tensor]]:
    field = Driven(width)
    p = {
        "gain": tensor(3.0, gradient=True),
        "rate": tensor(*torch.linspace(1, 2, width).tolist(), gradient=True),
        "n": 2.0,
    }
    return field, random(batch, width), p, [*field.parameters(), p["gain"], p["rate"]]


def oscillator() -> tuple[Any, Any, Any, list[Tensor]]:
    """A function of two parts, with a closure, an index and a power of time."""
    stiffness = tensor(40.0, gradient=True)
    weights = tensor(0.3, 0.5, gradient=True)

    def f(t: Tensor, u: dict[str, Tensor], p: tuple[Tensor, ...]) -> dict[str, Tensor]:
        pull = -stiffness * torch.sin(u["x"]) - p[0] * u["v"]
        return {"v": pull + t**2 * weights[1], "x": u["v"] * torch.cosh(weights[0] * t)}

    p = (tensor(9.0, gradient=True),)
    return f, {"x": random(2), "v": random(2, seed=3)}, p, [stiffness, weights, p[0]]


def reactions() -> tuple[Any, Any, Any, list[Tensor]]:
    """POLLU with rates of like size as parameters, and twenty entries of a state."""
    rates = known._POLLU_RATES.log1p().requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        extended = torch.cat((y, y.new_ones(1)))
        return known._POLLU_BALANCE @ (
            rates * y[known._POLLU_FIRST] * extended[known._POLLU_SECOND]
        )

    return f, random(20).abs(), None, [rates]


def constant() -> tuple[Any, Any, Any, list[Tensor]]:
    """Nothing depends on the state."""
    rate = tensor(0.3, -2.0, gradient=True)
    return lambda t, u: rate * t, random(2), None, [rate]


def linear() -> tuple[Any, Any, Any, list[Tensor]]:
    """No second derivatives by the state, and none of anything by time."""
    matrix = (random(4, 4) - 20 * torch.eye(4, dtype=D)).requires_grad_()
    return lambda t, u: matrix @ u, random(4), None, [matrix]


def normalized() -> tuple[Any, Any, Any, list[Tensor]]:
    """Activations and normalizations, which change in time."""
    norm, cell = nn.LayerNorm(4).double(), nn.GRUCell(4, 4).double()
    with torch.no_grad():
        for i, x in enumerate(cell.parameters()):
            x.copy_(random(*x.shape, seed=i) / 2)

    def f(t: Tensor, u: Tensor) -> Tensor:
        gated = norm(cell(u, torch.cos(t) * u))
        kinks = functional.elu(9 * u) + functional.softplus(u.cumsum(1)) - u * functional.relu(u)
        return gated + 0.1 * kinks + u.detach() * u.sin() - 3 * u

    return f, random(2, 4), None, [*norm.parameters(), *cell.parameters()]


class Decay(nn.Module):
    """A field of which all can be seen."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u


class Ranked(nn.Module):
    """Its second derivative needs the place of the greatest entry, which programs do not have."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u * u.max(0, keepdim=True)[0]


FIELDS: dict[str, Callable[[], tuple[Any, Any, Any, list[Tensor]]]] = {
    "module": lambda: driven(2, 3),
    "wide module": lambda: driven(3, 5),
    "one entry": lambda: driven(1, 1),
    "parts": oscillator,
    "reactions": reactions,
    "constant": constant,
    "linear": linear,
    "normalized": normalized,
}
STEPS: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}
SAVEAT = (0.0, 0.03, 0.04, 0.1, 0.17, 0.45, 0.5)


def flat(u: Any) -> Tensor:
    parts = u.values() if isinstance(u, dict) else (u,)
    return torch.cat([x.reshape(-1) for x in parts])


def solved(
    made: tuple[Any, Any, Any, list[Tensor]],
    algorithm: Any,
    compile: Any,
    span: Any = (0.0, 0.5),
    **options: Any,
) -> tuple[psn.Solution, list[Tensor]]:
    """A solution and its gradients to all inputs, of a loss of all that a solution has."""
    f, u0, p, wanted = made
    starts = {"u": u0} if isinstance(u0, Tensor) else u0
    starts = {key: x.clone().requires_grad_() for key, x in starts.items()}
    said = {x: options.pop(x, None) for x in ("mass_matrix", "jac", "jac_sparsity")}
    start: Any = starts["u"] if isinstance(u0, Tensor) else starts
    problem = psn.ODEProblem(f, start, span, p=p, **said)
    options = {"rtol": 1e-6, "atol": 1e-8, "engine": "torch"} | options
    solution = psn.solve(problem, algorithm, compile=compile, **options)
    states, end = flat(solution.u), flat(solution.u1)
    weights = torch.linspace(-1, 2, len(states), dtype=D)
    loss = (states * weights).sum() + (end**3).sum()
    times = [x for x in (*span, options.get("saveat")) if isinstance(x, Tensor)]
    inputs = [*starts.values(), *wanted, *(x for x in times if x.requires_grad)]
    return solution, [loss, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def assert_alike(found: Any, expected: Any, values: float = 1e-12, bars: float = 1e-10) -> None:
    (native, gradients), (eager, others) = found, expected
    assert native.retcode is eager.retcode
    assert native.stats.naccept == eager.stats.naccept
    assert native.stats.nreject == eager.stats.nreject
    assert native.stats.naccept_backward == eager.stats.naccept_backward
    assert native.t.shape == eager.t.shape
    torch.testing.assert_close(flat(native.u), flat(eager.u), rtol=values, atol=values)
    torch.testing.assert_close(flat(native.u1), flat(eager.u1), rtol=values, atol=values)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = float(other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=bars, atol=bars * max(scale, 1.0))
