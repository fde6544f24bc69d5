"""Steps that are kept with their graph, of states in their own shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

D = torch.float64
STATES = {
    "no dimension": torch.tensor(0.7, dtype=D),
    "one": torch.linspace(-1, 1, 3, dtype=D),
    "two": torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3),
    "turned": torch.linspace(-1, 1, 6, dtype=D).reshape(3, 2).T,
    "three": torch.linspace(-1, 1, 12, dtype=D).reshape(2, 1, 6),
}
FIELDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an output": lambda u, rate: rate * torch.sin(u),
    "a view": lambda u, rate: (rate * torch.sin(u))[None].squeeze(0),
    "turned": lambda u, rate: rate * torch.sin(u.movedim(0, -1).contiguous()).movedim(-1, 0),
    "the state": lambda u, rate: u,
    "written in place": lambda u, rate: (rate * torch.sin(u)).mul_(2),
    "saved by its graph": lambda u, rate: torch.tanh(rate * u),
}
FIXED = {"algorithm": psn.Euler(), "controller": psn.FixedStep(), "dt0": 0.25}
WAYS: dict[str, dict[str, Any]] = {
    "one stage": FIXED,
    "four": {**FIXED, "algorithm": psn.RK4()},
    "adaptive": {"algorithm": psn.Tsit5()},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("state", STATES)
def test_gradients_are_those_of_every_operation(state: str, name: str, way: str) -> None:
    """At the end, inside of steps, and of a state that needs none itself."""
    f, found = FIELDS[name], []
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0)):
        rate = torch.tensor(-0.8, dtype=D, requires_grad=True)
        u0 = STATES[state].clone().requires_grad_()
        for start in (u0, u0.detach()) if name != "the state" else (u0,):
            problem = psn.ODEProblem(lambda t, u: f(u, rate), start, (0.0, 1.0))  # noqa: B023
            u = psn.solve(problem, adjoint=adjoint, saveat=[0.1, 0.6, 1.0], **WAYS[way]).u
            ((u * (1 + u)).sum() + 0 * rate).backward()
        found.append((u.detach(), u0.grad, rate.grad))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda u: u.neg_(),
    "shape": lambda u: u.squeeze_(),
    "graph": lambda u: u.detach_(),
}


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_a_field_changes_is_refused(change: str, needs: bool) -> None:
    """Also where none of its numbers is changed: the graph would end there."""
    rate, changed = torch.ones(3, dtype=D, requires_grad=True), CHANGES[change]
    u0 = torch.ones(1, 3, dtype=D, requires_grad=needs)
    problem = psn.ODEProblem(lambda t, u: rate * changed(u), u0, (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"in.place"):
        psn.solve(problem, psn.Euler(), controller=psn.FixedStep(), dt0=0.5)
