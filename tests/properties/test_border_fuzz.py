"""Malformed arguments to every public callable: refused by name, or taken because they are right.

Each call has one or two arguments replaced by values from a list of what careless callers give, or
left out, or misspelled. It ends well where it works with values that may be accepted, or raises an
error of this package or a `TypeError` or `ValueError` whose message names the argument. It ends
badly with a bare error of Python or torch, or by accepting nonsense.

The environment variable `PSN_BORDER_CALLS` sets the number of calls.
"""

from __future__ import annotations

import collections
import os
import re
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties.borders import BORDERS, Border
from properties.malformed import VALUES

import pysciml_node as psn
from pysciml_node.kernels import KernelConvergenceError

CALLS = int(os.environ.get("PSN_BORDER_CALLS", "1500"))
OWN = (
    psn.SolverFailure,
    psn.EngineUnavailable,
    psn.JuliaError,
    psn.UnsupportedModule,
    psn.CompileError,
    KernelConvergenceError,
    FileNotFoundError,
)
MISSING, MISSPELLED = "left out", "misspelled"


@dataclass(frozen=True)
class Ending:
    """How a call ended: `good`, `nonsense`, `bare`, `torch` or `unnamed`; and what was said."""

    kind: str
    what: str = ""


def is_named(name: str, target: Border, message: str) -> bool:
    """Whether a message has the argument's name, or another word for it."""
    words = (name, *target.words.get(name, ()))
    return any(
        re.search(rf"(?<![A-Za-z_]){re.escape(word)}(?![A-Za-z_])", message) for word in words
    )


def run(target: Border, changes: dict[str, str]) -> Ending:
    """Make one call, with the values that are named in `changes`."""
    arguments = target.good()
    values: dict[str, Any] = {}
    names = set(changes)
    for name, label in changes.items():
        if label == MISSING:
            arguments.pop(name, None)
        elif label == MISSPELLED:
            arguments[name + "s"] = arguments.pop(name, None)
            names.add(name + "s")
        else:
            arguments[name] = values[name] = VALUES[label]()
    wrong = [name for name, value in values.items() if not target.kinds[name].takes(value)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.call(**arguments)
    except OWN:
        return Ending("good")
    except Exception as error:
        message = str(error)
        known = isinstance(error, TypeError | ValueError)
        if known and any(is_named(name, target, message) for name in names):
            return Ending("good")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {frame.filename.split('/')[-1]}:{frame.lineno}"
        said = f"{where}: {message[:160]}"
        ours = "pysciml_node" in frame.filename and (frame.line or "").startswith(
            ("raise", "refuse")
        )
        if ours and known:
            return Ending("unnamed", said)
        outside = isinstance(error, RuntimeError | NotImplementedError) or "torch" in frame.filename
        return Ending("torch" if outside else "bare", said)
    finally:
        psn.set_engine(None)
    return Ending("nonsense", f"accepted {', '.join(wrong)}") if wrong else Ending("good")


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A callable, and what its arguments are replaced by; all of them equally likely."""
    random = draw(st.randoms(use_true_random=True))
    where = random.choice(list(BORDERS))
    kinds = BORDERS[where].kinds
    changes = {}
    for name in random.sample(list(kinds), min(random.randint(1, 2), len(kinds))):
        labels = [label for label in VALUES if label not in kinds[name].skip]
        changes[name] = random.choice([*labels, MISSING, MISSPELLED])
    return where, changes


def test_malformed_arguments_are_refused_by_name() -> None:
    """Of all calls, under one in a hundred may end badly."""
    endings: collections.Counter[str] = collections.Counter()
    bad: list[str] = []

    @settings(
        max_examples=CALLS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def campaign(call: tuple[str, dict[str, str]]) -> None:
        where, changes = call
        torch.manual_seed(0)
        ending = run(BORDERS[where], changes)
        endings[ending.kind] += 1
        if ending.kind != "good":
            bad.append(f"{ending.kind}: {where}({changes}): {ending.what}")

    campaign()
    total = sum(endings.values())
    report = "\n".join([f"{total} calls: {dict(endings)}", *sorted(bad)])
    if "PSN_BORDER_CALLS" in os.environ:
        print(report)
    assert len(bad) < 0.01 * total, report


@pytest.mark.parametrize("where", BORDERS)
def test_the_calls_work_as_they_stand(where: str) -> None:
    """What the campaign starts from is right."""
    try:
        BORDERS[where].call(**BORDERS[where].good())
    except FileNotFoundError:
        assert where.startswith(("data.", "read_idx"))
