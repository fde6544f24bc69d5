"""Parameters behind the flow, of which the curvature at its end says nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from optim.flows import normal
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.optim import VarianceCorrected

CURVATURES: dict[str, dict[str, Any]] = {
    "diagonal": {"curvature": "diagonal"},
    "diagonal-undamped": {"curvature": "diagonal", "damping": 0.0},
    "gauss-newton": {"curvature": "gauss-newton"},
    "gauss-newton-plain": {"curvature": "gauss-newton", "safeguard": "none"},
}
every = pytest.mark.parametrize("options", CURVATURES.values(), ids=CURVATURES)


class Model(nn.Module):
    """A neural ODE with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
        for k, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * normal(*parameter.shape, seed=k)
        field = lambda t, u: torch.tanh(self.linear(u))  # noqa: E731
        self.node = psn.NeuralODE(field, psn.RK4(), controller=psn.FixedStep(), dt0=0.25)
        self.x, self.y = normal(16, 2, seed=7), normal(16, 1, seed=8)

    def closure(self, whole: bool) -> tuple[Tensor, Any]:
        solution = self.node(self.x)
        out = self.head(solution.u1)
        return 0.5 * (out - self.y).square().mean(), out if whole else solution


@every
def test_a_head_that_the_solution_does_not_know_is_refused(options: dict[str, Any]) -> None:
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = VarianceCorrected(model.parameters(), lr=0.1, **options)
    with pytest.raises(ValueError, match="do not depend on parameter 2, of shape \\(1, 2\\)"):
        optimizer.step(lambda: model.closure(whole=False))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@every
def test_with_the_whole_models_outputs_it_is_trained(options: dict[str, Any]) -> None:
    model = Model()
    more = {"probes": 16} if options["curvature"] == "diagonal" else {}
    optimizer = VarianceCorrected(model.parameters(), lr=0.1, **options, **more)
    losses = [float(optimizer.step(lambda: model.closure(whole=True))) for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(after < 1.05 * before for before, after in pairwise(losses))


def test_the_terminal_curvature_is_one_number_for_the_head_too() -> None:
    model = Model()
    optimizer = VarianceCorrected(model.parameters(), lr=0.1)
    losses = [float(optimizer.step(lambda: model.closure(whole=False))) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_probes_that_cancel_make_no_step_instead_of_an_infinite_one() -> None:
    """Equal samples of one parameter: the signs of a probe cancel half of the time."""
    for seed in range(6):
        a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        options = {"damping": 0.0, "generator": torch.Generator().manual_seed(seed)}
        optimizer = VarianceCorrected([a], lr=0.5, curvature="diagonal", **options)
        for _ in range(4):
            outputs = torch.exp(a).expand(2, 1)
            loss = 0.5 * (outputs - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            optimizer.step(solution=outputs)
            assert bool(torch.isfinite(a))
