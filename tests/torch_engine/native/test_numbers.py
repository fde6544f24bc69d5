"""Numbers in `p`, and what they cost: other numbers are other values, and no other code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.problems.state import StateSpec
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.translation import export, repeated

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
_START = torch.tensor([1.0, 2.0], dtype=D)


class _Rates(NamedTuple):
    fast: float
    slow: float


def _solve(f: Any, p: Any, algorithm: Any = None, u0: Tensor = _START) -> psn.Solution:
    problem = psn.ODEProblem(f, u0, (0.0, 1.0), p=p)
    return psn.solve(problem, algorithm, rtol=1e-9, atol=1e-9, compile=True)


def _decays(u1: Tensor, rate: float, start: Tensor = _START) -> None:
    torch.testing.assert_close(u1.detach(), start * math.exp(-rate), rtol=1e-7, atol=0)


@pytest.fixture
def nothing_made() -> Any:
    return mock.patch.object(export, "_translate", side_effect=AssertionError("made again"))


@pytest.mark.parametrize(
    ("f", "p_of"),
    [
        (lambda t, u, p: -p * u, lambda rate: rate),
        (lambda t, u, p: -p["part"][0] * u * p["part"][1], lambda rate: {"part": [rate, 1.0]}),
        (lambda t, u, p: -(p.fast + p.slow) * u, lambda rate: _Rates(rate, 0.0)),
        (lambda t, u, p: -p[0] * u / p[1], lambda rate: (rate, torch.ones(2, dtype=D))),
    ],
)
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Rodas5P(), psn.KenCarp4()])
def test_other_numbers_need_no_other_code(
    f: Any, p_of: Callable[[float], Any], algorithm: Any, nothing_made: Any
) -> None:
    def solved(rate: float) -> None:
        u0 = _START.clone().requires_grad_()
        solution = _solve(f, p_of(rate), algorithm, u0)
        _decays(solution.u1, rate)
        _decays(solution(0.5), rate / 2)
        (gradient,) = torch.autograd.grad(solution.u1.sum(), u0)
        torch.testing.assert_close(gradient, torch.full_like(u0, math.exp(-rate)))

    solved(0.5)
    with nothing_made:
        solved(0.75)
        solved(-0.25)


def test_members_share_numbers(nothing_made: Any) -> None:
    starts = torch.stack((_START, 3 * _START))

    def solved(rate: float) -> None:
        one = psn.ODEProblem(lambda t, u, p: -p * u, _START, (0.0, 1.0), p=rate)
        many = psn.solve(psn.EnsembleProblem(one, u0=starts), rtol=1e-9, atol=1e-9, compile=True)
        _decays(many.u1, rate, starts)
        _decays(many[1](0.5), rate / 2, starts[1])

    solved(0.5)
    with nothing_made:
        solved(0.75)


def test_stochastic_equations_read_numbers(nothing_made: Any) -> None:
    def solved(p: tuple[float, float]) -> None:
        problem = psn.SDEProblem(
            lambda t, u, p: p[0] * u, lambda t, u, p: p[1] * u, _START[:, None], (0.0, 1.0), p=p
        )
        found = [
            psn.solve(problem, generator=torch.Generator().manual_seed(0), compile=compiled).u1
            for compiled in (True, False)
        ]
        torch.testing.assert_close(*found, rtol=1e-12, atol=0)

    solved((0.5, 0.1))
    with nothing_made:
        solved((0.25, 0.2))


@pytest.mark.parametrize(
    ("f", "rate_of"),
    [
        (lambda t, u, p: -math.sin(p) * u, math.sin),
        (lambda t, u, p: -u if p > 0.6 else -2 * u, lambda p: 1.0 if p > 0.6 else 2.0),
        (lambda t, u, p: -p * u if isinstance(p, float) else u, lambda p: p),
        (lambda t, u, p: -torch.full_like(u, p) * u, lambda p: p),
        (lambda t, u, p: -sum(p for _ in range(2)) * u, lambda p: 2 * p),
    ],
)
def test_numbers_that_python_uses_are_those_of_the_solve(f: Any, rate_of: Any) -> None:
    for p in (0.5, 0.75, 0.5, 0.5, 0.75, 0.75, 0.5):
        _decays(_solve(f, p).u1, rate_of(p))


def test_exponents_may_be_numbers() -> None:
    """`u' = -u^n` has `u^(1 - n) = u0^(1 - n) + (n - 1) t`."""
    for n in (2.0, 3.0, 2.5):
        u0 = _START.clone().requires_grad_()
        u1 = _solve(lambda t, u, p: -(u**p), n, u0=u0).u1
        expected = (u0 ** (1 - n) + (n - 1)) ** (1 / (1 - n))
        torch.testing.assert_close(u1, expected, rtol=1e-7, atol=0)
        gradients = [torch.autograd.grad(x.sum(), u0)[0] for x in (u1, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("as_entry", [False, True])
def test_solves_with_numbers_that_were_before_begin_at_once(
    as_entry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`u' = -p k u` has `u1 = u0 exp(-p k)`, and `du1/dk = -p u1`."""
    k = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def field(t: Tensor, u: Tensor, p: Any) -> Tensor:
        rate = p["rate"] if as_entry else p
        return -rate * k * u

    def expect_decay(rate: float) -> None:
        u1 = _solve(field, {"rate": rate} if as_entry else rate).u1
        _decays(u1, rate * 0.5)
        (gradient,) = torch.autograd.grad(u1.sum(), k)
        torch.testing.assert_close(gradient, -rate * u1.detach().sum(), rtol=1e-7, atol=0)

    def fail(*_: Any) -> None:
        raise AssertionError("a solve that was before")

    for rate in (0.5, 1.5) * 3:
        expect_decay(rate)
    if repeated._repeat is not None:  # there is an interpreter's lock
        monkeypatch.setattr(attempt, "NativeSolve", fail)
    for rate in (1.5, 0.5, 0.5):
        expect_decay(rate)


_AT_HALF = {0.5: 3.0}


def _at_once(t: Tensor, u: Tensor, p: float) -> Tensor:
    try:
        return -math.floor(p) * u
    except Exception:
        return 0 * u


@pytest.mark.parametrize(
    ("f", "rate_of"),
    [
        (lambda t, u, p: 0 * u if isinstance(p, float) and p < 0 else -p * u, lambda p: max(p, 0)),
        (lambda t, u, p: -_AT_HALF.get(p, 1.0) * u, lambda p: _AT_HALF.get(p, 1.0)),
        (lambda t, u, p: -(2.0 if p in _AT_HALF else 1.0) * u, lambda p: 1.0 + (p == 0.5)),
        (lambda t, u, p: -((p > 0.1) + (p > 0.4)) * u, lambda p: (p > 0.1) + (p > 0.4)),
        (_at_once, math.floor),
    ],
)
def test_what_fields_ask_of_numbers_is_answered_for_each(f: Any, rate_of: Any) -> None:
    """Nothing of it is seen in a trace, and it is no matter for the number that comes first.

    Later solves with a number are found at once, whichever number was before.
    """
    for p in (0.25, 0.5, -0.5, 1.25) * 3 + (0.25, 0.25, 1.25, 1.25, -0.5, -0.5, 0.5):
        if p > 0 or f is not _at_once:
            _decays(_solve(f, p).u1, rate_of(p))


def test_what_stochastic_functions_and_members_ask_of_numbers() -> None:
    def drift(t: Tensor, u: Tensor, p: list[float]) -> Tensor:
        return u * (_AT_HALF.get(p[0], 1.0))

    def diffusion(t: Tensor, u: Tensor, p: list[float]) -> Tensor:
        return 0.1 * u * _AT_HALF.get(p[1], 1.0)

    def decay(t: Tensor, u: Tensor, p: float) -> Tensor:
        return -_AT_HALF.get(p, 1.0) * u

    for p in ([0.25, 0.25], [0.5, 0.25], [0.25, 0.5]):
        problem = psn.SDEProblem(drift, diffusion, _START[:, None], (0.0, 1.0), p=p)
        found = [
            psn.solve(problem, generator=torch.Generator().manual_seed(0), compile=compiled).u1
            for compiled in (True, False)
        ]
        torch.testing.assert_close(*found, rtol=1e-12, atol=0)
        one = psn.ODEProblem(decay, _START, (0.0, 1.0), p=p[0])
        many = psn.EnsembleProblem(one, u0=torch.stack((_START, 3 * _START)))
        u1 = psn.solve(many, rtol=1e-9, atol=1e-9, compile=True).u1
        _decays(u1, _AT_HALF.get(p[0], 1.0), many.u0)


def test_a_field_that_counts_has_its_count_of_the_solve() -> None:
    calls: list[int] = []

    def f(t: Tensor, u: Tensor, p: float) -> Tensor:
        calls.append(1)
        return -p * u

    _solve(f, 0.25)
    before = len(calls)
    _decays(_solve(f, 0.5).u1, 0.5)
    assert len(calls) == before


def test_whole_numbers_count() -> None:
    for n in (1, 3, 2):
        _decays(_solve(lambda t, u, p: -sum(u for _ in range(p)), n).u1, n)


def test_single_precision_has_the_numbers_of_python() -> None:
    """Products that single precision does not have: Planck's constant over that of Boltzmann."""
    u0 = torch.ones(2)
    for h in (6.6e-34, 1.3e-33):
        u1 = _solve(lambda t, u, p: -(p[0] * p[0]) / (p[1] * p[1]) * 1e21 * u, (h, 1.4e-23), u0=u0)
        torch.testing.assert_close(
            u1.u1, u0 * math.exp(-((h / 1.4e-23) ** 2) * 1e21), rtol=1e-5, atol=0
        )


def test_a_field_that_is_made_anew_for_each_number_is_told() -> None:
    def decay(rate: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, u: -rate * u

    spec = StateSpec.of(torch.ones(2))
    for k in range(7):
        export.translate(decay(0.5 + k), spec)
        export.translate(decay(0.5 + k), StateSpec.of(torch.ones(3 + k)))
        export.translate(decay(torch.tensor(0.5 + k)), spec)
    with pytest.warns(psn.PsnWarning, match=r"8 times .*\n  Write a tensor"):
        export.translate(decay(0.1), spec)
    export.translate(decay(0.2), spec)  # once


@pytest.mark.parametrize(
    "f",
    [
        lambda t, u, p: -u * ((u > 0) * p),
        lambda t, u, p: -u * torch.where(u > 0.5, p, 2 * p),
        lambda t, u, p: -u * torch.as_tensor(p),
        lambda t, u, p: -u * (torch.searchsorted(_START, u.detach() / 2) + 1 / p),
        lambda t, u, p: -u * (1.0 + ((u > 0) > p)),
    ],
    ids=["a mask", "a choice", "a tensor", "places", "a comparison"],
)
def test_numbers_that_torch_rounds_to_single_precision_are_rounded(f: Any) -> None:
    """Beside whole numbers and truths alone 0.1 is 0.100000001, and as a tensor it is not."""
    for p in (0.1, 0.7, 0.1):
        problem = psn.ODEProblem(f, _START, (0.0, 1.0), p=p)
        options: Any = {"controller": psn.FixedStep(), "dt0": 0.25}
        native, eager = (
            psn.solve(problem, psn.RK4(), compile=compile, **options).u1
            for compile in (True, False)
        )
        torch.testing.assert_close(native, eager, rtol=1e-13, atol=0)


_COUNT = 4000
_DRAWN = torch.Generator().manual_seed(0)
_WAVE = torch.rand(_COUNT, dtype=D, generator=_DRAWN)
_TIMES, _WHOLE = torch.randint(1, 60, (2, _COUNT), generator=_DRAWN).to(D)
_SHIFT = _WHOLE - _TIMES * _WAVE

JUMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": lambda x: torch.round(x + 0.5),
    "sign": lambda x: torch.sign(x - _WHOLE),
    "less": lambda x: torch.where(x < _WHOLE, 1.0, 2.0).to(D),
    "greater or equal": lambda x: (x >= _WHOLE).to(D),
    "equal": lambda x: (x == _WHOLE).to(D),
    "remainder": lambda x: x % 1.0,
    "fmod": lambda x: torch.fmod(x, 1.0),
    "whole quotient": lambda x: x.detach() // 1.0,
}


@pytest.mark.parametrize("kind", ["ordinary", "stochastic", "members"])
@pytest.mark.parametrize("jump", JUMPS)
def test_a_product_and_a_sum_are_rounded_apart_before_a_jump(jump: str, kind: str) -> None:
    """`n u + s` is a whole number up to rounding, and its last bit decides on the value."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return JUMPS[jump](_TIMES * u + _SHIFT)

    # A step of one, so that the derivative is what the state moves by.
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1.0}
    ends = []
    for compile in (True, False):
        if kind == "stochastic":
            noisy = psn.SDEProblem(f, lambda t, u: torch.zeros_like(u), _WAVE, (0.0, 1.0))
            u1 = psn.solve(noisy, psn.EM(), compile=compile, **options).u1
        elif kind == "members":
            one = psn.ODEProblem(f, _WAVE, (0.0, 1.0))
            many = psn.EnsembleProblem(one, u0=_WAVE.expand(2, _COUNT))
            u1 = psn.solve(many, psn.Euler(), compile=compile, **options).u1[1]
        else:
            u1 = psn.solve(
                psn.ODEProblem(f, _WAVE, (0.0, 1.0)), psn.Euler(), compile=compile, **options
            ).u1
        ends.append(u1)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
