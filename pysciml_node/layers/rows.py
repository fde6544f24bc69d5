"""The rows of a batch as members of an ensemble, each with steps of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import map_tensors, tensors_of
from pysciml_node.regularizers.base import Regularizer, attach_penalties
from pysciml_node.solutions.ensemble import EnsembleSolution


@dataclass(frozen=True)
class OfRow:
    """A field of batches as that of one row, which it is given as a batch of one."""

    function: Callable[..., Any]

    def __call__(self, t: Tensor, u: Any, *p: Any) -> Any:
        """The derivative of one row."""
        out = self.function(t, map_tensors(lambda x: x.unsqueeze(0), u), *p)
        return map_tensors(lambda x: x.squeeze(0), out)


def rows_of(problem: ODEProblem, of_row: Callable[..., Any]) -> EnsembleProblem:
    """The ensemble of a batch's rows; `p` is the same for all.

    Args:
        problem: of the batch.
        of_row: its field as that of a row.

    Raises:
        ValueError: a state without rows.
    """
    if any(x.ndim == 0 for x in tensors_of(problem.u0)):
        raise ValueError(
            "independent=True takes the rows of u0 as members, but u0 has a part without axes.\n"
            "  Give u0 of shape (B, *D)."
        )
    row = map_tensors(lambda x: x[0].detach(), problem.u0)
    return EnsembleProblem(dataclasses.replace(problem, f=of_row, u0=row), problem.u0)


def refuse_rates(regularizers: Sequence[Regularizer]) -> None:
    """Refuse regularizers that integrate along the solution, beside states that share steps.

    Raises:
        ValueError: there is one.
    """
    for regularizer in regularizers:
        if type(regularizer).rate is not Regularizer.rate:
            raise ValueError(
                f"{regularizer.name} integrates a rate beside a batch, and rows with steps of "
                "their own are none.\n"
                "  Use LocalError or GlobalError, or leave independent=True out."
            )


def attach_row_penalties(solution: EnsembleSolution, regularizers: Sequence[Regularizer]) -> None:
    """Evaluate regularizers on each member's own steps, and set the means over the members."""
    spec = solution.problem.problem.spec
    solution.penalty = torch.zeros((), dtype=spec.real_dtype, device=spec.device)
    attach_penalties(solution, regularizers)
