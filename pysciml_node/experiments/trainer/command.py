"""The command line that all examples share, and what it runs."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from pysciml_node.data import Splits
from pysciml_node.experiments.reporting.figures import plot_training
from pysciml_node.experiments.reporting.results import (
    RunResult,
    check_mergeable,
    format_table,
    merge_results,
    summarize,
)
from pysciml_node.experiments.trainer.experiment import BUDGETS, BudgetName, Experiment
from pysciml_node.experiments.trainer.runner import measure, train_run
from pysciml_node.experiments.trainer.settings import (
    ADJOINTS,
    DTYPES,
    STEP_SIZES,
    Run,
    Settings,
    Variant,
    describe,
)

# "none" reads better than "vanilla" after --regularize.
NAMES: dict[str, Variant] = {
    "none": "vanilla",
    "local-unbiased": "local-unbiased",
    "local-biased": "local-biased",
    "global-error": "global-error",
    "global-stiffness": "global-stiffness",
    "steer": "steer",
    "taylor": "taylor",
    "local-stiffness": "local-stiffness",
    "kinetic": "kinetic",
    "jacobian": "jacobian",
    "rnode": "rnode",
}
_CHOICES = {"dtype": DTYPES, "adjoint": ADJOINTS, "step_size": STEP_SIZES}
_SHARED = {
    "steps": "optimizer steps",
    "batch_size": "samples a batch",
    "validation_samples": "training samples held out to choose settings on",
    "learning_rate": "at the first step",
    "solver": "name of the algorithm",
    "tolerance": "relative and absolute, of the solver",
    "dtype": "of parameters and states",
    "engine": "of the solves: auto, torch or julia",
    "adjoint": "how gradients pass through the solve; the paper's is interpolating",
    "step_size": "of the penalty's step: Hairer's first step, as in the paper's code, or the "
    "solver's",
    "stop_gradient": "keep the penalty's gradient out of the sampled state and the first stage, as "
    "the paper's code does; the full gradient is thousands of times smaller, so --weight has to "
    "grow with it",
    "hidden": "width of the field's hidden layers",
    "evaluate_every": "optimizer steps between evaluations",
}


@dataclass(frozen=True)
class Place:
    """The folders that a command reads from and writes to.

    Args:
        data_dir: folder of the data.
        output_dir: folder of results, pictures and checkpoints.
        download: whether data that is missing may be fetched.
        resume: whether runs continue from their checkpoints.
        checkpoint_every: optimizer steps between two of them.
    """

    data_dir: Path
    output_dir: Path
    download: bool = True
    resume: bool = False
    checkpoint_every: int = 100


def run_all(
    experiment: Experiment,
    data: Splits[Any],
    settings: Settings,
    runs: Sequence[Run],
    place: Place,
) -> list[RunResult]:
    """Train runs one after the other, each added to the results file as it ends.

    Args:
        experiment: what is run.
        data: its parts.
        settings: those shared by the runs.
        runs: variants, seeds and weights.
        place: where the files are.

    Returns:
        All runs that the results file then holds.

    Raises:
        ValueError: the results file, or a checkpoint, belongs to other settings.
    """
    results = place.output_dir / "results.json"
    for run in runs:
        check_mergeable(results, describe(settings, run))
    held: list[RunResult] = []
    for number, run in enumerate(runs, start=1):
        trainer = train_run(
            data,
            settings,
            run,
            label=run.name if len(runs) == 1 else f"[{number}/{len(runs)}] {run.name}",
            build=experiment.build,
            checkpoint=place.output_dir / "checkpoints" / f"{run.name}.pt",
            checkpoint_every=place.checkpoint_every,
            resume=place.resume,
        )
        held = merge_results(results, [measure(trainer, data)])
        plot_training(held, place.output_dir / "training.png")
        if experiment.picture is not None:
            experiment.picture(trainer, data, place.output_dir / f"{run.name}.png")
    return held


def make_parser(experiment: Experiment, description: str) -> argparse.ArgumentParser:
    """The parser of an experiment's options; those left out take the budget's values.

    Args:
        experiment: whose settings are shown as defaults.
        description: for the help.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    output_dir = Path("runs") / experiment.name
    add("--data-dir", type=Path, default=experiment.data_dir, help="[default: %(default)s]")
    add("--no-download", action="store_true", help="do not fetch files that are missing")
    add("--output-dir", type=Path, default=output_dir, help="[default: %(default)s]")
    add(
        "--regularize",
        choices=[name for name, variant in NAMES.items() if _runnable(experiment, variant)],
        nargs="+",
        default=["none"],
        help="which penalty to add; several are run one after the other [default: none]",
    )
    add("--seed", "--seeds", type=int, nargs="+", default=[0], help="[default: 0]")
    add(
        "--weight",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="of the penalty, going exponentially from one to the other "
        f"[paper: {', '.join(f'{k} {a:g} {b:g}' for k, (a, b) in experiment.weights.items())}]",
    )
    add(
        "--budget",
        choices=BUDGETS,
        default="paper",
        help="whose settings to start from: the paper's, those of a run of minutes on a CPU core, "
        "or those of a look of seconds",
    )
    add("--quick", dest="budget", action="store_const", const="quick", help="--budget quick")
    for name, text in (_SHARED | dict(experiment.options)).items():
        default = getattr(experiment.settings, name)
        shown = f"{text} [paper: {default}]"
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
        else:
            add(flag, type=type(default), choices=_CHOICES.get(name), help=shown)
    add("--checkpoint-every", type=int, default=100, help="steps between two [default: 100]")
    add("--resume", action="store_true", help="continue from the runs' checkpoints, if any")
    add("--threads", type=int, help="threads of torch [default: torch's own choice]")
    return parser


def _runnable(experiment: Experiment, variant: Variant) -> bool:
    return variant == "vanilla" or variant in experiment.weights


def settings_of(experiment: Experiment, arguments: argparse.Namespace) -> Settings:
    """The budget's settings with what the command line changes."""
    settings, _ = experiment.at(arguments.budget)
    given = vars(arguments)
    changes = {f.name: given[f.name] for f in fields(settings) if given.get(f.name) is not None}
    return replace(settings, **changes)


def make_runs(
    experiment: Experiment,
    budget: BudgetName,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    weight: tuple[float, float] | None = None,
) -> list[Run]:
    """The runs of several variants and seeds, with the budget's weights unless one is given.

    The variants of a seed come one after the other, so that a machine that slows down over the
    hours slows all of them alike.
    """
    _, weights = experiment.at(budget)
    return [
        Run(variant=variant, seed=seed, weight=weight or weights.get(variant, (1.0, 1.0)))
        for seed in seeds
        for variant in variants
    ]


def load(experiment: Experiment, budget: BudgetName, place: Place, settings: Any) -> Any:
    """The data of an experiment.

    Raises:
        SystemExit: they are not there, and cannot be fetched.
    """
    try:
        return experiment.data(budget, place.data_dir, place.download, settings)
    except (ImportError, OSError) as error:
        # No connection, no such folder, a package that is not there: the message says it all.
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def main(experiment: Experiment, description: str, words: Sequence[str] | None = None) -> None:
    """Run an experiment as its command line says, and print its table.

    Args:
        experiment: what to run.
        description: for the help.
        words: of the command line; the process's own when None.

    Raises:
        SystemExit: the data are not there, and cannot be fetched.
    """
    arguments = make_parser(experiment, description).parse_args(words)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    settings = settings_of(experiment, arguments)
    runs = make_runs(
        experiment,
        arguments.budget,
        [NAMES[name] for name in arguments.regularize],
        arguments.seed,
        None if arguments.weight is None else (arguments.weight[0], arguments.weight[1]),
    )
    output_dir = arguments.output_dir
    place = Place(
        data_dir=arguments.data_dir,
        output_dir=output_dir if arguments.budget == "paper" else output_dir / arguments.budget,
        download=not arguments.no_download,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
    )
    data = load(experiment, arguments.budget, place, settings)
    held = run_all(experiment, data, settings, runs, place)
    print(format_table(summarize(held)))
    print(f"written: {place.output_dir / 'results.json'}, {place.output_dir / 'training.png'}")
