"""What drift and diffusion use gets its gradient, once; the replay sees what the solve saw."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.usefixtures("looks_in_both")

D = torch.float64
ADJOINTS = {
    "discrete": psn.DiscreteAdjoint(),
    "direct": psn.DirectAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
}
any_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)


def solve(drift: Any, diffusion: Any, adjoint: psn.DirectAdjoint, p: Any = None) -> psn.Solution:
    """Fixed steps of the Euler-Heun method, which every adjoint can replay."""
    problem = psn.SDEProblem(
        drift,
        diffusion,
        torch.zeros(2, 1, dtype=D),
        (0.0, 1.0),
        interpretation="stratonovich",
        p=p,
    )
    return psn.solve(
        problem,
        psn.EulerHeun(),
        controller=psn.FixedStep(),
        dt0=0.05,
        adjoint=adjoint,
        generator=torch.Generator().manual_seed(0),
    )


def quiet(t: Tensor, u: Tensor) -> Tensor:
    return 0.1 * torch.ones_like(u)


@any_adjoint
@pytest.mark.parametrize("where", ["drift", "diffusion"])
@pytest.mark.parametrize("computed", [False, True], ids=["leaf", "computed"])
def test_used_in_the_middle_alone(adjoint: psn.DirectAdjoint, where: str, computed: bool) -> None:
    """The end is linear in `a`: each step averages its ends, where `a` is used or not."""
    source = torch.tensor(2.0, dtype=D, requires_grad=True)
    amplitude, calls = source, []
    if computed:
        amplitude = source * 3
        amplitude.grad_fn.register_hook(lambda *_: calls.append(1))

    def used(t: float) -> bool:
        return 0.375 < t < 0.625

    def switched(t: Tensor, u: Tensor) -> Tensor:
        return (amplitude if used(float(t)) else 0.0) * torch.ones_like(u)

    parts = (switched, quiet) if where == "drift" else (lambda t, u: 0 * u, switched)
    solution = solve(*parts, adjoint)
    steps = list(itertools.pairwise(solution.trajectory.times))
    brownian = solution.trajectory.brownian
    motions = [b - a if where == "drift" else brownian(a, b)[0].item() for a, b in steps]
    shares = [(used(a) + used(b)) / 2 for a, b in steps]
    solution.u1[0].sum().backward()
    assert source.grad is not None
    right = sum(share * motion for share, motion in zip(shares, motions, strict=True))
    assert source.grad.item() == pytest.approx(right * (3 if computed else 1), rel=1e-9)
    assert len(calls) == computed


class Scaled(nn.Module):
    """`du = -k g u dt + g dW` with a context `g`."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=D))
        self.g: Any = None

    def drift(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * self.g * (u + 1)

    def diffusion(self, t: Tensor, u: Tensor) -> Tensor:
        return self.g * torch.ones_like(u)


@any_adjoint
def test_a_context_set_between_two_solves(adjoint: psn.DirectAdjoint) -> None:
    field, e = Scaled(), torch.tensor(0.5, dtype=D, requires_grad=True)
    found = []
    for chosen in (adjoint, psn.DirectAdjoint()):
        field.g = e * 1
        x = solve(field.drift, field.diffusion, chosen)
        field.g = e * 3
        y = solve(field.drift, field.diffusion, chosen)
        found.append(torch.autograd.grad((x.u1 - y.u1).sum(), (field.k, e)))
        with torch.no_grad():
            field.g = e * 7
            between = x(torch.tensor([0.21], dtype=D))
            field.g = e * 1
            torch.testing.assert_close(between, x(torch.tensor([0.21], dtype=D)))
    torch.testing.assert_close(
        *found, rtol=1e-2 if adjoint is ADJOINTS["backsolve"] else 1e-9, atol=0
    )


@any_adjoint
def test_hooks_run_once(adjoint: psn.DirectAdjoint) -> None:
    field = Scaled()
    field.g = 0.5
    gradients, calls = [], []
    for hooked in (False, True):
        field.zero_grad()
        if hooked:
            field.k.register_hook(lambda g: (calls.append(1), 10 * g)[1])
        solve(field.drift, field.diffusion, adjoint).u1.sum().backward()
        assert field.k.grad is not None
        gradients.append(field.k.grad.item())
    assert gradients[1] == pytest.approx(10 * gradients[0], rel=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("adjoint", [ADJOINTS["discrete"], ADJOINTS["backsolve"]])
def test_constants_changed_in_place_are_noticed(adjoint: psn.DirectAdjoint) -> None:
    field, c = Scaled(), torch.tensor(1.0, dtype=D)
    field.g = c
    solution = solve(field.drift, field.diffusion, adjoint)
    c.mul_(3)
    with pytest.raises(RuntimeError, match=r"g has been changed in place"):
        solution.u1.sum().backward()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("which", ["drift", "diffusion"])
def test_what_looks_between_the_steps_after_a_step_of_the_optimizer_is_refused(
    which: str, compile: Any, recorded: bool
) -> None:
    """States of one equation and stages of another make no solution."""
    fields = {name: nn.Linear(2, 2, dtype=D) for name in ("drift", "diffusion")}
    problem = psn.SDEProblem(
        lambda t, u: fields["drift"](u),
        lambda t, u: fields["diffusion"](u),
        torch.ones(3, 2, dtype=D),
        (0.0, 1.0),
    )
    solution = psn.solve(
        problem, psn.SOSRI2(), compile=compile, controller=psn.FixedStep(), dt0=0.25
    )
    middle, times = solution(0.3), solution.t
    with torch.no_grad():
        fields[which].weight.mul_(3)
    with torch.set_grad_enabled(recorded):
        for look in (
            lambda: solution(0.3),
            lambda: solution.local_estimate(0.3),
            solution.step_estimates,
            solution.trajectory.stiffness,
        ):
            with pytest.raises(RuntimeError, match=r"has been changed in place"):
                look()
        # What was stored needs no field.
        torch.testing.assert_close(solution(times), solution.u)
        with torch.no_grad():
            fields[which].weight.div_(3)
        torch.testing.assert_close(solution(0.3), middle)


@any_adjoint
@pytest.mark.parametrize("recorded", [True, False])
def test_random_fields_are_refused(adjoint: psn.DirectAdjoint, recorded: bool) -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    backsolve = isinstance(adjoint, psn.BacksolveAdjoint)
    problem = psn.SDEProblem(
        lambda t, u: net(u),
        quiet,
        torch.ones(3, 1, dtype=D),
        (0.0, 1.0),
        interpretation="stratonovich" if backsolve else "ito",
    )
    algorithm = psn.EulerHeun() if backsolve else psn.SOSRI()
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1} if backsolve else {}
    if backsolve and not recorded:
        with torch.no_grad():
            assert psn.solve(problem, algorithm, adjoint=adjoint, **options).retcode.successful
        return
    with (
        torch.set_grad_enabled(recorded),
        pytest.raises(ValueError, match=r"random numbers \(net\.1: Dropout\)"),
    ):
        psn.solve(problem, algorithm, adjoint=adjoint, **options)


@any_adjoint
def test_fields_that_differentiate_inside(adjoint: psn.DirectAdjoint) -> None:
    """`du = -k u dt` by the gradient of an energy, with a leaf made inside."""
    k = torch.tensor(1.0, dtype=D, requires_grad=True)

    def drift(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            y = u if u.requires_grad else u.clone().requires_grad_()
            own = t.detach().clone().requires_grad_()
            energy = 0.5 * (k * (y + 1).square()).sum() + 0 * own
            (g,) = torch.autograd.grad(energy, y, create_graph=True)
        return -g

    ends = []
    for chosen in (adjoint, psn.DirectAdjoint()):
        solution = solve(drift, lambda t, u: 0 * u, chosen)
        ends.append(torch.autograd.grad(solution.u1.sum(), k)[0])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=0)
    assert ends[0].item() == pytest.approx(-2 * math.exp(-1), rel=1e-2)
    with torch.no_grad():
        solve(drift, lambda t, u: 0 * u, adjoint)
