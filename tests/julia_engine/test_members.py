"""Gradients of many members by one call into Julia are those of single solves."""

from __future__ import annotations

import math
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.julia_engine import sweeps
from pysciml_node.julia_engine.members import sweep as members_sweep
from pysciml_node.julia_engine.members.stacked import JuliaMembers

pytestmark = pytest.mark.julia

D = torch.float64
NEAR: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


class Swirl(nn.Module):
    """With a parameter that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 2, dtype=D))
        self.beside = nn.Parameter(torch.ones(3, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.weight) * (1 + t)


def member(ensemble: psn.EnsembleProblem, m: int, options: dict[str, Any]) -> psn.Solution:
    """One member, solved by itself."""
    saveat = options.get("saveat")
    if isinstance(saveat, Tensor) and saveat.ndim == 2:
        options = {**options, "saveat": saveat[m]}
    return psn.solve(ensemble.member(m), **options)


def expect_same(
    ensemble: psn.EnsembleProblem, inputs: list[Tensor], **options: Any
) -> psn.EnsembleSolution:
    """Values, statistics and gradients of one call are those of single solves."""
    options = {"rtol": 1e-7, "atol": 1e-7, "engine": "julia", "throw": False, **options}
    together = psn.solve(ensemble, **options)
    single = [member(ensemble, m, options) for m in range(len(ensemble))]
    # What was not reached is NaN in the one, and missing in the others.
    losses = [
        together.u1.nan_to_num().square().sum(),
        sum(s.u1.square().sum() for s in single if s.success),
    ]
    if options.get("saveat") is not None:
        losses[0] = losses[0] + together.u.nan_to_num().sin().sum()
        losses[1] = losses[1] + sum(s.u.sin().sum() for s in single)
    torch.testing.assert_close(*losses, **NEAR)
    with (
        mock.patch.object(sweeps, "enter", wraps=sweeps.enter) as one_by_one,
        mock.patch.object(members_sweep, "enter", wraps=members_sweep.enter) as at_once,
    ):
        found = torch.autograd.grad(losses[0], inputs, allow_unused=True)
        assert len(one_by_one.mock_calls) + len(at_once.mock_calls) == 1
    expected = torch.autograd.grad(losses[1], inputs, allow_unused=True)
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, **NEAR)
    for m, alone in enumerate(single):
        assert (together[m].stats, together[m].retcode) == (alone.stats, alone.retcode)
    return together


def starts(members: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(members, 2, generator=generator, dtype=D).requires_grad_()


def rates(members: int = 4) -> Tensor:
    return torch.linspace(0.5, 4, members, dtype=D)[:, None].requires_grad_()


def decay(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return -p["rate"] * u + p["drive"] * torch.sin(t)


ADJOINTS = [
    (psn.Tsit5(), psn.DiscreteAdjoint()),
    (psn.Tsit5(), psn.ForwardDiffSensitivity()),
    (psn.Rodas5P(), psn.GaussAdjoint()),
]


@pytest.mark.parametrize(("algorithm", "adjoint"), ADJOINTS, ids=lambda x: type(x).__name__)
def test_every_adjoint(algorithm: Any, adjoint: Any) -> None:
    field, u0 = Swirl(), starts()
    ensemble = psn.EnsembleProblem(psn.ODEProblem(field, u0[0].detach(), (0.0, 1.0)), u0)
    inputs = [u0, field.weight, field.beside]
    options: dict[str, Any] = {"adjoint": adjoint, "tstops": [0.5]}
    for saveat in (None, [0.0, 0.3, 0.5, 0.8, 1.0]):
        expect_same(ensemble, inputs, algorithm=algorithm, saveat=saveat, **options)


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), psn.GaussAdjoint()], ids=lambda x: type(x).__name__
)
def test_own_intervals_times_and_parameters(adjoint: Any) -> None:
    u0, rate = starts(), rates()
    drive = torch.tensor(0.7, dtype=D, requires_grad=True)
    tspan = torch.tensor([[0, 1.0], [0, 2.0], [1.0, 0.2], [0.5, 1.5]], dtype=D)
    tspan.requires_grad_()
    span = tspan.detach()
    saveat = span[:, :1] + (span[:, 1:] - span[:, :1]) * torch.tensor([0.3, 0.8], dtype=D)
    saveat.requires_grad_()

    def driven(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -p * u + drive * torch.sin(t)

    problem = psn.ODEProblem(driven, u0[0].detach(), (0.0, 1.0), p=rate[0].detach())
    ensemble = psn.EnsembleProblem(problem, u0, rate, tspan)
    inputs = [u0, rate, drive, tspan, saveat]
    expect_same(ensemble, inputs, adjoint=adjoint, saveat=saveat, tstops=[0.6])


def test_a_shared_interval_and_shared_times_receive_gradients() -> None:
    field, u0 = Swirl(), starts()
    t0, t1 = (torch.tensor(t, dtype=D, requires_grad=True) for t in (0.1, 1.0))
    saveat = torch.tensor([0.3, 0.9], dtype=D, requires_grad=True)
    ensemble = psn.EnsembleProblem(psn.ODEProblem(field, u0[0].detach(), (t0, t1)), u0)
    expect_same(ensemble, [u0, field.weight, t0, t1, saveat], saveat=saveat)


def test_members_that_fail_and_members_without_a_cotangent() -> None:
    u0 = torch.tensor([[0.1], [2.0], [0.2]], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: u**2, u0[0].detach(), (0.0, 1.5))
    ensemble = psn.EnsembleProblem(problem, u0)
    solution = psn.solve(
        ensemble, saveat=[0.4, 1.0, 1.5], dtmin=1e-6, throw=False, engine="julia", rtol=1e-9,
        atol=1e-9,
    )  # fmt: skip
    assert [code.successful for code in solution.retcodes] == [True, False, True]
    assert solution.u[1, :, 0].isnan().tolist() == [False, True, True]
    (found,) = torch.autograd.grad(solution.u[:2].nan_to_num().sum(), u0)
    exact = sum(1 / (1 - 0.1 * t) ** 2 for t in (0.4, 1.0, 1.5))
    assert found[:, 0].tolist() == pytest.approx([exact, 1 / (1 - 0.8) ** 2, 0.0], rel=1e-6)
    assert [s.nvjp > 0 for s in solution.member_stats] == [True, True, False]


def test_steps_of_one_size_that_lead_to_infinity_are_cut() -> None:
    u0 = torch.tensor([[0.1], [30.0]], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: u**3, u0[0].detach(), (0.0, 1.5))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "saveat": [0.05, 1.0]}
    together = expect_same(psn.EnsembleProblem(problem, u0), [u0], **options)
    assert together.retcodes[1] is psn.ReturnCode.Unstable


def test_a_state_in_parts_of_float32() -> None:
    rate = torch.linspace(1, 2, 3, dtype=torch.float32).requires_grad_()
    u0 = {"x": torch.rand(3, 2), "y": torch.rand(3)}
    problem = psn.ODEProblem(
        lambda t, u, p: {"x": -p * u["x"] * u["y"], "y": -u["y"]},
        {key: x[0] for key, x in u0.items()}, (0.0, 1.0), p=rate[0].detach(),
    )  # fmt: skip
    ensemble = psn.EnsembleProblem(problem, u0, rate)
    options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    together, apart = (psn.solve(ensemble, engine=e, **options).u1["x"] for e in ("julia", "torch"))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.sum(), rate)[0] for x in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_source_in_julia() -> None:
    field = psn.JuliaField("(u, p, t) -> [p[1] * u[2], -p[2] * u[1]]")
    u0, p = starts(5), torch.rand(5, 2, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(field, u0[0].detach(), (0.0, 1.5), p=p[0].detach())
    times = torch.tensor([0.0, 0.5, 1.5], dtype=D, requires_grad=True)
    expect_same(psn.EnsembleProblem(problem, u0, p), [u0, p, times], saveat=times)
    shared = p[0].detach().requires_grad_()
    problem = psn.ODEProblem(field, u0[0].detach(), (0.0, 1.5), p=shared)
    expect_same(psn.EnsembleProblem(problem, u0), [u0, shared])


def test_dense_output_of_a_member_has_its_gradient_and_pickles_without_it() -> None:
    u0, rate = starts(), rates()
    problem = psn.ODEProblem(lambda t, u, p: -p * u, u0[0].detach(), (0.0, 1.0), p=rate[0].detach())
    for algorithm, adjoint in ((psn.Tsit5(), psn.DiscreteAdjoint()), ADJOINTS[-1]):
        ensemble = psn.solve(
            psn.EnsembleProblem(problem, u0, rate), algorithm, adjoint=adjoint, engine="julia",
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        exact = u0[2] * torch.exp(-0.4 * rate[2])
        value = ensemble[2](0.4)
        torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)
        found, expected = (torch.autograd.grad(x.sum(), (u0, rate)) for x in (value, exact))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not ensemble.detach()[2](0.4).requires_grad
        again = pickle.loads(pickle.dumps(ensemble.detach()))
        torch.testing.assert_close(again[1].u1, ensemble[1].u1.detach(), **NEAR)


class Swell(nn.Module):
    """`u' = cos(t) u`."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.cos(t) * u


@pytest.mark.parametrize(
    "adjoint",
    [psn.DiscreteAdjoint(), psn.GaussAdjoint(), psn.ForwardDiffSensitivity()],
    ids=lambda a: type(a).__name__,
)
def test_dense_output_moves_with_a_members_own_start(adjoint: psn.Adjoint) -> None:
    spans = torch.tensor([[0.1, 0.7], [0.2, 0.7]], dtype=torch.float64, requires_grad=True)
    u0 = torch.ones(2, 1, dtype=torch.float64)
    many = psn.EnsembleProblem(psn.ODEProblem(Swell(), u0[0], (0.0, 1.0)), u0, tspan=spans)
    options: dict[str, Any] = {"adjoint": adjoint, "engine": "julia", "rtol": 1e-8, "atol": 1e-8}
    solution = psn.solve(many, psn.Tsit5(), **options)
    assert isinstance(solution.members, JuliaMembers)
    for t in (0.3, 0.6):
        (found,) = torch.autograd.grad(solution.solutions[1](t).sum(), spans, retain_graph=True)
        rate = -math.cos(0.2) * math.exp(math.sin(t) - math.sin(0.2))
        assert found.tolist()[1] == pytest.approx([rate, 0.0], abs=1e-6)
