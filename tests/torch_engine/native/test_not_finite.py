"""Gradients of what a solve has reached before it was not finite any more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "throw": False}


def ordinary(method: Any, inputs: list[Tensor], **options: Any) -> psn.Solution:
    u0, rate, t1 = inputs
    problem = psn.ODEProblem(lambda t, u: rate * u**9, u0, (0.0, t1))
    return psn.solve(problem, method, **FIXED, **options)


def stochastic(method: Any, inputs: list[Tensor], **options: Any) -> psn.Solution:
    u0, rate, _ = inputs
    problem = psn.SDEProblem(
        lambda t, u: rate * u**9, lambda t, u: 0.1 + 0 * u, u0, (0.0, 1.0), "additive"
    )
    generator = torch.Generator().manual_seed(1)
    return psn.solve(problem, method, generator=generator, **FIXED, **options)


@pytest.mark.parametrize("saveat", [[0.05, 0.1, 0.2, 0.9], None])
@pytest.mark.parametrize(
    ("solve", "method"),
    [(ordinary, psn.Euler()), (ordinary, psn.Tsit5()), (stochastic, psn.SRA1())],
)
def test_good_states_have_their_gradients(
    solve: Any, method: Any, saveat: list[float] | None
) -> None:
    """They were NaN: cotangents of zero went back through steps that were not finite."""
    found = []
    for compile in (True, False):
        inputs = [torch.tensor(x, dtype=D, requires_grad=True) for x in ([0.9], 1.0, 1.0)]
        solution = solve(method, inputs, saveat=saveat, compile=compile)
        assert solution.retcode is psn.ReturnCode.Unstable
        # Later ones may be as large as numbers are.
        states = solution.u[: 1 + (saveat is None)]
        assert len(states)
        found.append(torch.autograd.grad((states**2).sum(), inputs, allow_unused=True))
    for native, eager in zip(*found, strict=True):
        if eager is None or native is None:
            assert not any(x is not None and x.any() for x in (native, eager))
        else:
            assert bool(torch.isfinite(eager).all())
            torch.testing.assert_close(native, eager, rtol=1e-9, atol=1e-9)
