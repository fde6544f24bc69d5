"""Global regularizers against the solver's own estimates and direct differentiation."""

import os
import subprocess
import sys

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


def test_estimates_that_do_not_see_the_state() -> None:
    """An integral, on absolute tolerances alone."""
    p = torch.tensor([0.5, 0.2], dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    problem = psn.ODEProblem(lambda t, u, p: torch.sin(9 * t) * p, start, (0.0, 1.0), p)
    found = []
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint()):
        fixed = {"controller": psn.FixedStep(), "dt0": 0.1, "rtol": 0.0, "atol": 1e-4}
        solution = psn.solve(problem, psn.Tsit5(), adjoint=adjoint, **fixed)
        found.append(torch.autograd.grad(psn.GlobalError()(solution), p)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_gradients_reach_parameters_wherever_they_come_from() -> None:
    """Through p, computed from others; through a closure, as leaf and as the result of a sum."""
    start = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    sources = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 1.3, -0.4)]
    rate, leaf, other = sources
    p, captured = rate.square(), other.exp() + other
    problem = psn.ODEProblem(lambda t, u, p: p * torch.sin(leaf * u) + captured, start, (0, 1), p)
    found = []
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint()):
        fixed = {"controller": psn.FixedStep(), "dt0": 0.1, "adjoint": adjoint}
        solution = psn.solve(problem, psn.Tsit5(), **fixed)
        penalty = psn.GlobalError()(solution) + 0.1 * psn.GlobalStiffness()(solution)
        found.append(torch.autograd.grad(penalty, [p, *sources], retain_graph=True))
    for replayed, direct in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(replayed, direct, rtol=1e-9, atol=1e-14)


def test_a_second_derivative_of_replayed_estimates_is_refused() -> None:
    solution = solve(psn.DiscreteAdjoint(), psn.GlobalError())
    (first,) = torch.autograd.grad(solution.penalty, solution.parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="DirectAdjoint"):
        first.sum().backward()


_RISE = """
import resource
import torch
import pysciml_node as psn
from pysciml_node.experiments.trainer.model import TimeDependentMLP

torch.set_num_threads(1)  # two of a busy machine wait for one another
field = TimeDependentMLP(784, 100, generator=torch.Generator().manual_seed(0))
start = torch.rand(128, 784, requires_grad=True)


def gradient(steps):
    node = psn.NeuralODE(
        field,
        psn.DP5(),
        saveat=[1.0],
        dt0=1 / steps,
        controller=psn.FixedStep(),
        regularizers=[psn.GlobalError()],
    )
    solution = node(start)
    torch.autograd.grad(solution.u.sum() + solution.penalty, [start, *field.parameters()])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before = gradient(2)
print((gradient(50) - before) / (4 * start.numel()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux reports it")
def test_estimates_of_all_steps_cost_two_states_a_step_and_the_graph_of_one() -> None:
    """The state and its cotangent, 100 in all for 50 steps."""
    # The allocator gives back what is freed: in its heap, holes count as well.
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-c", _RISE]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=given_back)
    assert float(run.stdout) < 300


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
