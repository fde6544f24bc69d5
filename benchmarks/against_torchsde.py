"""torchsde beside `compat.torchsde` and native code, in one process: steps a second.

    pip install torchsde
    python benchmarks/against_torchsde.py

Geometric Brownian motion (4096 x 8, and a small batch of 16 x 2), additive noise of three motions
(1024 x 8), the generator of an SDE-GAN (1024 x 16, general noise of three motions, `f_and_g`), and
a latent SDE (1024 x 4, `logqp`), in float32, by 64 steps on one core, forward and with gradients;
each with a new Brownian motion a solve. Rates are of CPU time, medians over turns that alternate;
with a ratio above one this package is faster. The last columns are `solve(..., compile=True)` of
the same equation by the same method. The last rows are queries of 12,288 entries: of a
`BrownianTree` on 50 falling levels, and of a `BrownianInterval` step by step.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torchsde as theirs
from timing import interleave, pin, table
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat import torchsde as ours

STEPS = 64


class Geometric(nn.Module):
    """`dy = m y dt + s y dW`."""

    noise_type, sde_type, shape = "diagonal", "ito", (4096, 8)

    def __init__(self) -> None:
        super().__init__()
        self.m, self.s = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.3))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift."""
        return self.m * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        return self.s * y


class Small(Geometric):
    """The same for a few states, where what a step costs beside its sums is what counts."""

    shape = (16, 2)


class Additive(nn.Module):
    """A small network with noise of three motions."""

    noise_type, sde_type, shape = "additive", "ito", (1024, 8)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.mixing = nn.Parameter(torch.randn(8, 3) / 4)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift."""
        return self.net(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        return self.mixing.expand(len(y), 8, 3)


class Generator(nn.Module):
    """The generator of torchsde's SDE-GAN example."""

    noise_type, sde_type, shape = "general", "stratonovich", (1024, 16)

    def __init__(self) -> None:
        super().__init__()
        self.drift, self.diffusion = (
            nn.Sequential(nn.Linear(17, 16), nn.SiLU(), nn.Linear(16, n), nn.Tanh())
            for n in (16, 48)
        )

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        ty = torch.cat((t.expand(len(y), 1), y), 1)
        return self.drift(ty), self.diffusion(ty).view(-1, 16, 3)


class Latent(nn.Module):
    """A posterior and a prior with one diffusion."""

    noise_type, sde_type, shape = "diagonal", "ito", (1024, 4)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift."""
        return self.net(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        return torch.full_like(y, 0.5)

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        """The prior's drift."""
        return -y


ROWS: list[tuple[type[Any], str, dict[str, Any]]] = [
    (Geometric, "euler", {}),
    (Geometric, "milstein", {"options": {"grad_free": True}}),
    (Geometric, "srk", {}),
    (Small, "euler", {}),
    (Small, "srk", {}),
    (Additive, "srk", {}),
    (Generator, "reversible_heun", {}),
    (Generator, "midpoint", {}),
    (Latent, "euler", {"logqp": True}),
]


NATIVE: dict[tuple[str, str], Any] = {
    ("diagonal", "euler"): psn.EM(),
    ("diagonal", "milstein"): psn.RKMil(),
    ("diagonal", "srk"): psn.SRIW1(),
    ("additive", "srk"): psn.SRA1(),
    ("general", "reversible_heun"): psn.ReversibleHeun(),
    ("general", "midpoint"): psn.StratonovichMidpoint(),
}


def native(sde: Any, y0: Tensor, method: str, way: str) -> Callable[[], object]:
    """The same solve as native code."""
    if hasattr(sde, "f_and_g"):
        problem = psn.SDEProblem(
            lambda t, y: sde.f_and_g(t, y)[0],
            lambda t, y: sde.f_and_g(t, y)[1],
            y0,
            (0.0, 1.0),
            sde.noise_type,
            sde.sde_type,
        )
    else:
        problem = psn.SDEProblem(sde.f, sde.g, y0, (0.0, 1.0), sde.noise_type, sde.sde_type)
    algorithm = NATIVE[sde.noise_type, method]
    fixed: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1 / STEPS, "compile": True}

    def run() -> object:
        if way == "forward":
            with torch.no_grad():
                return psn.solve(problem, algorithm, **fixed)
        loss = psn.solve(problem, algorithm, **fixed).u1.square().mean()
        return torch.autograd.grad(loss, list(sde.parameters()))

    return run


def solves(kind: type[Any], method: str, options: dict[str, Any], way: str) -> dict[str, Any]:
    """The same solve by both, ready to be timed."""
    torch.manual_seed(0)
    sde = kind()
    y0 = torch.full(kind.shape, 0.5)

    def call(package: Any) -> Callable[[], object]:
        function = package.sdeint_adjoint if way == "adjoint" else package.sdeint

        def run() -> object:
            given = {"method": method, "dt": 1 / STEPS, **options}
            if way == "forward":
                with torch.no_grad():
                    return function(sde, y0, [0.0, 1.0], **given)
            found = function(sde, y0, [0.0, 1.0], **given)
            parts = found if isinstance(found, tuple) else (found,)
            loss = sum(part[-1].square().mean() for part in parts)
            return torch.autograd.grad(loss, list(sde.parameters()))

        return run

    calls = {"theirs": call(theirs), "ours": call(ours)}
    if not options.get("logqp"):
        calls["native"] = native(sde, y0, method, way)
    return calls


def brownian(package: Any, tree: bool) -> Callable[[], object]:
    """Many queries of one motion."""
    x, levels = torch.zeros(12_288), torch.linspace(2.6, -3.5, 51).exp().tolist()

    def run() -> object:
        if tree:
            motion = package.BrownianTree(0.02, x, 14.0, entropy=1)
            return [motion(b, a) for a, b in itertools.pairwise(levels)]
        motion = package.BrownianInterval(0.0, 1.0, x.shape, x.dtype, entropy=1)
        return [motion(n / 50, (n + 1) / 50) for n in range(50)]

    return run


def row(name: str, calls: dict[str, Callable[[], object]], count: int, repeats: int) -> list[str]:
    """Rates of all, and their ratios."""
    spread = interleave(calls, repeats)
    rates = {who: 1e3 * count / one.cpu for who, one in spread.items()}
    cells = [name, f"{rates['theirs']:.0f}"]
    for who in ("ours", "native"):
        found = who in rates
        cells += [f"{rates[who]:.0f}" if found else ""]
        cells += [f"{rates[who] / rates['theirs']:.2f}" if found else ""]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="the first words of rows")
    chosen = parser.parse_args()
    repeats = chosen.repeats
    pin(None)
    torch.set_num_threads(1)
    rows = [
        row(f"{kind.__name__}, {method}, {way}", solves(kind, method, options, way), STEPS, repeats)
        for kind, method, options in ROWS
        if not chosen.only or kind.__name__ in chosen.only
        for way in ("forward", "gradient", "adjoint")
    ]
    for name, tree in (("BrownianTree", True), ("BrownianInterval", False)):
        if chosen.only and name not in chosen.only:
            continue
        calls = {"theirs": brownian(theirs, tree), "ours": brownian(ours, tree)}
        rows.append(row(name, calls, 50, repeats))
    print(
        table(
            ["steps or queries a CPU second", "torchsde", "here", "ratio", "native", "ratio"], rows
        )
    )


if __name__ == "__main__":
    main()
