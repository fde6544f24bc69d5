"""Solves like those before: what holds of the first one holds of all that follow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
ONE: dict[str, Any] = {"algorithm": psn.Euler(), "controller": psn.FixedStep(), "dt0": 1.0}
FOUR: dict[str, Any] = {"algorithm": psn.RK4(), "controller": psn.FixedStep(), "dt0": 0.25}
WAYS = {"one Euler step": ONE, "four RK4 steps": FOUR}
AFTER = 4
"""So many solves later nothing is new any more."""

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 8, dtype=D), nn.Linear(8, 3, dtype=D)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(u) + torch.sin(5 * t)))
        return out


def start(moves: bool = True) -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_(moves)


def solve(f: Callable[..., Any], u0: Any, way: dict[str, Any], **options: Any) -> psn.Solution:
    algorithm, *_ = way.values()
    given = {name: x for name, x in way.items() if name != "algorithm"}
    return psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), algorithm, **given, **options)


def late(f: Callable[..., Any], u0: Any, way: dict[str, Any]) -> psn.Solution:
    """One solve after others that were alike."""
    for _ in range(AFTER):
        solve(f, u0, way)
    return solve(f, u0, way)


@each_way
@pytest.mark.parametrize("moves", [True, False])
def test_every_solve_has_the_gradients_and_the_costs_of_the_first(
    way: dict[str, Any], moves: bool
) -> None:
    field, u0 = Field(), start(moves)
    inputs = [*([u0] if moves else []), *field.parameters()]
    replayed = solve(field, u0, way, adjoint=psn.DiscreteAdjoint(memory=0))
    expected = torch.autograd.grad(replayed.u1.square().sum(), inputs)
    costs = set()
    for _ in range(AFTER + 2):
        solution = solve(field, u0, way)
        found = torch.autograd.grad(solution.u1.square().sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert torch.equal(solution.u1, replayed.u1)
        costs.add(tuple(solution.stats.asdict().values()))
        assert solution.stats.nfe_backward == 0
    assert len(costs) == 1


@each_way
def test_states_of_several_parts(way: dict[str, Any]) -> None:
    rate = nn.Parameter(torch.tensor(0.3, dtype=D))

    def field(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": -rate * u["a"] * u["b"], "b": rate * u["a"]}

    u0 = {"a": torch.ones(2, dtype=D, requires_grad=True), "b": torch.ones(2, dtype=D)}
    found = []
    for _ in range(AFTER + 2):
        end = solve(field, u0, way).u1
        found.append(torch.autograd.grad(end["a"].sum() + end["b"].prod(), (u0["a"], rate)))
    for gradients in found[1:]:
        for one, other in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@each_way
def test_states_of_all_steps_dense_output_and_a_second_pass(way: dict[str, Any]) -> None:
    field, u0 = Field(), start()
    rows = []
    for solution in (solve(field, u0, way), late(field, u0, way)):
        loss = solution.u.cos().sum() + solution(0.3).sin().sum()
        first = torch.autograd.grad(loss, [u0, *field.parameters()], retain_graph=True)
        again = torch.autograd.grad(loss, [u0, *field.parameters()])
        assert all(map(torch.equal, first, again))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, u0)
        rows.append(first)
    for one, other in zip(*rows, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def refusals() -> dict[str, tuple[Callable[[Field], object], str]]:
    def count(field: Field) -> None:
        with torch.no_grad():
            field.second.bias.mul_(2)

    return {
        "counted": (count, r"second\.bias has been changed in place"),
        "uncounted": (lambda field: field.second.bias.data.mul_(2), "could not reproduce"),
        "saved": (lambda field: field.second.weight.data.mul_(2), "could not reproduce"),
    }


@each_way
@pytest.mark.parametrize("change", refusals())
def test_changes_before_the_backward_pass_are_refused(way: dict[str, Any], change: str) -> None:
    make, words = refusals()[change]
    for kind in (solve, late):
        field = Field()
        solution = kind(field, start(), way)
        make(field)
        with pytest.raises(RuntimeError, match=words):
            solution.u1.sum().backward()


@each_way
def test_what_is_not_used_may_change_and_parameters_may_be_frozen(way: dict[str, Any]) -> None:
    for kind in (solve, late):
        field, u0 = Field(), start()
        field.register_buffer("other", torch.zeros(1, dtype=D))
        expected = torch.autograd.grad(solve(field, u0, way).u1.sum(), [u0, field.first.weight])
        solution = kind(field, u0, way)
        field.other.add_(1)
        field.second.weight.requires_grad_(False)
        found = torch.autograd.grad(solution.u1.sum(), [u0, field.first.weight])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@each_way
def test_hooks_of_parameters_run_once(way: dict[str, Any]) -> None:
    field, seen = Field(), list[Tensor]()
    solution = late(field, start(), way)
    field.second.bias.register_hook(seen.append)
    solution.u1.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], field.second.bias.grad, rtol=0, atol=0)
    # And those that are there before.
    late(field, start(), way).u1.sum().backward()
    assert len(seen) == 2


@each_way
def test_hooks_of_modules_see_no_graphs_of_kept_steps(way: dict[str, Any]) -> None:
    field, u0, shown = Field(), start(), list[bool]()
    late(field, u0, way)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: shown.append(out.requires_grad)
    )
    try:
        for _ in range(AFTER):
            shown.clear()
            solve(field, u0, way)
            assert not any(shown[3:])  # the first evaluation looks for tensors
    finally:
        handle.remove()


@each_way
def test_second_derivatives_are_refused_and_batches_have_their_rows(way: dict[str, Any]) -> None:
    field, u0 = Field(), start()
    solution = late(field, u0, way)
    (first,) = torch.autograd.grad(solution.u1.square().sum(), u0, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative"):
        torch.autograd.grad(first.sum(), u0)
    u1 = late(field, u0, way).u1.flatten()
    (rows,) = torch.autograd.grad(
        u1, u0, torch.eye(6, dtype=D), is_grads_batched=True, retain_graph=True
    )
    for i, row in enumerate(rows):
        (expected,) = torch.autograd.grad(u1[i], u0, retain_graph=True)
        torch.testing.assert_close(row, expected, rtol=1e-11, atol=1e-13)


@each_way
def test_backward_passes_in_autocast_are_in_the_precision_of_the_solve(way: dict[str, Any]) -> None:
    field, u0 = Field().float(), start().detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(solve(field, u0, way).u1.sum(), u0)
    u1 = late(field, u0, way).u1
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(u1.sum(), u0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Turning(Field):
    """A field that does something else where the state is large."""

    def __init__(self, what: Callable[[Turning, Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("scale", torch.ones(1, dtype=D))
        self.calls = 0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out = super().forward(t, u)
        return self.what(self, out) if float(u.detach().sum()) > 100 else out


def large() -> Tensor:
    return (start().detach() + 100).requires_grad_()


def drawn(field: Turning, out: Tensor) -> Tensor:
    return out * torch.rand(())


def scaled(field: Turning, out: Tensor) -> Tensor:
    field.scale.mul_(1.5)
    return out * field.scale.clone()


def counted(field: Turning, out: Tensor) -> Tensor:
    field.calls += 1
    return out * (1 + 0.1 * field.calls)


@each_way
@pytest.mark.parametrize("what", [drawn, scaled, counted])
def test_fields_that_begin_to_change_are_refused_as_those_that_always_did(
    way: dict[str, Any], what: Any
) -> None:
    for before in (0, AFTER):
        field = Turning(what)
        for _ in range(before):
            solve(field, start(), way)
        with pytest.raises((RuntimeError, ValueError)):
            solve(field, large(), way).u1.sum().backward()


@each_way
def test_fields_that_count_without_using_it_have_their_gradients(way: dict[str, Any]) -> None:
    def use(field: Turning, out: Tensor) -> Tensor:
        field.calls += 1
        return out

    field, u0 = Turning(use), large()
    expected = torch.autograd.grad(solve(field, u0, way).u1.sum(), u0)
    late(field, start(), way)
    for _ in range(3):
        solution = solve(field, u0, way)
        found = torch.autograd.grad(solution.u1.sum(), u0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_end_of_a_solve_that_is_not_finite_is_cut_off() -> None:
    """`u' = u^2` in steps of 0.25 from 1e3 overflows in single precision."""
    u0 = torch.tensor([1e3], requires_grad=True)
    codes, found = set(), []
    for _ in range(AFTER + 2):
        solution = solve(lambda t, u: u * u, u0, FOUR, throw=False)
        codes.add((solution.retcode, solution.stats.naccept))
        found += torch.autograd.grad(solution.u.sum(), u0)
    assert len(codes) == 1
    for x in found[1:]:
        torch.testing.assert_close(x, found[0], rtol=0, atol=0)


@each_way
def test_nothing_is_left_to_the_garbage_collector(way: dict[str, Any]) -> None:
    field, u0 = Field(), start()
    late(field, u0, way)
    gc.collect()
    gc.disable()
    try:
        solve(field, u0, way).u1.sum().backward()
        left = gc.collect()
    finally:
        gc.enable()
    assert left == 0
