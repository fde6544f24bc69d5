"""Under `torch.autocast` the field runs in low precision, in the solve and in every replay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint, odeint_adjoint
from pysciml_node.problems.modes import in_full_precision, solvable

ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Field(nn.Module):
    """Sees in what precision it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.seen: set[torch.dtype] = set()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.net(u)
        self.seen.add(out.dtype)
        return out


def gradients(field: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(field.parameters())))


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_every_adjoint_has_the_gradient_of_the_recorded_operations(
    adjoint: psn.Adjoint, inside: bool
) -> None:
    field, u0 = Field(), torch.tensor([[1.0, 0.5], [-0.3, 0.2]])
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))

    def found(adjoint: psn.Adjoint) -> tuple[Tensor, list[Tensor]]:
        options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}
        with half():
            u1 = psn.solve(problem, psn.RK4(), adjoint=adjoint, **options).u1
            if inside:
                return u1.detach(), gradients(field, u1.sum())
        return u1.detach(), gradients(field, u1.sum())

    u1, of_u1 = found(adjoint)
    assert field.seen == {torch.bfloat16}
    assert u1.dtype == torch.float32
    expected, of_expected = found(psn.DirectAdjoint())
    torch.testing.assert_close(u1, expected, rtol=0, atol=0)
    # What the continuous adjoints evaluate at other points is rounded in bfloat16 there.
    bound = 1e-5 if adjoint.discrete else 3e-2
    for x, y in zip(of_u1, of_expected, strict=True):
        torch.testing.assert_close(x, y, rtol=bound, atol=bound)


def test_the_solver_itself_is_exact() -> None:
    """A field that is exact in float32: sums of stages in bfloat16 would show."""
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(3), (0.0, 1.0))
    with half():
        solution = psn.solve(problem, saveat=[0.5, 1.0])
        dense = solution(0.25)
        # Of long steps, whose stages differ by more than rounding does.
        stiffness = psn.solve(problem, rtol=1e-3, atol=1e-3).step_stiffness
    assert solution.u[:, 0].tolist() == pytest.approx([math.exp(-0.5), math.exp(-1)], rel=2e-6)
    assert dense[0].item() == pytest.approx(math.exp(-0.25), rel=2e-6)
    assert stiffness.tolist() == pytest.approx([1.0] * len(stiffness), rel=1e-3)


def test_dense_output_and_penalties_later_replay_in_the_same_precision() -> None:
    field = Field()
    node = psn.NeuralODE(
        field,
        rtol=1e-2,
        atol=1e-2,
        regularizers=[psn.LocalError(), psn.GlobalError(), psn.KineticEnergy()],
    )
    with half():
        solution = node(torch.ones(3, 2))
    (solution(0.3).sum() + solution.penalty + solution.step_stiffness.sum()).backward()
    solution.local_estimate(0.2)
    assert field.seen == {torch.bfloat16}
    assert all(p.grad is not None for p in node.parameters())
    node(torch.ones(3, 2))
    assert field.seen == {torch.bfloat16, torch.float32}


def test_a_state_that_an_encoder_made_is_solved_in_single_precision() -> None:
    encoder, node, head = (
        nn.Linear(2, 2),
        psn.NeuralODE(Field(), rtol=1e-3, atol=1e-3),
        nn.Linear(2, 1),
    )
    with half():
        solution = node(encoder(torch.ones(3, 2)))
        out = head(solution.u1)
    assert solution.u1.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None for p in (*encoder.parameters(), *node.parameters()))


@pytest.mark.parametrize("exact", [True, False])
def test_flows(exact: bool) -> None:
    flow = psn.CNF(Field(), event_shape=2, rtol=1e-2, atol=1e-2, exact=exact)
    x = torch.tensor([[0.3, -0.2]])

    def log_prob() -> Tensor:
        flow.generator = torch.Generator().manual_seed(0)
        density: Tensor = flow.log_prob(x)
        return density

    with half():
        found = log_prob()
    torch.testing.assert_close(found, log_prob(), rtol=2e-2, atol=2e-2)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_stochastic_solves() -> None:
    field = Field()
    problem = psn.SDEProblem(field, lambda t, u: 0.1 * field(t, u), torch.ones(2, 2), (0.0, 1.0))

    def found(adjoint: psn.Adjoint) -> list[Tensor]:
        with half():
            solution = psn.solve(
                problem,
                adjoint=adjoint,
                controller=psn.FixedStep(),
                dt0=0.1,
                generator=torch.Generator().manual_seed(0),
            )
        return [solution.u1, *gradients(field, solution.u1.sum())]

    for x, y in zip(found(psn.DiscreteAdjoint()), found(psn.DirectAdjoint()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert field.seen == {torch.bfloat16}


@pytest.mark.parametrize("integrate", [odeint, odeint_adjoint])
def test_the_drop_in_for_torchdiffeq(integrate: Any) -> None:
    field = Field()
    with half():
        y = integrate(field, torch.ones(1, 2), torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2)
    assert y.dtype == torch.float32
    y[-1].sum().backward()
    assert field.seen == {torch.bfloat16}


def test_members_of_an_ensemble() -> None:
    field = Field()
    problem = psn.ODEProblem(field, torch.ones(2), (0.0, 1.0))
    many = psn.EnsembleProblem(problem, torch.ones(2, 2))
    with half():
        solution = psn.solve(many, rtol=1e-2, atol=1e-2)
    solution.u1.sum().backward()
    assert field.seen == {torch.bfloat16}


def test_functions_that_are_no_operations_of_torch_compute_in_full_precision() -> None:
    field = Field()
    module = psn.ODEProblem(field, torch.ones(2), (0.0, 1.0))
    function = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
    with half(), solvable(module) as low, solvable(function) as other:
        assert low.f is not field
        assert in_full_precision(low, (nn.Module,)).f is field
        assert in_full_precision(other, (nn.Module,)) is other


def test_outputs_of_another_precision_are_refused_as_elsewhere() -> None:
    problem = psn.ODEProblem(lambda t, u: -u.double(), torch.ones(2), (0.0, 1.0))
    with half(), pytest.raises(TypeError, match="dtype"):
        psn.solve(problem)
