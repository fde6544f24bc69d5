"""MNIST classified by a neural ODE, with and without local-error regularization.

The experiment of Pal, Edelman and Rackauckas, "Locally Regularized Neural Differential Equations"
(arXiv:2303.02262, section 4.1), at full size: a 784-dimensional state flows from t = 0 to 1 along
a tanh network with 100 hidden units, and a linear layer reads the class off its end. One call
trains one variant with one seed and adds it to OUTPUT_DIR/results.json:

    for variant in none local-unbiased local-biased; do
        python examples/mnist_ode.py --data-dir data/mnist --regularize $variant --seed 0
    done

An interrupted call goes on where it stopped when it is repeated with --resume.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from pysciml_node.data import Splits, mnist
from pysciml_node.experiments.figures import plot_training
from pysciml_node.experiments.results import check_mergeable, format_table, merge_results, summarize
from pysciml_node.experiments.runner import measure, train_classifier
from pysciml_node.experiments.settings import (
    ADJOINTS,
    DTYPES,
    STEP_SIZES,
    Run,
    Settings,
    Variant,
    describe,
)

VARIANTS: dict[str, Variant] = {
    "none": "vanilla",
    "local-unbiased": "local-unbiased",
    "local-biased": "local-biased",
}
PAPER = Settings()
QUICK_SAMPLES = 2048


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a neural ODE on MNIST, with or without local-error regularization.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data/mnist"), help="the four MNIST files")
    add("--no-download", action="store_true", help="do not fetch files that are missing")
    add("--output-dir", type=Path, default=Path("runs/mnist"), help="results and checkpoints")
    add("--regularize", choices=list(VARIANTS), default="none", help="which penalty to add")
    add(
        "--weight",
        type=float,
        nargs=2,
        default=(2.5, 1.0),
        metavar=("FIRST", "LAST"),
        help="of the penalty, decaying exponentially",
    )
    add("--steps", type=int, default=PAPER.steps, help="optimizer steps")
    add("--batch-size", type=int, default=PAPER.batch_size, help="samples a batch")
    add("--learning-rate", type=float, default=PAPER.learning_rate, help="of Adam")
    add("--tolerance", type=float, default=PAPER.tolerance, help="relative and absolute")
    add("--dtype", choices=DTYPES, default=PAPER.dtype, help="of parameters and states")
    add("--engine", default=PAPER.engine, help="engine of the solves: auto, torch or julia")
    add(
        "--adjoint",
        choices=ADJOINTS,
        default=PAPER.adjoint,
        help="how gradients pass through the solve; the paper's is interpolating",
    )
    add(
        "--step-size",
        choices=STEP_SIZES,
        default=PAPER.step_size,
        help="of the penalty's step: Hairer's first step, as in the paper's code, or the solver's",
    )
    add(
        "--stop-gradient",
        action=argparse.BooleanOptionalAction,
        default=PAPER.stop_gradient,
        help="keep the penalty's gradient out of the sampled state and the first stage, as the "
        "paper's code does; the full gradient is thousands of times smaller, so --weight has to "
        "grow with it",
    )
    add("--seed", type=int, default=0, help="of parameters, batches and penalty times")
    add("--evaluate-every", type=int, default=PAPER.evaluate_every, help="steps")
    add("--checkpoint-every", type=int, default=100, help="steps between two checkpoints")
    add("--resume", action="store_true", help="continue from the run's checkpoint, if any")
    add("--threads", type=int, help="threads of torch [default: torch's own choice]")
    add(
        "--quick",
        action="store_true",
        help=f"a minute's look: 20 steps, tolerance 1e-4, {QUICK_SAMPLES} samples a part",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    data = mnist(arguments.data_dir, download=not arguments.no_download)
    settings = Settings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        tolerance=arguments.tolerance,
        dtype=arguments.dtype,
        engine=arguments.engine,
        adjoint=arguments.adjoint,
        step_size=arguments.step_size,
        stop_gradient=arguments.stop_gradient,
        evaluate_every=arguments.evaluate_every,
        # A look at the curve while training; the figures at the end use all of the test data.
        monitor_samples=4 * arguments.batch_size,
    )
    output_dir = arguments.output_dir
    if arguments.quick:
        settings = replace(settings, steps=20, tolerance=1e-4, evaluate_every=10)
        first = slice(QUICK_SAMPLES)
        data = Splits(data.train[first], data.validation, data.test[first])
        output_dir = output_dir / "quick"
    run = Run(
        variant=VARIANTS[arguments.regularize], seed=arguments.seed, weight=tuple(arguments.weight)
    )
    results, picture = output_dir / "results.json", output_dir / "training.png"
    check_mergeable(results, describe(settings, run))
    trainer = train_classifier(
        data,
        settings,
        run,
        label=run.name,
        checkpoint=output_dir / "checkpoints" / f"{run.name}.pt",
        checkpoint_every=arguments.checkpoint_every,
        resume=arguments.resume,
    )
    runs = merge_results(results, [measure(trainer, data)])
    plot_training(runs, picture)
    print(format_table(summarize(runs)))
    print(f"written: {results}, {picture}")


if __name__ == "__main__":
    main()
