"""Changes that torch does not count, between a solve and its backward sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.replay.members.estimates import estimates_of
from pysciml_node.steps.contents import Contents, fingerprint

D = torch.float64


def example(dtype: torch.dtype, size: int) -> Tensor:
    seeded = torch.Generator().manual_seed(size)
    return torch.randint(0, 2, (size,), generator=seeded).to(dtype)


@pytest.mark.parametrize("size", [1, 7, 300_001])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, D, torch.cfloat]
)
def test_a_change_of_any_entry_changes_the_fingerprint(dtype: torch.dtype, size: int) -> None:
    x = example(dtype, size)
    seen = fingerprint(x)
    assert fingerprint(x.clone()) == seen
    for place in {0, size // 2, size - 1}:
        other = x.clone()
        other[place] = 1 - x[place].to(torch.cfloat).real
        assert fingerprint(other) != seen


def test_the_order_of_entries_counts_in_a_block_and_between_blocks() -> None:
    x = torch.arange(400_000, dtype=D)
    swapped = x.clone()
    swapped[[3, 4]] = x[[4, 3]]
    far = torch.cat((x[200_000:], x[:200_000]))
    assert len({fingerprint(x), fingerprint(swapped), fingerprint(far), fingerprint(-x)}) == 4


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x.view(2, -1).T, lambda x: x[1:]])
def test_views_have_the_fingerprints_of_their_copies(view: Callable[[Tensor], Tensor]) -> None:
    for dtype in (torch.float32, D, torch.cdouble):
        x = view(torch.linspace(0, 1, 10).to(dtype))
        assert fingerprint(x) == fingerprint(x.clone())
    conjugate = (torch.linspace(0, 1, 10).to(torch.cdouble) * 1j).conj()
    assert fingerprint(conjugate) == fingerprint(conjugate.resolve_conj())
    assert fingerprint(conjugate) != fingerprint(conjugate.conj())


def test_what_changes_before_it_is_settled_is_passed_over() -> None:
    x, y = torch.zeros(3), torch.ones(2)
    contents = Contents([x, y])
    x.data[0] = 1.0
    assert contents.changed([x, y]) == [x]
    contents.settle([x, y])
    x.data[1] = 1.0
    y.data[0] = 0.0
    assert contents.changed([x, y]) == [y]


class Late(nn.Module):
    """`-rate u`, and for `t` from 0.3 to 0.31 by as much more as something says."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5], dtype=D))
        self.array = np.array([3.0])
        self.calls = np.zeros(1)
        if held == "parameter":
            self.more = nn.Parameter(torch.tensor([3.0], dtype=D))
        elif held == "memory of an array":
            self.tensor = torch.from_numpy(self.array)
        self.held = held

    @property
    def now(self) -> Tensor:
        if self.held == "parameter":
            return self.more
        return self.tensor if self.held == "memory of an array" else torch.from_numpy(self.array)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        within = (t > 0.3) & (t < 0.31)
        return -self.rate * u * (1 + torch.where(within, self.now, 0.0))

    def change(self) -> None:
        if self.held == "parameter":
            self.more.data.fill_(6.0)
        else:
            self.array[0] = 6.0


def end(kind: str, field: Late, adjoint: Any) -> Tensor:
    """`exp(-rate (1 + 0.03))`, of stochastic equations nearly."""
    u0, span = torch.ones(1, dtype=D), (0.0, 1.0)
    options: dict[str, Any] = {"adjoint": adjoint, "tstops": [0.3, 0.31]}
    if kind == "stochastic":
        problem = psn.SDEProblem(
            field, lambda t, u: 1e-6 * u, u0, span, interpretation="stratonovich"
        )
        steps = {"dt0": 0.01, "controller": psn.FixedStep()}
        seeded = torch.Generator().manual_seed(0)
        return psn.solve(problem, psn.EulerHeun(), generator=seeded, **steps, **options).u1
    options |= {"rtol": 1e-8, "atol": 1e-8}
    one = psn.ODEProblem(field, u0, span)
    if kind == "members":
        return psn.solve(psn.EnsembleProblem(one, u0=u0.expand(3, 1)), **options).u1[1]
    return psn.solve(one, **options).u1


CONTINUOUS = (psn.InterpolatingAdjoint(), psn.GaussAdjoint(), psn.BacksolveAdjoint())
WAYS = [
    *(("one", adjoint) for adjoint in CONTINUOUS),
    *(("members", adjoint) for adjoint in CONTINUOUS),
    ("stochastic", psn.BacksolveAdjoint()),
    *((kind, psn.DiscreteAdjoint()) for kind in ("one", "members", "stochastic")),
]


@pytest.mark.parametrize("held", ["parameter", "memory of an array", "array"])
@pytest.mark.parametrize(("kind", "adjoint"), WAYS)
def test_a_change_of_what_the_start_does_not_show_is_refused(
    kind: str, adjoint: Any, held: str
) -> None:
    field = Late(held)
    # Steps of 0.01 see the ends of the short interval in their trapezoidal rule.
    bound = 0.04 if kind == "stochastic" else 1e-5
    u1 = end(kind, field, adjoint)
    # The field counts its calls in an array: that is its own.
    for _ in range(2):
        (slope,) = torch.autograd.grad(u1.sum(), field.rate, retain_graph=True)
        assert slope.item() == pytest.approx(-1.03 * math.exp(-1.03 / 2), rel=bound)
    field.change()
    with pytest.raises(RuntimeError, match=r"changed in place|could not reproduce"):
        torch.autograd.grad(u1.sum(), field.rate)


class Beside(Late):
    """The same, with tensors that it does not read, or reads by way of others."""

    def __init__(self) -> None:
        super().__init__("parameter")
        self.register_buffer("unread", torch.ones(3, dtype=D))
        self.spare = nn.Linear(2, 2)
        self.numbers = torch.full((2,), 3.0, dtype=D)
        self.by: Callable[[], Any] = lambda: self.more

    @property
    def now(self) -> Tensor:
        return torch.as_tensor(self.by(), dtype=D)


BY: dict[str, Callable[[Beside], Any]] = {
    "view": lambda field: field.numbers[1:],
    "number": lambda field: field.numbers[0].item(),
    "list": lambda field: field.numbers.tolist()[0],
    "array": lambda field: field.numbers.numpy()[:1] * 1.0,
    "memory": lambda field: torch.from_dlpack(field.numbers)[:1],
}


@pytest.mark.parametrize(("kind", "adjoint"), WAYS)
def test_a_change_of_what_is_not_read_is_no_error(kind: str, adjoint: Any) -> None:
    field = Beside()
    bound = 0.04 if kind == "stochastic" else 1e-5
    u1 = end(kind, field, adjoint)
    field.unread.data.fill_(2.0)
    field.spare.weight.data.mul_(2.0)
    field.numbers.add_(1.0)
    (slope,) = torch.autograd.grad(u1.sum(), field.rate)
    assert slope.item() == pytest.approx(-1.03 * math.exp(-1.03 / 2), rel=bound)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("adjoint", [psn.GaussAdjoint(), psn.BacksolveAdjoint()])
@pytest.mark.parametrize("kind", ["one", "members"])
def test_what_is_read_by_way_of_something_else_is_read(kind: str, adjoint: Any, by: str) -> None:
    field = Beside()
    field.by = lambda: BY[by](field)
    u1 = end(kind, field, adjoint)
    field.numbers.data.fill_(6.0)
    with pytest.raises(RuntimeError, match="numbers has been changed in place"):
        torch.autograd.grad(u1.sum(), field.rate)


def test_kept_steps_look_at_arrays_that_are_read_in_the_middle() -> None:
    """Neither the start nor the last step shows the change."""
    field = Late("array")
    problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    u1 = psn.solve(problem, tstops=[0.3, 0.31], adjoint=psn.DiscreteAdjoint(memory=2**26)).u1
    field.change()
    with pytest.raises(RuntimeError, match="could not reproduce"):
        torch.autograd.grad(u1.sum(), field.rate)


class Scaled(nn.Module):
    """`-(rate * scale) * u`, of which the graph reads the scale, and a bias that it does not."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5], dtype=D))
        self.bias = nn.Parameter(torch.zeros(1, dtype=D))
        self.array = np.array([2.0])
        self.losses = np.zeros(3)
        if held == "parameter":
            self.scale = nn.Parameter(torch.tensor([2.0], dtype=D))
        elif held == "memory of an array":
            self.tensor = torch.from_numpy(self.array)
        self.held = held

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.held == "parameter":
            return -self.rate * self.scale * u + self.bias
        scale = self.tensor if self.held == "memory of an array" else torch.from_numpy(self.array)
        return -self.rate * scale * u + self.bias

    def change(self) -> None:
        if self.held == "parameter":
            self.scale.data.mul_(2.0)
        else:
            self.array[0] = 4.0


@pytest.mark.parametrize("held", ["parameter", "memory of an array", "array"])
@pytest.mark.parametrize("kind", ["one", "members", "stochastic"])
def test_graphs_of_solves_are_as_they_were_or_refused(kind: str, held: str) -> None:
    """`exp(-2 rate)`: of what the graph does not read, a change is no error."""
    field = Scaled(held)
    u1 = end(kind, field, psn.DirectAdjoint())
    bound = 1e-3 if kind == "stochastic" else 1e-6
    field.bias.data.add_(1.0)
    field.losses[0] = 3.0
    (slope,) = torch.autograd.grad(u1.sum(), field.rate, create_graph=True)
    assert slope.item() == pytest.approx(-2 * math.exp(-1), rel=bound)
    (second,) = torch.autograd.grad(slope.sum(), field.rate, retain_graph=True)
    assert second.item() == pytest.approx(4 * math.exp(-1), rel=bound)
    field.change()
    name = "scale" if held == "parameter" else "tensor|array"
    for value in (u1, slope):
        with pytest.raises(RuntimeError, match=rf"({name}) has been changed in place since"):
            torch.autograd.grad(value.sum(), field.rate, retain_graph=True)


@pytest.mark.parametrize("kind", ["one", "members", "stochastic"])
def test_graphs_of_solves_that_have_not_saved_what_is_changed_have_their_gradients(
    kind: str,
) -> None:
    field = Late("parameter")
    u1 = end(kind, field, psn.DirectAdjoint())
    before = torch.autograd.grad(u1.sum(), (field.rate, field.more), retain_graph=True)
    field.change()
    after = torch.autograd.grad(u1.sum(), (field.rate, field.more))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("size", [3, 100_000])
def test_what_is_not_a_number_is_what_it_was(size: int) -> None:
    x = torch.full((size,), math.nan, dtype=D)
    contents = Contents([x])
    assert not contents.changed([x])
    x.data[size - 1] = 1.0
    assert contents.changed([x]) == [x]
    y = torch.zeros(size)
    contents = Contents([y])
    for other in (torch.zeros(size + 1), torch.zeros(size, dtype=D)):
        y.data = other
        assert contents.changed([y]) == [y]


LOOKS: dict[str, Callable[[psn.Solution], Tensor]] = {
    "inside of the first step": lambda solution: solution(1e-4).sum(),
    "local estimate": lambda solution: solution.local_estimate(1e-4, psn.Tsit5()).error,
    "stochastic estimate": lambda solution: solution.local_estimate(1e-4, psn.SRIW1()).error,
}


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
@pytest.mark.parametrize("look", LOOKS)
def test_dense_output_and_estimates_have_graphs_of_their_own(look: str, adjoint: Any) -> None:
    field, u0, span = Scaled("parameter"), torch.ones(1, dtype=D), (0.0, 1.0)
    if look == "stochastic estimate":
        noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, span)
        seeded = torch.Generator().manual_seed(0)
        solution = psn.solve(noisy, psn.SRIW1(), adjoint=adjoint, generator=seeded)
    else:
        solution = psn.solve(psn.ODEProblem(field, u0, span), adjoint=adjoint)
    value = LOOKS[look](solution)
    torch.autograd.grad(value, field.rate, retain_graph=True)
    field.change()
    with pytest.raises(RuntimeError, match="scale has been changed in place"):
        torch.autograd.grad(value, field.rate)


def test_an_estimate_of_members_in_one_batch_has_a_graph_of_its_own() -> None:
    field = Scaled("parameter")
    one = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    found = estimates_of(psn.solve(psn.EnsembleProblem(one, u0=torch.ones(3, 1, dtype=D))).members)
    assert found is not None
    error = found.local(np.full(3, 1e-4), psn.Tsit5(), True, None).error.sum()
    field.change()
    with pytest.raises(RuntimeError, match="scale has been changed in place"):
        torch.autograd.grad(error, field.rate)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("look", ["one step", "inside of the first step", "local estimate"])
def test_graphs_of_gradients_are_guarded_as_well(look: str, order: int) -> None:
    """Those of `exp(-rate^2 x)` do not come by the ends of steps where there is but one."""
    x, rate = torch.tensor(0.5, dtype=D), torch.tensor(0.25, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -(rate**2 * u * x), torch.ones(1, dtype=D), (0.0, 1.0))
    solution = psn.solve(
        problem, psn.Tsit5(), dt0=1.0, controller=psn.FixedStep(), adjoint=psn.DirectAdjoint()
    )
    derivative = solution.u1.sum() if look == "one step" else LOOKS[look](solution)
    for _ in range(order - 1):
        (derivative,) = torch.autograd.grad(derivative, rate, create_graph=True)
    (last,) = torch.autograd.grad(derivative, rate, retain_graph=True)
    if look == "one step":
        a, r = x.item(), rate.item()
        second, third = 4 * a**2 * r**2 - 2 * a, 12 * a**2 * r - 8 * a**3 * r**3
        expected = (second if order == 2 else third) * math.exp(-a * r**2)
        assert last.item() == pytest.approx(expected, rel=1e-4)
    x.data.fill_(2.0)
    with pytest.raises(RuntimeError, match="x has been changed in place"):
        torch.autograd.grad(derivative, rate)
