"""Under `torch.inference_mode` solves have the values they have elsewhere, and leave nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

D = torch.float64


def decay(t: Tensor, u: Any) -> Any:
    return -u


def test_the_density_of_a_flow() -> None:
    flow = psn.CNF(decay, event_shape=2, rtol=1e-8, atol=1e-8)
    with torch.inference_mode():
        density = flow.log_prob(torch.zeros(1, 2))
        samples = flow.sample((3,))
    assert density.item() == pytest.approx(-math.log(2 * math.pi) - 2, abs=1e-4)
    assert samples.shape == (3, 2)


def test_inputs_that_were_made_in_inference_mode() -> None:
    flow = psn.CNF(nn.Linear(2, 2), event_shape=2)
    with torch.inference_mode():
        x = torch.ones(1, 2)
        inside = flow.log_prob(x)
    loss = flow.log_prob(x).sum()
    loss.backward()
    torch.testing.assert_close(inside, loss.detach().reshape(1))
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.parametrize(
    "regularizer",
    [
        psn.KineticEnergy(),
        psn.JacobianFrobenius(),
        psn.TaylorDerivative(2),
        psn.LocalError(generator=torch.Generator()),
        psn.LocalStiffness(generator=torch.Generator()),
        psn.GlobalError(),
        psn.GlobalStiffness(),
    ],
)
def test_penalties(regularizer: psn.Regularizer) -> None:
    node = psn.NeuralODE(decay, regularizers=[regularizer])
    u0 = torch.ones(2, 3, dtype=D)

    def penalty() -> Tensor:
        if (generator := getattr(regularizer, "generator", None)) is not None:
            generator.manual_seed(0)
        return node(u0).penalty.detach()

    with torch.inference_mode():
        inside = penalty()
    assert inside.item() > 0
    torch.testing.assert_close(inside, penalty())


def test_dense_output_events_ensembles_and_local_steps() -> None:
    problem = psn.ODEProblem(decay, torch.ones(1, dtype=D), (0.0, 1.0))
    outside = psn.solve(problem, rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        inside = psn.solve(problem, rtol=1e-9, atol=1e-9)
        assert inside(0.3).item() == pytest.approx(math.exp(-0.3), rel=1e-8)
        assert outside(0.3).item() == pytest.approx(math.exp(-0.3), rel=1e-8)
        torch.testing.assert_close(inside.step_stiffness, outside.step_stiffness)
        assert inside.local_estimate(0.2).error == outside.local_estimate(0.2).error
        halved = psn.solve(problem, events=psn.Event(lambda t, u: u[0] - 0.5))
        many = psn.solve(psn.EnsembleProblem(problem, torch.ones(2, 1, dtype=D)))
    assert halved.event_t is not None
    assert halved.event_t.item() == pytest.approx(math.log(2), rel=1e-5)
    assert many.u1.shape == (2, 1)
    assert inside(0.3).item() == pytest.approx(math.exp(-0.3), rel=1e-8)


def test_stochastic_solves() -> None:
    problem = psn.SDEProblem(decay, lambda t, u: 0.1 * u, torch.ones(2, 1, dtype=D), (0.0, 1.0))
    with torch.inference_mode():
        inside = psn.solve(problem, generator=torch.Generator().manual_seed(0))
        middle = inside(0.5)
    outside = psn.solve(problem, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inside.u1, outside.u1, rtol=0, atol=0)
    torch.testing.assert_close(middle, outside(0.5), rtol=0, atol=0)


FIRST_INSIDE = """
import torch, pysciml_node as psn
from pysciml_node.kernels import nngp
net = torch.nn.Linear(2, 2).double()
u0, x = torch.ones(1, 2).double(), torch.eye(2).double()
f = lambda t, u: net(u)
g = lambda t, u: 0.1 * net(u)

def all(u0):
    for name in ("Tsit5", "DP5", "DP8", "BS3"):
        yield psn.solve(psn.ODEProblem(f, u0, (0., 1.)), getattr(psn, name)(), saveat=[.3]).u
    for name in ("SOSRI", "RKMil"):
        yield psn.solve(psn.SDEProblem(f, g, u0, (0., 1.)), getattr(psn, name)()).u1
    yield psn.NeuralODE(f, regularizers=[psn.LocalError()])(u0).penalty
    yield nngp(x, x, T=1., sigma_u=1., sigma_w=1., sigma_v=1., activation=torch.relu) * net.weight

with torch.inference_mode():
    list(all(u0))
for value in all(u0.clone().requires_grad_()):
    value.sum().backward()
"""


def test_nothing_is_left_that_breaks_training_later() -> None:
    """In a process of its own, whose constants are made inside."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_INSIDE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class _Decaying(nn.Module):
    """`du/dt = -k u`."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.ones((), dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * u


def _end(field: nn.Module, **how: Any) -> float:
    problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    return psn.solve(problem, rtol=1e-9, atol=1e-9, **how).u1.item()


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.GaussAdjoint()])
def test_a_field_that_was_made_inside(adjoint: psn.Adjoint) -> None:
    with torch.inference_mode():
        field = _Decaying()
    with pytest.raises(RuntimeError, match=r"f\.k .*inference_mode(.|\n)*  Make.*no_grad"):
        _end(field, adjoint=adjoint)
    with torch.no_grad():
        assert _end(field, adjoint=adjoint) == pytest.approx(math.exp(-1), rel=1e-8)


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_a_field_that_was_made_inside_has_no_native_code() -> None:
    with torch.inference_mode():
        field = _Decaying()
    with torch.no_grad(), pytest.raises(psn.CompileError, match="inference_mode"):
        _end(field, compile=True)
    # No refusal is left behind for what comes into its places.
    field.k = nn.Parameter(torch.ones((), dtype=D))
    assert _end(field, compile=True) == pytest.approx(math.exp(-1), rel=1e-8)
