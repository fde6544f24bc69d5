"""Penalties of native members: taken for all at once, as for members of the loop in Python."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from properties.native_cases import quick_turns
from stiff_fields import D, random
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.replay.members.estimates import StackedEstimates, estimates_of
from pysciml_node.replay.members.field import MembersField
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.members import NativeMembers

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

PENALTIES: dict[str, Any] = {
    "error": lambda g: psn.LocalError("unbiased", generator=g),
    "error at ends of steps": lambda g: psn.LocalError("biased", step_size="solver", generator=g),
    "error, with the solve": lambda g: psn.LocalError("unbiased", stop_gradient=False, generator=g),
    "stiffness": lambda g: psn.LocalStiffness("unbiased", generator=g),
    "all errors": lambda g: psn.GlobalError(),
    "greatest stiffness": lambda g: psn.GlobalStiffness(aggregate="max"),
}


class Swirl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        with torch.no_grad():
            for i, x in enumerate(self.net.parameters()):
                x.copy_(random(*x.shape, seed=i))

    def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return 4 * self.net(2 * u) * p + torch.sin(9 * t) * u.flip(-1)


FIELD, TSIT5 = Swirl(), psn.Tsit5()
STIFF = (psn.Rodas5P(), psn.TRBDF2(), psn.AutoTsit5(psn.Rosenbrock23()))


def solve(
    compile: bool, algorithm: Any = TSIT5, **options: Any
) -> tuple[EnsembleSolution, list[Tensor]]:
    p = torch.linspace(0.5, 2, 11, dtype=D).requires_grad_()
    u0 = random(11, 2).requires_grad_()
    one = psn.ODEProblem(FIELD, u0[0], (0.0, 1.0), p=p[0])
    tspan = torch.stack((torch.zeros(11, dtype=D), torch.linspace(0.7, 1.5, 11, dtype=D)), 1)
    members = psn.EnsembleProblem(one, u0, p=p, tspan=tspan)
    steps = {"controller": psn.FixedStep(), "dt0": 0.21, "rtol": 1e-2, "atol": 1e-3} | options
    solution = psn.solve(members, algorithm, compile=compile, engine="torch", **steps)
    return solution, [u0, p, *FIELD.parameters()]


def penalized(name: str, solution: EnsembleSolution, inputs: list[Tensor]) -> list[Tensor]:
    """A penalty and its gradients, those of the states among them."""
    penalty = PENALTIES[name](torch.Generator().manual_seed(5))
    value = penalty._over_members(solution)
    assert value is not None
    bars = torch.autograd.grad(value, inputs, allow_unused=True)
    return [
        value,
        *(torch.zeros_like(x) if b is None else b for x, b in zip(inputs, bars, strict=True)),
    ]


def close(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * (size + 1e-30))


OPTIONS: dict[str, dict[str, Any]] = {
    "fixed steps": {},
    "without gradients kept": {"adjoint": psn.DiscreteAdjoint(memory=0)},
    "stops": {"tstops": [0.3]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PENALTIES)
def test_they_are_those_of_members_in_python_and_of_each_alone(name: str, options: str) -> None:
    found, expected = (solve(compile, **OPTIONS[options]) for compile in (True, False))
    assert isinstance(found[0].members, NativeMembers)
    with mock.patch.object(NativeMembers, "solution", side_effect=AssertionError):
        assert isinstance(estimates_of(found[0].members), StackedEstimates)
    together = penalized(name, *found)
    close(together, penalized(name, *expected), 1e-8)
    with mock.patch.object(NativeMembers, "maps_field", False):
        alone = penalized(name, *solve(True, **OPTIONS[options]))
    close(together, alone, 1e-7)


@pytest.mark.parametrize("algorithm", STIFF, ids=lambda a: a.expression)
@pytest.mark.parametrize("name", [x for x in PENALTIES if "greatest" not in x])
def test_those_of_stiff_members_too(name: str, algorithm: Any) -> None:
    """And of those that change their method: each step by the one that took it."""
    steps = {"algorithm": algorithm, "dt0": 0.1}
    with quick_turns(0.05):
        found, expected = (solve(compile, **steps) for compile in (True, False))
        again = solve(True, **steps)
    taken = found[0].members.steps.methods
    assert taken is None or {*taken.tolist()} == {0, 1}
    with mock.patch.object(NativeMembers, "solution", side_effect=AssertionError):
        assert isinstance(estimates_of(found[0].members), StackedEstimates)
    together = penalized(name, *found)
    close(together, penalized(name, *expected), 1e-6)
    with mock.patch.object(NativeMembers, "maps_field", False):
        close(together, penalized(name, *again), 1e-6)


@pytest.mark.parametrize("algorithm", STIFF, ids=lambda a: a.expression)
def test_steps_of_stiff_members_are_compared(algorithm: Any) -> None:
    field = Swirl()
    with mock.patch(f"{__name__}.FIELD", field), quick_turns(0.05):
        solution, _ = solve(True, algorithm, dt0=0.1)
    with torch.no_grad():
        field.net[0].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match="could not reproduce"):
        PENALTIES["all errors"](None)._over_members(solution)


def test_a_field_that_vmap_does_not_map_has_those_of_each() -> None:
    """Programs have no such operations by now, so one stands in that refuses."""
    solution, inputs = solve(True)
    expected = penalized("all errors", solution, inputs)
    solution, inputs = solve(True)
    with mock.patch.object(MembersField, "_mapped", side_effect=RuntimeError("no rule")):
        assert estimates_of(solution.members) is None
        found = penalized("all errors", solution, inputs)
    close(found, expected, 1e-9)


@pytest.mark.parametrize("hidden", [True, False])
def test_weights_that_have_changed_since_are_refused(hidden: bool) -> None:
    field = Swirl()
    with mock.patch(f"{__name__}.FIELD", field):
        solution, _ = solve(True)
    weight = field.net[0].weight
    with torch.no_grad():
        (weight.data if hidden else weight).mul_(1.1)
    for name in ("error", "all errors"):
        with pytest.raises(RuntimeError, match=r"could not reproduce|changed in place|modified"):
            PENALTIES[name](None)._over_members(solution)


def test_evaluations_are_counted_for_each() -> None:
    with torch.no_grad():
        solution, _ = solve(True)
        before = solution.members.count("nfe").copy()
        PENALTIES["all errors"](None)._over_members(solution)
        added = solution.members.count("nfe") - before
    assert (added > 0).all()


def test_copies_without_gradients() -> None:
    solution, _ = solve(True)
    expected = PENALTIES["all errors"](None)._over_members(solution)
    found = PENALTIES["all errors"](None)._over_members(solution.detach())
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=0)


def test_rows_of_a_layer() -> None:
    x, penalties = torch.linspace(-1, 1, 12, dtype=D).reshape(6, 2), []
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for weights in net.parameters():  # large, so that errors are far above those of rounding
        numbers = torch.arange(1.0, weights.numel() + 1, dtype=D)
        weights.data = 2 * torch.sin(7 * numbers).reshape(weights.shape)
    for compile in (True, False):
        node = psn.NeuralODE(
            lambda t, u: net(u), psn.Tsit5(), compile=compile, independent=True,
            regularizers=[psn.GlobalError()], controller=psn.FixedStep(), dt0=0.5,
        )  # fmt: skip
        penalty = node(x).penalty
        penalties.append([penalty, *torch.autograd.grad(penalty, list(net.parameters()))])
    close(*penalties, 1e-8)
