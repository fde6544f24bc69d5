"""The simplest neural ODE, and what its optimizer does for larger ones.

The experiment of Okamoto, Takeuchi and Sakemi, "Learning the Simplest Neural ODE"
(arXiv:2505.02019): `x' = a x` is fitted to the states of `x' = a* x` at one time t, by SGD, by Adam
and by the variance-corrected rule, over initializations, horizons and learning rates. Loss curves
of the rule are straight lines of one slope. Then what the paper leaves open: random linear systems
of many dimensions and a network fitted to a damped pendulum, with SGD, Adam, LBFGS and the three
curvatures of `VarianceCorrected` (with backtracking); and the rate of Gauss-Newton over
initializations and horizons, for linear systems and for a network with more parameters than data.

    python examples/simplest_ode.py --output-dir runs/simplest_ode

writes results.json and a picture a study, and prints the tables. Values of a*, a0, t and the
learning rates are not published; those used here are in results.json.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysciml_node._optional import require
from pysciml_node.cli.doctor import environment
from pysciml_node.experiments.reporting.figures import save_figure
from pysciml_node.experiments.studies.terminal_fits import (
    BLOWN_UP,
    Run,
    Task,
    asymptotic_rate,
    descend,
    linear_task,
    network_task,
    scalar_task,
    straight_line_of_flows,
)
from pysciml_node.optim import VarianceCorrected
from pysciml_node.optim.options import Curvature

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[Sequence[Tensor], float], Optimizer]
TARGET, START, HORIZON, RATE = -1.0, 1.0, 1.0, 0.1
STARTS = (-4.0, -3.0, -2.0, 0.0, 1.0, 2.0)
HORIZONS = (0.5, 1.0, 2.0, 3.0)
RATES = (0.03, 0.1, 0.3, 1.0)
RATE_HORIZONS = (0.5, 1.0, 2.0, 3.0)  # the pendulum turns by t; at pi straight lines end
STUDIES = ("paper", "rates", "systems")
RATE_LIMIT = 60  # iterations; a start that needs more stands in a valley
FLOOR = 1e-13
THEORY = 2.0 * math.log(2.0)
COLORS = {
    "SGD": "#999999",
    "Adam": "#e69f00",
    "LBFGS": "#009e73",
    "terminal": "#0072b2",
    "diagonal": "#cc79a7",
    "gauss-newton": "#d55e00",
}


@dataclass(frozen=True)
class Method:
    """An optimizer and the learning rates it is tuned over."""

    name: str
    make: MakeOptimizer
    rates: tuple[float, ...]


def variance_corrected(curvature: Curvature, **options: Any) -> MakeOptimizer:
    def make(params: Sequence[Tensor], lr: float) -> Optimizer:
        probes = torch.Generator().manual_seed(0)
        return VarianceCorrected(params, lr, curvature=curvature, generator=probes, **options)

    return make


def lbfgs(params: Sequence[Tensor], lr: float) -> Optimizer:
    # The two evaluations end a step after one line search; max_iter=1 would too, but was seen to
    # stand still for good after a step that did not change the memory.
    return torch.optim.LBFGS(
        params,
        lr,
        max_iter=2,
        max_eval=2,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )


METHODS = (
    Method("SGD", torch.optim.SGD, (0.01, 0.1, 1.0)),
    Method("Adam", torch.optim.Adam, (0.01, 0.03, 0.1)),
    Method("LBFGS", lbfgs, (1.0,)),
    Method(
        "terminal", variance_corrected("terminal", safeguard="backtracking"), (0.3, 1.0, 3.0, 10.0)
    ),
    Method(
        "diagonal",
        variance_corrected("diagonal", probes=2, damping=0.1, safeguard="backtracking"),
        (0.1, 0.3, 1.0),
    ),
    Method("gauss-newton", variance_corrected("gauss-newton"), (1.0,)),
)


def paper_study(iterations: int) -> dict[str, dict[str, dict[str, Run]]]:
    """`study -> method -> label -> run`, one of start, horizon and learning rate varied a study."""
    studies = {
        "start": {f"a0 = {a:g}": (a, HORIZON, RATE) for a in STARTS},
        "horizon": {f"t = {t:g}": (START, t, RATE) for t in HORIZONS},
        "rate": {f"lr = {lr:g}": (START, HORIZON, lr) for lr in RATES},
    }
    methods: dict[str, MakeOptimizer] = {
        "SGD": torch.optim.SGD,
        "Adam": torch.optim.Adam,
        "terminal": variance_corrected("terminal"),
    }
    results: dict[str, dict[str, dict[str, Run]]] = {}
    for study, cases in studies.items():
        results[study] = {}
        for name, make in methods.items():
            results[study][name] = {}
            for label, (start, horizon, lr) in cases.items():
                task = scalar_task(start, TARGET, horizon)
                optimizer = make(list(task.field.parameters()), lr)
                results[study][name][label] = descend(task, optimizer, FLOOR, iterations)
    return results


@dataclass(frozen=True)
class Rate:
    """A descent of gauss-newton at `lr = 0.5`; the rate is the mean of its last iterations.

    `straight` says whether the end-point map can go straight to the truth (None: not known).
    """

    family: str
    horizon: float
    spread: float
    seed: int
    straight: bool | None
    reached: bool
    iterations: int
    rate: float


def rate_study(horizons: Sequence[float], seeds: int) -> list[Rate]:
    """Rates over starts; in theory `2 log 2 = 1.386` where the loss can be brought to zero."""
    network = partial(network_task, hidden=64, samples=8)
    # name, task, scales of the start, accuracy of the solver, target
    cases: tuple[tuple[str, Callable[..., Task], tuple[float, ...], float, float], ...] = (
        ("linear 3", partial(linear_task, 3), (0.0, 0.5, 1.0, 2.0), 1e-8, 1e-12),
        ("network 64", network, (0.0, 0.5, 1.0), 1e-7, 1e-9),
    )
    rates: list[Rate] = []
    for name, make_task, spreads, tolerance, target in cases:
        for horizon, spread, seed in itertools.product(horizons, spreads, range(1, seeds + 1)):
            task = make_task(horizon, seed, spread=spread, tolerance=tolerance)
            straight = straight_line_of_flows(task) if name.startswith("linear") else None
            optimizer = VarianceCorrected(
                task.field.parameters(), lr=0.5, curvature="gauss-newton", cg_rtol=1e-4
            )
            run = descend(task, optimizer, target, RATE_LIMIT)
            rate = asymptotic_rate(run.losses)
            count = len(run.losses) - 1
            rates.append(Rate(name, horizon, spread, seed, straight, run.reached, count, rate))
    return rates


def print_rates(rates: Sequence[Rate]) -> None:
    """A line for each family, horizon and kind of start."""
    print(f"\ngauss-newton, lr = 0.5: rate per iteration (in theory 2 log 2 = {THEORY:.4f})")
    kinds = {True: "straight", False: "not straight", None: "any"}
    groups: dict[tuple[str, float, bool | None], list[Rate]] = {}
    for row in rates:
        groups.setdefault((row.family, row.horizon, row.straight), []).append(row)
    for (family, horizon, straight), rows in groups.items():
        done = [row for row in rows if row.reached]
        line = f"{family:<10} t = {horizon:<4g} starts {kinds[straight]:<12} reached "
        line += f"{len(done)}/{len(rows)}"
        if done:
            values = [row.rate for row in done]
            counts = [row.iterations for row in done]
            line += f"   rate {min(values):.4f} to {max(values):.4f}"
            line += f"   iterations {min(counts)} to {max(counts)}"
        print(line)
    print(flush=True)


@dataclass(frozen=True)
class Summary:
    """A method on a family of tasks: how many runs reached the target, and medians over those."""

    family: str
    horizon: float
    method: str
    lr: float
    reached: int
    runs: int
    iterations: float | None
    solves: float | None
    seconds: float | None


Family = tuple[str, Callable[[float, int], Task], float]


def families(dimensions: Sequence[int]) -> Iterator[Family]:
    """Name, task of `(horizon, seed)`, and target of each family."""
    for d in dimensions:
        yield f"linear {d}", partial(linear_task, d), 1e-6
    yield "pendulum", network_task, 1e-2


def tuned_rate(family: Family, method: Method, horizons: Sequence[float], cap: int) -> float:
    """The rate with the fewest iterations over all horizons, on seed 0, which is not reported."""
    _, make_task, target = family

    best, fewest = method.rates[0], math.inf
    for lr in method.rates if len(method.rates) > 1 else ():
        total = 0.0
        for horizon in horizons:
            task = make_task(horizon, 0)
            run = descend(task, method.make(list(task.field.parameters()), lr), target, cap)
            # Among rates that do not get there, the one that comes closest.
            remaining = max(0.0, math.log(run.losses[-1] / target))
            total += len(run.losses) + (0.0 if run.reached else cap * (1.0 + remaining))
            if total >= fewest:
                break
        else:
            best, fewest = lr, total
    return best


def systems_study(
    dimensions: Sequence[int], horizons: Sequence[float], seeds: int, cap: int
) -> list[Summary]:
    """Iterations, solves and seconds to the target, one learning rate for all horizons."""
    summaries: list[Summary] = []
    for family, method in itertools.product(families(dimensions), METHODS):
        name, make_task, target = family
        lr = tuned_rate(family, method, horizons, cap)
        for horizon in horizons:
            runs = []
            for seed in range(1, seeds + 1):
                task = make_task(horizon, seed)
                optimizer = method.make(list(task.field.parameters()), lr)
                runs.append(descend(task, optimizer, target, cap))
            done = [run for run in runs if run.reached]
            medians = (
                statistics.median(values) if done else None
                for values in (
                    [len(run.losses) - 1 for run in done],
                    [run.solves for run in done],
                    [run.seconds for run in done],
                )
            )
            summaries.append(
                Summary(name, horizon, method.name, lr, len(done), len(runs), *medians)
            )
            print(format_row(summaries[-1]), flush=True)
    return summaries


HEADER = (
    f"{'family':<10} {'t':>4}  {'method':<13} {'lr':>5}  "
    f"{'reached':>7} {'iterations':>10} {'solves':>7} {'cpu s':>7}"
)


def format_row(row: Summary) -> str:
    return (
        f"{row.family:<10} {row.horizon:>4g}  {row.method:<13} {row.lr:>5g}  "
        f"{row.reached:>3}/{row.runs:<3} "
        + (
            "-"
            if row.iterations is None
            else f"{row.iterations:>10g} {row.solves:>7g} {row.seconds:>7.2f}"
        )
    )


def new_grid(rows: int, columns: int) -> tuple[Any, Any]:
    figures = require("matplotlib.figure", extra="plots", purpose="draw the pictures")
    figure = figures.Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_paper(results: dict[str, dict[str, dict[str, Run]]], path: Path) -> None:
    figure, grid = new_grid(len(results["start"]), len(results))
    for column, (study, methods) in enumerate(results.items()):
        for row, (method, runs) in enumerate(methods.items()):
            axes = grid[row][column]
            for index, (label, run) in enumerate(runs.items()):
                axes.semilogy(run.losses, color=f"C{index}", label=label)
            axes.set(ylim=(FLOOR, BLOWN_UP), ylabel=f"{method}: relative loss", xlabel="iteration")
            axes.legend(fontsize=7)
        fixed = {"start": "t, lr", "horizon": "a0, lr", "rate": "a0, t"}[study]
        grid[0][column].set_title(f"{study} varied; {fixed} fixed")
    save_figure(figure, path)


def plot_systems(summaries: Sequence[Summary], path: Path) -> None:
    figure, grid = new_grid(1, 3)
    per_dimension, seconds, per_horizon = grid[0]
    for method, color in COLORS.items():
        rows = [row for row in summaries if row.method == method]
        linear = [row for row in rows if row.family.startswith("linear")]
        style = {"color": color, "marker": "o", "linestyle": "-", "label": method}
        horizon = max(row.horizon for row in summaries)
        longest = [row for row in linear if row.horizon == horizon]
        dimensions = [int(row.family.split()[1]) for row in longest]
        per_dimension.loglog(dimensions, [row.iterations for row in longest], **style)
        seconds.loglog(dimensions, [row.seconds for row in longest], **style)
        network = [row for row in rows if row.family == "pendulum"]
        per_horizon.loglog(
            [row.horizon for row in network], [row.iterations for row in network], **style
        )
    per_dimension.set(xlabel="dimension", ylabel="iterations", title=f"linear, t = {horizon:g}")
    seconds.set(xlabel="dimension", ylabel="CPU seconds", title=f"linear, t = {horizon:g}")
    per_horizon.set(xlabel="horizon t", ylabel="iterations", title="pendulum, network of 16")
    per_dimension.legend(fontsize=7)
    save_figure(figure, path)


def plot_rates(rates: Sequence[Rate], path: Path) -> None:
    figure, grid = new_grid(1, 1)
    axes = grid[0][0]
    axes.axhspan(0.9 * THEORY, 1.1 * THEORY, color="#dddddd")
    axes.axhline(THEORY, color="#444444")
    markers = (("linear 3", True, "o"), ("linear 3", False, "x"), ("network 64", None, "s"))
    for shift, (family, straight, marker) in zip((0.95, 1.0, 1.05), markers, strict=True):
        rows = [row for row in rates if (row.family, row.straight) == (family, straight)]
        axes.semilogx(
            [shift * row.horizon for row in rows],
            [row.rate for row in rows],
            marker,
            label=family if straight is not False else f"{family}, no straight line",
        )
    axes.legend(fontsize=7)
    axes.set(
        xlabel="horizon t",
        ylabel="rate per iteration",
        ylim=(0.0, 1.5 * THEORY),
        title="gauss-newton, lr = 0.5, all starts",
    )
    save_figure(figure, path)


def print_paper(results: dict[str, dict[str, dict[str, Run]]]) -> None:
    """Iterations to a relative loss of 1e-8, and the rule's rate, in theory `-2 log(1 - lr)`."""

    def count(run: Run) -> str:
        below = [index for index, loss in enumerate(run.losses) if loss < 1e-8]
        return str(below[0]) if below else "not"

    print("iterations to a relative loss of 1e-8; last line: rate of the rule per iteration")
    for study, methods in results.items():
        print(f"\n{study:<10}" + "".join(f"{label:>12}" for label in next(iter(methods.values()))))
        for method, runs in methods.items():
            print(f"{method:<10}" + "".join(f"{count(run):>12}" for run in runs.values()))
        rates = [asymptotic_rate(run.losses) for run in methods["terminal"].values()]
        print(f"{'rate':<10}" + "".join(f"{rate:>12.4f}" for rate in rates))


def run_study(name: str, arguments: argparse.Namespace, out: Path) -> Any:
    """Run a study, print its table, draw its picture, and return what goes into the results."""
    picture = out / f"{name}.png"
    if name == "paper":
        paper = paper_study(arguments.iterations)
        print_paper(paper)
        plot_paper(paper, picture)
        return {
            study: {
                m: {label: asdict(run) for label, run in runs.items()} for m, runs in by.items()
            }
            for study, by in paper.items()
        }
    if name == "rates":
        rates = rate_study(RATE_HORIZONS[:: 2 if arguments.quick else 1], arguments.seeds)
        print_rates(rates)
        plot_rates(rates, picture)
        return [asdict(row) for row in rates]
    print(HEADER)
    summaries = systems_study(
        arguments.dimensions, arguments.horizons, arguments.seeds, arguments.iterations
    )
    plot_systems(summaries, picture)
    return [asdict(row) for row in summaries]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The simplest neural ODE, and the variance-corrected rule beyond it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("runs/simplest_ode"), help="results and pictures")
    add("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="what to run")
    add("--dimensions", type=int, nargs="+", default=[2, 5, 10, 20, 50], help="linear systems")
    add("--horizons", type=float, nargs="+", default=[0.5, 2.0], help="of the larger systems")
    add("--seeds", type=int, default=2, help="runs of each case")
    add("--iterations", type=int, default=200, help="at most")
    add("--threads", type=int, default=1, help="threads of torch; one is fastest at these sizes")
    add("--quick", action="store_true", help="small systems, few iterations, one seed")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    require("matplotlib", extra="examples", purpose="draw the pictures")
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.dimensions, arguments.horizons = [2, 5], [0.5]
        arguments.seeds, arguments.iterations = 1, 12
    out = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {
        "environment": environment(),
        "settings": {
            "a*": TARGET,
            "a0": START,
            "t": HORIZON,
            "lr": RATE,
            "loss": "E|x_t - y|^2 / E|y|^2",
            **{key: str(value) for key, value in vars(arguments).items()},
        },
    }
    for name in arguments.studies:
        results[name] = run_study(name, arguments, out)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path} and {', '.join(f'{name}.png' for name in arguments.studies)}")


if __name__ == "__main__":
    main()
