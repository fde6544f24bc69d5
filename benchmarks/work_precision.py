"""Stiff problems: error against time, beside SciPy, diffrax and, with `--sciml`, the Julia engine.

    python benchmarks/work_precision.py [--sciml] [--picture stiff.svg]

Problems and reference solutions are those of the test set for initial value problems. Every solver
gives the state at the end at relative tolerances of 1e-4, 1e-6 and 1e-8; the error is the largest
of any entry, relative to the reference. Times are the best of three: processor time of all threads,
without compilation. Peers that are not installed are left out; a solver that fails has NaN.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import pin, processor, table, versions

CORE = pin(None)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import pysciml_node as psn  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conformance import stiff_problems as known  # noqa: E402

TOLERANCES = (1e-4, 1e-6, 1e-8)
PACKAGES = ("torch", "pysciml_node", "scipy", "diffrax", "jax")
Solve = Callable[[float], Any]


@dataclass(frozen=True)
class Problem:
    """A stiff problem.

    Attributes:
        f: the field on arrays of a module that has `stack`: `f(t, y, module)`.
        start: state at 0.
        end: where the reference is.
        reference: the state there.
        atol: absolute tolerance over the relative one.
    """

    f: Callable[[Any, Any, Any], Any]
    start: torch.Tensor
    end: float
    reference: torch.Tensor
    atol: float


def robertson(t: Any, y: Any, xp: Any) -> Any:
    """Robertson's reactions."""
    a, b, c = y[0], y[1], y[2]
    slow, fast, medium = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return xp.stack([medium - slow, slow - medium - fast, fast])


def van_der_pol(t: Any, y: Any, xp: Any) -> Any:
    """Van der Pol's oscillator on its slow time scale, mu = 1000."""
    return xp.stack([y[1], 1e6 * ((1 - y[0] ** 2) * y[1] - y[0])])


def orego(t: Any, y: Any, xp: Any) -> Any:
    """The Oregonator."""
    a, b, c = y[0], y[1], y[2]
    return xp.stack(
        [77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)]
    )


def pollu(t: Any, y: Any, xp: Any) -> Any:
    """Air pollution, 20 species."""
    table = POLLU["torch" if xp is torch else "numpy"]  # JAX takes NumPy's arrays
    extended = xp.concatenate([y, xp.ones_like(y[:1])])
    rates = table["rates"] * y[table["first"]] * extended[table["second"]]
    return table["balance"] @ rates


_ARRAYS = {
    "rates": known._POLLU_RATES,
    "first": known._POLLU_FIRST,
    "second": known._POLLU_SECOND,
    "balance": known._POLLU_BALANCE,
}
POLLU: dict[str, dict[str, Any]] = {
    "torch": _ARRAYS,
    "numpy": {name: x.numpy() for name, x in _ARRAYS.items()},
}
PROBLEMS = {
    "Robertson": Problem(robertson, known.ROBERTSON_START, 40.0, known.ROBERTSON_AT_40, 1e-4),
    "Van der Pol": Problem(
        van_der_pol,
        torch.tensor([2.0, 0.0], dtype=torch.float64),
        2.0,
        torch.tensor([0.1706167732170483e1, -0.8928097010247975], dtype=torch.float64),
        1.0,
    ),
    "OREGO": Problem(orego, known.OREGO_START, 360.0, known.OREGO_AT_360, 1.0),
    "POLLU": Problem(pollu, known.POLLU_START, 60.0, known.POLLU_AT_60, 1e-8),
}


def ours(problem: Problem, algorithm: Any, engine: str = "torch", compile: bool = False) -> Solve:
    """A method of this package."""

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return problem.f(t, y, torch)

    ode = psn.ODEProblem(f, problem.start, (0.0, problem.end))

    def solve(tolerance: float) -> Any:
        with torch.no_grad():
            atol = tolerance * problem.atol
            options = {"rtol": tolerance, "atol": atol, "engine": engine, "compile": compile}
            return psn.solve(ode, algorithm, **options).u1.numpy()

    return solve


def scipy(problem: Problem, method: str) -> Solve:
    """A method of SciPy, with the Jacobian by its own differences."""
    from scipy.integrate import solve_ivp

    def solve(tolerance: float) -> Any:
        return solve_ivp(
            lambda t, y: problem.f(t, y, np),
            (0.0, problem.end),
            problem.start.numpy(),
            method=method,
            rtol=tolerance,
            atol=tolerance * problem.atol,
        ).y[:, -1]

    return solve


def kvaerno5(problem: Problem) -> Solve:
    """diffrax's Kvaerno5 under `jit`."""
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    term = diffrax.ODETerm(lambda t, y, args: problem.f(t, y, jnp))
    start = jnp.asarray(problem.start.numpy())

    @jax.jit
    def run(tolerance: Any) -> Any:
        control = diffrax.PIDController(rtol=tolerance, atol=tolerance * problem.atol)
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Kvaerno5(),
            0.0,
            problem.end,
            None,
            start,
            stepsize_controller=control,
            saveat=diffrax.SaveAt(t1=True),
            max_steps=20_000,
            throw=False,
        )
        return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[0], jnp.nan)

    return lambda tolerance: np.asarray(run(tolerance))


def solvers(problem: Problem, sciml: bool) -> dict[str, Solve]:
    """All that are installed, by name."""
    found = {
        "Rodas5P": ours(problem, psn.Rodas5P()),
        "Rodas5P, native": ours(problem, psn.Rodas5P(), compile=True),
        "KenCarp4": ours(problem, psn.KenCarp4()),
        "KenCarp4, native": ours(problem, psn.KenCarp4(), compile=True),
    }
    if importlib.util.find_spec("scipy"):
        found |= {f"SciPy {x}": scipy(problem, x) for x in ("Radau", "BDF")}
    if importlib.util.find_spec("diffrax"):
        found["diffrax Kvaerno5"] = kvaerno5(problem)
    if sciml:
        found |= {f"SciML {type(x).__name__}": ours(problem, x, "julia") for x in (psn.Rodas5P(),)}
    return found


def measure(solve: Solve, tolerance: float, reference: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Milliseconds and error of a solve."""
    state = np.asarray(solve(tolerance))
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        solve(tolerance)
        best = min(best, time.process_time() - begin)
    error = float(np.max(np.abs(state - reference) / np.abs(reference)))
    return 1e3 * best, error


def picture(curves: dict[str, dict[str, list[tuple[float, float]]]], file: str) -> None:
    """Draw one panel for each problem."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, (name, methods) in zip(panels.flat, curves.items(), strict=False):
        psn.plot.work_precision(methods, work="milliseconds", axes=panel)
        panel.set_title(name)
        panel.legend(fontsize=7)
    figure.savefig(file)


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sciml", action="store_true", help="with the Julia engine")
    parser.add_argument("--only", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--picture", help="file to draw to")
    arguments = parser.parse_args()
    print(processor(), versions(PACKAGES))
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    rows = []
    for name in arguments.only:
        problem = PROBLEMS[name]
        reference = problem.reference.numpy()
        for method, solve in solvers(problem, arguments.sciml).items():
            points = [measure(solve, tolerance, reference) for tolerance in TOLERANCES]
            curves.setdefault(name, {})[method] = points
            rows.append([name, method, *(f"{work:.3g} / {error:.0e}" for work, error in points)])
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(["problem", "method", *(f"{x:.0e}, ms / error" for x in TOLERANCES)], rows))
    if arguments.picture:
        picture(curves, arguments.picture)


if __name__ == "__main__":
    main()
