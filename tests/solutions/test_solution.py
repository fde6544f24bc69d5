"""What a solution holds, and what can be had from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import ALGORITHMS, KNOWN
from torch import Tensor

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

native = pytest.param(True, marks=pytest.mark.skipif(not available()[0], reason=available()[1]))


def solve(**options: Any) -> psn.Solution:
    known = KNOWN["swirl"]
    problem = psn.ODEProblem(known.f, known.u0.expand(3, 2).clone(), known.tspan)
    return psn.solve(problem, **options)


def test_the_fields() -> None:
    solution = solve()
    assert solution.engine == "torch"
    assert solution.algorithm == psn.Tsit5()
    assert solution.retcode is psn.ReturnCode.Success
    assert solution.success
    assert solution.event is None
    assert solution.event_t is None
    assert solution.penalty.item() == 0.0
    assert solution.penalties == {}
    n = solution.stats.naccept
    assert solution.t.shape == solution.step_times.shape == (n + 1,)
    assert solution.u.shape == (n + 1, 3, 2)
    assert solution.u1.shape == (3, 2)
    assert solution.step_errors.shape == (n,)
    assert bool((solution.step_errors <= 1).all())


def test_return_codes_that_are_successes() -> None:
    assert {code for code in psn.ReturnCode if code.successful} == {
        psn.ReturnCode.Success,
        psn.ReturnCode.Terminated,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_output_takes_numbers_sequences_and_tensors(dtype: torch.dtype) -> None:
    solution = solve(rtol=1e-9, atol=1e-9)
    known = KNOWN["swirl"]
    times = torch.tensor([0.9, -0.5, 0.1, 0.1], dtype=dtype)
    expected = known.at(times.double())[:, None].expand(4, 3, 2)
    torch.testing.assert_close(solution(times), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solution(times.tolist()), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solution(times[0]), expected[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solution(times[0].item()), expected[0], rtol=1e-7, atol=1e-7)


def test_dense_output_meets_the_steps() -> None:
    """Continuous, with continuous derivative: the values on both sides of a step's end agree."""
    solution = solve(rtol=1e-4, atol=1e-4)
    inner = solution.t[1:-1]
    torch.testing.assert_close(solution(solution.t), solution.u, rtol=0, atol=0)
    h = 1e-6
    before, at, after = solution(inner - h), solution(inner), solution(inner + h)
    torch.testing.assert_close((at - before) / h, (after - at) / h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", [False, native])
@pytest.mark.parametrize("looked_at", ["states", "trajectory"])
def test_states_of_the_steps_are_a_copy_with_their_graph(compile: bool, looked_at: str) -> None:
    rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    u0 = torch.tensor([2.0, 3.0], dtype=torch.float64)

    def decay(t: Tensor, u: Tensor) -> Tensor:
        return rate * u

    options = {"compile": compile, "rtol": 1e-10, "atol": 1e-10}
    for _ in range(2):  # the second time it is a solve that was before
        solution = psn.solve(psn.ODEProblem(decay, u0, (0.0, 1.0)), **options)
        if looked_at == "trajectory":
            assert solution.trajectory.times[-1] == 1.0
        with torch.no_grad():
            states = solution.u
        exact = u0 * torch.exp(rate * solution.t)[:, None]
        torch.testing.assert_close(states, exact, rtol=1e-8, atol=1e-8)
        (found,) = torch.autograd.grad(states.sum(), rate, retain_graph=True)
        (expected,) = torch.autograd.grad(exact.sum(), rate)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        before = solution(0.5).detach()
        with torch.no_grad():
            states.zero_()
        torch.testing.assert_close(solution(0.5), before, rtol=0, atol=0)
        assert solution.u1.norm() > 1


@pytest.mark.parametrize("compile", [False, native])
def test_states_of_the_steps_are_without_what_a_method_carries(compile: bool) -> None:
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: 0.1 * u, torch.ones(3, 2), (0.0, 1.0),
        interpretation="stratonovich",
    )  # fmt: skip
    how = {"controller": psn.FixedStep(), "dt0": 0.25, "compile": compile}
    solution = psn.solve(problem, psn.ReversibleHeun(), **how)
    assert solution.u.shape == (5, 3, 2)
    assert torch.equal(solution.u[0], problem.u0)
    assert torch.equal(solution.u[-1], solution.u1)


def test_a_tuple_state_is_answered_with_tuples() -> None:
    problem = psn.ODEProblem(
        lambda t, u: (-u[0], u[1]), (torch.ones(2), torch.ones(3, 1)), (0.0, 1.0)
    )
    solution = psn.solve(problem)
    one, many = solution(0.5), solution([0.1, 0.5, 0.7])
    assert [part.shape for part in one] == [(2,), (3, 1)]
    assert [part.shape for part in many] == [(3, 2), (3, 3, 1)]


def test_step_sizes_are_those_of_the_steps() -> None:
    for span in ((-1.0, 1.0), (1.0, -1.0)):
        known = KNOWN["swirl"]
        solution = psn.solve(psn.ODEProblem(known.f, known.at(span[0]), span))
        sizes = solution.t.diff().abs()
        middles = (solution.t[:-1] + solution.t[1:]) / 2
        found = [solution.step_size(t) for t in middles.tolist()]
        torch.testing.assert_close(torch.tensor(found).double(), sizes)
        # The later step at a boundary, the last one at the end.
        assert solution.step_size(solution.t[1].item()) == pytest.approx(sizes[1].item())
        assert solution.step_size(span[1]) == pytest.approx(sizes[-1].item())


def test_errors_of_fixed_steps_are_unknown() -> None:
    solution = solve(controller=psn.FixedStep(), dt0=0.5)
    assert bool(torch.isnan(solution.step_errors).all())


STIFFNESS = [name for name in ALGORITHMS if getattr(psn, name).tableau.stiffness_stages]


@pytest.mark.parametrize("name", STIFFNESS)
@pytest.mark.parametrize("rate", [-3.0, 7.0, 2j, -1 + 2j])
def test_stiffness_of_a_linear_field_is_its_eigenvalue(name: str, rate: complex) -> None:
    """`|k_i - k_j| / |g_i - g_j| = |lambda|` for `u' = lambda u`."""
    algorithm = getattr(psn, name)()
    u0 = torch.tensor([1.0, -2.0], dtype=torch.complex128)
    solution = psn.solve(
        psn.ODEProblem(lambda t, u: rate * u, u0, (0.0, 1.0)), algorithm, rtol=1e-3, atol=1e-3
    )
    found = solution.step_stiffness
    assert found.shape == (solution.stats.naccept,)
    torch.testing.assert_close(found, torch.full_like(found, abs(rate)), rtol=1e-3, atol=0)


def test_methods_without_a_stiffness_estimate_say_nan() -> None:
    solution = solve(algorithm=psn.Midpoint())
    assert bool(torch.isnan(solution.step_stiffness).all())


def test_local_estimates_are_those_of_the_steps() -> None:
    """The estimate of a step taken again from where it started, by its own size."""
    solution = solve(rtol=1e-5, atol=1e-5)
    for n in range(solution.stats.naccept - 1):
        t, h = solution.t[n].item(), solution.t[n + 1].item() - solution.t[n].item()
        found = solution.local_estimate(t, dt=h)
        assert found.dt.item() == pytest.approx(h, rel=1e-12)
        assert found.error.item() == pytest.approx(solution.step_errors[n].item(), rel=1e-6)
        assert found.stiffness.item() == pytest.approx(solution.step_stiffness[n].item(), rel=1e-9)


def test_local_estimates_in_reverse_time_have_signed_sizes() -> None:
    known = KNOWN["swirl"]
    solution = psn.solve(psn.ODEProblem(known.f, known.at(1.0), (1.0, -1.0)))
    assert solution.local_estimate(0.3).dt.item() < 0
    assert solution.local_estimate(0.3, dt=0.1).dt.item() == -0.1
    # Not beyond the end.
    assert solution.local_estimate(-0.95, dt=0.1).dt.item() == pytest.approx(-0.05)


def test_local_estimates_know_the_end_of_the_solve() -> None:
    """Which a tensor is that changes afterwards, as a learned end does."""
    end = torch.tensor(1.0, dtype=torch.float64)
    solution = psn.solve(psn.ODEProblem(lambda t, u: -u, torch.ones(3).double(), (0.0, end)))
    expected = solution.local_estimate(0.95, dt=0.1)
    for moved in (2.0, -1.0):
        end.fill_(moved)
        assert solution.local_estimate(0.95, dt=0.1) == expected
    assert expected.dt.item() == pytest.approx(0.05)


def test_penalties_can_be_left_out_of_a_loss() -> None:
    loss: Tensor = solve().penalty + 1.0
    assert loss.item() == 1.0


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    solve(progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100.0%" in captured.err
    solve(progress=False)
    assert capsys.readouterr().err == ""


def test_set_engine_and_get_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYSCIML_NODE_ENGINE", raising=False)
    assert psn.get_engine() == "auto"
    monkeypatch.setenv("PYSCIML_NODE_ENGINE", "torch")
    assert psn.get_engine() == "torch"
    psn.set_engine("auto")
    try:
        assert psn.get_engine() == "auto"
    finally:
        psn.set_engine(None)
    assert psn.get_engine() == "torch"
    assert math.isfinite(solve().u1.sum().item())
