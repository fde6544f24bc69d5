"""Checks of the options of an ensemble: those that members share, and those of each member."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import Array, MemberOptions
from pysciml_node.problems.ensemble import EnsembleProblem, check_sizes
from pysciml_node.problems.ode import Problem
from pysciml_node.problems.state import moves
from pysciml_node.solving.checks import check_algorithm, check_options, check_problem


def check_members(
    ensemble: EnsembleProblem, algorithm: Algorithm | None, **given: Any
) -> tuple[Problem, Algorithm, MemberOptions]:
    """A problem that stands for all members, the algorithm, and the options.

    Raises:
        TypeError: one is of the wrong kind.
        ValueError: one is out of range, or does not go with another.
    """
    check_sizes(ensemble)
    problem = check_problem(ensemble.member(0))
    spans = ensemble.spans()
    if ensemble.tspan is not None:
        problem = _over_all(problem, spans)
    algorithm = check_algorithm(problem, algorithm)
    differing: dict[str, Any] = {}
    for name in ("rtol", "atol"):
        tolerance = _own_tolerance(name, given[name], ensemble)
        if tolerance is not None:
            differing[name] = tolerance
            given[name] = float(tolerance.amin())
    saveat = given["saveat"]
    nested = isinstance(saveat, list | tuple) and all(isinstance(x, list | tuple) for x in saveat)
    if getattr(saveat, "ndim", 1 + nested) == 2:
        differing["saveat"], differing["saveat_tensor"] = _own_times(saveat, ensemble, spans)
        # The first member's times stand for all, over an interval that may be another's.
        given["saveat"] = sorted(differing["saveat"][0].tolist(), reverse=problem.direction < 0)
    options = check_options(problem, algorithm, **given)
    if ensemble.tspan is not None and "saveat" not in differing and options.saveat is not None:
        _expect_inside(np.array([options.saveat]), spans)
    return problem, algorithm, MemberOptions(options, spans, **differing)


def _over_all(problem: Problem, spans: tuple[Array, Array]) -> Problem:
    """The problem over the interval that holds those of all members."""
    low, high = float(np.min(spans)), float(np.max(spans))
    forward = spans[0][0] < spans[1][0]
    given: Any = problem
    whole: Problem = dataclasses.replace(given, tspan=(low, high) if forward else (high, low))
    return whole


def _own_tolerance(name: str, value: Any, ensemble: EnsembleProblem) -> Tensor | None:
    """A tolerance with a value for each member, `(M, 1)` or `(M, N)`; `None` for one of all."""
    spec, size = ensemble.problem.spec, len(ensemble)
    if checks.as_float(value) is not None or (spec.keys is not None and not torch.is_tensor(value)):
        return None
    tensor = checks.as_tensor(value)
    if tensor is None or tensor.ndim == 0:
        return None
    shape = () if spec.keys is not None else tuple(spec.shapes[0])
    whole = tensor.ndim == len(shape) + 1 and tensor.shape[0] in (1, size)
    if tensor.shape != (size,) and not whole:
        return None
    tensor = checks.tensor(name, tensor, real=True).detach().to(spec.device, spec.real_dtype)
    if bool((~(tensor >= 0) | tensor.isinf()).any()):
        raise ValueError(
            f"{name} must be finite and at least 0 for each member, but has "
            f"{float(tensor.min())} to {float(tensor.max())}.\n  Write {name}.clamp(min=0)."
        )
    if tensor.ndim == 1:
        if shape and shape[-1] == size and size > 1:
            raise ValueError(
                f"{name} of shape {(size,)} may be for the {size} members or for the {size} entries"
                f" of a state.\n  Write {name}.reshape{(size, *(1,) * len(shape))} for the members,"
                f" or {name}.expand{(1, *shape)} for the entries."
            )
        return tensor.reshape(size, 1)
    try:
        return tensor.expand(size, *shape).reshape(size, -1)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to the states of all "
            f"members, {(size, *shape)}.\n"
            f"  Give one number, one for each member ({(size,)}), or one for each entry."
        ) from None


def _own_times(
    saveat: Any, ensemble: EnsembleProblem, spans: tuple[Array, Array]
) -> tuple[Array, Tensor | None]:
    """The members' output times, `(M, T)`; as a tensor too where they receive gradients."""
    if isinstance(saveat, list | tuple):
        rows = [checks.numbers("saveat", row) for row in saveat]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                "saveat of shape (M, T) must name as many times for each member.\n"
                "  Repeat the last time of those that have fewer."
            )
        saveat = torch.tensor(rows, dtype=torch.float64)
    tensor = checks.tensor("saveat", saveat, real=True, finite=True)
    if tensor.shape[0] != len(ensemble) or not tensor.shape[1]:
        raise ValueError(
            f"saveat of an ensemble must have shape (T,) or (M, T) with M = {len(ensemble)}, but "
            f"has {tuple(tensor.shape)}.\n  Give a row of times for each member, or one for all."
        )
    times: Array = tensor.detach().cpu().double().numpy()
    if tensor.dtype != torch.float64:
        low, high = np.minimum(*spans)[:, None], np.maximum(*spans)[:, None]
        slack = 1e-6 * (high - low)
        near = (low - slack <= times) & (times <= high + slack)
        times = np.where(near, np.clip(times, low, high), times)
    times = _expect_inside(times, spans)
    direction = np.sign(spans[1] - spans[0])[:, None]
    wrong = np.argwhere(np.diff(times, axis=1) * direction < 0)
    if len(wrong):
        m, i = (int(x) for x in wrong[0])
        raise ValueError(
            f"saveat must be in the order of integration, but saveat[{m}, {i + 1}]="
            f"{times[m, i + 1]} follows {times[m, i]}.\n  Sort the rows first."
        )
    return times, tensor if moves(tensor) else None


def _expect_inside(times: Array, spans: tuple[Array, Array]) -> Array:
    """Times `(M, T)` or `(1, T)`, refused where they lie some ulps outside a member's interval."""
    low, high = np.minimum(*spans)[:, None], np.maximum(*spans)[:, None]
    slack = 4 * np.spacing(np.maximum(abs(low), abs(high)))
    wrong = np.argwhere((times < low - slack) | (times > high + slack))
    if len(wrong):
        m, i = (int(x) for x in wrong[0])
        value = float(np.broadcast_to(times, (len(low), times.shape[1]))[m, i])
        shared = "Give saveat of shape (M, T): times of its own for each member."
        remedy = shared if len(times) == 1 else "Widen its tspan, or drop the times beyond it."
        raise ValueError(
            f"saveat must lie inside the interval of each member, but time {i} of member {m} is "
            f"{value}, and its interval ({spans[0][m]}, {spans[1][m]}).\n  {remedy}"
        )
    inside: Array = np.clip(times, low, high) if len(times) > 1 or len(low) == 1 else times
    return inside
