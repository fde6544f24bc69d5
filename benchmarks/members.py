"""Ensembles: many Lorenz systems with their own parameter, each with steps of its own, on one core.

    python benchmarks/members.py [--sizes 200 1000 10000] [--only native diffrax ...]
    python benchmarks/members.py --stochastic --sizes 1000
    python benchmarks/members.py --adjoints --sizes 200

Every solver takes Tsit5 with an integral controller and tolerances of 1e-6 in float64, from (1, 1,
1) over [0, 2], with rho between 10 and 40, and gives the states at the end; the gradient is that of
their sum to all starts and parameters. Peers that are not installed are left out. Times are in
milliseconds: the median of CPU time, and the fastest run by the clock, for on a machine that does
other work as well the clock's median says little. The error is the largest of any state, against
native code at tolerances of 1e-12.

`--stochastic` solves stochastic Lotka-Volterra equations of members with rates of their own over
[0, 1] by SOSRI with its usual tolerances, in one batch, as native code, and, for 20 of them, one
after the other; and by 64 steps of `EM` as native code. Milliseconds of CPU time for each member;
of native code the least of five.

`--adjoints` takes the Lorenz systems' gradients of the sum of their states at 0.1, 0.2, ..., 2 by
each adjoint, in one batch and, for 20 of them, one after the other: milliseconds of CPU time for
each member with the forward solve, the fastest of three runs and one run, and by how much the
gradients differ, relative.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from timing import pin, processor, table, versions

CORE = pin(None)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pysciml_node as psn  # noqa: E402

D = torch.float64
END, TOLERANCE = 2.0, 1e-6
PACKAGES = ("torch", "pysciml_node", "diffrax", "jax", "torchode", "gradsolve", "warp-lang")


@dataclass
class Candidate:
    """A solver made ready for some members.

    Attributes:
        forward: solves, and returns the states at the end, `(M, 3)`.
        gradient: solves, and returns the gradients of starts and parameters.
    """

    forward: Callable[[], Any]
    gradient: Callable[[], Any]


def parameters(size: int) -> np.ndarray[Any, Any]:
    """The members' own parameters."""
    return np.linspace(10, 40, size)


def lorenz(t: Tensor, u: Tensor, rho: Tensor) -> Tensor:
    """One Lorenz system."""
    x, y, z = u
    return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z])


def lorenz_of_members(t: Tensor, u: Tensor, rho: Tensor) -> Tensor:
    """Those of all members that are under way."""
    x, y, z = u.unbind(1)
    return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z], 1)


def _ours(
    size: int, tolerance: float = TOLERANCE, batched: bool = False, **options: Any
) -> Candidate:
    rho = torch.tensor(parameters(size)).requires_grad_()
    u0 = torch.ones(size, 3, dtype=D, requires_grad=True)
    field = lorenz_of_members if batched else lorenz
    one = psn.ODEProblem(field, u0[0].detach(), (0.0, END), p=rho[0].detach())

    def solve() -> Tensor:
        found: Tensor = psn.solve(
            psn.EnsembleProblem(one, u0, rho, batched=batched), psn.Tsit5(),
            rtol=tolerance, atol=tolerance, controller=psn.IController(), engine="torch", **options,
        ).u1  # fmt: skip
        return found

    def forward() -> Tensor:
        with torch.no_grad():
            return solve()

    return Candidate(forward, lambda: torch.autograd.grad(solve().sum(), [u0, rho]))


def native(size: int) -> Candidate:
    """Native code."""
    return _ours(size, compile=True)


def eager(size: int) -> Candidate:
    """One batch in Python, the field mapped over members."""
    return _ours(size)


def eager_batched(size: int) -> Candidate:
    """One batch in Python, with a field of batches."""
    return _ours(size, batched=True)


def _lorenz_jax(jnp: Any) -> Callable[..., Any]:
    def f(t: Any, u: Any, rho: Any) -> Any:
        x, y, z = u
        return jnp.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z])

    return f


def diffrax(size: int) -> Candidate:
    """`vmap` and `jit`, with the adjoint that it takes by default."""
    dfx, jax = importlib.import_module("diffrax"), importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    field = _lorenz_jax(jax.numpy)

    def one(u0: Any, rho: Any) -> Any:
        return dfx.diffeqsolve(
            dfx.ODETerm(field), dfx.Tsit5(), 0.0, END, None, u0, args=rho,
            stepsize_controller=dfx.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        ).ys[0]  # fmt: skip

    u0, rho = jax.numpy.ones((size, 3)), jax.numpy.asarray(parameters(size))
    many = jax.jit(jax.vmap(one))
    pulled = jax.jit(jax.grad(lambda u, r: jax.vmap(one)(u, r).sum(), argnums=(0, 1)))
    return Candidate(
        lambda: jax.block_until_ready(many(u0, rho)),
        lambda: jax.block_until_ready(pulled(u0, rho)),
    )


def torchode(size: int) -> Candidate:
    """Its batch, differentiated through."""
    to = importlib.import_module("torchode")
    rho = torch.tensor(parameters(size)).requires_grad_()
    u0 = torch.ones(size, 3, dtype=D, requires_grad=True)

    def field(t: Tensor, u: Tensor) -> Tensor:
        x, y, z = u.unbind(1)
        return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z], 1)

    term = to.ODETerm(field)
    control = to.IntegralController(TOLERANCE, TOLERANCE, term=term)
    solver = to.AutoDiffAdjoint(to.Tsit5(term=term), control)
    ends = torch.tensor([[0.0, END]], dtype=D).expand(size, 2)

    def solve() -> Tensor:
        found: Tensor = solver.solve(to.InitialValueProblem(y0=u0, t_eval=ends)).ys[:, -1]
        return found

    def forward() -> Tensor:
        with torch.no_grad():
            return solve()

    return Candidate(forward, lambda: torch.autograd.grad(solve().sum(), [u0, rho]))


def _gradsolve(size: int, forward: str, backward: str, fused: bool) -> Candidate:
    package, jax = importlib.import_module("gradsolve"), importlib.import_module("jax")
    field = _lorenz_jax(jax.numpy)

    class Problem:
        name, dim, t0, t1, is_stiff = "lorenz_members", 3, 0.0, END, False

        @staticmethod
        def f_jax(t: Any, y: Any, params: Any) -> Any:
            """One system."""
            return field(t, y, params[0])

    u0, rho = np.ones((size, 3)), parameters(size)[:, None]
    options = {"fused": fused, "rtol": TOLERANCE, "atol": TOLERANCE}

    def gradient() -> Any:
        # The steps are recorded, and then replayed.
        ends = package.grad_closure(
            Problem(), u0, rho, wrt=("y0", "params"), engine=backward, **options
        )
        pull = jax.grad(lambda u, r: ends(u, r).sum(), argnums=(0, 1))
        return jax.block_until_ready(pull(jax.numpy.asarray(u0), jax.numpy.asarray(rho)))

    def solve() -> Any:
        return package.solve(Problem(), u0, rho, engine=forward, **options).y_final

    return Candidate(solve, gradient)


def gradsolve(size: int) -> Candidate:
    """Record and replay in JAX."""
    return _gradsolve(size, "tsit5_replay", "tsit5_replay", False)


def gradsolve_warp(size: int) -> Candidate:
    """The same with fused kernels of Warp."""
    importlib.import_module("warp")
    return _gradsolve(size, "warp_ode", "warp_replay", True)


CANDIDATES = {
    "native": native,
    "eager": eager,
    "eager, batched=True": eager_batched,
    "diffrax": diffrax,
    "gradsolve": gradsolve,
    "gradsolve, Warp": gradsolve_warp,
    "torchode": torchode,
}
LARGEST = {"gradsolve": 1000, "gradsolve, Warp": 1000}
"""Members beyond which a row takes too long."""


def sample(run: Callable[[], Any], seconds: float = 2.0) -> tuple[float, float]:
    """Milliseconds: median of CPU time, and the fastest run."""
    run()
    cpu: list[float] = []
    wall: list[float] = []
    gc.collect()
    until = time.perf_counter() + seconds
    while len(cpu) < 3 or (time.perf_counter() < until and len(cpu) < 300):
        start, before = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    return 1e3 * median(cpu), 1e3 * min(wall)


def row(name: str, size: int, exact: Tensor) -> list[str]:
    """A row of the table."""
    try:
        candidate = CANDIDATES[name](size)
    except ImportError as error:
        return [name, str(size), f"not installed: {error.name}", "", "", "", ""]
    ends = torch.tensor(np.asarray(candidate.forward()))
    cells = [name, str(size), f"{float((ends - exact).abs().max()):.0e}"]
    for run in (candidate.forward, candidate.gradient):
        cells += [f"{x:.3g}" for x in sample(run)]
    print(*cells, file=sys.stderr, flush=True)
    return cells


def populations(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """The drift of Lotka and Volterra's equations."""
    x, y = u.unbind()
    return torch.stack((p[0] * x - x * y, x * y - p[1] * y))


def stochastic(size: int) -> list[str]:
    """Members with paths of their own: a row."""
    p = torch.rand(size, 2, generator=torch.Generator().manual_seed(0), dtype=D) + 0.5
    u0 = torch.ones(size, 2, dtype=D, requires_grad=True)
    one = psn.SDEProblem(populations, lambda t, u, p: 0.2 * u, u0[0].detach(), (0.0, 1.0), p=p[0])
    cells, fixed = [str(size)], {"controller": psn.FixedStep(), "dt0": 1 / 64}
    ways: list[tuple[psn.Algorithm, dict[str, Any], int]] = [
        (psn.SOSRI(), {}, size),
        (psn.SOSRI(), {"compile": True}, size),
        (psn.EM(), {"compile": True, **fixed}, size),
        (psn.SOSRI(), {}, 20),
    ]
    for method, options, count in ways:
        ensemble = psn.EnsembleProblem(one, u0[:count], p[:count])
        listed = ensemble.members() if count == 20 else [ensemble]
        for gradient in (False, True):
            taken = []
            for _ in range(5 if options else 1):  # the first compiles
                before = time.process_time()
                for problem in listed:
                    with torch.set_grad_enabled(gradient):
                        made = psn.solve(problem, method, generator=torch.Generator(), **options)
                    if gradient:
                        torch.autograd.grad(made.u1.sum(), u0)
                taken.append(time.process_time() - before)
            cells.append(f"{1e3 * min(taken) / count:.3g}")
    return cells


ADJOINTS = (
    psn.DiscreteAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
)


def by_adjoint(size: int, adjoint: psn.Adjoint) -> list[str]:
    """Gradients in one batch and one after the other: a row."""
    rho, u0 = torch.tensor(parameters(size)).requires_grad_(), torch.ones(3, dtype=D)
    one = psn.ODEProblem(lorenz, u0, (0.0, END), p=rho[0].detach())
    saveat = torch.linspace(0.1, END, 20, dtype=D).tolist()

    def solve(problem: Any) -> Tensor:
        found: Tensor = psn.solve(
            problem, psn.Tsit5(), rtol=TOLERANCE, atol=TOLERANCE, controller=psn.IController(),
            engine="torch", saveat=saveat, adjoint=adjoint,
        ).u  # fmt: skip
        return found

    def batch() -> Tensor:
        return torch.autograd.grad(solve(psn.EnsembleProblem(one, p=rho)).sum(), rho)[0]

    times = []
    for _ in range(3):
        before = time.process_time()
        together = batch()
        times.append(time.process_time() - before)
    chosen = torch.linspace(0, size - 1, 20).round().long()
    problems = psn.EnsembleProblem(one, p=rho[chosen]).members()
    before = time.process_time()
    alone = sum(
        torch.autograd.grad(solve(problem).sum(), rho, retain_graph=True)[0] for problem in problems
    )
    seconds = time.process_time() - before
    off = ((together - alone).abs() / together.abs())[chosen].max()
    name = type(adjoint).__name__
    return [name, str(size), f"{1e3 * min(times) / size:.3g}", f"{50 * seconds:.3g}", f"{off:.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 10_000])
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--stochastic", action="store_true")
    parser.add_argument("--adjoints", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.stochastic:
        ways = ("batch", "native", "native, fixed steps", "one by one")
        header = ["members", *(name for way in ways for name in (way, "with gradient"))]
        print(table(header, [stochastic(size) for size in asked.sizes]))
        return
    if asked.adjoints:
        header = ["", "members", "one batch", "one by one", "difference"]
        print(table(header, [by_adjoint(n, adjoint) for n in asked.sizes for adjoint in ADJOINTS]))
        return
    rows = []
    for size in asked.sizes:
        exact = _ours(size, 1e-12, compile=True).forward()
        rows += [row(name, size, exact) for name in asked.only if size <= LARGEST.get(name, size)]
    print(f"{processor()}, core {CORE}; {versions(PACKAGES)}\n")
    header = ["", "members", "error", "forward, CPU", "fastest", "with gradient, CPU", "fastest"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
