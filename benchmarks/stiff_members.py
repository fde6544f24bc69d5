"""Ensembles of stiff problems: Robertson's equations with rates of each member's own, on one core.

    python benchmarks/stiff_members.py [--sizes 10 1000] [--only Rodas5P ...] [--repeats 3]

Each member has its rates, half to one and a half times the usual ones, and goes from (1, 0, 0) over
[0, 1000] at rtol 1e-6 and atol 1e-10 in float64. The gradient is that of the sum of all members'
first species at the end, to all rates. diffrax solves under `vmap` and `jit`; without it there are
our rows alone.

A row gives the accepted steps of a member, the largest error of any state at the end, each
entry relative to its largest value, that of the gradient, each rate's likewise, and
microseconds of CPU time for an accepted step of one member: medians, without compilation, all rows
taken in turn. The errors are those of the first 50 members, against Rodas5P
at rtol 1e-9.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from timing import pin, processor, show_members, versions

CORE = pin(None)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pysciml_node as psn  # noqa: E402

D = torch.float64
END, RTOL, ATOL = 1000.0, 1e-6, 1e-10
_EXACT = 50
"""Members whose errors are measured: the first ones."""
PACKAGES = ("torch", "pysciml_node", "diffrax", "jax")
Array = np.ndarray[Any, Any]


@dataclass
class Candidate:
    """A solver made ready for some members.

    Attributes:
        steps: accepted steps of all members together.
        forward: solves, and returns the states at the end, `(M, 3)`.
        gradient: solves, and returns the gradient to the rates, `(M, 3)`.
    """

    steps: int
    forward: Callable[[], Any]
    gradient: Callable[[], Any]


def rates(size: int) -> Tensor:
    """The members' own rates, `(M, 3)`."""
    shares = torch.rand(size, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    return torch.tensor([0.04, 3e7, 1e4], dtype=D) * (0.5 + shares)


def robertson(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Robertson's equations."""
    a, b, c = u.unbind()
    slow, fast, back = p[0] * a, p[1] * b * b, p[2] * b * c
    return torch.stack((back - slow, slow - fast - back, fast))


def ours(
    p: Tensor,
    algorithm: psn.Algorithm,
    rtol: float = RTOL,
    atol: float = ATOL,
    compile: bool = False,
) -> Candidate:
    """A method of this package: the members in one batch, or in native code."""
    p = p.clone().requires_grad_()
    u0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)
    one = psn.ODEProblem(robertson, u0, (0.0, END), p=p[0].detach())

    def solve() -> psn.EnsembleSolution:
        ensemble = psn.EnsembleProblem(one, p=p)
        return psn.solve(ensemble, algorithm, rtol=rtol, atol=atol, engine="torch", compile=compile)

    def forward() -> Tensor:
        with torch.no_grad():
            ends: Tensor = solve().u1
        return ends

    with torch.no_grad():
        steps = solve().stats.naccept
    return Candidate(steps, forward, lambda: torch.autograd.grad(solve().u1[:, 0].sum(), p)[0])


def one_by_one(p: Tensor, algorithm: psn.Algorithm) -> Candidate:
    """A method of this package, native solves one after the other."""
    p = p.clone().requires_grad_()
    u0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)

    def solve() -> list[psn.Solution]:
        problems = [psn.ODEProblem(robertson, u0, (0.0, END), p=own) for own in p.unbind()]
        return [
            psn.solve(x, algorithm, rtol=RTOL, atol=ATOL, engine="torch", compile=True)
            for x in problems
        ]

    def forward() -> Tensor:
        with torch.no_grad():
            return torch.stack([x.u1 for x in solve()])

    with torch.no_grad():
        steps = sum(x.stats.naccept for x in solve())

    def gradient() -> Tensor:
        ends = torch.stack([x.u1 for x in solve()])
        return torch.autograd.grad(ends[:, 0].sum(), p)[0]

    return Candidate(steps, forward, gradient)


def diffrax(rates: Tensor) -> Candidate:
    """Kvaerno5 under `vmap` and `jit`, with the adjoint that it takes by default."""
    dfx, jax = importlib.import_module("diffrax"), importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy

    def field(t: Any, u: Any, p: Any) -> Any:
        a, b, c = u
        slow, fast, back = p[0] * a, p[1] * b * b, p[2] * b * c
        return jnp.stack([back - slow, slow - fast - back, fast])

    def one(p: Any) -> Any:
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field), dfx.Kvaerno5(), 0.0, END, None, jnp.asarray([1.0, 0.0, 0.0]),
            args=p, stepsize_controller=dfx.PIDController(rtol=RTOL, atol=ATOL), max_steps=4096,
        )  # fmt: skip
        return solution.ys[0], solution.stats["num_accepted_steps"]

    p = jnp.asarray(rates.numpy())
    many = jax.jit(jax.vmap(one))
    pulled = jax.jit(jax.grad(lambda p: jax.vmap(one)(p)[0][:, 0].sum()))
    return Candidate(
        int(many(p)[1].sum()),
        lambda: jax.block_until_ready(many(p)[0]),
        lambda: jax.block_until_ready(pulled(p)),
    )


CANDIDATES: dict[str, Callable[[Tensor], Candidate]] = {
    "Rodas5P, native": lambda p: ours(p, psn.Rodas5P(), compile=True),
    "Rosenbrock23, native": lambda p: ours(p, psn.Rosenbrock23(), compile=True),
    "Rodas5P, native, one by one": lambda p: one_by_one(p, psn.Rodas5P()),
    "Rodas5P": lambda p: ours(p, psn.Rodas5P()),
    "KenCarp4": lambda p: ours(p, psn.KenCarp4()),
    "Rosenbrock23": lambda p: ours(p, psn.Rosenbrock23()),
    "diffrax Kvaerno5": diffrax,
}


def off(found: Any, exact: Array) -> float:
    """The largest difference, each column in units of its largest entry."""
    return float((abs(np.asarray(found) - exact) / abs(exact).max(0)).max())


KINDS = ("forward", "gradient")


def rows(size: int, names: list[str], repeats: int) -> list[list[str]]:
    """The rows of one size."""
    p = rates(size)
    tight = ours(p[:_EXACT], psn.Rodas5P(), 1e-9, 1e-13)
    exact = [tight.forward().numpy(), tight.gradient().numpy()]
    found = {}
    for name in names:
        try:
            found[name] = CANDIDATES[name](p)
        except ImportError as error:
            print(f"{name} is left out: {error.name} is not installed")
    # The first calls compile.
    first = {(name, kind): getattr(x, kind)() for name, x in found.items() for kind in KINDS}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in first}
    for _ in range(repeats):
        for (name, kind), spent in times.items():
            before = time.process_time()
            getattr(found[name], kind)()
            spent.append(time.process_time() - before)
    return [
        [
            *(name, str(size), f"{x.steps / size:.0f}"),
            *(
                f"{off(first[name, kind][:_EXACT], at):.0e}"
                for kind, at in zip(KINDS, exact, strict=True)
            ),
            *(f"{1e6 * median(times[name, kind]) / x.steps:.3g}" for kind in KINDS),
        ]
        for name, x in found.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    show_members(__doc__, list(CANDIDATES), rows, "steps")
    print(f"{processor()}, core {CORE}; {versions(PACKAGES)}")


if __name__ == "__main__":
    main()
