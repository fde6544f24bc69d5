"""What an engine is, and what it says when it has no such method."""

from __future__ import annotations

import pytest
import torch

import pysciml_node as psn
from pysciml_node.errors import MethodUnavailable
from pysciml_node.julia_engine import engine as julia_engine
from pysciml_node.solving.engines import Engine
from pysciml_node.torch_engine import engine as torch_engine

PROBLEM = psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0))


def test_both_engines_have_what_an_engine_has():
    engines: tuple[Engine, ...] = (torch_engine, julia_engine)
    names = [name for name in vars(Engine) if not name.startswith("_")]
    for engine in engines:
        assert all(callable(getattr(engine, name)) for name in names)
    assert [engine.NAME for engine in engines] == ["torch", "julia"]


def test_a_method_that_is_missing_is_told_apart_from_an_engine_that_cannot_run():
    with pytest.raises(MethodUnavailable, match="no error estimate"):
        psn.solve(PROBLEM, psn.Euler(), engine="julia")
    with pytest.raises(psn.EngineUnavailable) as caught:
        psn.solve(PROBLEM, engine="julia", adjoint=psn.DirectAdjoint())
    assert not isinstance(caught.value, MethodUnavailable)


def test_a_mass_matrix_that_requires_a_gradient_is_refused():
    mass = torch.eye(1).requires_grad_()
    with pytest.raises(ValueError, match="receives no gradient"):
        psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0), mass_matrix=mass)
