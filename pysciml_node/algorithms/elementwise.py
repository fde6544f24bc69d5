"""Formulas that hold for a number and, entry by entry, for an array: the functions they use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Maths:
    """Functions of numbers, or of arrays.

    Attributes:
        power: `x**y`.
        maximum: the larger of two.
        minimum: the smaller of two.
        atan: the arc tangent.
        isfinite: neither NaN nor infinite.
        copysign: the size of the first with the sign of the second.
        where: the second where the first holds, else the third.
        full: from a length and a value to an array; of numbers the value itself.
    """

    power: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]
    atan: Callable[[Any], Any]
    isfinite: Callable[[Any], Any]
    copysign: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    full: Callable[[Any, float], Any]


def _choose(condition: bool, first: float, second: float) -> float:
    return first if condition else second


NUMBERS = Maths(
    power=math.pow,
    maximum=max,
    minimum=min,
    atan=math.atan,
    isfinite=math.isfinite,
    copysign=math.copysign,
    where=_choose,
    full=lambda count, value: value,
)
"""Functions of Python's floats."""

ARRAYS = Maths(
    power=np.power,
    maximum=np.maximum,
    minimum=np.minimum,
    atan=np.arctan,
    isfinite=np.isfinite,
    copysign=np.copysign,
    where=np.where,
    full=np.full,
)
"""Functions of arrays, entry by entry."""
