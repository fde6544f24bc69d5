"""Three ideas beyond the published local regularizers, at one budget of evaluations each.

The task `digits-short` of `train_to_budget.py`, budgets of 0.6 of the evaluations that the same
training takes without a penalty:

    python examples/beyond_local_error.py --seeds 0 1 2

- `where-steps-are` draws the time of `LocalError` where the solver's steps are dense.
- `rejected` penalizes errors that would make the solver reject a step.
- `own-steps` gives every sample of a batch steps of its own, and a budget that they hold on
  average; it has a table of its own.

Results of every run are added to a file in OUTPUT_DIR as it ends; those of `train_to_budget.py`
are not repeated.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_to_budget import (
    SHORT,
    TASKS,
    Outcome,
    Plan,
    Results,
    compare_regularizers,
    history_of,
    step_seconds,
)

import pysciml_node as psn
from pysciml_node import data as datasets
from pysciml_node.experiments.trainer.evaluation import evaluate, evaluation_mode
from pysciml_node.experiments.trainer.runner import make_trainer
from pysciml_node.experiments.trainer.settings import Run, Variant

# Samples that solve for themselves are penalized one by one: so many of a batch are enough.
PENALIZED = 16


class WhereStepsAre(psn.LocalError):
    """A random time of a random step, so that times are drawn in proportion to the step density.

    Each is weighed by the size of its step over the mean size, so that the mean is the one that
    uniform times have.
    """

    def forward(self, solution: psn.Solution) -> Tensor:
        """The penalty."""
        ends = solution.step_times.tolist()
        n = len(ends) - 1
        share, k = torch.rand(2, generator=self.generator, dtype=torch.float64).tolist()
        k = int(k * n)
        size = ends[k + 1] - ends[k]
        step = self.estimate(solution, ends[k] + share * size)
        return n * size / (ends[-1] - ends[0]) * step.error * step.dt.abs()


class Rejected(psn.LocalError):
    """By how much a step half as long again as the solver's would miss the tolerance."""

    def forward(self, solution: psn.Solution) -> Tensor:
        """The penalty."""
        t = self.sample_time(solution)
        dt = 1.5 * solution.step_size(t)
        step = solution.local_estimate(t, self.pair(solution), dt=dt, stop_gradient=False)
        return (step.error - 1.0).relu()


class SomeSamples(psn.LocalError):
    """The local error of some samples' own steps."""

    def forward(self, solution: psn.Solution) -> Tensor | None:  # type: ignore[override]
        """The penalty of a sample, or nothing."""
        drawn = torch.rand((), generator=self.generator).item()
        return super().forward(solution) if drawn < PENALIZED / SHORT.batch_size else None


IDEAS: dict[str, Callable[..., psn.LocalError]] = {
    "local-unbiased": psn.LocalError,
    "local-biased": psn.LocalError,
    "where-steps-are": WhereStepsAre,
    "rejected": Rejected,
    "own-steps": SomeSamples,
}


def train(plan: Plan, target: float | None, native: bool, *, independent: bool) -> Outcome:
    """The digits, one of the ideas as regularizer where there is a target."""
    known: Variant = "vanilla" if target is None else "local-unbiased"
    data, run = datasets.digits(), Run(variant=known, seed=plan.seed, budget=target)
    trainer = make_trainer(data, SHORT, run)
    node: Any = trainer.model.node
    node.options["compile"] = native
    node.independent = independent
    for k, given in enumerate(node.regularizers):
        node.regularizers[k] = IDEAS[plan.variant](
            "biased" if plan.variant == "local-biased" else "unbiased",
            given.weight,
            step_size="solver",
            stop_gradient=False,
            generator=given.generator,
        )
    trainer.train()
    found = evaluate(trainer.model, data.test, SHORT.evaluated_at_once)
    with evaluation_mode(trainer.model):
        stats = node(data.test.x.flatten(1).double()).stats
    rejected = stats.nreject / (stats.naccept + stats.nreject)
    nfe = stats.nfe / len(data.test) if independent else found.nfe
    history, seconds = history_of(trainer.model), trainer.train_cpu_seconds
    step = step_seconds(trainer)
    return Outcome(nfe, found.score, seconds, step, target, *history, rejected=rejected)


def scatter(seed: int) -> None:
    """Print how much penalties at random times differ, for a field trained without a penalty."""
    data = datasets.digits()
    trainer = make_trainer(data, SHORT, Run(variant="vanilla", seed=seed))
    node: Any = trainer.model.node
    node.options["compile"] = True
    trainer.train()
    with evaluation_mode(trainer.model):
        solution = node(data.train.x[: SHORT.batch_size].flatten(1).double())
        print(solution)
        for kind in (psn.LocalError, WhereStepsAre):
            draws = torch.Generator().manual_seed(seed)
            penalty = kind(step_size="solver", stop_gradient=False, generator=draws)
            values = torch.stack([penalty(solution) for _ in range(150)])
            print(f"{kind.__name__}: deviation {values.std() / values.mean():.2f} of the mean")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", "--seeds", type=int, nargs="+", default=[0], help="[default: 0]")
    add("--output-dir", type=Path, default=Path("runs/budget"), help="[default: %(default)s]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shared = list(IDEAS)[:-1]
    for name, ideas in {"digits-short": shared, "digits-own-steps": ["own-steps"]}.items():
        independent = name == "digits-own-steps"
        trained = partial(train, independent=independent)
        task = replace(TASKS["digits-short"], train=trained, regularizers=ideas)
        results = Results(arguments.output_dir / f"{name}.json")
        compare_regularizers(task, results, arguments.seed).show(name)
    scatter(arguments.seed[0])


if __name__ == "__main__":
    main()
