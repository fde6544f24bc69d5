"""The neural SDE as a module, and regularizers that read stochastic solutions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn


class Net(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3).double(), scale

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.linear(u))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def node(*regularizers: psn.Regularizer, **options: Any) -> psn.NeuralSDE:
    torch.manual_seed(0)
    settings = {"rtol": 0.1, "atol": 0.1, "generator": seeded(), **options}
    return psn.NeuralSDE(Net(), Net(0.3), psn.SOSRI(), regularizers=regularizers, **settings)


def inputs() -> Tensor:
    return torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)


@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
@pytest.mark.parametrize("step_size", ["hairer", "solver"])
@pytest.mark.parametrize("stop_gradient", [True, False, "state"])
def test_local_error_reaches_both_networks(
    sampling: Any, step_size: Any, stop_gradient: Any
) -> None:
    regularizer = psn.LocalError(
        sampling, weight=10.0, step_size=step_size, stop_gradient=stop_gradient, generator=seeded()
    )
    model = node(regularizer)
    x = inputs().requires_grad_()
    solution = model(x)
    assert solution.penalty > 0
    assert solution.penalty == 10 * solution.penalties["LocalError"]
    solution.penalty.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert (x.grad is None) == (stop_gradient is not False)


def test_the_local_step_is_the_published_estimate() -> None:
    """`rms((delta E1 + E2) / (atol + max(|u|, |u1|) rtol))` of one step (arXiv 2303.02262, code).

    For `f = 1`, `g = 0` (SRIW1): `E1 = 2 dt` and `E2 = 0`, with `delta = 1/6`.
    """
    problem = psn.SDEProblem(
        lambda t, u: torch.ones_like(u), lambda t, u: 0 * u, torch.zeros(2, 2).double(), (0.0, 1.0)
    )
    solution = psn.solve(problem, psn.SRIW1(), rtol=0.0, atol=0.5, generator=seeded())
    step = solution.local_estimate(0.25, dt=0.125)
    assert step.dt.item() == 0.125
    assert step.error.item() == pytest.approx((2 * 0.125 / 6) / 0.5)


def test_local_noise_is_new_each_time_and_given_by_the_seed() -> None:
    """Unbiased: the mean over fresh noise is that of independent steps, whatever the path was."""

    def estimates(seed: int, count: int) -> list[float]:
        problem = psn.SDEProblem(
            lambda t, u: 0 * u, lambda t, u: torch.cos(u), torch.ones(1).double(), (0.0, 1.0)
        )
        solution = psn.solve(problem, psn.SOSRI(), generator=seeded(seed))
        return [solution.local_estimate(0.0, dt=0.1).error.item() for _ in range(count)]

    first, again, other = estimates(1, 200), estimates(1, 200), estimates(2, 200)
    assert first == again
    assert len(set(first)) == 200
    one, two = torch.tensor(first), torch.tensor(other)
    spread = math.sqrt((one.var() + two.var()).item() / 200)
    assert abs((one.mean() - two.mean()).item()) < 5 * spread


def test_global_error_is_the_sum_over_the_steps() -> None:
    model = node(psn.GlobalError(weight=1.0))
    solution = model(inputs())
    dt = solution.step_times.diff()
    expected = (solution.step_errors * dt).sum()
    torch.testing.assert_close(solution.penalty, expected)
    solution.penalty.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_stiffness_of_a_linear_drift() -> None:
    """The difference quotient of `f = -7 u` is 7; methods without a pair of stages refuse."""
    problem = psn.SDEProblem(
        lambda t, u: -7 * u, lambda t, u: 0.1 * u, torch.ones(2, 2).double(), (0.0, 1.0)
    )
    solution = psn.solve(problem, psn.SOSRI2(), generator=seeded())
    torch.testing.assert_close(
        solution.step_stiffness, torch.full_like(solution.step_stiffness, 7.0)
    )
    assert psn.LocalStiffness()(solution).item() == pytest.approx(7 / 10.6)
    assert psn.GlobalStiffness()(solution).item() == pytest.approx(7 / 10.6)
    other = psn.solve(problem, psn.SOSRI(), generator=seeded())
    with pytest.raises(ValueError, match="SOSRI2"):
        psn.LocalStiffness()(other)


def test_an_ordinary_pair_is_refused_for_the_local_step() -> None:
    model = node(psn.LocalError(algorithm=psn.Tsit5()))
    with pytest.raises(TypeError, match="stochastic method"):
        model(inputs())


@pytest.mark.parametrize(
    "regularizer",
    [psn.KineticEnergy(), psn.JacobianFrobenius(), psn.TaylorDerivative(2), psn.RandomEndTime(0.1)],
)
def test_integrals_are_refused_by_name(regularizer: psn.Regularizer) -> None:
    with pytest.raises(ValueError, match=type(regularizer).__name__):
        node(regularizer)


def test_adaptive_euler_maruyama_is_refused_and_fixed_steps_are_regularized() -> None:
    """One local step looks at no later path: its estimate needs no adaptive solve."""
    options: dict[str, Any] = {"regularizers": [psn.LocalError()], "generator": seeded()}
    with pytest.raises(ValueError, match=r"LambaEM with adaptive steps.*\n.*SOSRI"):
        psn.NeuralSDE(Net(), Net(0.3), psn.LambaEM(), **options)(inputs())
    with pytest.raises(ValueError, match=r"LambaEM with adaptive steps.*\n.*FixedStep\(\), dt0="):
        psn.NeuralSDE(Net(), Net(0.3), noise="general", **options)(inputs())
    fixed = psn.FixedStep()
    model = psn.NeuralSDE(Net(), Net(0.3), psn.EM(), controller=fixed, dt0=0.1, **options)
    assert model(inputs()).penalty > 0


def test_eval_mode_costs_nothing() -> None:
    model = node(psn.LocalError()).eval()
    solution = model(inputs())
    assert solution.penalty.item() == 0
    assert solution.penalties == {}
    assert solution.stats.nfe == solution.stats.nfe_diffusion


def test_calls_draw_new_paths_from_the_generator() -> None:
    model = node()
    x = inputs()
    one, two = model(x).u1, model(x).u1
    assert not torch.equal(one, two)
    model = node()
    assert torch.equal(model(x).u1, one)
    assert torch.equal(model(x, generator=seeded(9)).u1, model(x, generator=seeded(9)).u1)


def test_state_dict_and_training_step() -> None:
    """A step along the gradient lowers the loss on the same path."""
    model = node()
    loss = model(inputs(), generator=seeded(4)).u1.square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    assert model(inputs(), generator=seeded(4)).u1.square().mean() < loss
    other = node()
    other.load_state_dict(model.state_dict())
    x = inputs()
    assert torch.equal(other(x, generator=seeded(7)).u1, model(x, generator=seeded(7)).u1)
    assert "SOSRI" in repr(model)
