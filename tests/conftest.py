"""Settings shared by all tests."""

from __future__ import annotations

import os
import signal
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pysciml_node.julia_engine.process import runtime
from pysciml_node.torch_engine.native.library import cross_in_c
from pysciml_node.translation import again
from pysciml_node.translation.watch import Watch

# A shell that runs the tests in the background has them, and their subprocesses, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The states here are tiny: threads would only wait for one another.
torch.set_num_threads(1)


# Nothing is installed by running the tests: without Julia, those that need it are skipped.
os.environ.setdefault("PYTHON_JULIAPKG_OFFLINE", "yes")


@cache
def why_no_julia() -> str | None:
    """Why tests that need Julia cannot run; None where they can."""
    reason = runtime.unavailable_reason()
    return None if reason is None else f"no Julia (python -m pysciml_node install): {reason}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs Julia, where there is none; start it, once, for what does."""
    if item.get_closest_marker("julia") is None:
        return
    reason = why_no_julia()
    if reason is not None:
        pytest.skip(reason)
    runtime.start()


@pytest.fixture
def looks_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a field reaches is looked at in C and in Python, which have to see the same."""
    cross_in_c()
    if again._look is None:
        return
    in_c = again.tensors

    def in_both(watch: Watch, parts: tuple[Any, ...]) -> list[Tensor] | None:
        found, expected = in_c(watch, parts), watch.tensors(parts)
        assert (found is None) == (expected is None)
        assert list(map(id, found or ())) == list(map(id, expected or ()))
        return found

    monkeypatch.setattr(again, "tensors", in_both)
