"""The base of regularizers: modules that read a solution and return a scalar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.regularizers.probes import Probes
from pysciml_node.regularizers.rates import Rate
from pysciml_node.schedules import Schedule, as_schedule, unscaled
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution

Times = Sequence[float] | Tensor


class Regularizer(checks.Configured, nn.Module, ABC):
    """Base of all regularizers.

    It has no parameters; it is a module so that the step count of its weight is part of the
    model's `state_dict`.

    Args:
        weight: factor of the penalty in the loss, or a schedule of it; it may be assigned anew.
        name: key in `Solution.penalties`; default the class's name.

    Attributes:
        of_stochastic: whether it is for stochastic equations too.
    """

    of_stochastic: ClassVar[bool] = True

    def __init__(self, weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.name = type(self).__name__ if name is None else checks.text("name", name)
        self.steps = 0

    def prepare(self, problem: ODEProblem, saveat: Times | None) -> tuple[ODEProblem, Times | None]:
        """The problem and output times to solve in training; most regularizers change neither."""
        return problem, saveat

    def rate(self, problem: ODEProblem, probes: Probes | None) -> Rate | None:
        """The rate to integrate along the solution; `None` for most regularizers."""
        return None

    @abstractmethod
    def forward(self, solution: Solution) -> Tensor | None:
        """The unweighted penalty of a solution, a 0-d tensor; `None` where there is none."""

    def _over_members(self, solution: EnsembleSolution) -> Tensor | None:
        """The mean of the unweighted penalties of an ensemble's members."""
        values = [self(member) for member in solution]
        known = [value for value in values if value is not None]
        return torch.stack(known).mean() if known else None

    @property
    def weight(self) -> Schedule:
        """The schedule of the factor in the loss."""
        return self._weight

    @weight.setter
    def weight(self, weight: float | Schedule) -> None:
        self._weight = as_schedule(weight)

    @property
    def current_weight(self) -> float:
        """The weight at the present training step."""
        return self.weight(self.steps)

    def charge(self, value: Tensor) -> None:
        """Tell a schedule that adjusts itself what it is the weight of."""
        schedule, factor = unscaled(self.weight)
        if schedule.observes:
            schedule.charge(factor * float(value.detach()))

    def step(self) -> None:
        """Count one training step of the schedule."""
        self.steps += 1

    def get_extra_state(self) -> Any:
        """The schedule's position, and what has become of it, for `state_dict`."""
        steps, state = torch.tensor(self.steps), self.weight.state_dict()
        return {"steps": steps, "schedule": state} if state else steps

    def set_extra_state(self, state: Any) -> None:
        """Put the schedule back, from `state_dict`."""
        if isinstance(state, dict):
            self.weight.load_state_dict(state["schedule"])
            state = state["steps"]
        self.steps = int(state)

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"weight={self.weight}"


def stability_radius(algorithm: Algorithm) -> float:
    """The unit of an algorithm's stiffness estimate.

    Raises:
        ValueError: the algorithm has no such estimate.
    """
    tableau = getattr(algorithm, "tableau", None)
    radius: float | None = getattr(tableau, "stability_radius", None)
    if getattr(tableau, "stiffness_stages", None) is None or radius is None:
        raise ValueError(
            f"{algorithm!r} has no stiffness estimate.\n"
            "  Use Tsit5, DP5, DP8, Vern7 or Vern9, and for stochastic equations SOSRI2 or SOSRA2."
        )
    return radius


def check_names(regularizers: Regularizer | Sequence[Regularizer]) -> list[Regularizer]:
    """The regularizers as a list; a single one is a list of one.

    Raises:
        TypeError: an entry is no regularizer.
        ValueError: two have one name.
    """
    listed: list[Regularizer] = checks.sequence(
        "regularizers",
        regularizers,
        Regularizer,  # type: ignore[type-abstract]
        example="LocalError()",
    )
    names: set[str] = set()
    for regularizer in listed:
        if regularizer.name in names:
            raise ValueError(
                f"two regularizers are named {regularizer.name!r}.\n  Give one of them name=..."
            )
        names.add(regularizer.name)
    return listed


def attach_penalties(
    solution: Solution | EnsembleSolution, regularizers: Sequence[Regularizer]
) -> None:
    """Evaluate regularizers on a solution and set its `penalties` and `penalty`.

    The penalty of an ensemble is the mean over its members, each evaluated on its own steps.
    """
    _let_observe(solution, regularizers)
    pairs: list[tuple[Regularizer, Tensor]] = []
    for regularizer in regularizers:
        if isinstance(solution, EnsembleSolution):
            value = regularizer._over_members(solution)
        else:
            value = regularizer(solution)
        if value is not None:
            solution.penalties[regularizer.name] = value
            pairs.append((regularizer, value))
            regularizer.charge(value)
    # Weights are read last: a schedule that several share has then seen all their penalties.
    total: Tensor | None = None
    for regularizer, value in pairs:
        term = regularizer.current_weight * value
        total = term if total is None else total + term
    if total is not None:
        solution.penalty = total


def _let_observe(
    solution: Solution | EnsembleSolution, regularizers: Sequence[Regularizer]
) -> None:
    """Show a solution, once each, to the schedules that adjust themselves.

    Before the penalties, which evaluate the field too.
    """
    watching: dict[Schedule, Regularizer] = {}
    for regularizer in regularizers:
        schedule, _ = unscaled(regularizer.weight)
        if schedule.observes:
            watching.setdefault(schedule, regularizer)
    for schedule, first in watching.items():
        schedule.observe(first, solution)
