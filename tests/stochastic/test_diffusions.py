"""What diffusions may do and return, and over which intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

D = torch.float64
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.125}
native = pytest.param(True, marks=pytest.mark.skipif(not available()[0], reason=available()[1]))
either_way = pytest.mark.parametrize("compile", [False, native])


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def share(t: Tensor, u: Tensor) -> Tensor:
    return 0.3 * u


def solved(problem: Any, algorithm: Any = None, **options: Any) -> Any:
    algorithm = psn.SRIW1() if algorithm is None else algorithm
    if not isinstance(problem, psn.ODEProblem):
        options["generator"] = torch.Generator().manual_seed(3)
    return psn.solve(problem, algorithm, engine="torch", **options)


def equation(
    diffusion: Callable[[Tensor, Tensor], Any], noise: Any = "diagonal", drift: Any = decay
) -> psn.SDEProblem:
    u0 = torch.ones(3, 2, dtype=D)
    return psn.SDEProblem(drift, diffusion, u0, (0.0, 1.0), noise)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_buffer_that_is_used_again_holds_one_value(recorded: bool) -> None:
    """The stages of a step have values of their own."""
    buffer = torch.empty(3, 2, dtype=D)

    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        buffer.copy_(u.detach()).mul_(0.3)
        return buffer

    with torch.set_grad_enabled(recorded):
        for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
            found = solved(equation(diffusion), adjoint=adjoint, **FIXED).u1
            torch.testing.assert_close(found, solved(equation(share), **FIXED).u1)


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general", "additive"])
def test_a_diffusion_that_changes_its_input_is_refused(noise: Any) -> None:
    def diffusion(t: Tensor, u: Tensor) -> Tensor:
        u = u.zero_()
        return u.unsqueeze(-1) if noise == "general" else u

    algorithm = {"general": psn.EM(), "additive": psn.SRA1()}.get(noise)
    for recorded in (False, True):
        refused = pytest.raises(
            RuntimeError, match=r"(?s)the diffusion has changed.*Work on a copy"
        )
        with torch.set_grad_enabled(recorded), refused:
            solved(equation(diffusion, noise), algorithm, **FIXED)


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_time_that_is_changed_in_place_is_refused(recorded: bool, members: bool) -> None:
    """The diffusion, and other stages, are evaluated at the time that the drift is given."""

    def later(t: Tensor, u: Tensor) -> Tensor:
        return -t.mul_(2) * u

    def rotation(t: Tensor, u: Tensor) -> Tensor:
        return u.flip(0) * t.add_(1)

    u0 = torch.ones(3, 2, dtype=D)
    wrong: list[Any] = [
        equation(lambda t, u: t * u, drift=later),
        equation(lambda t, u: t.sin_() * u),
        psn.ODEProblem(rotation, u0, (0.0, 1.0)),
    ]
    for problem in wrong:
        algorithm = psn.Tsit5() if isinstance(problem, psn.ODEProblem) else psn.SRIW1()
        if members:
            starts = torch.stack((u0, 2 * u0))
            problem = psn.EnsembleProblem(problem, u0=starts)
        options = {} if isinstance(algorithm, psn.Tsit5) else FIXED
        generator = None if isinstance(algorithm, psn.Tsit5) else torch.Generator().manual_seed(3)
        refused = pytest.raises(RuntimeError, match="changed its input in place")
        with torch.set_grad_enabled(recorded), refused:
            psn.solve(problem, algorithm, engine="torch", generator=generator, **options)


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_native_code_refuses_what_changes_its_input_by_name() -> None:
    def drift(t: Tensor, u: Tensor) -> Tensor:
        return u.neg_()

    u0 = torch.ones(3, 2, dtype=D)
    for problem in (
        psn.ODEProblem(drift, u0, (0.0, 1.0)),
        equation(share, drift=drift),
        equation(drift),
    ):
        algorithm = psn.Tsit5() if isinstance(problem, psn.ODEProblem) else psn.SRIW1()
        with pytest.raises(psn.CompileError, match="changes its input in place"):
            solved(problem, algorithm, compile=True)


@either_way
@pytest.mark.parametrize(
    ("returned", "word"),
    [
        (lambda u: u.float(), "float32"),
        (lambda u: torch.ones(3, 2, dtype=torch.long), "int64"),
        (lambda u: (u,), "tuple"),
        (lambda u: 0.3, "float"),
        (lambda u: None, "None"),
    ],
)
@pytest.mark.parametrize("noise", ["diagonal", "additive"])
def test_what_is_no_diffusion_is_refused(
    noise: Any, returned: Callable[[Tensor], Any], word: str, compile: bool
) -> None:
    algorithm = psn.SRA1() if noise == "additive" else psn.SRIW1()
    with pytest.raises((TypeError, ValueError), match=rf"{word}[\s\S]*\n  "):
        solved(equation(lambda t, u: returned(u), noise), algorithm, compile=compile, **FIXED)


@either_way
def test_what_is_no_drift_is_refused(compile: bool) -> None:
    def more(t: Tensor, u: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        return u[0], u[0]

    u0 = torch.ones(3, dtype=D)
    for problem in (
        psn.ODEProblem(lambda t, u: u.float(), u0, (0.0, 1.0)),
        psn.ODEProblem(lambda t, u: (u,), u0, (0.0, 1.0)),
        psn.ODEProblem(more, (u0,), (0.0, 1.0)),
    ):
        with pytest.raises(TypeError, match=r"float32|tuple"):
            solved(problem, psn.Tsit5(), compile=compile)


@either_way
@pytest.mark.parametrize("noise", ["general", "additive"])
def test_at_least_one_motion(noise: Any, compile: bool) -> None:
    problem = equation(lambda t, u: u.new_zeros(3, 2, 0), noise)
    with pytest.raises(ValueError, match="one or more Brownian"):
        solved(problem, psn.EM(), compile=compile, **FIXED)


@pytest.mark.parametrize("way", ["one", "members", native])
def test_stops_that_the_path_does_not_tell_apart(way: Any) -> None:
    """Times are told apart to `2**-32` of the interval: between such stops nothing moves."""
    problem: Any = equation(lambda t, u: torch.ones_like(u), "additive")
    options = {"rtol": 0.1, "atol": 0.1, "tstops": [0.5, 0.5 + 1e-13, 1 - 1e-13]}
    if way == "members":
        problem = psn.EnsembleProblem(problem, u0=torch.ones(2, 3, 2, dtype=D))
    found = solved(problem, psn.EM(), compile=way is True, **options)
    assert found.success if way != "members" else all(one.success for one in found)
    one = found[0] if way == "members" else found
    torch.testing.assert_close(one(0.5), one(0.5 + 1e-13), rtol=1e-12, atol=0)


@either_way
def test_ends_that_are_changed_after_a_solve_change_nothing(compile: bool) -> None:
    """Dense output, path, estimates and gradients are those of the interval that was solved."""
    rate = torch.tensor(0.3, dtype=D, requires_grad=True)
    found = []
    for changed in (False, True):
        ends = torch.tensor(0.0, dtype=D), torch.tensor(1.0, dtype=D)
        problem = psn.SDEProblem(
            lambda t, u: -rate * u, lambda t, u: rate * u, torch.ones(3, dtype=D), ends
        )
        adjoint = psn.DiscreteAdjoint(memory=0)
        solution = solved(problem, compile=compile, adjoint=adjoint, **FIXED)
        if changed:
            ends[0].sub_(0.5), ends[1].mul_(2.0)
        (gradient,) = torch.autograd.grad(solution.u1.sum(), rate, retain_graph=True)
        error = solution.local_estimate(0.9, dt=0.3).error
        found.append([gradient, solution(0.3), solution.brownian(0.0, 0.5), error])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_an_interval_whose_parts_are_no_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="another unit of time"):
        psn.SDEProblem(decay, share, torch.ones(2, dtype=D), (-1e-300, 1e-300))


@either_way
def test_a_start_that_is_changed_after_a_solve_changes_nothing(compile: bool) -> None:
    """A batch's memory is used again for the next one."""
    rate, found = torch.tensor(0.3, dtype=D, requires_grad=True), []
    for changed in (False, True):
        u0 = torch.ones(3, dtype=D)
        problem = psn.SDEProblem(lambda t, u: -rate * u, lambda t, u: rate * u, u0, (0.0, 1.0))
        solution = solved(problem, compile=compile, **FIXED)
        if changed:
            u0.zero_()
        (gradient,) = torch.autograd.grad(solution.u1.sum(), rate, retain_graph=True)
        error = solution.step_estimates()[0].error
        found.append([gradient, solution(0.0), solution(0.1), error])
    torch.testing.assert_close(*found, rtol=0, atol=0)
