"""Fields that ask outside of their objects, for what later solves do not look at, have no code."""

from __future__ import annotations

import builtins
import cProfile
import datetime
import inspect
import logging
import mmap
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from decaying import D, Holder, decay, end
from torch import Tensor

import pysciml_node as psn
from pysciml_node.translation.outside import outside

pytestmark = pytest.mark.usefixtures("looks_in_both")

RATE = 1.0


def around() -> None:
    """A function with the globals of this module."""


def mapped(path: Path) -> float:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        return float(memory.read())


OUTSIDE: dict[str, Callable[[Path], float]] = {
    "globals of a function": lambda path: around.__globals__["RATE"],
    "globals by words": lambda path: getattr(around, "__globals__")["RATE"],  # noqa: B009
    "globals of a frame": lambda path: sys._getframe().f_globals["RATE"],
    "a frame by inspect": lambda path: inspect.stack()[1].lineno * 0 + RATE,
    "a file": lambda path: float(path.read_text()),
    "lines of a file": lambda path: next(map(float, open(path))),  # noqa: SIM115
    "a file of NumPy": lambda path: float(np.loadtxt(path)),
    "a descriptor": lambda path: float(os.read(os.open(path, os.O_RDONLY), 9)),
    "mapped memory": mapped,
    "a directory": lambda path: len(os.listdir(path.parent)),
    "whether a file is there": lambda path: float(path.exists()),
    "threads of torch": lambda path: torch.get_num_threads(),
    "Python's limits": lambda path: sys.getrecursionlimit(),
    "a clock": lambda path: time.time() // 1e9,
    "the year": lambda path: datetime.date.today().year,
    "all classes": lambda path: len([x for x in Holder.__subclasses__() if x.k == 2.0]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_asked_outside_is_refused(name: str, tmp_path: Path) -> None:
    """The code had the answer of the first solve."""
    asked, path = OUTSIDE[name], tmp_path / "rate"
    path.write_text("1.0")
    with pytest.raises(psn.CompileError, match="may differ at each solve"):
        end(lambda t, u: -asked(path) * u)


def test_it_is_evaluated_by_torch_instead(tmp_path: Path) -> None:
    path = tmp_path / "rate"

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -float(path.read_text()) * u

    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0))
    path.write_text("1.0")
    with pytest.warns(psn.PsnWarning, match=r"f calls open\(\), whose answer may differ"):
        psn.solve(problem, compile="auto")
    path.write_text("2.0")
    found = psn.solve(problem, rtol=1e-9, atol=1e-9, compile="auto").u1
    assert float(found) == decay(2.0)


def test_a_number_among_the_builtins() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -u * BUILTIN_RATE  # type: ignore[name-defined] # noqa: F821

    try:
        for rate in (1.0, 2.0, 1.0):
            builtins.BUILTIN_RATE = rate  # type: ignore[attr-defined]
            assert end(f) == decay(rate)
    finally:
        del builtins.BUILTIN_RATE  # type: ignore[attr-defined]


def test_a_function_among_the_builtins() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -u * abs(-1.0)

    assert end(f) == decay(1.0)

    def two(x: float) -> float:
        return 2.0

    with mock.patch.object(builtins, "abs", two):
        found = end(f)
    assert found == decay(2.0)


def quiet(t: Tensor, u: Tensor) -> Tensor:
    """What looks around, and no number depends on it."""
    import math

    logging.getLogger(__name__).debug("at %s", "t")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("slow", stacklevel=1)
    return -u * math.cos(0.0)


class Reading(torch.nn.Module):
    """What it has read once it keeps."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)
        self.rate: float | None = None

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.rate is None:
            with open(self.path) as file:
                self.rate = float(file.read())
        return -u * self.rate


def test_other_fields_have_code(tmp_path: Path) -> None:
    (tmp_path / "rate").write_text("2.0")
    assert end(quiet) == decay(1.0)
    assert end(Reading(tmp_path / "rate")) == decay(2.0)


def test_fields_have_code_where_python_is_profiled() -> None:
    """By a profile that is left as it is."""
    profile: Any = cProfile.Profile()
    with profile:
        assert end(lambda t, u: -2.0 * u) == decay(2.0)
    assert profile.getstats()


@pytest.mark.parametrize(("module", "found"), [("hypothesis.internal", []), ("mine", ["time"])])
def test_libraries_may_measure_their_own_time(module: str, found: list[str]) -> None:
    """Of garbage that is collected meanwhile, for instance."""

    def ask() -> None:
        time.time()

    elsewhere = types.FunctionType(ask.__code__, {"__name__": module, "time": time})
    with outside() as asked:
        elsewhere()
    assert asked == found
