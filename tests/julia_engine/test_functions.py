"""Functions and closures in Julia: translated as modules are, or called back where that shows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.julia_engine.called import CallbackField, field_of
from pysciml_node.julia_engine.fields import Field, ProgramField

pytestmark = pytest.mark.julia

D = torch.float64


def made(problem: psn.ODEProblem) -> Field:
    return field_of(problem, problem.u0, gradients=True, implicit=False)


def decay(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return -p["rate"] * u + torch.where(t > 0.5, p["gain"], 0 * p["gain"])


def test_a_function_with_p_is_translated_and_its_gradient_is_that_of_torch() -> None:
    found = []
    for engine in ("julia", "torch"):
        p = {"rate": torch.tensor([0.5, 2.0], dtype=D), "gain": torch.tensor(0.7, dtype=D)}
        p = {name: x.requires_grad_() for name, x in p.items()}
        u0 = torch.ones(2, dtype=D, requires_grad=True)
        problem = psn.ODEProblem(decay, u0, (0.0, 1.0), p=p)
        assert isinstance(made(problem), ProgramField)
        options = {"rtol": 1e-8, "atol": 1e-8, "tstops": (0.5,)}
        end = psn.solve(problem, psn.Tsit5(), engine=engine, **options).u1
        found.append((end.detach(), *torch.autograd.grad(end.square().sum(), (u0, *p.values()))))
    for julia, torch_ in zip(*found, strict=True):
        torch.testing.assert_close(julia, torch_, rtol=1e-7, atol=1e-9)


def test_what_a_closure_holds_is_looked_at_before_each_solve() -> None:
    held = {"rate": 1.0}
    scale = torch.tensor(1.0, dtype=D, requires_grad=True)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -held["rate"] * scale * u

    problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    assert isinstance(made(problem), ProgramField)
    for rate in (1.0, 2.0):
        held["rate"] = rate
        end = psn.solve(problem, psn.Tsit5(), engine="julia", rtol=1e-9, atol=1e-9).u1
        assert float(end.detach()) == pytest.approx(math.exp(-rate), rel=1e-7)
        (bar,) = torch.autograd.grad(end.sum(), scale)
        assert float(bar) == pytest.approx(-rate * math.exp(-rate), rel=1e-6)


def test_functions_that_count_print_or_record_are_called_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[float] = []
    count = 0

    def records(t: Tensor, u: Tensor) -> Tensor:
        calls.append(1.0)
        return -u

    def counts(t: Tensor, u: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return -u

    def prints(t: Tensor, u: Tensor) -> Tensor:
        print("evaluated")
        return -u

    for field in (records, counts, prints):
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        with torch.no_grad():
            solution = psn.solve(problem, psn.Tsit5(), engine="julia")
        assert solution.stats.nfe > 6
        assert isinstance(made(problem), CallbackField)
    assert min(len(calls), count, capsys.readouterr().out.count("evaluated")) > 6


def test_functions_that_cannot_be_translated_are_called_back() -> None:
    def field(t: Tensor, u: Tensor) -> Tensor:
        return -u.sort().values if float(u.detach().sum()) > 0 else u

    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    assert isinstance(made(problem), CallbackField)
    end = psn.solve(problem, psn.Tsit5(), engine="julia", rtol=1e-8, atol=1e-8).u1
    torch.testing.assert_close(end, torch.full((2,), math.exp(-1.0), dtype=D), rtol=1e-6, atol=0.0)


def test_members_have_parameters_of_their_own() -> None:
    rates = torch.tensor([0.5, 1.0, 2.0], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u, p: -p * u, torch.ones(2, dtype=D), (0.0, 1.0), p=rates[0])
    ensemble = psn.EnsembleProblem(problem, p=rates)
    ends = psn.solve(ensemble, psn.Tsit5(), engine="julia", rtol=1e-9, atol=1e-9).u1
    expected = torch.exp(-rates)[:, None].expand(3, 2)
    torch.testing.assert_close(ends, expected, rtol=1e-7, atol=0.0)
    (bar,) = torch.autograd.grad(ends.sum(), rates)
    torch.testing.assert_close(bar, -2 * torch.exp(-rates.detach()), rtol=1e-6, atol=0.0)
