"""Solves that are prepared: the later ones of a field, by one crossing forward and one back."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.julia_engine import flight
from pysciml_node.julia_engine.process import runtime

pytestmark = pytest.mark.julia

D = torch.float64
TIMES = [0.0, 0.3, 0.5, 0.5, 1.0]


class Decay(nn.Module):
    """A linear field, with a rate for each component."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, 2.0], dtype=dtype))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`."""
        return -self.rate * u


@pytest.fixture
def flown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The flights, as they are made."""
    flights: list[Any] = []
    fly = flight.fly

    def noted(*arguments: Any) -> Any:
        flights.append(fly(*arguments))
        return flights[-1]

    monkeypatch.setattr(flight, "fly", noted)
    return flights


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("end", [1.0, -1.0])
@pytest.mark.parametrize("saved", [True, False])
def test_later_solves_are_the_first_one(
    flown: list[Any], dtype: torch.dtype, end: float, saved: bool
) -> None:
    field = Decay(dtype)
    u0 = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.0, end))
    saveat = [end * t for t in TIMES] if saved else None
    options: dict[str, Any] = {"saveat": saveat, "tstops": [0.5 * end], "engine": "julia"}
    found = []
    for _ in range(3):
        solution = psn.solve(problem, psn.Tsit5(), **options)
        loss = solution.u.pow(2).sum() + 3 * solution.u1.sum()
        gradients = torch.autograd.grad(loss, (u0, field.rate))
        inside = solution(torch.tensor([0.21, 0.77], dtype=dtype) * end)
        record = solution.trajectory.record  # type: ignore[attr-defined]
        places = record.times, record.stops, record.inside, record.at_end, record.marks
        found.append((places, (solution.u, solution.t, inside), gradients, solution.stats))
    assert len(flown) == 2
    first, *later = found
    for places, states, gradients, stats in later:
        assert places == first[0]
        torch.testing.assert_close(states, first[1], rtol=0, atol=0)
        # Sums of cotangents are taken in another order.
        bound = 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradients, first[2], rtol=bound, atol=bound)
        assert (stats.nfe, stats.nvjp, stats.naccept) == (
            first[3].nfe,
            first[3].nvjp,
            first[3].naccept,
        )


def test_more_steps_than_there_is_room_for(flown: list[Any]) -> None:
    field, u0 = Decay(), torch.ones(2, dtype=D)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    for _ in range(2):
        solution = psn.solve(
            problem, psn.RK4(), controller=psn.FixedStep(), dt0=1e-3, saveat=TIMES, engine="julia"
        )
        exact = torch.exp(-torch.tensor(TIMES, dtype=D)[:, None] * field.rate)
        torch.testing.assert_close(solution.u, exact, rtol=1e-11, atol=0)
        (bar,) = torch.autograd.grad(solution.u.sum(), field.rate)
        (expected,) = torch.autograd.grad(exact.sum(), field.rate)
        torch.testing.assert_close(bar, expected, rtol=1e-10, atol=0)
    ((left, _),) = flown
    assert left.count == len(solution.trajectory.errors) == 1000


def test_a_failed_solve_has_the_gradient_of_what_it_reached(flown: list[Any]) -> None:
    factor = torch.tensor(1.0, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u, p: p * u**3, torch.ones(3, dtype=D), (0.0, 1.0), factor)
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.02, "throw": False}
    bars = []
    for engine in ("julia", "julia", "torch"):
        solution = psn.solve(problem, psn.Euler(), engine=engine, **options)
        assert not solution.success
        assert bool(solution.u.isfinite().all())
        (bar,) = torch.autograd.grad(solution.u[3].sum() + solution.u1.sum() * 0, factor)
        bars.append(bar)
    assert len(flown) == 1
    torch.testing.assert_close(bars[1], bars[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(bars[1], bars[2], rtol=1e-12, atol=0)


def test_a_parameter_that_was_changed_since_is_refused_in_the_sweep(flown: list[Any]) -> None:
    field = Decay()
    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    for _ in range(2):
        end = psn.solve(problem, engine="julia").u1
    with torch.no_grad():
        field.rate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.sum().backward()
    assert len(flown) == 1


def test_ctrl_c_stops_a_flight(flown: list[Any]) -> None:
    problem = psn.ODEProblem(Decay(), torch.ones(2, dtype=D), (0.0, 1.0))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "max_steps": 10**9}
    with torch.no_grad():
        for _ in range(2):
            psn.solve(problem, psn.Euler(), dt0=2e-2, engine="julia", **options)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            psn.solve(problem, psn.Euler(), dt0=1e-8, engine="julia", **options)
        timer.join()
        assert len(flown) == 1
        # Nothing is left over for the next one.
        again = psn.solve(problem, psn.Euler(), dt0=2e-2, engine="julia", **options)
    assert again.success


def test_what_julia_raises_is_raised_here() -> None:
    runtime.start()
    with pytest.raises(psn.JuliaError, match="KeyError"):
        runtime.cross("fly!", 10**9, *(0,) * 9)


def test_states_of_parts_and_parameters_that_lie_otherwise(flown: list[Any]) -> None:
    """A rotation, its matrix a transposed one, its state in two parts."""
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D).t().requires_grad_()
    start = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)

    def field(t: Tensor, u: tuple[Tensor, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (p @ torch.cat(u)).split(1)
        return x, y

    assert not matrix.is_contiguous()
    problem = psn.ODEProblem(field, tuple(start.split(1)), (0.0, 1.0), matrix)
    for _ in range(2):
        x, y = psn.solve(problem, engine="julia", rtol=1e-10, atol=1e-10).u1
        exact = torch.linalg.matrix_exp(matrix) @ start
        torch.testing.assert_close(torch.cat((x, y)), exact, rtol=1e-8, atol=1e-8)
        bars = torch.autograd.grad(x.sum() + 2 * y.sum(), (matrix, start), retain_graph=True)
        expected = torch.autograd.grad(exact[0] + 2 * exact[1], (matrix, start))
        torch.testing.assert_close(bars, expected, rtol=1e-7, atol=1e-8)
    assert len(flown) == 1


def test_gradients_have_the_shapes_that_tensors_had_when_the_solve_began(flown: list[Any]) -> None:
    """Other data that torch does not count must not move what the sweep writes, and where."""
    field, u0 = Decay(), torch.ones(2, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    for _ in range(2):
        end = psn.solve(problem, engine="julia").u1
    expected = torch.autograd.grad(end.sum(), (u0, field.rate), retain_graph=True)
    u0.data, field.rate.data = torch.ones(1, dtype=D), torch.ones(1, dtype=D)
    bars = torch.autograd.grad(end.sum(), (u0, field.rate))
    torch.testing.assert_close(bars, expected, rtol=0, atol=0)
    assert len(flown) == 1


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entries that are crossed to, as they are called."""
    names: list[str] = []
    cross = runtime._cross

    def noted(name: str, *words: int) -> int:
        names.append(name)
        return cross(name, *words)

    monkeypatch.setattr(runtime, "_cross", noted)
    return names


LONG: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 2.0**-17, "max_steps": 10**9}


@pytest.mark.parametrize("width", [2, 20_000])
def test_what_takes_longer_than_a_moment_goes_on(crossed: list[str], width: int) -> None:
    """Euler's steps of `u' = -r u`, in small ones and in those of which nothing is kept."""
    count = 2**17 if width == 2 else 2**8
    rate = torch.full((width,), 0.5, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u, p: -p * u, torch.ones(width, dtype=D), (0.0, 1.0), rate)
    for _ in range(2):
        end = psn.solve(problem, psn.Euler(), engine="julia", **{**LONG, "dt0": 1 / count}).u1
        (bar,) = torch.autograd.grad(end.sum(), rate)
    assert crossed == ["fly!", "go_on!", "pull_flight!", "go_on!"]
    expected = (1 - rate / count) ** count
    torch.testing.assert_close(end, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(bar, -expected / (1 - rate / count), rtol=1e-11, atol=0)


def test_a_handler_that_raises_once_julia_is_back_leaves_nothing_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What goes on after a moment, and a record of more steps than there was room for."""
    problem = psn.ODEProblem(Decay(), torch.ones(2, dtype=D), (0.0, 1.0))
    with torch.no_grad():
        for dt0 in (2.0**-17, 2.0**-8):
            options = {**LONG, "dt0": dt0, "engine": "julia"}
            for _ in range(2):
                expected = psn.solve(problem, psn.Euler(), **options)
            held, crossing = runtime.call("held"), runtime._runtime.crossings["fly!"]

            def struck(address: int, crossing: Any = crossing) -> int:
                crossing(address)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setitem(runtime._runtime.crossings, "fly!", struck)
                with pytest.raises(KeyboardInterrupt):
                    psn.solve(problem, psn.Euler(), **options)
            assert runtime.call("held") == held
            assert torch.equal(psn.solve(problem, psn.Euler(), **options).u, expected.u)
