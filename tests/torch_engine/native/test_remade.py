"""Functions that are made anew for each solve, and arguments: known again, and none mistaken."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.usefixtures("looks_in_both")

D = torch.float64
TIGHT: Any = {"rtol": 1e-9, "atol": 1e-9}
RATE = 1.0


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, dtype=D, **options)


def solved(f: Callable[..., Any], p: Any = None, compile: bool = True) -> psn.Solution:
    return psn.solve(psn.ODEProblem(f, ones(1), (0.0, 1.0), p=p), compile=compile, **TIGHT)


def end(f: Callable[..., Any], p: Any = None, compile: bool = True) -> Any:
    return solved(f, p, compile).u1.item()


def decay(rate: float, t: float = 1.0) -> Any:
    return pytest.approx(math.exp(-rate * t), rel=1e-7)


def by(rate: Any) -> Callable[..., Any]:
    """`du/dt = -rate * u`, a function of the same code each time."""
    return lambda t, u: -rate * u


def translations(run: Callable[[], object]) -> int:
    """How often something is exported."""
    with mock.patch("torch.export.export", wraps=torch.export.export) as export:
        run()
    return int(export.call_count)


class Net(nn.Module):
    """`du/dt = -rate * u` by a layer."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False, dtype=D)
        nn.init.constant_(self.layer.weight, -rate)

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.layer(u)
        return out

    def field(self, t: Tensor, u: Tensor) -> Tensor:
        return self(u)


def test_functions_with_the_same_captures_and_other_tensors_are_translated_once() -> None:
    net = Net()

    def run() -> None:
        for scale in (1.0, 2.0, 3.0):
            context = torch.full((1,), scale, dtype=D)
            assert end(lambda t, u: net(u) * context) == decay(scale)  # noqa: B023
            assert end(net.field) == decay(1.0)

    assert translations(run) == 2


class Chosen(nn.Module):
    """`du/dt = -rates[place] * u`, where the place is a number that the program holds."""

    def __init__(self, place: int, rates: list[float]) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor(rates, dtype=D))
        self.place = torch.tensor([place])

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        place = self.place.tolist()[0]
        return -self.rates[place : place + 1] * u


def test_modules_of_one_class_that_look_the_same_are_translated_once() -> None:
    def run(cases: list[tuple[int, list[float]]]) -> None:
        for place, rates in cases:
            f = Chosen(place, rates)
            solution = solved(f)
            assert solution.u1.item() == decay(rates[place])
            assert solution(0.3).item() == decay(rates[place], 0.3)
            solution.u1.backward()
            assert f.rates.grad is not None
            assert f.rates.grad[place].item() == pytest.approx(-math.exp(-rates[place]), rel=1e-6)

    assert translations(lambda: run([(0, [1.0, 2.0]), (0, [3.0, 4.0]), (0, [5.0, 6.0])])) == 1
    assert translations(lambda: run([(1, [1.0, 2.0]), (0, [3.0, 4.0]), (1, [5.0, 6.0])])) == 1
    assert translations(lambda: run([(1, [1.0, 2.0, 3.0]), (0, [3.0]), (2, [1.0, 2.0, 3.0])])) == 3


def test_an_argument_of_the_same_form_is_another_tensor_each_time() -> None:
    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        return -p * u if isinstance(p, Tensor) else -p["a"] * u - p["more"][0]

    def run() -> None:
        for rate in (1.0, 2.0, 3.0):
            assert end(f, torch.full((1,), rate, dtype=D)) == decay(rate)
            p = {"a": torch.full((1,), rate, dtype=D), "more": [torch.zeros(1, dtype=D)]}
            assert end(f, p) == decay(rate)

    assert translations(run) == 2


def test_arguments_of_other_forms_are_not_mistaken() -> None:
    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        if isinstance(p, dict):
            first, second = p.values()
            return -(first + 2 * second) * u
        if isinstance(p, Tensor):
            return -p.double().sum() * u * (2 if p.requires_grad else 1)
        if isinstance(p, tuple | list):
            return -p[0] * u * (1 if isinstance(p, tuple) else 3)
        return -p * u if type(p) is float else -2 * p * u

    cases: dict[str, tuple[Any, float | None]] = {
        "shape": (ones(1), 1.0),
        "another shape": (ones(3), 3.0),
        "dtype": (torch.ones(1), None),
        "gradient": (ones(1, requires_grad=True), 2.0),
        "parameter": (nn.Parameter(ones(1)), 2.0),
        "tuple": ((ones(1),), 1.0),
        "list": ([ones(1)], 3.0),
        "dict": ({"a": ones(1), "b": 2 * ones(1)}, 5.0),
        "order of a dict": ({"b": 2 * ones(1), "a": ones(1)}, 4.0),
        "number": (1.0, 1.0),
        "another kind of number": (1, 2.0),
        "apart": (ones(6)[::2][:1], 1.0),
    }
    for _ in range(2):
        for name, (p, rate) in cases.items():
            if rate is None:
                with pytest.raises(psn.CompileError, match="dtype"):
                    end(f, p)
            else:
                assert end(f, p) == decay(rate), name


@pytest.mark.parametrize("where", ["p", "attribute", "capture"])
def test_zeros_of_either_sign_are_told_apart(where: str) -> None:
    holder = nn.Module()

    def rate(zero: Any, u: Tensor) -> Tensor:
        return torch.atan2(torch.full_like(u, zero), -ones(1))

    for zero in (0.0, -0.0, 0.0):
        holder.zero = zero
        fields: dict[str, Any] = {
            "p": (lambda t, u, p: rate(p, u), zero),
            "attribute": (lambda t, u: rate(holder.zero, u), None),
            "capture": (lambda t, u: rate(zero, u), None),  # noqa: B023
        }
        found = end(*fields[where])
        assert found == pytest.approx(1 + math.copysign(math.pi, zero), rel=1e-7)


def test_a_parameter_that_is_the_argument_too_gets_both_gradients() -> None:
    k = nn.Parameter(ones(1))
    fields: list[Any] = [(lambda t, u, p: -k * p * u, k), (lambda t, u, p: -k * p[0] * u, (k,))]
    for f, p in fields * 2:
        # `u1 = exp(-k^2)`
        solution = solved(f, p)
        (gradient,) = torch.autograd.grad(solution(0.5).sum() + solution.u1.sum(), k)
        assert gradient.item() == pytest.approx(-math.exp(-0.5) - 2 * math.exp(-1), rel=1e-6)


def test_gradients_reach_what_each_function_captured() -> None:
    k = ones(1, requires_grad=True)
    for scale in (1.0, 2.0, 3.0):
        rate = scale * k
        (gradient,) = torch.autograd.grad(solved(lambda t, u: -rate * u).u1, k)  # noqa: B023
        assert gradient.item() == pytest.approx(-scale * math.exp(-scale), rel=1e-6)
        (gradient,) = torch.autograd.grad(solved(lambda t, u, p: -p * u, scale * k).u1, k)
        assert gradient.item() == pytest.approx(-scale * math.exp(-scale), rel=1e-6)


def test_dense_output_is_that_of_the_function_as_it_was() -> None:
    def made(rate: Tensor) -> tuple[Callable[..., Any], Callable[[Tensor], None]]:
        def change(other: Tensor) -> None:
            nonlocal rate
            rate = other

        return lambda t, u: -rate * u, change

    rates = [torch.full((1,), k, dtype=D, requires_grad=True) for k in (1.0, 2.0, 3.0)]
    pairs = [made(rate) for rate in rates]
    solutions = [solved(f) for f, _ in pairs]
    for _, change in pairs:
        change(9 * ones(1))
    for rate, solution in zip(rates, solutions, strict=True):
        k, found = rate.item(), solution(0.4)
        assert found.item() == decay(k, 0.4)
        (gradient,) = torch.autograd.grad(found.sum(), rate)
        assert gradient.item() == pytest.approx(-0.4 * math.exp(-0.4 * k), rel=1e-6)


def test_dense_output_is_that_of_the_argument_as_it_was() -> None:
    p = [ones(1, requires_grad=True)]
    first, given = solved(lambda t, u, p: -p[0] * u, p), p[0]
    p[0] = 2 * ones(1)
    second = solved(lambda t, u, p: -p[0] * u, p)
    assert second(0.4).item() == decay(2.0, 0.4)
    (gradient,) = torch.autograd.grad(first(0.4).sum(), given)
    assert gradient.item() == pytest.approx(-0.4 * math.exp(-0.4), rel=1e-6)


@pytest.mark.parametrize("given", ["capture", "p"])
def test_what_was_changed_in_place_is_not_evaluated_again(given: str) -> None:
    k = ones(1, requires_grad=True)
    for _ in range(2):
        captured, passed = (lambda t, u: -k * u, None), (lambda t, u, p: -p * u, k)
        f, p = captured if given == "capture" else passed
        solution = solved(f, p)
    with torch.no_grad():
        k.fill_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        solution(0.4).sum().backward()


def test_every_part_of_a_function_that_is_exchanged_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def f(t: Tensor, u: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return -(scale * RATE + shift) * u

    def g(t: Tensor, u: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return -(scale * RATE + shift + 1) * u

    def expect(rate: float) -> None:
        for _ in range(2):
            assert end(f) == decay(rate)

    expect(1.0)
    f.__defaults__ = (2.0,)
    expect(2.0)
    f.__kwdefaults__ = {"shift": 1.0}
    expect(3.0)
    monkeypatch.setitem(globals(), "RATE", 2.0)
    expect(5.0)
    f.__code__ = g.__code__
    expect(6.0)


def test_functions_of_one_code_and_other_captures() -> None:
    nets = [Net(1.0), Net(2.0)]
    nets[1].layer = nn.Sequential(nets[1].layer, nn.Tanh())  # type: ignore[assignment]
    for _ in range(2):
        for net in nets:
            f = lambda t, u: net.field(t, u)  # noqa: B023, E731
            assert end(f) == pytest.approx(end(f, compile=False), rel=1e-9)
        assert end(by(2.0)) == decay(2.0)
        assert end(by(3)) == decay(3)
        assert end(by(2 * ones(1))) == decay(2)


def test_tensors_that_come_to_have_attributes() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = ones(1)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -getattr(self.w, "alpha", 1.0) * self.w * u

    held: Any = Field()
    w: Any = ones(1)
    for f, tensor in ((held, held.w), (lambda t, u: -getattr(w, "alpha", 1.0) * w * u, w)):
        for alpha in (1.0, 2.0, 3.0):
            for _ in range(2):
                assert end(f) == decay(alpha)
            tensor.alpha = alpha + 1
    other: Any = ones(1)
    other.alpha = 7.0
    held.w = other
    assert end(held) == decay(7.0)


class Doubled(Tensor):
    """A tensor whose products are twice as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out.as_subclass(Tensor) if func is torch.Tensor.mul else out


def test_a_class_of_tensors_is_not_taken_for_another() -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -(p * u)

    assert end(f, ones(1)) == decay(1.0)
    # It is refused, or does as it does.
    doubled: Any = ones(1).as_subclass(Doubled)  # type: ignore[no-untyped-call]
    try:
        assert end(f, doubled) == decay(2.0)
    except psn.CompileError:
        assert end(f, doubled, compile=False) == decay(2.0)
    assert end(f, ones(1)) == decay(1.0)


@pytest.mark.parametrize("kind", ["module", "graph", "dict", "function"])
def test_what_a_function_captures_goes_with_it(kind: str) -> None:
    def run(scale: float) -> weakref.ref[Any]:
        net, context = Net(), scale * ones(1, requires_grad=True)
        table = {"context": context}
        inner = by(context)
        functions: dict[str, tuple[Callable[..., Any], Any]] = {
            "module": (lambda t, u: net(u), net),
            "graph": (lambda t, u: -context * u, context),
            "dict": (lambda t, u: -table["context"] * u, context),
            "function": (lambda t, u: inner(t, u), context),
        }
        f, captured = functions[kind]
        for _ in range(2):
            assert end(f) == decay(1.0 if kind == "module" else scale)
        return weakref.ref(captured)

    run(1.0)  # torch.export keeps the last tensor that it has seen
    gone = run(2.0)
    gc.collect()
    assert gone() is None


def test_threads_solve_functions_of_one_code() -> None:
    net = Net()

    def job(i: int) -> bool:
        k = 1.0 + i % 5
        context = torch.full((1,), k, dtype=D, requires_grad=True)
        u1 = solved(lambda t, u, p: net(u) * context * p, ones(1)).u1
        (gradient,) = torch.autograd.grad(u1, context)
        value = math.exp(-k)
        return abs(u1.item() - value) < 1e-7 and abs(gradient.item() + value) < 1e-6

    job(0)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(job, range(60)))


def test_a_solve_inside_a_field() -> None:
    """`v' = -u` from one over one unit of time, and `u' = v(1) = 1 - u`."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        inner = psn.ODEProblem(lambda s, v, p: -p, ones(1), (0.0, 1.0), p=u)
        return psn.solve(inner, compile=True, **TIGHT).u1  # type: ignore[no-any-return]

    u0 = torch.zeros(1, dtype=D, requires_grad=True)
    u1 = psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), **TIGHT).u1
    assert u1.item() == pytest.approx(1 - math.exp(-1), rel=1e-7)
    (gradient,) = torch.autograd.grad(u1, u0)
    assert gradient.item() == decay(1.0)
