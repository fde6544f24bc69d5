"""Global regularizers against the solver's own estimates and direct differentiation."""

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(2, 2, dtype=torch.float64, generator=generator))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.sin(u @ self.a.T) + torch.cos(t)


def solve(adjoint: object, *regularizers: psn.Regularizer, **options: object) -> psn.Solution:
    field = Field()
    u0 = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    model = psn.NeuralODE(field, psn.Tsit5(), regularizers=regularizers, adjoint=adjoint, **options)
    solution = model(u0)
    solution.parameters = list(field.parameters())
    return solution


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
def test_global_error_aggregates_the_estimates_of_the_steps(aggregate: str) -> None:
    solution = solve(psn.DiscreteAdjoint(), psn.GlobalError(aggregate=aggregate))
    times = torch.tensor(solution.trajectory.times, dtype=torch.float64)
    values = solution.step_errors * times.diff().abs()
    expected = getattr(values, aggregate)()
    torch.testing.assert_close(solution.penalties["GlobalError"], expected, rtol=1e-9, atol=0)


def test_global_stiffness_is_the_eigenvalue_of_a_linear_field() -> None:
    model = psn.NeuralODE(lambda t, u: -7.0 * u, psn.Tsit5(), regularizers=[psn.GlobalStiffness()])
    value = model(torch.ones(2, 3, dtype=torch.float64)).penalties["GlobalStiffness"]
    assert value.item() == pytest.approx(7.0 / 3.5068, rel=1e-6)


@pytest.mark.parametrize("regularizer", [psn.GlobalError, psn.GlobalStiffness])
def test_gradients_of_replay_equal_direct_ones(regularizer: type[psn.Regularizer]) -> None:
    """On fixed steps both adjoints differentiate the same discretisation."""
    fixed = {"controller": psn.FixedStep(), "dt0": 0.1}
    found = []
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint()):
        solution = solve(adjoint, regularizer(), **fixed)
        found.append(torch.autograd.grad(solution.penalty, solution.parameters)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "adjoint", [psn.GaussAdjoint(), psn.InterpolatingAdjoint(), psn.BacksolveAdjoint()]
)
def test_continuous_adjoints_are_refused_with_the_reason(adjoint: object) -> None:
    with pytest.raises(ValueError, match="stages of a step are not part of the continuous"):
        solve(adjoint, psn.GlobalError())


def test_random_end_time_is_uniform_and_only_in_training() -> None:
    generator = torch.Generator().manual_seed(0)
    model = psn.NeuralODE(
        lambda t, u: torch.ones_like(u),
        regularizers=[psn.RandomEndTime(0.25, generator=generator)],
    )
    u0 = torch.zeros(1, 1, dtype=torch.float64)
    ends = torch.stack([model(u0).u1.squeeze() for _ in range(400)])
    assert ends.min() >= 0.75
    assert ends.max() <= 1.25
    # Uniform: mean 1, variance b^2 / 3, within four standard errors.
    assert abs(ends.mean() - 1) < 4 * 0.25 / (3 * 400) ** 0.5
    assert model.eval()(u0).u1.item() == pytest.approx(1.0)


def test_output_times_move_inside_their_own_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = [0.0, 0.2, 0.5, 0.5, 1.0]
    model = psn.NeuralODE(
        lambda t, u: torch.ones_like(u),
        saveat=grid,
        regularizers=[psn.RandomEndTime(1.0, generator=generator)],
    )
    u0 = torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(20):
        solution = model(u0)
        moved = solution.u.flatten() - torch.tensor(grid, dtype=torch.float64)
        torch.testing.assert_close(solution.u.flatten(), solution.t)
        assert moved[0] == 0
        assert moved[2] == moved[3]
        assert (solution.t.diff() >= 0).all()
    assert model.eval()(u0).t.tolist() == pytest.approx(grid)
