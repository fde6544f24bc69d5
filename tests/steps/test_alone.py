"""Values that nobody else holds are taken as they are, others are copied."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.steps import alone
from pysciml_node.steps.alone import own, own_whole

Make = Callable[[Tensor], Tensor]

# The second half keeps its result for its derivative.
MAKES: list[Make] = [torch.sin, torch.neg, torch.tanh, torch.sigmoid, torch.relu, torch.exp]


@pytest.fixture(autouse=True)
def counted_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are counted as they are here: a compiler may look at frames by now."""
    monkeypatch.setattr(alone, "_FEWEST", alone._fewest())
    monkeypatch.setattr(alone, "_FEWEST_OF_WHOLE", alone._fewest_of_whole())


def handed_on(make: Make, keep: Callable[[Tensor], Any]) -> tuple[Tensor, int]:
    """What an evaluation leaves, as `own_whole` has it, and where its memory was."""
    value = make(torch.ones(1, 2, requires_grad=True))
    place = value.data_ptr()
    kept = keep(value)
    found = own_whole(value)
    del kept
    return found, place


def flattened(make: Make, keep: Callable[[Tensor], Any]) -> tuple[Tensor, int]:
    """The same by `own`, of a value that has been flattened."""
    value = make(torch.ones(1, 2, requires_grad=True))
    place = value.data_ptr()
    kept, value = keep(value), value.reshape(-1)
    found = own(value)
    del kept
    return found, place


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("evaluate", [handed_on, flattened])
def test_who_holds_a_value(make: Make, evaluate: Any) -> None:
    ways: dict[str, Callable[[Tensor], Any]] = {
        "not": lambda x: None,
        "view": lambda x: x[0],
        "detached": lambda x: x.detach(),
        "array": lambda x: x.detach().numpy(),
    }
    copied = {}
    for way, keep in ways.items():
        found, place = evaluate(make, keep)
        copied[way] = found.data_ptr() != place
    assert copied == {"not": False, "view": True, "detached": True, "array": True}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("evaluate", [handed_on, flattened])
def test_a_held_value_whose_result_was_put_elsewhere_is_copied(make: Make, evaluate: Any) -> None:
    """Hooks of saved tensors keep none of its memory: who else has it is another user."""

    def saved_elsewhere(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x):
            return make(x)

    found, place = evaluate(saved_elsewhere, lambda x: x.detach())
    assert found.data_ptr() != place
    found, place = evaluate(saved_elsewhere, lambda x: None)
    assert found.data_ptr() == place


class Reusing(nn.Module):
    """`tanh(w u)`, in memory that the next evaluation writes to."""

    def __init__(self, holds: Callable[[Tensor], Tensor | None], saving: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.holds, self.saving = holds, saving
        self.kept: list[Tensor] = []

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative at `u`."""
        for x in self.kept:
            x.data.zero_()
        with self.saving():
            value = torch.tanh(self.w * u)
        held = self.holds(value)
        self.kept = [] if held is None else [held]
        return value


def elsewhere() -> AbstractContextManager[object]:
    """Saved tensors are copies."""
    return torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x)


@pytest.mark.parametrize("holds", [Tensor.detach, lambda x: x.detach()[:1]])
def test_states_do_not_see_what_a_field_does_with_memory_it_has_kept(holds: Any) -> None:
    """RK4 of `u' = tanh(w u)`, whose earlier values the field overwrites."""
    u0 = torch.tensor([0.3, -0.7], dtype=torch.float64)
    field = Reusing(holds, elsewhere)
    fixed: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    found = psn.solve(problem, psn.RK4(), adjoint=psn.DirectAdjoint(), **fixed)
    plain = Reusing(lambda x: None, nullcontext)
    plain.forward = lambda t, u: torch.tanh(plain.w * u)  # type: ignore[method-assign]
    problem = psn.ODEProblem(plain, u0, (0.0, 1.0))
    expected = psn.solve(problem, psn.RK4(), adjoint=psn.DirectAdjoint(), **fixed)
    torch.testing.assert_close(found.u1, expected.u1, rtol=1e-14, atol=0)
    gradients = [
        torch.autograd.grad(one.u1.sum(), x.w)[0] for one, x in ((found, field), (expected, plain))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=0)
