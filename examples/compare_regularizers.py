"""One model trained with each regularizer: what each costs, and what it saves.

Two tasks, the 8x8 digits classified by a neural ODE and a density in the plane learned by a
continuous flow:

    python examples/compare_regularizers.py --seeds 0 1 2

prints a table a task: the task's metric, seconds of training and evaluations a step, evaluations
and milliseconds of a prediction, and by how much training raises the peak memory above that of two
samples. Every run is a process of its own, so that its memory can be told. OUTPUT_DIR/TASK has
results.json, memory.json and the training curves; runs that are there already are not repeated
with --resume.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pysciml_node.data import Splits, digits
from pysciml_node.experiments.demo import digits_demo
from pysciml_node.experiments.published.flows import plane_experiment
from pysciml_node.experiments.reporting.figures import plot_training
from pysciml_node.experiments.reporting.results import (
    RunResult,
    lay_out,
    load_results,
    merge_results,
)
from pysciml_node.experiments.trainer.experiment import Budget, Experiment
from pysciml_node.experiments.trainer.model import make_classifier
from pysciml_node.experiments.trainer.runner import make_trainer, measure
from pysciml_node.experiments.trainer.settings import VARIANTS, Run, Settings
from pysciml_node.experiments.trainer.trainable import METRICS


def load_digits(folder: Path, download: bool, settings: Settings) -> Splits[Any]:
    """The 8x8 digits."""
    del folder, download, settings
    return digits()


CLASSIFIER = Experiment(
    name="classifier",
    title="8x8 digits, neural ODE",
    settings=replace(digits_demo.SETTINGS, steps=200, taylor_order=2, evaluate_every=50),
    weights={
        "local-unbiased": digits_demo.WEIGHT,
        "local-biased": digits_demo.WEIGHT,
        "local-stiffness": (0.05, 0.05),
        "global-error": digits_demo.WEIGHT,
        "global-stiffness": (0.05, 0.05),
        "kinetic": (0.03, 0.03),
        "jacobian": (0.03, 0.03),
        "rnode": (0.03, 0.03),
        "taylor": (0.01, 0.01),
        "steer": (0.5, 0.5),
    },
    reduced=Budget(),
    quick=Budget({"steps": 3, "tolerance": 1e-3, "hidden": 8, "evaluate_every": 3}),
    data_dir=Path("data"),
    load=load_digits,
    load_quick=load_digits,
    build=make_classifier,
)
PLANE = replace(plane_experiment("eight-gaussians"), name="flow")
TASKS = {"classifier": CLASSIFIER, "flow": PLANE}
Memory = dict[str, dict[str, float]]


def peak() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_one(task: str, arguments: argparse.Namespace, run: Run) -> dict[str, Any]:
    """One run in this process: its figures, and the rise of the peak memory in MiB."""
    torch.set_num_threads(arguments.threads)
    experiment = TASKS[task]
    settings = replace(experiment.at(arguments.budget)[0], engine=arguments.engine)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    data = experiment.data(arguments.budget, experiment.data_dir, False, settings)
    trainer = make_trainer(data, settings, run, build=experiment.build)
    # Everything that is needed once is loaded by a step of another model on two samples.
    warm = experiment.build(data, settings, Run(variant="vanilla"))
    warm.outcome(data.train[:2]).loss.backward()
    before = peak()
    trainer.train()
    memory = peak() - before
    return {"memory": memory, "result": asdict(measure(trainer, data))}


def run_apart(task: str, arguments: argparse.Namespace, run: Run) -> tuple[RunResult, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", task, "--regularize", run.variant]
    command += ["--seeds", str(run.seed), "--budget", arguments.budget]
    command += ["--engine", arguments.engine, "--threads", str(arguments.threads)]
    command += [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return RunResult(**found["result"]), found["memory"]


def compare(task: str, arguments: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Run a task's runs and print its table."""
    folder = arguments.output_dir / task
    results, memories = folder / "results.json", folder / "memory.json"
    memory: Memory = json.loads(memories.read_text()) if memories.exists() else {}
    for number, run in enumerate(runs, start=1):
        there = any(r.variant == run.variant and r.seed == run.seed for r in load_results(results))
        if arguments.resume and there and str(run.seed) in memory.get(run.variant, {}):
            continue
        print(f"[{number}/{len(runs)}] {task}: {run.name}", file=sys.stderr, flush=True)
        result, mib = run_apart(task, arguments, run)
        held = merge_results(results, [result])
        memory.setdefault(run.variant, {})[str(run.seed)] = mib
        memories.write_text(json.dumps(memory, indent=1) + "\n")
        plot_training(held, folder / "training.png")
    print(f"{TASKS[task].title}\n{table(load_results(results), memory)}\n")


def table(runs: Sequence[RunResult], memory: Memory) -> str:
    """A row a variant, the mean over the seeds of each figure."""
    metric = METRICS[runs[0].metric]
    head = ["", f"test {metric.title}", "train (s)", "train (CPU s)", "train NFE", "test NFE"]
    rows = [[*head, "predict (ms)", "memory (MiB)"]]
    for variant in VARIANTS:
        own = [run for run in runs if run.variant == variant]
        if not own:
            continue
        scores = [metric.scale * run.test for run in own]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        mean = statistics.fmean
        rows.append(
            [
                variant,
                f"{mean(scores):.{metric.decimals}f} ± {spread:.{metric.decimals}f}",
                f"{mean(run.train_seconds for run in own):.1f}",
                f"{mean(run.train_cpu_seconds for run in own):.1f}",
                f"{mean(mean(run.history['nfe']) for run in own):.1f}",
                f"{mean(run.nfe for run in own):.1f}",
                f"{1000 * mean(run.predict_seconds for run in own):.1f}",
                f"{mean(memory[variant].values()):.0f}",
            ]
        )
    return lay_out(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=list(TASKS), help="[default: all]")
    add("--regularize", nargs="+", choices=VARIANTS, help="[default: all]")
    add("--seed", "--seeds", type=int, nargs="+", default=[0], help="[default: 0]")
    add("--steps", type=int, help="optimizer steps [default: the budget's]")
    add("--engine", default="auto", help="of the solves: auto, torch or julia [default: auto]")
    add("--output-dir", type=Path, default=Path("runs/compare"), help="[default: %(default)s]")
    add("--resume", action="store_true", help="keep the runs that are in the results already")
    add("--threads", type=int, default=1, help="of torch [default: 1]")
    add("--budget", choices=("paper", "reduced", "quick"), default="reduced")
    add("--quick", dest="budget", action="store_const", const="quick", help="--budget quick")
    add("--one", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for task in [arguments.one] if arguments.one else arguments.task:
        _, weights = TASKS[task].at(arguments.budget)
        known = [v for v in VARIANTS if v == "vanilla" or v in weights]
        runs = [
            Run(variant=variant, seed=seed, weight=weights.get(variant, (1.0, 1.0)))
            for seed in arguments.seed
            for variant in arguments.regularize or known
        ]
        if arguments.one:
            print(json.dumps(train_one(task, arguments, runs[0])))
        else:
            compare(task, arguments, runs)


if __name__ == "__main__":
    main()
