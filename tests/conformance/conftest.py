"""One suite for every engine: the `engine` fixture runs each test on those that are present."""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import cache

import pytest
import torch
from gpu import place

import pysciml_node as psn
from pysciml_node.errors import MethodUnavailable

ENGINES = ("torch", "julia")


@cache
def _missing(name: str) -> str | None:
    """Why an engine cannot run here, or `None`."""
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0))
    try:
        psn.solve(problem, psn.Tsit5(), engine=name)
    except psn.EngineUnavailable as error:
        return f"{error.args[0].splitlines()[0]} To have it: python -m pysciml_node install"
    return None


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine that is present."""
    name: str = request.param
    if reason := _missing(name):
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def tensors_on_the_device() -> Generator[None, None, None]:
    """New tensors lie on `PSN_TEST_DEVICE`, where it is named (see `tests/gpu`)."""
    if "PSN_TEST_DEVICE" not in os.environ:
        yield
        return
    with place.device():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """What SciML lacks is refused by name: adaptive steps of Euler and EM, and ReversibleHeun."""
    try:
        return (yield)
    except MethodUnavailable as error:
        pytest.skip(str(error).splitlines()[0])
