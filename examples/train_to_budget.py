"""Training to a budget: evaluations asked for and reached, and what a weight found by hand gives.

For each task and seed: a run without a penalty, runs with `psn.Budget` at shares of its
evaluations, and runs with constant weights, between which the test metric at the same evaluations
is interpolated:

    python examples/train_to_budget.py --task digits --seeds 0 1 2

The task `mnist` reads data/mnist. The same budget for one regularizer after the other:

    python examples/train_to_budget.py --task digits-short --regularizers --seeds 0 1 2

Native code cannot differentiate inside the field, as some of the regularizers do; these train
without it. So that their times compare, every run ends with five training steps that are timed
without native code.

Results of every run are added to OUTPUT_DIR/TASK.json as it ends, and runs that are there are not
repeated: the tables are made from these files, and kept in OUTPUT_DIR/budgets.json or
regularizers.json. OUTPUT_DIR/TASK.png has evaluations and weights over training, and the trade-off.
"""

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import neural_sde_spiral as spiral
import torch
from moons_flow import MoonsFlow
from torch.nn.functional import avg_pool2d

import pysciml_node as psn
from pysciml_node import data as datasets
from pysciml_node.cli.doctor import environment
from pysciml_node.data.plane import plane_splits
from pysciml_node.experiments.demo import digits_demo
from pysciml_node.experiments.published.mnist import MNIST_ODE
from pysciml_node.experiments.reporting.figures import new_figure, save_figure
from pysciml_node.experiments.reporting.results import lay_out, mean_and_std
from pysciml_node.experiments.trainer.evaluation import evaluate
from pysciml_node.experiments.trainer.model import make_classifier
from pysciml_node.experiments.trainer.runner import Build, make_trainer
from pysciml_node.experiments.trainer.settings import Run, Settings
from pysciml_node.experiments.trainer.training import Trainer

SHARES = (0.4, 0.6, 0.8)
# Where regularizers are compared.
SHARE = 0.6
# Training steps that are timed without native code.
TIMED = 5


@dataclass(frozen=True)
class Plan:
    """One run: what holds its cost down, if anything does.

    Args:
        seed: of parameters, batches and random times.
        variant: the regularizer.
        weight: a constant one.
        share: a budget, as a share of the evaluations of the seed's run without a penalty.
    """

    seed: int
    variant: str = "vanilla"
    weight: float | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        """What the run is called in files."""
        held = "" if self.weight is None else f" weight {self.weight:g}"
        held += "" if self.share is None else f" budget {self.share:g}"
        return f"{self.variant}{held} seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        nfe: evaluations of a prediction, mean over the test batches.
        score: the test metric.
        seconds: CPU seconds of training.
        step_seconds: CPU seconds of a training step at its end, without native code.
        target: evaluations asked for.
        weights: of the penalty, about twenty over the training.
        prices: these weights times the penalties.
        costs: evaluations at these times, without the jumps of whole steps.
        rejected: share of the attempted steps of a prediction, where it is counted.
    """

    nfe: float
    score: float
    seconds: float
    step_seconds: float = 0.0
    target: float | None = None
    weights: list[float] = field(default_factory=list)
    prices: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    rejected: float | None = None


@dataclass(frozen=True)
class Table:
    """A comparison.

    Args:
        metric: what is compared.
        rows: as they are shown, the headings first.
        reached: evaluations over those asked for, one number a seed, by the row's name.
    """

    metric: str
    rows: list[list[str]]
    reached: dict[str, list[float]]

    def show(self, name: str) -> None:
        """Print it."""
        print(f"{name}, {self.metric}\n{lay_out(self.rows)}\n")


# Trains a plan to a target, in native code or without it.
Train = Callable[[Plan, float | None, bool], Outcome]


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        metric: what scores are.
        scale: factor between score and table.
        weights: constant ones, whose evaluations span those of the budgets.
        train: trains and measures a plan with a target, in native code or without it.
        native: whether there is native code for it.
        interpreted: regularizers that native code cannot take.
        regularizers: those that can be compared on it, in the order of the table.
    """

    metric: str
    scale: float
    weights: Sequence[float]
    train: Train
    native: bool = False
    interpreted: Collection[str] = ("jacobian", "taylor")
    regularizers: Sequence[str] = (
        "local-unbiased",
        "local-biased",
        "local-stiffness",
        "global-error",
        "steer",
        "kinetic",
        "jacobian",
        "taylor",
    )

    @property
    def decimals(self) -> int:
        """Of scores in tables."""
        return 2 if self.scale > 1 else 3


def trained(build: Build, load: Callable[[], Any], settings: Settings) -> Train:
    """A task of the trainer."""

    def train(plan: Plan, target: float | None, native: bool) -> Outcome:
        data = load()
        weight = plan.weight or 1.0
        variant: Any = plan.variant
        run = Run(variant=variant, seed=plan.seed, weight=(weight, weight), budget=target)
        trainer = make_trainer(data, settings, run, build=build)
        trainer.model.node.options["compile"] = native
        trainer.train()
        found = evaluate(trainer.model, data.test, settings.evaluated_at_once)
        history, seconds = history_of(trainer.model), trainer.train_cpu_seconds
        return Outcome(found.nfe, found.score, seconds, step_seconds(trainer), target, *history)

    return train


def step_seconds(trainer: Trainer) -> float:
    """CPU seconds of a training step without native code, after the training, over five steps."""
    model: Any = trainer.model
    model.node.options["compile"] = False
    trainer.settings = replace(trainer.settings, steps=trainer.step + TIMED)
    before = trainer.train_cpu_seconds
    trainer.train()
    return (trainer.train_cpu_seconds - before) / TIMED


def history_of(model: torch.nn.Module) -> tuple[list[float], list[float], list[float]]:
    """Twenty weights, prices and costs of the budget inside a model, if there is one."""
    for module in model.modules():
        if isinstance(module, psn.Regularizer) and isinstance(module.weight, psn.Budget):
            history = module.weight.history
            prices = [w * p for w, p in zip(history.weight, history.penalty, strict=True)]
            every = max(len(history) // 20, 1)
            return history.weight[::every], prices[::every], history.smooth[::every]
    return [], [], []


def train_spiral(plan: Plan, target: float | None, native: bool) -> Outcome:
    """The stochastic spiral of `neural_sde_spiral.py`; it has no native code."""
    words = ["--regularize", "none" if plan.variant == "vanilla" else plan.variant]
    words += ["--seed", str(plan.seed), "--steps", str(SPIRAL_STEPS), "--engine", "torch"]
    words += ["--tolerance", "0.1"]
    words += [] if plan.weight is None else ["--weight", str(plan.weight)]
    arguments = spiral.parse_arguments(words)
    moments = spiral.true_moments("torch", seed=0)
    model = spiral.make_model(arguments)
    paths = torch.Generator().manual_seed(plan.seed)

    def measure() -> float:
        """Of predictions of the end alone: training solves stop at 33 times as well."""
        model.eval()
        with torch.no_grad():
            solution = model(spiral.START.repeat(100, 1), generator=paths)
        model.train()
        return float(solution.stats.nfe)

    if target is not None:
        # The loss starts at about 4, and evaluations answer to the weight in some 30 steps.
        options: dict[str, Any] = {"limit": 4.0, "response": 30.0, "measure": measure}
        budget = psn.Budget(nfe=target, horizon=SPIRAL_STEPS, **options)
        model.regularizers[0].weight = budget
    seconds, _, _ = spiral.train(model, moments, arguments)
    figures, _ = spiral.evaluate(model, moments, paths=1000)
    history = history_of(model)
    step = seconds / SPIRAL_STEPS
    return Outcome(figures["test_nfe"], figures["test_mse"], seconds, step, target, *history)


def few_mnist() -> Any:
    """MNIST at half its resolution, its first 1,000 test images alone."""
    parts = datasets.mnist(MNIST_ODE.data_dir, download=False)
    train, test = (
        replace(part, x=avg_pool2d(part.x.unsqueeze(1), 2).squeeze(1))
        for part in (parts.train, parts.test[:1000])
    )
    return replace(parts, train=train, test=test)


def make_moons_flow(data: Any, settings: Settings, run: Run) -> MoonsFlow:
    """The flow, whatever the data."""
    del data
    return MoonsFlow(settings, run)


def few_moons() -> Any:
    """2,000 points of two moons, and 500 to test on."""
    return plane_splits("two-moons", train=2000, validation=200, test=500)


SPIRAL_STEPS = 150
DIGITS = replace(digits_demo.SETTINGS, steps=200, taylor_order=2, evaluate_every=1000)
SHORT = replace(DIGITS, steps=100)
MOONS = replace(
    DIGITS, steps=300, batch_size=256, learning_rate=1e-2, decay="cosine", tolerance=1e-6, hidden=64
)
FEW_MNIST = replace(DIGITS, steps=300, batch_size=64)


def classifier(weights: tuple[float, float], load: Callable[[], Any], settings: Settings) -> Task:
    """Images by their accuracy; `weights` are those tried by hand."""
    train = trained(make_classifier, load, settings)
    return Task("accuracy (%)", 100.0, weights, train, native=True)


TASKS: Mapping[str, Task] = {
    "digits": classifier((10.0, 80.0), datasets.digits, DIGITS),
    "digits-short": classifier((10.0, 80.0), datasets.digits, SHORT),
    "mnist": classifier((20.0, 100.0), few_mnist, FEW_MNIST),
    "moons": Task(
        "NLL (nats)",
        1.0,
        (60.0, 600.0),
        trained(make_moons_flow, few_moons, MOONS),
        native=True,
        interpreted=("kinetic", "jacobian", "taylor"),
    ),
    "spiral": Task(
        "MSE",
        1.0,
        (300.0, 1000.0),
        train_spiral,
        regularizers=("local-unbiased", "local-biased", "local-stiffness", "global-error"),
    ),
}
# How regularizers are called in tables.
NAMES = {
    "vanilla": "none",
    "local-unbiased": "`LocalError`, unbiased",
    "local-biased": "`LocalError`, biased",
    "local-stiffness": "`LocalStiffness`",
    "global-error": "`GlobalError`",
    "steer": "`RandomEndTime(0.5)`",
    "kinetic": "`KineticEnergy`",
    "jacobian": "`JacobianFrobenius`",
    "taylor": "`TaylorDerivative(2)`",
}
# Half width of the random end time of STEER, which has no weight to hold a budget by.
STEER = 0.5


class Results:
    """The runs of a task, kept in a file.

    Args:
        path: the file.
        train: whether runs that are not there are trained; otherwise they are left out.
    """

    def __init__(self, path: Path, train: bool = True) -> None:
        self.path = path
        self.train = train
        found = json.loads(path.read_text()) if path.exists() else {}
        self.outcomes = {name: Outcome(**outcome) for name, outcome in found.items()}

    def run(self, task: Task, plan: Plan) -> Outcome:
        """The outcome of a plan, trained where it is not known."""
        if plan.name not in self.outcomes:
            target = None
            if plan.share is not None:
                target = plan.share * self.run(task, Plan(plan.seed)).nfe
            began = time.perf_counter()
            # What a budget says of itself is in the table.
            with warnings.catch_warnings(action="ignore", category=psn.PsnWarning):
                native = task.native and plan.variant not in task.interpreted
                outcome = task.train(plan, target, native)
            self.outcomes[plan.name] = outcome
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
            self.path.write_text(json.dumps(content, indent=1) + "\n")
            print(
                f"{self.path.stem}: {plan.name}: nfe {outcome.nfe:.1f}, score {outcome.score:.4f}, "
                f"target {target}, {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return self.outcomes[plan.name]

    def of(self, task: Task, plans: Iterable[Plan]) -> dict[int, Outcome]:
        """The outcomes of plans by their seeds."""
        return {
            plan.seed: self.run(task, plan)
            for plan in plans
            if self.train or plan.name in self.outcomes
        }


def shown(values: Sequence[float], decimals: int) -> str:
    """Mean and spread, or a single value."""
    found = mean_and_std(values)
    spread = f" ± {found['std']:.{decimals}f}" if len(values) > 1 else ""
    return f"{found['mean']:.{decimals}f}{spread}"


def by_hand(points: Sequence[tuple[float, float]], nfe: float) -> float | None:
    """The score at these evaluations, between constant weights; `None` outside of them."""
    ordered = sorted(points)
    for (a, low), (b, high) in itertools.pairwise(ordered):
        if a <= nfe <= b:
            return low + (high - low) * (nfe - a) / max(b - a, 1e-9)
    return None


def by_hand_at(task: Task, results: Results, seed: int) -> list[tuple[float, float]]:
    """Evaluations and scores of constant weights, 0 among them."""
    plans = [Plan(seed), *(Plan(seed, "local-unbiased", weight) for weight in task.weights)]
    found = [outcome for plan in plans for outcome in results.of(task, [plan]).values()]
    return [(outcome.nfe, outcome.score) for outcome in found]


def compare_weights(task: Task, results: Results, seeds: Sequence[int]) -> Table:
    """Budgets, and weights by hand at the same evaluations."""
    rows = [["budget", "asked for", "reached", "reached / asked", "metric", "by hand"]]
    scale, decimals = task.scale, task.decimals
    plain = results.of(task, map(Plan, seeds)).values()
    evaluations = shown([o.nfe for o in plain], 1)
    scores = shown([scale * o.score for o in plain], decimals)
    rows.append(["none" + some(plain, seeds), "", evaluations, "", scores, ""])
    reached: dict[str, list[float]] = {}
    for share in SHARES:
        found = results.of(task, (Plan(s, "local-unbiased", share=share) for s in seeds))
        if not found:
            continue
        targets = [o.target or 0.0 for o in found.values()]
        ratios = [o.nfe / target for o, target in zip(found.values(), targets, strict=True)]
        matched = [by_hand(by_hand_at(task, results, s), o.nfe) for s, o in found.items()]
        known = [scale * score for score in matched if score is not None]
        rows.append(
            [
                f"{share:g}{some(found, seeds)}",
                shown(targets, 1),
                shown([o.nfe for o in found.values()], 1),
                shown(ratios, 3),
                shown([scale * o.score for o in found.values()], decimals),
                shown(known, decimals) + some(known, found) if known else "",
            ]
        )
        reached[f"{share:g}"] = [round(ratio, 3) for ratio in ratios]
    draw(task, results, seeds)
    return Table(task.metric, rows, reached)


def some(found: Sized, seeds: Sized) -> str:
    """How many seeds there are, where it is not all of them."""
    return "" if len(found) == len(seeds) else f" ({len(found)} of {len(seeds)})"


def compare_regularizers(task: Task, results: Results, seeds: Sequence[int]) -> Table:
    """One budget for each regularizer."""
    scale, decimals = task.scale, task.decimals
    step = "a training step (CPU ms)"
    rows = [["regularizer", "evaluations", "reached / asked", "metric", step]]
    reached: dict[str, list[float]] = {}
    for variant in ("vanilla", *task.regularizers):
        held: dict[str, Any] = {"vanilla": {}, "steer": {"weight": STEER}}
        options = held.get(variant, {"share": SHARE})
        found = results.of(task, (Plan(seed, variant, **options) for seed in seeds))
        if not found:
            continue
        ratios = [o.nfe / o.target for o in found.values() if o.target]
        rows.append(
            [
                NAMES.get(variant, f"`{variant}`") + some(found, seeds),
                shown([o.nfe for o in found.values()], 1),
                shown(ratios, 3) if ratios else "",
                shown([scale * o.score for o in found.values()], decimals),
                shown([1000 * o.step_seconds for o in found.values()], 0),
            ]
        )
        reached[variant] = [round(ratio, 3) for ratio in ratios]
    return Table(task.metric, rows, reached)


def draw(task: Task, results: Results, seeds: Sequence[int]) -> None:
    """Costs over training, and the trade-off."""
    figure, (over_time, weights, trade_off) = new_figure(3)
    colors = dict(zip(SHARES, ("#d55e00", "#0072b2", "#009e73"), strict=True))
    for share, seed in itertools.product(SHARES, seeds):
        found = results.of(task, [Plan(seed, "local-unbiased", share=share)]).get(seed)
        if found is None:
            continue
        places = [k / max(len(found.costs) - 1, 1) for k in range(len(found.costs))]
        label = f"{share:g} of vanilla" if seed == seeds[0] else None
        over_time.plot(places, found.costs, color=colors[share], label=label, linewidth=1)
        over_time.axhline(found.target, color=colors[share], linestyle=":", linewidth=1)
        weights.plot(places, [w or None for w in found.weights], color=colors[share], linewidth=1)
        trade_off.plot(found.nfe, task.scale * found.score, "o", color=colors[share])
    for seed in seeds:
        points = sorted(by_hand_at(task, results, seed))
        scores = [task.scale * score for _, score in points]
        label = "constant weights" if seed == seeds[0] else None
        trade_off.plot(
            [n for n, _ in points], scores, "-x", color="#888888", linewidth=1, label=label
        )
    over_time.set(xlabel="share of training", ylabel="evaluations", title=results.path.stem)
    weights.set(xlabel="share of training", ylabel="weight", yscale="log")
    trade_off.set(xlabel="evaluations (test)", ylabel=task.metric)
    over_time.legend()
    trade_off.legend()
    save_figure(figure, results.path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=list(TASKS), help="[default: all]")
    add("--regularizers", action="store_true", help="one budget for every regularizer instead")
    add("--kept", action="store_true", help="train nothing, show the runs that are there")
    add("--seed", "--seeds", type=int, nargs="+", default=[0], help="[default: 0]")
    add("--output-dir", type=Path, default=Path("runs/budget"), help="[default: %(default)s]")
    add("--threads", type=int, default=1, help="of torch [default: 1]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare = compare_regularizers if arguments.regularizers else compare_weights
    tables = {}
    for name in arguments.task:
        results = Results(arguments.output_dir / f"{name}.json", train=not arguments.kept)
        tables[name] = compare(TASKS[name], results, arguments.seed)
        tables[name].show(name)
    kept = "regularizers.json" if arguments.regularizers else "budgets.json"
    shown_tables = {name: asdict(table) for name, table in tables.items()}
    content = {"environment": environment(), "seeds": arguments.seed, "tables": shown_tables}
    (arguments.output_dir / kept).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
