"""Derivatives of four Euler steps of `u' = f(t, u)` in a number `k` that the field has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pysciml_node as psn

D = torch.float64
FOUR: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}


def problem(field: Callable[[Tensor, Tensor], Tensor]) -> psn.ODEProblem:
    """From 1, over [0, 1]."""
    return psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))


def slope(
    field: Any, adjoint: psn.Adjoint, given: psn.Problem | psn.EnsembleProblem | None = None
) -> float:
    """The derivative of the end; of `given`, which has the field, where it is another problem."""
    given = problem(field) if given is None else given
    one = given.problem if isinstance(given, psn.EnsembleProblem) else given
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
    algorithm: psn.Algorithm = psn.Euler()
    if isinstance(one, psn.SDEProblem):
        algorithm, options["generator"] = psn.EM(), torch.Generator()
    end = psn.solve(given, algorithm, **options).u1.sum()
    return float(torch.autograd.grad(end, field.k)[0])
