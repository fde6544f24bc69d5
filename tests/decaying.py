"""A solve of `du/dt = -rate u` by native code, for tests in which the rate changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pysciml_node as psn

D = torch.float64


def end(f: Callable[..., Any], p: Any = None) -> float:
    """The state at 1, from 1 at 0."""
    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0), p=p)
    return float(psn.solve(problem, rtol=1e-9, atol=1e-9, compile=True).u1.detach())


def decay(rate: float) -> Any:
    """What it ought to be."""
    return pytest.approx(math.exp(-rate), rel=1e-6)


class Holder:
    """A plain object."""

    k: Any = 1.0
