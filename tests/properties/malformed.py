"""What a careless caller may give for an argument, and which of it each kind of argument takes.

The judgements here are written without the package's own checks, so that they can judge these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pysciml_node as psn

Make = Callable[[], Any]


def _endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


class _Field(nn.Module):
    def forward(self, t: Tensor, u: Any) -> Any:
        return u


# Made anew for each call: generators are used up, and tensors may be changed.
VALUES: dict[str, Make] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "2.5": lambda: 2.5,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e-320": lambda: 1e-320,
    "1e308": lambda: 1e308,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "1j": lambda: 1j,
    "Fraction": lambda: Fraction(1, 2),
    "Decimal": lambda: Decimal("0.5"),
    "float64": lambda: np.float64(0.5),
    "float64 nan": lambda: np.float64("nan"),
    "int64": lambda: np.int64(2),
    "bool_": lambda: np.bool_(True),
    "datetime64": lambda: np.datetime64("2020-01-01"),
    "word": lambda: "tsit5",
    "empty word": lambda: "",
    "bytes": lambda: b"torch",
    "path": lambda: Path("nowhere"),
    "empty tuple": lambda: (),
    "empty list": list,
    "empty dict": dict,
    "set": lambda: {0.1, 0.2},
    "range": lambda: range(3),
    "generator": lambda: (x for x in (0.1, 0.2)),
    "list": lambda: [0.1, 0.2],
    "list of words": lambda: ["a"],
    "list of None": lambda: [None],
    "list of nan": lambda: [math.nan],
    "ragged list": lambda: [[1.0], [2.0, 3.0]],
    "endless list": _endless,
    "dict": lambda: {"a": 1.0},
    "object": object,
    "class": lambda: psn.Tsit5,
    "class of modules": lambda: nn.Linear,
    "int": lambda: int,
    "module": lambda: math,
    "ellipsis": lambda: ...,
    "slice": lambda: slice(0, 2),
    "dtype": lambda: torch.float64,
    "device": lambda: torch.device("cpu"),
    "array": lambda: np.ones((2, 3)),
    "array of words": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, 1.0], dtype=object),
    "array nan": lambda: np.array([math.nan, 1.0]),
    "0-d array": lambda: np.array(0.5),
    "0-d tensor": lambda: torch.tensor(0.5),
    "0-d integer": lambda: torch.tensor(2),
    "0-d nan": lambda: torch.tensor(math.nan),
    "0-d complex": lambda: torch.tensor(1j),
    "0-d meta": lambda: torch.tensor(1.0, device="meta"),
    "tensor": lambda: torch.tensor([0.2, 0.4], dtype=torch.float64),
    "matrix": lambda: torch.ones(2, 3, dtype=torch.float64),
    "three axes": lambda: torch.ones(2, 1, 3),
    "empty tensor": lambda: torch.empty(0),
    "no rows": lambda: torch.empty(0, 3),
    "integers": lambda: torch.arange(3),
    "booleans": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "half": lambda: torch.ones(2, 3, dtype=torch.float16),
    "tensor nan": lambda: torch.tensor([[math.nan, 1.0, 1.0]]),
    "tensor inf": lambda: torch.tensor([[math.inf, 1.0, 1.0]]),
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    "list of tensors": lambda: [torch.ones(2), torch.ones(3)],
    "callable of none": lambda: lambda: 0.0,
    "callable of one": lambda: lambda x: x,
    "callable of two": lambda: lambda x, y: y,
    "callable of three": lambda: lambda x, y, z: y,
    "callable of keywords": lambda: lambda *, x: x,
    "builtin": lambda: math.sin,
    "nn.Module": lambda: nn.Linear(3, 3),
    "field": _Field,
    "problem": lambda: psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0)),
    "algorithm": psn.Tsit5,
    "adjoint": psn.GaussAdjoint,
    "controller": psn.PIController,
    "event": lambda: psn.Event(lambda t, u: u.sum()),
    "regularizer": psn.KineticEnergy,
    "schedule": lambda: psn.schedules.Constant(1.0),
    "generator of torch": torch.Generator,
}
HUGE = ("1e308", "2**70", "10**400")

Takes = Callable[[Any], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Args:
        takes: whether a value may be accepted; accepting another one is accepting nonsense.
        skip: values that are not tried, since they ask for more than a test can give.
    """

    takes: Takes
    skip: tuple[str, ...] = ()


def _real(x: Any) -> float | None:
    if isinstance(x, bool | np.bool_):
        return None
    if isinstance(x, int | float | Fraction | Decimal | np.integer | np.floating):
        try:
            return float(x)
        except OverflowError:
            return math.inf
    if isinstance(x, Tensor) and not x.is_complex() and x.dtype != torch.bool:
        return float(x) if x.numel() == 1 and x.device.type != "meta" and x.ndim == 0 else None
    if isinstance(x, np.ndarray) and x.ndim == 0:
        return float(x)
    return None


def real(within: Callable[[float], bool], none: bool = False, finite: bool = True) -> Kind:
    """A number inside a range."""

    def takes(x: Any) -> bool:
        if x is None:
            return none
        found = _real(x)
        if found is None or math.isnan(found) or (finite and math.isinf(found)):
            return False
        return within(found)

    return Kind(takes)


def count(low: int = 1, none: bool = False, costly: bool = True) -> Kind:
    """A whole number from `low` on; where its size costs time, huge ones are not tried."""

    def takes(x: Any) -> bool:
        if x is None:
            return none
        whole = isinstance(x, int | np.integer) and not isinstance(x, bool)
        if isinstance(x, Tensor) and x.ndim == 0 and x.dtype == torch.int64:
            whole = True
        return whole and int(x) >= low

    return Kind(takes, HUGE if costly else ())


def choice(*known: Any, none: bool = False) -> Kind:
    """One of some names."""

    def takes(x: Any) -> bool:
        if x is None:
            return none
        return any(type(x) is type(one) and x == one for one in known)

    return Kind(takes)


def made(*kinds: type, none: bool = False) -> Kind:
    """An instance of a class."""
    return Kind(lambda x: (x is None and none) or isinstance(x, kinds))


def callables(count: int, none: bool = False) -> Kind:
    """A callable that can be called with so many arguments; built-ins show no signature."""
    import inspect

    def takes(x: Any) -> bool:
        if x is None:
            return none
        if not callable(x) or (isinstance(x, type) and issubclass(x, nn.Module)):
            return False
        try:
            signature = inspect.signature(x.forward if isinstance(x, nn.Module) else x)
            signature.bind(*range(count))
        except ValueError:
            return True
        except TypeError:
            return False
        return True

    return Kind(takes)


def _arraylike(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "iufcb")


def tensors(none: bool = False, floating: bool = False) -> Kind:
    """A tensor; shapes are each function's own affair."""

    def takes(x: Any) -> bool:
        if x is None:
            return none
        if not _arraylike(x):
            return False
        return not floating or not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex()

    return Kind(takes)


def _plausible(x: Any) -> bool:
    numbers = isinstance(x, list | tuple | range) and all(_real(y) is not None for y in x)
    return numbers or hasattr(x, "__next__") or (_arraylike(x) and x.ndim == 1)


ANY = Kind(lambda x: True)
FLAG = made(bool, np.bool_)
MAYBE_FLAG = made(bool, np.bool_, type(None))
NAME = Kind(lambda x: x is None or (isinstance(x, str) and x != ""))
WORDS = Kind(lambda x: isinstance(x, str) and x != "")
GENERATOR = made(torch.Generator, none=True)
POSITIVE = real(lambda x: x > 0)
MAYBE_POSITIVE = real(lambda x: x > 0, none=True)
NOT_NEGATIVE = real(lambda x: x >= 0)
SHARE = real(lambda x: 0 < x < 1)
NUMBER = real(lambda x: True)
TIMES = Kind(_plausible)
MAYBE_TIMES = Kind(lambda x: x is None or _plausible(x))
WEIGHT = Kind(lambda x: isinstance(x, psn.schedules.Schedule) or NUMBER.takes(x))
REGULARIZERS = Kind(
    lambda x: (isinstance(x, list | tuple) and not x) or isinstance(x, psn.Regularizer)
)
ALGORITHM = Kind(lambda x: x is None or type(x) is psn.Tsit5)
ADJOINT = Kind(lambda x: x is None or isinstance(x, psn.GaussAdjoint))
CONTROLLER = Kind(lambda x: x is None or isinstance(x, psn.PIController))
ENGINE = choice("torch", "auto", "julia", none=True)
SHAPE = Kind(
    lambda x: (
        (
            isinstance(x, int | np.integer)
            or (isinstance(x, list | tuple | range) and all(isinstance(y, int) for y in x))
            or (isinstance(x, Tensor) and not x.is_floating_point())
        )
        and not isinstance(x, bool)
    ),
    HUGE,
)
TOLERANCE = Kind(lambda x: NOT_NEGATIVE.takes(x) or (_arraylike(x) and np.ndim(x) > 0))
