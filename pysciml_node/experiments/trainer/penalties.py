"""The regularizers that a variant trains with, and their random numbers."""

import torch

from pysciml_node.budgets import Budget
from pysciml_node.experiments.trainer.settings import Run, Settings, Variant
from pysciml_node.regularizers import (
    GlobalError,
    GlobalStiffness,
    JacobianFrobenius,
    KineticEnergy,
    LocalError,
    LocalStiffness,
    RandomEndTime,
    Regularizer,
    TaylorDerivative,
)
from pysciml_node.regularizers.local import Sampling
from pysciml_node.schedules import Exponential, Schedule

_SAMPLING: dict[Variant, Sampling] = {
    "local-unbiased": "unbiased",
    "local-biased": "biased",
    "budget-0.6": "unbiased",
}


def make_regularizers(
    settings: Settings, run: Run, generator: torch.Generator
) -> list[Regularizer]:
    """The variant's regularizers, their weights on the schedule of the run, or held to its budget.

    Args:
        settings: length of the schedule, and the choices of the local penalties.
        run: variant and weights.
        generator: draws random times and probes.

    Returns:
        None for vanilla, two for RNODE, one for the others.
    """
    weight: Schedule = Exponential(*run.weight, settings.steps)
    if run.budget is not None:
        weight = Budget(nfe=run.budget, horizon=settings.steps)
    if run.variant in _SAMPLING:
        return [
            LocalError(
                _SAMPLING[run.variant],
                weight=weight,
                step_size=settings.step_size,
                stop_gradient=settings.stop_gradient,
                generator=generator,
            )
        ]
    if run.variant == "local-stiffness":
        return [
            LocalStiffness(
                weight=weight,
                step_size=settings.step_size,
                stop_gradient=settings.stop_gradient,
                generator=generator,
            )
        ]
    # As the code of the paper that proposed them aggregates: arXiv:2105.03918.
    if run.variant == "global-error":
        return [GlobalError(weight, aggregate="mean")]
    if run.variant == "global-stiffness":
        return [GlobalStiffness(weight, aggregate="max")]
    if run.variant == "steer":
        return [RandomEndTime(run.weight[0], generator=generator)]
    if run.variant == "taylor":
        return [TaylorDerivative(settings.taylor_order, weight)]
    regularizers: list[Regularizer] = []
    if run.variant in ("kinetic", "rnode"):
        regularizers.append(KineticEnergy(weight))
    if run.variant in ("jacobian", "rnode"):
        regularizers.append(JacobianFrobenius(weight, generator=generator))
    return regularizers
