"""What has to hold on another device than the CPU: run by `test_gpu.py` in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu import place, pretend
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat import torchdiffeq

Solve = Callable[[nn.Module, Tensor], Tensor]

ADJOINTS = (
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.BacksolveAdjoint(),
    psn.GaussAdjoint(),
)
REGULARIZERS = (
    psn.LocalError(),
    psn.LocalError("biased"),
    psn.LocalStiffness(),
    psn.KineticEnergy(),
    psn.JacobianFrobenius(),
    psn.GlobalError(),
    psn.RandomEndTime(0.1),
)
SDE_METHODS = (
    (psn.EM(), "diagonal", "ito"),
    (psn.RKMil(), "diagonal", "ito"),
    (psn.SRA1(), "additive", "ito"),
    (psn.SOSRI(), "diagonal", "ito"),
    (psn.EulerHeun(), "diagonal", "stratonovich"),
    (psn.ReversibleHeun(), "diagonal", "stratonovich"),
)


class _Field(nn.Module):
    """A small field of two states."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.net(u) * torch.cos(t)


def _made(build: Callable[[], nn.Module], device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    start = torch.randn(6, 2, dtype=torch.float64)
    return build().double().to(device), start.to(device)


def _agree(solve: Solve, build: Callable[[], nn.Module] = _Field) -> None:
    """Values and gradients are those of the CPU, and lie on the device."""
    found = []
    for device in (torch.device("cpu"), place.device()):
        module, start = _made(build, device)
        start.requires_grad_()
        torch.manual_seed(1)
        value = solve(module, start)
        value.square().sum().backward()  # type: ignore[no-untyped-call]
        tensors = [value.detach(), start.grad, *(p.grad for p in module.parameters())]
        assert all(x is None or x.device.type == device.type for x in tensors)
        found.append(torch.cat([x.cpu().reshape(-1) for x in tensors if x is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


def _end(field: Any, start: Tensor, *args: Any, **options: Any) -> Tensor:
    problem = psn.ODEProblem(field, start, (0.0, 1.0))
    return psn.solve(problem, *args, engine="torch", **options).u1


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("method", [psn.Tsit5(), psn.Vern7()], ids=lambda m: type(m).__name__)
def test_explicit_methods(method: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    _agree(
        lambda field, start: (
            psn.solve(
                psn.ODEProblem(field, start, (0.0, 1.0)),
                method,
                saveat=times,
                adjoint=adjoint,
                engine="torch",
            ).u
        )
    )


@pytest.mark.parametrize("method", [psn.Rosenbrock23(), psn.KenCarp4()])
def test_implicit_methods(method: psn.Algorithm) -> None:
    _agree(lambda field, start: _end(field, start, method))


@pytest.mark.parametrize(
    ("method", "adjoint"),
    [*((psn.Tsit5(), adjoint) for adjoint in ADJOINTS), (psn.KenCarp4(), psn.GaussAdjoint())],
)
def test_members_and_their_parameters(method: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    def solve(field: nn.Module, start: Tensor) -> Tensor:
        rates = torch.linspace(0.5, 2, 6, dtype=start.dtype, device=start.device)
        one = psn.ODEProblem(lambda t, u, p: p * field(t, u), start[0], (0.0, 1.0), p=rates[0])
        many = psn.EnsembleProblem(one, u0=start, p=rates)
        return psn.solve(many, method, adjoint=adjoint, engine="torch").u1

    _agree(solve)


def test_events_and_doses() -> None:
    falls = psn.Event(lambda t, u: u[0, 0] - 0.2, affect=lambda t, u: u + 0.5)
    dose = psn.Event(at=[0.3, 0.7], affect=lambda t, u: u * 0.9)
    _agree(lambda field, start: _end(field, start, events=[falls, dose]))


def test_dense_output_and_end_time() -> None:
    def solve(field: nn.Module, start: Tensor) -> Tensor:
        end = torch.tensor(1.5, dtype=start.dtype, device=start.device, requires_grad=True)
        solution = psn.solve(psn.ODEProblem(field, start, (0.0, end)), engine="torch")
        (slope,) = torch.autograd.grad(solution.u1.sum(), end, retain_graph=True)
        between = solution(torch.linspace(0, 1.5, 5, dtype=start.dtype, device=start.device))
        return torch.cat((solution.u1, between.sum(0))) + slope

    _agree(solve)


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=repr)
def test_regularizers(regularizer: psn.Regularizer) -> None:
    def solve(node: nn.Module, start: Tensor) -> Tensor:
        solution: psn.Solution = node(start)
        return solution.u1 + solution.penalty

    _agree(solve, lambda: psn.NeuralODE(_Field(), regularizers=[regularizer]))


def test_density_of_a_flow() -> None:
    _agree(lambda flow, start: flow.log_prob(start), lambda: psn.CNF(_Field()))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4"])
def test_torchdiffeq(method: str) -> None:
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    _agree(
        lambda field, start: torchdiffeq.odeint_adjoint(
            field, start, times.to(start.device), method=method
        )
    )


@pytest.mark.parametrize(("method", "noise", "interpretation"), SDE_METHODS)
def test_stochastic_methods(
    method: Any, noise: Any, interpretation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.pretended():
        monkeypatch.setattr(torch, "Generator", pretend.PretendGenerator)
    # A device has normal numbers of its own: a seed is one path there, and adjoints agree on it.
    field, start = _made(_Field, place.device())

    def gradient(adjoint: psn.Adjoint) -> Tensor:
        problem = psn.SDEProblem(
            field,
            lambda t, u: torch.full_like(u, 0.1) if noise == "additive" else 0.1 * u,
            start,
            (0.0, 1.0),
            noise=noise,
            interpretation=interpretation,
        )
        end = psn.solve(
            problem,
            method,
            engine="torch",
            adjoint=adjoint,
            controller=psn.FixedStep(),
            dt0=0.1,
            generator=torch.Generator().manual_seed(3),
        ).u1
        assert end.device == start.device
        gradients = torch.autograd.grad(end.square().sum(), list(field.parameters()))
        return torch.cat([x.reshape(-1) for x in (end.detach(), *gradients)]).cpu()

    discrete, direct = gradient(psn.DiscreteAdjoint()), gradient(psn.DirectAdjoint())
    torch.testing.assert_close(discrete, direct, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not place.pretended(), reason="Reads are counted on the pretended device.")
def test_values_that_the_host_waits_for() -> None:
    field, start = _made(_Field, place.device())
    with torch.no_grad():
        with pretend.Reads() as reads:
            stats = psn.solve(psn.ODEProblem(field, start, (0.0, 1.0)), engine="torch").stats
        # One a step, to accept it or not, and those of the first step size and the end.
        assert reads.count <= stats.naccept + stats.nreject + 3
        with pretend.Reads() as reads:
            _end(field, start, psn.RK4(), controller=psn.FixedStep(), dt0=0.01)
        assert reads.count <= 2
