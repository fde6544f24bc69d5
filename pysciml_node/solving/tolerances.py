"""The tolerances of a solve: one number, one for each part of the state, or one for each entry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem


def check_tolerance(name: str, value: Any, problem: Problem) -> tuple[float | Tensor, int]:
    """A tolerance as a number or flat tensor, and how many leading entries of the state it counts.

    The entries of a state behind the last finite absolute tolerance need not be looked at at all.
    """
    spec = problem.spec
    if spec.keys is None or not isinstance(value, tuple | list | dict):
        return _check_part(name, value, problem, spec.shapes[0]), sum(spec.sizes)
    named = isinstance(value, dict)
    if (list(value) if named else list(range(len(value)))) != list(spec.keys) and (
        not named or set(value) != set(spec.keys)
    ):
        keys = list(spec.keys)
        hint = "Write one number for all parts, or one entry for each."
        checks.refuse(name, f"a number, or have the parts of u0, {keys}", value, hint, ValueError)
    given = spec.parts(value)
    parts = [
        _check_part(f"{name}[{key!r}]", part, problem, shape)
        for key, part, shape in zip(spec.keys, given, spec.shapes, strict=True)
    ]
    counted = len(parts)
    numbers = [part if isinstance(part, float) else None for part in parts]
    while counted > 1 and numbers[counted - 1] == math.inf:
        counted -= 1
    first = numbers[0]
    if first is not None and all(part == first for part in numbers[:counted]):
        return first, sum(spec.sizes[:counted])
    flat = [
        part if isinstance(part, Tensor) else torch.full((size,), part)
        for part, size in zip(parts, spec.sizes, strict=True)
    ]
    return torch.cat([part.to(spec.device, spec.real_dtype) for part in flat]), sum(spec.sizes)


def _check_part(name: str, value: Any, problem: Problem, shape: torch.Size) -> float | Tensor:
    """One tolerance of one part of the state."""
    if checks.as_float(value) is not None:
        return checks.number(name, value, at_least=0, infinite=name.startswith("atol["))
    if checks.as_tensor(value) is None:
        checks.refuse(name, "a number or a tensor", value, f"Write {name.partition('[')[0]}=1e-6.")
    tensor = checks.tensor(name, value, real=True)
    spec = problem.spec
    if bool((~(tensor >= 0)).any()):
        raise ValueError(
            f"{name} must be at least 0 everywhere, but has {float(tensor.min())}.\n"
            f"  Write {name}.clamp(min=0), or the absolute values."
        )
    if name.startswith("rtol") and bool(tensor.isinf().any()):
        raise ValueError(
            f"{name} must be finite everywhere, but has inf.\n"
            "  Write atol=inf for entries whose errors do not count."
        )
    try:
        full = tensor.to(spec.device, spec.real_dtype).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to the state's "
            f"{tuple(shape)}.\n  Give one number, or a tensor of u0's shape."
        ) from None
    return full.reshape(-1)


_BOTH_ZERO = (
    "rtol and atol must not both be 0: no step could be accepted.\n"
    "  Write rtol=1e-6 for errors relative to the state, or atol for absolute ones."
)

_ALL_INFINITE = (
    "rtol or atol is inf in every entry: no error would count, and every step be accepted.\n"
    "  Give some entry finite ones, or steps of one size, controller=FixedStep() and dt0."
)


def check_together(options: SolveOptions) -> None:
    """Refuse options with which adaptive steps could not be accepted, or none be rejected.

    Raises:
        ValueError: some entry has no tolerance at all, or no entry has a finite one.
    """
    if not options.controller.adaptive:
        return
    rtol, atol = options.tolerances.rtol, options.tolerances.atol
    if isinstance(rtol, float) and isinstance(atol, float):
        if rtol == atol == 0:
            raise ValueError(_BOTH_ZERO)
        if math.isinf(atol):
            raise ValueError(_ALL_INFINITE)
        return
    finite = torch.as_tensor(rtol).isfinite() & torch.as_tensor(atol).isfinite()
    if not bool(finite.any()):
        raise ValueError(_ALL_INFINITE)
    both = torch.as_tensor(rtol == 0) & torch.as_tensor(atol == 0)
    if bool(both.any()):
        raise ValueError(_BOTH_ZERO)
