"""Requests that are filled in C: the same solves as in Python, of tensors however they lie."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native import crossing, departure
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

TIMES = [0.25, 0.5, 1.0]


class Decay(nn.Module):
    """`u' = A u`, each row of `u` by itself."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        start = torch.arange(size * size, dtype=torch.float64).reshape(size, size)
        self.a = nn.Parameter(torch.sin(start) - torch.eye(size, dtype=torch.float64))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`, `(B, N)`."""
        return u @ self.a.T


def solved(field: nn.Module, u0: Tensor, **options: Any) -> list[Tensor]:
    """The saved states, and the gradients of the sum of their squares."""
    u0 = u0.detach().requires_grad_()
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    options = {"rtol": 1e-9, "atol": 1e-9, "saveat": TIMES, **options}
    solution = psn.solve(problem, compile=True, engine="torch", **options)
    inputs = [u0, *field.parameters()]
    return [solution.u.detach(), *torch.autograd.grad(solution.u.square().sum(), inputs)]


def exact(field: Decay, u0: Tensor) -> list[Tensor]:
    """The same by matrix exponentials."""
    u0, a = u0.detach().requires_grad_(), field.a
    u = torch.stack([u0 @ torch.linalg.matrix_exp(t * a).T for t in TIMES])
    return [u.detach(), *torch.autograd.grad(u.square().sum(), [u0, a])]


def expect_exact(field: Decay, u0: Tensor) -> None:
    for found, expected in zip(solved(field, u0), exact(field, u0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


WAYS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "more steps than there is room for": {"controller": psn.FixedStep(), "dt0": 1 / 300},
    "an event": {
        "events": psn.Event(lambda t, u: u.sum() - 1.7, terminal=True),
        "saveat": None,
    },
    "two methods": {"algorithm": psn.AutoTsit5()},
    "progress": {"progress": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_in_python_requests_are_filled_as_in_c(
    way: str, monkeypatch: pytest.MonkeyPatch, start: Tensor
) -> None:
    options = dict(WAYS[way])
    algorithm = options.pop("algorithm", psn.Tsit5())

    def run() -> list[Tensor]:
        u0, field = start.requires_grad_(), Decay()
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        given = {"saveat": TIMES, **options}
        solution = psn.solve(problem, algorithm, compile=True, engine="torch", **given)
        gradients = torch.autograd.grad(solution.u.square().sum(), [u0, *field.parameters()])
        return [solution.u.detach(), solution.step_times, *gradients]

    in_c, made = run(), []

    def counted(*arguments: Any, **further: Any) -> crossing.Call:
        made.append(arguments)
        return crossing.call_of(*arguments, **further)

    monkeypatch.setattr(departure, "call_of", counted)
    for name in ("_cross", "_take_steps", "_pull_back"):
        monkeypatch.setattr(crossing, name, None)
    # Other options are another departure, whose calls are made in Python.
    options["max_steps"] = 9999
    for found, expected in zip(run(), in_c, strict=True):
        assert torch.equal(found, expected)
    assert made


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def negated(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def spread(x: Tensor) -> Tensor:
    return torch.stack((x, x), dim=-1)[..., 0]


@pytest.mark.parametrize("lay", [transposed, negated, spread])
def test_parameters_may_come_to_lie_otherwise(lay: Callable[[Tensor], Tensor]) -> None:
    """Between two solves, where the address may stay the same."""
    field, u0 = Decay(3), torch.ones(2, 3, dtype=torch.float64)
    for _ in range(2):
        expect_exact(field, u0)
    field.a.data = lay(field.a.data)
    for _ in range(2):
        expect_exact(field, u0)
    field.a.data = field.a.data.T  # the same memory, read the other way
    for _ in range(2):
        expect_exact(field, u0)


@pytest.mark.parametrize("lay", [transposed, negated, spread])
def test_initial_states_may_lie_in_any_way(lay: Callable[[Tensor], Tensor]) -> None:
    field, u0 = Decay(3), torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]], dtype=torch.float64)
    for x in (u0, lay(u0), u0):
        expect_exact(field, x)


@pytest.mark.parametrize("lay", [transposed, negated, spread])
def test_cotangents_may_lie_in_any_way(lay: Callable[[Tensor], Tensor]) -> None:
    field, bar = Decay(), torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    u0 = torch.ones(2, 2, dtype=torch.float64)
    solution = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), compile=True)
    (expected,) = torch.autograd.grad(solution.u1, field.a, bar, retain_graph=True)
    (found,) = torch.autograd.grad(solution.u1, field.a, lay(bar))
    assert torch.equal(found, expected)


def test_numbers_of_saved_times_and_steps_are_in_the_log() -> None:
    """`step_times` and dense output read what C has noted behind the request."""
    field, u0 = Decay(), torch.ones(1, 2, dtype=torch.float64)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    solution = psn.solve(
        problem, psn.RK4(), controller=psn.FixedStep(), dt0=1 / 128, saveat=TIMES, compile=True
    )
    expected = torch.arange(129, dtype=torch.float64) / 128
    torch.testing.assert_close(solution.step_times, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(solution(0.5), solution.u[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("counts", [(4, 4, 9, 3, 200, 4), (100, 2, 2)])
def test_steps_of_one_size_may_be_more_or_fewer_than_lately(counts: tuple[int, ...]) -> None:
    """Room is made for as many as the solve before took."""
    field, u0 = Decay(), torch.ones(1, 2, dtype=torch.float64)
    for count in counts:
        options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1 / count}
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        solution = psn.solve(problem, psn.Euler(), compile=True, **options)
        factor = torch.eye(2, dtype=torch.float64) + field.a.detach() / count
        expected = torch.stack(
            [u0 @ torch.linalg.matrix_power(factor.T, n) for n in range(count + 1)]
        )
        torch.testing.assert_close(solution.u.detach(), expected, rtol=1e-12, atol=0)


def test_a_solve_that_runs_out_of_steps_has_those_that_it_took() -> None:
    """Also where there was no more room for another."""
    field, u0 = Decay(), torch.ones(1, 2, dtype=torch.float64)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1 / 8, "compile": True}
    for most in (8, 3, 8, 8, 5):
        solution = psn.solve(problem, psn.Euler(), max_steps=most, throw=False, **options)
        assert len(solution.step_times) == len(solution.u) == most + 1
        assert solution.success == (most == 8)


def test_threads_may_solve_the_same_field_at_once() -> None:
    field = Decay()
    starts = [torch.full((1, 2), 1.0 + i, dtype=torch.float64) for i in range(4)]
    expected = [solved(field, u0) for u0 in starts]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            pairs = zip(solved(field, starts[i]), expected[i], strict=True)
            if not all(torch.equal(found, one) for found, one in pairs):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def start() -> Tensor:
    return torch.tensor([[1.0, 0.5]], dtype=torch.float64)
