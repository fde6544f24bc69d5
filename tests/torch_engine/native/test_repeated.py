"""Solves that were before, but for their states and the numbers of tensors, are found in C."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pysciml_node as psn
from pysciml_node.errors import CompileError
from pysciml_node.torch_engine.native import departure, prepared
from pysciml_node.torch_engine.native.compiler import available

pytestmark = [
    pytest.mark.skipif(not available()[0], reason=available()[1]),
    pytest.mark.skipif(
        not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no lock"
    ),
]

TOLERANCES: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


class Growth(nn.Module):
    """`u' = k u`."""

    def __init__(self, k: float = 0.5) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor([k], dtype=torch.float64))
        self.factor = 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`."""
        return self.factor * self.k * u


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The problems of solves that were none of those before."""
    problems: list[Any] = []
    look_up = prepared._look_up

    def noted(problem: Any, *how: Any) -> Any:
        problems.append(problem)
        return look_up(problem, *how)

    monkeypatch.setattr(prepared, "_look_up", noted)
    return problems


def start(value: float = 1.0) -> Tensor:
    return torch.tensor([[value], [2 * value]], dtype=torch.float64)


def solved(field: Any, u0: Tensor, end: Any = 1.0, p: Any = None, **options: Any) -> psn.Solution:
    problem = psn.ODEProblem(field, u0, (0.0, end), p, **options)
    return psn.solve(problem, compile=True, engine="torch", **TOLERANCES)


def expect_growth(solution: psn.Solution, u0: Tensor, rate: float) -> None:
    expected = u0 * torch.exp(torch.tensor(rate, dtype=torch.float64))
    torch.testing.assert_close(solution.u1.detach(), expected, rtol=1e-7, atol=0)


def of_closures() -> Callable[[], Any]:
    field = Growth()
    return lambda: lambda t, u: field(t, u)


def of_methods() -> Callable[[], Any]:
    field = Growth()
    return lambda: field.forward


def of_modules() -> Callable[[], Any]:
    field = Growth()
    return lambda: field


@pytest.mark.parametrize("fields", [of_modules, of_closures, of_methods])
def test_the_next_solve_is_not_looked_up(
    fields: Callable[[], Callable[[], Any]], looked_up: list[Any]
) -> None:
    make = fields()
    for count in range(6):
        u0 = start(1.0 + count)
        with torch.no_grad() if count % 2 else nullcontext():
            expect_growth(solved(make(), u0), u0, 0.5)
    # The first; a function that was made anew may need another look.
    assert len(looked_up) <= (1 if fields is of_modules else 2)


def test_numbers_of_parameters_are_those_of_each_solve(looked_up: list[Any]) -> None:
    field, u0 = Growth(), start()
    for k in (0.5, 0.25, -1.0):
        with torch.no_grad():
            field.k.fill_(k)
        solution = solved(field, u0)
        expect_growth(solution, u0, k)
        (found,) = torch.autograd.grad(solution.u1.sum(), field.k)
        torch.testing.assert_close(found, solution.u1.detach().sum().reshape(1))
    field.k.data = torch.tensor([2.0], dtype=torch.float64)
    expect_growth(solved(field, u0), u0, 2.0)
    assert len(looked_up) == 1


def changed_number(field: Growth) -> None:
    field.factor = 2.0


def exchanged_parameter(field: Growth) -> None:
    field.k = nn.Parameter(2 * field.k.detach())


def another_method(field: Growth) -> None:
    field.forward = lambda t, u: 2 * field.k * u  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [changed_number, exchanged_parameter, another_method])
def test_a_field_that_has_changed_is_looked_up(
    change: Callable[[Growth], None], looked_up: list[Any]
) -> None:
    field, u0 = Growth(), start()
    for _ in range(3):
        expect_growth(solved(field, u0), u0, 0.5)
    change(field)
    for _ in range(3):
        expect_growth(solved(field, u0), u0, 1.0)
    assert len(looked_up) == 2


def test_another_interval_state_or_class_is_looked_up(looked_up: list[Any]) -> None:
    field, u0 = Growth(), start()
    for _ in range(2):
        expect_growth(solved(field, u0), u0, 0.5)
    for end in (2.0, torch.tensor(2.0), -1.0):
        expect_growth(solved(field, u0, end), u0, 0.5 * float(end))
    expect_growth(solved(field, u0[:1]), u0[:1], 0.5)
    assert len(looked_up) == 5

    class Decay(Growth):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.k * u

    field.__class__ = Decay
    expect_growth(solved(field, u0), u0, -0.5)
    assert len(looked_up) == 6


def test_an_argument_is_read(looked_up: list[Any]) -> None:
    class Field(nn.Module):
        def forward(self, t: Tensor, u: Tensor, p: Any = None) -> Tensor:
            return 0.5 * u if p is None else p * u

    field, u0 = Field(), start()
    for p, rate in ((None, 0.5), (None, 0.5), (1.0, 1.0), (torch.tensor(2.0).double(), 2.0)):
        expect_growth(solved(field, u0, p=p), u0, rate)
    # Without an argument and with one: a number is a tensor there.
    assert len(looked_up) == 2


class Doubling(TorchFunctionMode):
    """A mode that changes operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Doubling, torch.autograd.forward_ad.dual_level])
def test_modes_are_refused_at_each_solve(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    field, u0 = Growth(), start()
    for _ in range(3):
        expect_growth(solved(field, u0), u0, 0.5)
    with mode(), pytest.raises((CompileError, RuntimeError)):
        solved(field, u0)
    expect_growth(solved(field, u0), u0, 0.5)


def test_dense_output_says_what_has_changed_since(looked_up: list[Any]) -> None:
    field, u0 = Growth(), start()
    solutions = [solved(field, u0) for _ in range(3)]
    assert len(looked_up) == 1
    for solution in solutions:
        torch.testing.assert_close(solution(1.0).detach(), solution.u1.detach())
    with torch.no_grad():
        field.k.mul_(2)
    for solution in solutions:
        with pytest.raises(RuntimeError, match="k"):
            solution(0.5)


@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.T.contiguous().T])
def test_a_sweep_in_many_turns_is_one(
    lay: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on in C until it is through, and where it is not for C, in Python."""

    def run() -> tuple[Tensor, ...]:
        field, u0 = Growth(), lay(start()).requires_grad_()
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        how: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1e-4}
        solution = psn.solve(problem, psn.RK4(), compile=True, engine="torch", **how)
        return torch.autograd.grad(solution.u1.sum(), [u0, field.k])

    expected = run()
    torch.testing.assert_close(expected[0], torch.full((2, 1), 0.5).double().exp())
    torch.testing.assert_close(expected[1], (start() * 0.5 / 0.5 * expected[0]).sum().reshape(1))
    monkeypatch.setattr(departure, "TURN", 0.0)
    for found, one in zip(run(), expected, strict=True):
        assert torch.equal(found, one)


def test_only_gradients_that_are_asked_for_are_written() -> None:
    field, u0 = Growth(), start().requires_grad_()
    for inputs in ([u0], [field.k], [u0, field.k]):
        gradients = torch.autograd.grad(solved(field, u0).u1.sum(), inputs)
        expected = {id(u0): u0.detach() * 0 + torch.e**0.5}
        expected[id(field.k)] = (u0.detach() * torch.e**0.5).sum().reshape(1)
        for x, found in zip(inputs, gradients, strict=True):
            torch.testing.assert_close(found, expected[id(x)], rtol=1e-7, atol=0)


def test_gradients_are_those_of_the_solve_where_tensors_have_other_data_since() -> None:
    """They have the size that they had then: C wrote beyond the end of the new one."""
    field, u0 = Growth(), start().requires_grad_()
    solution = solved(field, u0)
    u0.data, field.k.data = torch.empty(0).double(), torch.empty(0).double()
    of_u0, of_k = torch.autograd.grad(solution.u1.sum(), [u0, field.k])
    torch.testing.assert_close(of_u0, start() * 0 + torch.e**0.5, rtol=1e-7, atol=0)
    torch.testing.assert_close(of_k, (start() * torch.e**0.5).sum().reshape(1), rtol=1e-7, atol=0)


def weighted(t: Tensor, u: Tensor, p: Any) -> Tensor:
    """`u' = k u`, with `k` in an extra argument."""
    k = p["k"] if isinstance(p, dict) else p[0] if isinstance(p, tuple | list) else p
    return k * u


@pytest.mark.parametrize("wrap", [lambda k: k, lambda k: (k,), lambda k: [k], lambda k: {"k": k}])
def test_an_extra_argument_of_tensors_is_read_at_each_solve(
    wrap: Callable[[Tensor], Any], looked_up: list[Any]
) -> None:
    u0 = start()
    for k in (0.5, 0.25, -1.0, 0.125):
        rate = torch.tensor(k, dtype=torch.float64, requires_grad=True)
        solution = solved(weighted, u0, p=wrap(rate))
        expect_growth(solution, u0, k)
        (found,) = torch.autograd.grad(solution.u1.sum(), rate)
        torch.testing.assert_close(found, solution.u1.detach().sum())
    count = len(looked_up)
    assert count <= 2
    # Of another form, and then of the first again.
    for shape in ((1,), (2, 1), ()):
        p = wrap(torch.full(shape, 0.5, dtype=torch.float64))
        expect_growth(solved(weighted, u0, p=p), u0, 0.5)
    assert len(looked_up) == count + 3


def test_tensors_of_an_argument_that_are_those_of_the_field_are_told_from_others() -> None:
    field, u0 = Growth(), start()
    for k in (field.k, torch.tensor([2.0], dtype=torch.float64), field.k):
        problem = psn.ODEProblem(lambda t, u, p: p * field(t, u), u0, (0.0, 1.0), k)
        for _ in range(3):
            solution = psn.solve(problem, compile=True, engine="torch", **TOLERANCES)
            expect_growth(solution, u0, 0.5 * k.item())
    for _ in range(2):
        field.k.data.mul_(2)
        problem = psn.ODEProblem(lambda t, u, p: p * field(t, u), u0, (0.0, 1.0), field.k)
        solution = psn.solve(problem, compile=True, engine="torch", **TOLERANCES)
        expect_growth(solution, u0, field.k.item() ** 2)


@pytest.mark.parametrize(("wrap", "key"), [(lambda k: [k], 0), (lambda k: {"k": k}, "k")])
def test_what_is_in_an_argument_later_is_not_what_was_solved(
    wrap: Callable[[Tensor], Any], key: Any
) -> None:
    u0, p = start(), wrap(torch.tensor(0.5, dtype=torch.float64))
    solutions = [solved(weighted, u0, p=p) for _ in range(3)]
    p[key] = torch.tensor(3.0, dtype=torch.float64)
    for solution in solutions:
        expected = u0 * torch.exp(torch.tensor(0.25, dtype=torch.float64))
        torch.testing.assert_close(solution(0.5), expected, rtol=1e-7, atol=0)
    expect_growth(solved(weighted, u0, p=p), u0, 3.0)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda k: k, "p"),
        (lambda k: (1, k), "p[1]"),
        (lambda k: [k], "p[0]"),
        (lambda k: {"k": k}, "p['k']"),
        (lambda k: {"k": (k,)}, "p['k'][0]"),
    ],
)
def test_dense_output_names_what_has_changed_in_an_argument(
    wrap: Callable[[Tensor], Any], name: str
) -> None:
    def field(t: Tensor, u: Tensor, p: Any) -> Tensor:
        while not isinstance(p, Tensor):
            p = [*(p.values() if isinstance(p, dict) else p)][-1]
        return p * u

    u0, k = start(), torch.tensor(0.5, dtype=torch.float64)
    solutions = [solved(field, u0, p=wrap(k)) for _ in range(3)]
    k.mul_(2)
    for solution in solutions:
        with pytest.raises(RuntimeError, match=f"(^|\\W){re.escape(name)}\\W"):
            solution(0.5)


def test_rosenbrock_steps_with_and_without_gradients_are_not_made_again(
    looked_up: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    field, u0, made = Growth(), start(), []
    make = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *how: made.append(how) or make(*how))
    for count in range(8):
        with torch.no_grad() if count % 4 < 2 else nullcontext():
            problem = psn.ODEProblem(field, u0, (0.0, 1.0))
            solution = psn.solve(problem, psn.Rodas5P(), compile=True, engine="torch", **TOLERANCES)
            expect_growth(solution, u0, 0.5)
        if count % 4 > 1:
            (found,) = torch.autograd.grad(solution.u1.sum(), field.k)
            expected = (u0 * torch.e**0.5).sum().reshape(1)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert len(made) == 2
    assert len(looked_up) == 4  # the first of each kind after the other
