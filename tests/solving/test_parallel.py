"""Members in other processes: states, codes, counts and gradients are those of one call."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

joblib = pytest.importorskip("joblib")
pytest.importorskip("cloudpickle")

D = torch.float64
TOLERANCES: dict[str, float] = {"rtol": 1e-7, "atol": 1e-7}
# Chunks are smaller batches, whose kernels round differently.
NEAR: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}
HERE = psn.Parallel(chunk=2)


def swirl() -> nn.Module:
    """A module of a class that workers cannot import."""

    class Swirl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=D)
            self.weight = nn.Parameter(weight)

        def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
            return torch.tanh(u @ self.weight) * (1 + t) - p * u

    return Swirl()


def many(field: Any, count: int = 5) -> psn.EnsembleProblem:
    generator = torch.Generator().manual_seed(1)
    u0 = torch.randn(count, 2, generator=generator, dtype=D).requires_grad_()
    p = torch.rand(count, 1, generator=generator, dtype=D).requires_grad_()
    ends = torch.stack((torch.zeros(count), torch.linspace(0.5, 2, count)), 1).to(D)
    problem = psn.ODEProblem(field, u0[0].detach(), (0.0, 1.0), p=p[0].detach())
    return psn.EnsembleProblem(problem, u0, p, tspan=ends.requires_grad_())


@pytest.fixture
def threads() -> Iterator[None]:
    with joblib.parallel_config(backend="threading", n_jobs=2):
        yield


def compare(ensemble: psn.EnsembleProblem, inputs: list[Tensor], **options: Any) -> None:
    """States, codes, counts and gradients with and without workers."""
    members = options.pop("members", HERE)
    away = psn.solve(ensemble, members=members, **options)
    here = psn.solve(ensemble, **options)
    assert away.retcodes == here.retcodes
    torch.testing.assert_close(away.u1, here.u1, **NEAR)
    torch.testing.assert_close(away.u, here.u, **NEAR)
    torch.testing.assert_close(away.t, here.t)
    losses = [(x.u**2).sum() + (x.u1**3).sum() for x in (away, here)]
    found, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert away.member_stats == here.member_stats


def test_two_processes() -> None:
    field = swirl()
    ensemble = many(field)
    assert isinstance(ensemble.tspan, Tensor)
    saveat = 0.9 * ensemble.tspan[:, 1:].detach() * torch.tensor([0.0, 0.5, 1.0], dtype=D)
    inputs = [ensemble.u0, ensemble.p, ensemble.tspan, field.weight]
    two = psn.Parallel(workers=2, chunk=3)
    compare(ensemble, inputs, saveat=saveat, members=two, **TOLERANCES)


def test_continuous_adjoints(threads: None) -> None:
    field = swirl()
    ensemble = many(field, 3)
    inputs = [ensemble.u0, ensemble.p, field.weight]
    compare(ensemble, inputs, saveat=[0.0, 0.3], adjoint=psn.InterpolatingAdjoint(), **TOLERANCES)


def test_members_of_a_stochastic_equation_keep_their_paths(threads: None) -> None:
    sigma = torch.tensor(0.5, dtype=D, requires_grad=True)
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: sigma * u, torch.ones(2, dtype=D), (0.0, 1.0)
    )
    u0 = torch.ones(4, 2, dtype=D).requires_grad_()
    u = [
        psn.solve(
            psn.EnsembleProblem(problem, u0),
            generator=torch.Generator().manual_seed(5),
            controller=psn.FixedStep(),
            dt0=0.1,
            **options,
        ).u1
        for options in ({}, {"members": HERE})
    ]
    torch.testing.assert_close(*u, **NEAR)
    found, expected = (torch.autograd.grad(x.square().sum(), [u0, sigma]) for x in u)
    torch.testing.assert_close(found, expected, **NEAR)


def test_events(threads: None) -> None:
    def bounce(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((u[1], torch.full_like(u[1], -9.81)))

    heights = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(bounce, torch.zeros(2, dtype=D), (0.0, 1.0))
    event = psn.Event(
        lambda t, u: u[0], affect=lambda t, u: torch.stack((u[0], -0.9 * u[1])), direction=-1,
        terminal=False,
    )  # fmt: skip
    # A member that is left alone keeps graphs, which a batch does not: that changes its counts.
    replayed = psn.DiscreteAdjoint(memory=0)
    ensemble = psn.EnsembleProblem(problem, heights)
    compare(ensemble, [heights], events=event, saveat=[0.5, 1.0], adjoint=replayed)


def test_failures_are_named_and_the_others_kept(threads: None) -> None:
    u0 = torch.tensor([[0.1], [2.0], [0.2], [1.0]], dtype=D, requires_grad=True)
    ensemble = psn.EnsembleProblem(psn.ODEProblem(lambda t, u: u**2, u0[0], (0.0, 1.5)), u0)
    options: dict[str, Any] = {"dtmin": 1e-6, "saveat": [0.4, 1.5], **TOLERANCES}
    with pytest.raises(psn.EnsembleFailure, match=r"members failed: 1, 3\. Member 1: ") as e:
        psn.solve(ensemble, members=HERE, **options)
    assert e.value.members == (1, 3)
    solution = psn.solve(ensemble, throw=False, members=HERE, **options)
    assert solution.u[1, :, 0].isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(solution.u1[::2].sum(), u0)
    good = u0[::2].detach()
    torch.testing.assert_close(gradient[::2], (1 - 1.5 * good) ** -2, rtol=1e-4, atol=1e-4)


def test_a_single_solution_is_made_when_asked_for(threads: None) -> None:
    ensemble = many(swirl(), 3)
    solution = psn.solve(ensemble, members=HERE, **TOLERANCES)
    one = solution[1]
    torch.testing.assert_close(one.u1, solution.u1[1], **NEAR)
    assert one.u1.requires_grad
    assert one.stats == solution.member_stats[1]
    copy = pickle.loads(pickle.dumps(solution))
    assert not copy.u1.requires_grad
    assert torch.equal(copy.u1, solution.u1)
    with torch.no_grad():
        assert ensemble.problem.f.weight.add_(1) is not None
    with pytest.raises(RuntimeError, match=r"f\.weight has been changed in place"):
        _ = solution[2]


def test_what_the_solve_saw_is_what_the_gradient_sees(threads: None) -> None:
    scale = {"by": 1.0}
    u0 = torch.ones(4, 1, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -scale["by"] * u, u0[0].detach(), (0.0, 1.0))
    solution = psn.solve(psn.EnsembleProblem(problem, u0), members=HERE, **TOLERANCES)
    scale["by"] = 3.0
    (gradient,) = torch.autograd.grad(solution.u1.sum(), u0)
    torch.testing.assert_close(gradient, torch.full_like(u0, -1.0).exp(), rtol=1e-5, atol=0)


def test_changed_weights_and_second_derivatives_are_refused(threads: None) -> None:
    field = swirl()
    solution = psn.solve(many(field), members=HERE)
    (first,) = torch.autograd.grad(solution.u1.sum(), field.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()
    with torch.no_grad():
        field.weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        solution.u1.sum().backward()


def test_what_does_not_go_together_is_said() -> None:
    ensemble = many(swirl())
    with pytest.raises(ValueError, match="DirectAdjoint keeps the graph"):
        psn.solve(ensemble, members=HERE, adjoint=psn.DirectAdjoint())
    with pytest.raises(ValueError, match="progress"):
        psn.solve(ensemble, members=HERE, progress=True)
    with pytest.raises(ValueError, match="is for an EnsembleProblem"):
        psn.solve(ensemble.member(0), members=HERE)
    with pytest.raises(TypeError, match="members"):
        psn.solve(ensemble, members=2)
    with pytest.raises(ValueError, match="workers"):
        psn.Parallel(workers=0)

    def loss(u: Tensor) -> Tensor:
        ends: Tensor = psn.solve(psn.EnsembleProblem(problem, u), members=HERE).u1
        return ends.sum()

    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2, dtype=D), (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
        torch.func.grad(loss)(torch.ones(3, 2, dtype=D))


def test_tensors_that_workers_would_import_anew_are_refused(threads: None) -> None:
    module = types.ModuleType("a_module_of_the_user")
    source = "import torch\nrate = torch.tensor(2.0)\ndef field(t, u):\n    return -rate * u\n"
    exec(source, module.__dict__)
    sys.modules[module.__name__] = module
    try:
        problem = psn.ODEProblem(module.field, torch.ones(1), (0.0, 1.0))
        with pytest.raises(RuntimeError, match=r"uses rate, a tensor of an imported module"):
            psn.solve(psn.EnsembleProblem(problem, torch.ones(3, 1)), members=HERE)
    finally:
        del sys.modules[module.__name__]
