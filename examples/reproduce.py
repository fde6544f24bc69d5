"""The published experiments, several at a time, with the published figures beside ours.

Trains the chosen variants with every seed and prints, for each experiment, the test metric and the
costs, with their ratios to the vanilla run, beside the tables of Pal, Edelman and Rackauckas,
"Locally Regularized Neural Differential Equations" (arXiv:2303.02262).

    python examples/reproduce.py physionet cifar10 --budget reduced --seeds 0 1 2
    python examples/reproduce.py --list

The paper's budget takes hours to days on a CPU. Data is looked for in DATA_DIR/<its folder>, such
as data/mnist. Results of runs that are there already are not trained again.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch

from pysciml_node.experiments.published.cifar10 import CIFAR10
from pysciml_node.experiments.published.mnist import MNIST_ODE
from pysciml_node.experiments.published.mnist_sde import MNIST_SDE
from pysciml_node.experiments.published.multiscale import CIFAR10_MULTI_SCALE
from pysciml_node.experiments.published.physionet import PHYSIONET
from pysciml_node.experiments.reporting.published import compare
from pysciml_node.experiments.reporting.results import format_table, load_results, summarize
from pysciml_node.experiments.trainer.command import NAMES, Place, load, make_runs, run_all
from pysciml_node.experiments.trainer.experiment import BUDGETS, Experiment

ALL = (MNIST_ODE, MNIST_SDE, PHYSIONET, CIFAR10, CIFAR10_MULTI_SCALE)
EXPERIMENTS = {experiment.name: experiment for experiment in ALL}
COMPARED = ["none", "local-unbiased", "local-biased"]
CHANGEABLE = ("steps", "batch_size", "tolerance", "dtype", "engine", "adjoint", "hidden")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", help="all of them when none is named")
    add("--list", action="store_true", help="say which experiments there are")
    add("--regularize", choices=list(NAMES), nargs="+", default=COMPARED, help="variants")
    add("--seed", "--seeds", type=int, nargs="+", default=[0])
    add("--budget", choices=BUDGETS, default="reduced")
    add("--quick", dest="budget", action="store_const", const="quick", help="--budget quick")
    add("--data-dir", type=Path, default=Path("data"), help="holds each experiment's folder")
    add("--no-download", action="store_true", help="do not fetch files that are missing")
    add("--output-dir", type=Path, default=Path("runs/reproduce"))
    add("--resume", action="store_true", help="continue from checkpoints, if any")
    add("--markdown", action="store_true", help="print the comparison as a table of Markdown")
    add("--threads", type=int, default=1, help="threads of torch")
    for name in CHANGEABLE:
        kind = {"steps": int, "batch_size": int, "hidden": int, "tolerance": float}.get(name, str)
        add(f"--{name.replace('_', '-')}", type=kind, help="instead of the budget's")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    return arguments


def reproduce(experiment: Experiment, arguments: argparse.Namespace) -> None:
    settings, weights = experiment.at(arguments.budget)
    given = vars(arguments)
    changes = {
        f.name: given[f.name]
        for f in fields(settings)
        if f.name in CHANGEABLE and given[f.name] is not None
    }
    settings = replace(settings, **changes)
    variants = [NAMES[name] for name in arguments.regularize]
    runnable = [v for v in variants if v == "vanilla" or v in weights]
    place = Place(
        data_dir=arguments.data_dir / experiment.data_dir.name,
        output_dir=arguments.output_dir / arguments.budget / experiment.name,
        download=not arguments.no_download,
        resume=arguments.resume,
    )
    held = load_results(place.output_dir / "results.json")
    done = {(run.variant, run.seed) for run in held}
    planned = make_runs(experiment, arguments.budget, runnable, arguments.seed)
    runs = [run for run in planned if (run.variant, run.seed) not in done]
    if runs:
        data = load(experiment, arguments.budget, place, settings)
        held = run_all(experiment, data, settings, runs, place)
    summary = summarize(held)
    used = {run.variant: run.settings["weight"] for run in held if run.settings["weight"]}
    print(
        f"\n{experiment.title}: {settings.steps} steps of {settings.batch_size}, tolerance "
        f"{settings.tolerance:g}, {settings.dtype}, engine {settings.engine}, "
        f"seeds {sorted({r.seed for r in held})}, weights "
        + ", ".join(f"{variant} {a:g} to {b:g}" for variant, (a, b) in used.items())
    )
    if not arguments.markdown:
        print(format_table(summary))
    print("\nbeside the paper (costs: ours in CPU seconds; † measured on other hardware):\n")
    print(compare(experiment.name, summary, markdown=arguments.markdown))


def main() -> None:
    arguments = parse_arguments()
    if arguments.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<20} {experiment.title}")
        return
    torch.set_num_threads(arguments.threads)
    for name in arguments.experiments or EXPERIMENTS:
        reproduce(EXPERIMENTS[name], arguments)


if __name__ == "__main__":
    main()
