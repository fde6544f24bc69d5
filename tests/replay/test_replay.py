"""What the discrete adjoint's replay costs and keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conformance.problems import ALGORITHMS
from torch import Tensor, nn

import pysciml_node as psn

ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


def small_field() -> nn.Module:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(self.linear(u)) * torch.cos(t)

    return Field()


def start() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_replay_a_step(name: str) -> None:
    """Each accepted step is evaluated once more, without the stage that serves the next one."""
    algorithm = getattr(psn, name)()
    solution = psn.solve(
        psn.ODEProblem(small_field(), start(), (0.0, 1.0)),
        algorithm,
        rtol=1e-3,
        atol=1e-3,
        adjoint=psn.DiscreteAdjoint(memory=0),
    )
    solution.u1.sum().backward()
    stats, tableau = solution.stats, algorithm.tableau
    assert stats.naccept_backward == stats.naccept
    assert stats.nreject_backward == 0
    assert stats.nvjp == stats.nfe_backward
    assert stats.nfe_backward == stats.naccept * (tableau.stages - tableau.fsal)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_grid_of_output_times_costs_no_steps(name: str) -> None:
    """Forward and backward: the same steps, with the dense output's extra stages at most.

    The stage where one step ends and the next one starts is evaluated once.
    """
    algorithm = getattr(psn, name)()
    field = small_field()
    found = []
    for saveat in (None, torch.linspace(0.0, 1.0, 100, dtype=torch.float64)):
        problem = psn.ODEProblem(field, start(), (0.0, 1.0))
        solution = psn.solve(problem, algorithm, rtol=1e-5, atol=1e-5, saveat=saveat, dtmax=0.2)
        (solution.u.square().sum() if saveat is not None else solution.u1.sum()).backward()
        found.append(solution.stats)
    plain, grid = found
    extra = len(algorithm.tableau.interpolant.c)
    assert grid.naccept == plain.naccept
    assert grid.naccept_backward == plain.naccept
    assert grid.nfe <= plain.nfe + plain.naccept * extra
    assert grid.nfe_backward <= plain.nfe_backward + plain.naccept * extra + algorithm.tableau.fsal


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("tstops", [(), (0.35,)])
def test_stages_that_two_steps_share_have_the_gradient_of_both(
    name: str, tstops: tuple[float, ...]
) -> None:
    """Some steps hold saved times, others none, and at a stop the field may jump."""
    field, u0 = small_field(), start().requires_grad_()

    def jumping(t: Tensor, u: Tensor) -> Tensor:
        rate: Tensor = field(t, u)
        return rate if not tstops or float(t.detach()) <= tstops[0] else 2 * rate

    inputs = [u0, *field.parameters()]
    found = []
    for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
        solution = psn.solve(
            psn.ODEProblem(jumping, u0, (0.0, 1.0)),
            getattr(psn, name)(),
            rtol=1e-5,
            atol=1e-5,
            dtmax=0.06,
            saveat=[0.11, 0.13, 0.2, 0.34, 0.36, 0.41, 0.9],
            tstops=tstops,
            adjoint=adjoint,
        )
        found.append(torch.autograd.grad(solution.u.square().sum(), inputs))
    for ours, direct in zip(*found, strict=True):
        torch.testing.assert_close(ours, direct, rtol=1e-11, atol=1e-13)


def test_steps_behind_the_last_cotangent_are_not_replayed() -> None:
    problem = psn.ODEProblem(small_field(), start(), (0.0, 1.0))
    fixed = {"controller": psn.FixedStep(), "dt0": 0.1}
    steps = psn.solve(problem, **fixed)
    steps.u[3].sum().backward()
    early = psn.solve(problem, **fixed)
    early(0.25).sum().backward()
    # The states at all steps have one gradient, mostly zeros; dense output that of one step.
    assert steps.stats.naccept_backward <= 10
    assert early.stats.naccept_backward == 2


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("saveat", [None, (0.3, 1.0)])
def test_memory_is_freed_without_the_collector(
    adjoint: psn.DirectAdjoint, backward: bool, saveat: tuple[float, ...] | None
) -> None:
    """No reference cycle holds the states of a solve whose solution is gone."""
    with without_collector():
        field = small_field()
        solution = psn.solve(
            psn.ODEProblem(field, start(), (0.0, 1.0)), adjoint=adjoint, saveat=saveat
        )
        if backward:
            solution.u.sum().backward()
        watched = [weakref.ref(solution), weakref.ref(solution.trajectory), weakref.ref(field)]
        del solution, field
        assert [ref() for ref in watched] == [None] * len(watched)


def test_tensors_of_a_dropped_solve_are_freed() -> None:
    """The number of live tensors is what it was before the solve."""

    def tensors() -> int:
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def once() -> None:
        field = small_field()
        solution = psn.solve(psn.ODEProblem(field, start(), (0.0, 1.0)))
        solution.u1.sum().backward()

    with without_collector():
        once()  # tables are made on first use and kept
        before = tensors()
        once()
        assert tensors() == before


def test_the_adjoint_holds_one_state_a_step() -> None:
    """Bytes saved for backward: the states, and no stage of any step."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    field, u0 = small_field(), start().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        solution = psn.solve(problem, adjoint=psn.DiscreteAdjoint(memory=0))
    assert sum(saved) <= (solution.stats.naccept + 1) * u0.numel() + 4 * 12
