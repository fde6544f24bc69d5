"""Regularizers of many members at once: those of each member on its own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.regularizers.base import Regularizer

D = torch.float64


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def penalty(regularizer: Regularizer, at_once: bool, **options: Any) -> tuple[Tensor, ...]:
    """The penalty of a layer whose rows are independent, and its gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(6, 2, dtype=D).requires_grad_()
    node = psn.NeuralODE(
        lambda t, u: net(u) * (1 + t), independent=True, regularizers=[regularizer], **options
    )
    if not at_once:
        # Instance attributes come first: the way that regularizers go by default.
        regularizer._over_members = lambda s: Regularizer._over_members(regularizer, s)  # type: ignore[method-assign]
    solution = node(x)
    inputs = [x, *net.parameters()]
    gradients = torch.autograd.grad(solution.penalty, inputs, materialize_grads=True)
    nfe = torch.tensor(solution.stats.nfe)
    return (solution.penalty, *gradients, nfe)


@pytest.mark.parametrize("kind", [psn.LocalError, psn.LocalStiffness])
@pytest.mark.parametrize("solver", [psn.Tsit5(), psn.DP8()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": "biased"},
        {"step_size": "solver", "stop_gradient": "state"},
        {"stop_gradient": False},
        {"sampling": "biased", "stop_gradient": False, "include_start": True},
        {"algorithm": psn.DP5()},
    ],
    ids="-".join,
)
def test_local_penalties_are_means_over_members(
    kind: Any, solver: psn.Algorithm, options: dict[str, Any]
) -> None:
    pair = [
        penalty(kind(generator=generator(), **options), at_once, algorithm=solver, rtol=1e-4)
        for at_once in (True, False)
    ]
    # An error estimate is a difference of nearly equal numbers.
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
@pytest.mark.parametrize("kind", [psn.GlobalError, psn.GlobalStiffness])
def test_global_penalties_are_means_over_members(kind: Any, aggregate: Any) -> None:
    for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
        one, other = (
            penalty(kind(aggregate=aggregate), at_once, adjoint=adjoint)
            for at_once in (True, False)
        )
        torch.testing.assert_close(one[:-1], other[:-1], rtol=1e-6, atol=1e-12)


def test_a_class_of_ones_own_is_asked_for_each_member() -> None:
    asked = []

    class Early(psn.LocalError):
        def sample_time(self, solution: psn.Solution) -> float:
            asked.append(solution)
            return float(solution.t[0])

    penalty(Early(), True)
    assert len(asked) == 6


def test_gradients_by_finite_differences() -> None:
    weight = torch.tensor([[0.3, -1.0], [0.8, -0.2]], dtype=D, requires_grad=True)
    x = torch.tensor([[1.0, 0.5], [-0.3, 0.7]], dtype=D, requires_grad=True)

    def value(weight: Tensor, x: Tensor) -> Tensor:
        controller = {"controller": psn.FixedStep(), "dt0": 0.25}
        regularizers = [psn.GlobalError(), psn.LocalError(step_size="solver", stop_gradient=False)]
        regularizers[1].generator = generator()  # type: ignore[attr-defined]
        node = psn.NeuralODE(
            lambda t, u: torch.tanh(u @ weight) + t * u,
            psn.BS3(),
            independent=True,
            regularizers=regularizers,
            **controller,
        )
        return node(x).penalty

    assert torch.autograd.gradcheck(value, (weight, x), rtol=1e-5)
