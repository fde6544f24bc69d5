"""Types and ranges at which numbers would go wrong: the right value, or a refusal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint

ADJOINTS = [psn.DiscreteAdjoint(), psn.DirectAdjoint(), psn.InterpolatingAdjoint()]
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


def ones(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(shape or (1,), dtype=dtype)


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex32])
def test_half_precision_states_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"must be float32, float64, complex64 or complex128"):
        psn.ODEProblem(decay, ones(dtype=dtype), (0.0, 1.0))


@pytest.mark.parametrize("bad", [{1: ones()}, {"a": ones(), None: ones()}])
def test_keys_of_a_state_are_names(bad: Any) -> None:
    with pytest.raises(TypeError, match="keys of a dict u0 must be strings"):
        psn.ODEProblem(decay, bad, (0.0, 1.0))


def test_parts_of_different_dtypes_are_refused() -> None:
    for other in (torch.float32, torch.complex128):
        with pytest.raises(ValueError, match="must share one dtype"):
            psn.ODEProblem(decay, (ones(), ones(dtype=other)), (0.0, 1.0))


def test_an_interval_of_one_number_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(TypeError, match="tspan must be a pair"):
        psn.ODEProblem(decay, ones(), torch.tensor(1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="u0 has no entries"):
        psn.ODEProblem(decay, torch.ones(0, 3), (0.0, 1.0))


def test_times_that_the_field_could_not_tell_apart_are_refused() -> None:
    """In single precision ten million seconds and the next number differ by one second."""
    with pytest.raises(ValueError, match=r"at least 1000 different times in torch\.float32"):
        psn.ODEProblem(decay, ones(dtype=torch.float32), (1e7, 1e7 + 5))
    problem = psn.ODEProblem(lambda t, u: torch.cos(t).expand(1), 0 * ones(), (1e7, 1e7 + 5))
    exact = math.sin(1e7 + 5) - math.sin(1e7)
    assert psn.solve(problem, rtol=1e-9, atol=1e-9).u1.item() == pytest.approx(exact, abs=1e-7)


def test_stage_times_far_from_zero_are_rounded_once() -> None:
    """In single precision at 1000: the error is that of the times themselves."""
    problem = psn.ODEProblem(lambda t, u: torch.cos(t).expand(1), torch.zeros(1), (1000.0, 1005.0))
    exact = math.sin(1005.0) - math.sin(1000.0)
    assert psn.solve(problem, rtol=1e-6, atol=1e-6).u1.item() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("size", [1, 50_000])
@pytest.mark.parametrize("rtol", [1e-38, 1e-20, 0.0])
def test_an_absolute_tolerance_alone(rtol: float, size: int) -> None:
    """A relative tolerance of nearly nothing is none, not one that accepts every step."""
    problem = psn.ODEProblem(lambda t, u: 20 * torch.cos(20 * t) * u, torch.ones(size), (0.0, 2.0))
    solution = psn.solve(problem, rtol=rtol, atol=1e-5)
    expected = math.exp(math.sin(40.0))
    torch.testing.assert_close(solution.u1, torch.full((size,), expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("engine", ["torch"])
def test_a_part_that_never_drives_the_step_may_still_fail(engine: str) -> None:
    problem = psn.ODEProblem(
        lambda t, u: {"x": -u["x"], "y": torch.log(0.5 - t) * u["y"]},
        {"x": ones(), "y": ones()},
        (0.0, 1.0),
    )
    tolerances: dict[str, Any] = {"atol": {"x": 1e-6, "y": math.inf}, "engine": engine}
    with pytest.raises(psn.SolverFailure, match="NaN or infinite"):
        psn.solve(problem, **tolerances)
    failed = psn.solve(problem, throw=False, **tolerances)
    assert failed.retcode is psn.ReturnCode.Unstable
    assert torch.isfinite(failed.u1["y"]).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("given", ["dict", "tuple", "tensor"])
def test_some_error_has_to_count(given: str, compiled: bool) -> None:
    """Every step was accepted: 1e17 where the solution is exp(-300)."""
    parts: Any = {"dict": {"x": ones(), "y": ones()}, "tuple": (ones(), ones()), "tensor": ones(2)}
    infinite: Any = {
        "dict": {"x": math.inf, "y": math.inf},
        "tuple": (math.inf, math.inf),
        "tensor": torch.full((2,), math.inf),
    }

    def field(t: Tensor, u: Any) -> Any:
        if isinstance(u, Tensor):
            return -30 * u
        return {k: -30 * x for k, x in u.items()} if isinstance(u, dict) else (-30 * u[0], -u[1])

    problem = psn.ODEProblem(field, parts[given], (0.0, 10.0))
    with pytest.raises(ValueError, match="inf in every entry"):
        psn.solve(problem, atol=infinite[given], engine="torch", compile=compiled)
    with pytest.raises(ValueError, match="inf in every entry"):
        psn.solve(problem, rtol=0.0, atol=infinite[given], engine="torch", compile=compiled)


@pytest.mark.parametrize("parts", [False, True])
def test_an_infinite_relative_tolerance_is_refused(parts: bool) -> None:
    """Its entry counted as one without an error, and estimates had gradients of NaN."""
    rtol = torch.tensor([1e-3, math.inf])
    state: Any = {"x": ones(), "y": ones(2)} if parts else ones(2)
    problem = psn.ODEProblem(
        lambda t, u: {k: -x for k, x in u.items()} if parts else -u, state, (0.0, 1.0)
    )
    with pytest.raises(ValueError, match=r"must be finite everywhere(?s:.*)atol=inf"):
        psn.solve(problem, rtol={"x": 1e-3, "y": rtol} if parts else rtol)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dt0", [None, 0.1])
def test_a_zero_without_an_absolute_tolerance_is_named(dt0: float | None, compiled: bool) -> None:
    """The message was that the field or the state had become infinite, which neither had."""
    problem = psn.ODEProblem(lambda t, u: -u, torch.tensor([1.0, 0.0]), (0.0, 1.0))
    how: dict[str, Any] = {"dt0": dt0, "compile": compiled, "engine": "torch"}
    with pytest.raises(
        psn.SolverFailure, match=r"(?s)no tolerance.*is 0: component \(1,\)"
    ) as failure:
        psn.solve(problem, rtol=1e-6, atol=0.0, **how)
    assert "infinite" not in str(failure.value)
    found = psn.solve(problem, rtol=1e-6, atol=1e-30, **how).u1
    torch.testing.assert_close(found, torch.tensor([math.exp(-1.0), 0.0]), rtol=1e-5, atol=0)


@every_adjoint
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Rodas5P(), psn.KenCarp4()])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_field_that_works_in_place_is_refused(
    adjoint: psn.DiscreteAdjoint, algorithm: Any, gradients: bool
) -> None:
    def clamped(t: Tensor, u: Tensor) -> Tensor:
        u[0] = 1.0
        return -u

    words = r"(?s)the field has changed .*\n  Work on a copy"
    for field in (lambda t, u: u.neg_(), clamped):
        u0 = ones(3)
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=words):
            psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), algorithm, adjoint=adjoint)
        assert torch.equal(u0, ones(3))


@every_adjoint
@pytest.mark.parametrize("size", [1, 50_000])
def test_a_field_may_use_one_buffer_for_all_its_results(
    adjoint: psn.DiscreteAdjoint, size: int
) -> None:
    buffer = torch.empty(size, dtype=torch.float64)

    def field(t: Tensor, u: Tensor) -> Tensor:
        buffer.copy_(u.detach()).neg_()
        return buffer

    expected = torch.full((size,), math.exp(-1), dtype=torch.float64)
    solution = psn.solve(psn.ODEProblem(field, ones(size), (0.0, 1.0)), adjoint=adjoint)
    torch.testing.assert_close(solution.u1, expected, rtol=1e-5, atol=0)
    with torch.no_grad():
        y = odeint(field, ones(size), torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(y[-1], expected, rtol=1e-5, atol=0)


def test_times_some_ulps_outside_the_interval_are_its_end() -> None:
    solution = psn.solve(
        psn.ODEProblem(decay, ones(), (0.0, 0.3)),
        saveat=[0.1 * i for i in range(4)],
        tstops=[0.1 * 3],
    )
    assert solution.t[-1].item() == 0.3
    assert torch.equal(solution.u[-1], solution.u1)
    with pytest.raises(ValueError, match="inside tspan"):
        psn.solve(psn.ODEProblem(decay, ones(), (0.0, 0.3)), saveat=[0.30001])


def test_the_first_step_is_not_below_the_smallest() -> None:
    """Hairer's guess may be; it is no reason to fail."""
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = odeint(decay, ones(), t, options={"min_step": 0.01}, rtol=1e-5, atol=1e-5)
    assert y[-1].item() == pytest.approx(math.exp(-1), rel=1e-4)


@pytest.mark.parametrize("compiled", [True, "auto", False])
def test_what_torch_refuses_is_said_whatever_is_asked_of_native_code(compiled: Any) -> None:
    problem = psn.ODEProblem(decay, ones(2), (0.0, 1.0), mass_matrix=torch.eye(2).double())
    with pytest.raises(psn.EngineUnavailable, match="mass matri"):
        psn.solve(problem, psn.Tsit5(), compile=compiled)
