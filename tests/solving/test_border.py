"""Bad input is refused where it enters: what was given, what was expected, what to do.

A solve that fails carries what it has computed up to there, and says why it stopped and what to
try.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def ones(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.ones(shape or (2, 3), dtype=dtype, device=device)


@dataclass(frozen=True)
class Bad:
    """A problem and options, the error they raise, and what its message must name."""

    error: type[Exception]
    words: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    f: Any = decay
    u0: Any = field(default_factory=ones)
    tspan: Any = (0.0, 1.0)
    p: Any = None
    algorithm: Any = None

    def run(self) -> psn.Solution:
        problem = psn.ODEProblem(self.f, self.u0, self.tspan, self.p)
        return psn.solve(problem, self.algorithm, **self.options)


PROBLEMS = {
    "field is no function": Bad(TypeError, ("f must be callable", "Tensor"), f=ones()),
    "arguments swapped": Bad(TypeError, ("callable", "ODEProblem(f, u0"), f=ones(), u0=decay),
    "state is a ragged list": Bad(TypeError, ("u0", "list", "as_tensor"), u0=[[1.0], [2.0, 3.0]]),
    "state is a word": Bad(TypeError, ("u0", "str", "as_tensor"), u0="one"),
    "state of integers": Bad(TypeError, ("u0", "int64", "float()"), u0=torch.arange(3)),
    "state of booleans": Bad(TypeError, ("u0", "bool"), u0=torch.tensor([True])),
    "state without entries": Bad(ValueError, ("u0", "no entries"), u0=torch.empty(0)),
    "state of no parts": Bad(ValueError, ("u0", "no entries"), u0=()),
    "part is no tensor": Bad(TypeError, ("u0[1]", "int"), u0=(ones(), 3)),
    "part of integers": Bad(
        TypeError, ("u0['n']", "int64"), u0={"x": ones(), "n": torch.arange(3)}
    ),
    "parts of two dtypes": Bad(
        ValueError, ("float64", "float32", ".to("), u0=(ones(), ones(dtype=torch.float32))
    ),
    "parts on two devices": Bad(
        ValueError, ("cpu", "meta", ".to("), u0=(ones(), ones(device="meta"))
    ),
    "state without values": Bad(ValueError, ("u0", "meta"), u0=ones(device="meta")),
    "argument on another device": Bad(
        ValueError, ("p", "cpu", "meta", ".to("), p={"a": [ones(device="meta")]}
    ),
    "equal ends": Bad(ValueError, ("tspan", "different", "1.0"), tspan=(1.0, 1.0)),
    "start not finite": Bad(ValueError, ("tspan[0]", "finite", "nan"), tspan=(math.nan, 1.0)),
    "end not finite": Bad(ValueError, ("tspan[1]", "finite", "inf"), tspan=(0.0, math.inf)),
    "end is a word": Bad(TypeError, ("tspan[1]", "number", "str"), tspan=(0.0, "1")),
    "end of several numbers": Bad(
        ValueError, ("tspan[1]", "one real number", "(2,)"), tspan=(0.0, torch.ones(2))
    ),
    "end is complex": Bad(
        ValueError, ("tspan[1]", "real", "complex"), tspan=(0.0, torch.tensor(1j))
    ),
    "three ends": Bad(TypeError, ("tspan", "pair"), tspan=(0.0, 0.5, 1.0)),
    "one end": Bad(TypeError, ("tspan", "pair"), tspan=1.0),
}

OPTIONS = {
    "algorithm's class": Bad(TypeError, ("algorithm", "Tsit5()"), algorithm=psn.Tsit5),
    "algorithm's name": Bad(TypeError, ("algorithm", "'tsit5'", "Tsit5()"), algorithm="tsit5"),
    "adjoint's class": Bad(TypeError, ("adjoint", "GaussAdjoint()"), {"adjoint": psn.GaussAdjoint}),
    "adjoint's name": Bad(
        TypeError, ("adjoint", "'direct'", "DiscreteAdjoint()"), {"adjoint": "direct"}
    ),
    "controller's class": Bad(
        TypeError, ("controller", "PIDController()"), {"controller": psn.PIDController}
    ),
    "unknown option": Bad(TypeError, ("reltol",), {"reltol": 1e-3}),
    "unknown engine": Bad(ValueError, ("engine", "torch", "julia", "'jax'"), {"engine": "jax"}),
    "negative rtol": Bad(ValueError, ("rtol", "-0.001", "at least 0"), {"rtol": -1e-3}),
    "negative atol": Bad(ValueError, ("atol", "-1.0", "at least 0"), {"atol": -1.0}),
    "rtol not a number": Bad(ValueError, ("rtol", "nan"), {"rtol": math.nan}),
    "rtol infinite": Bad(ValueError, ("rtol", "inf", "finite"), {"rtol": math.inf}),
    "rtol a word": Bad(TypeError, ("rtol", "number", "'high'"), {"rtol": "high"}),
    "rtol none": Bad(TypeError, ("rtol", "number", "None"), {"rtol": None}),
    "atol a list": Bad(TypeError, ("atol", "number", "tensor"), {"atol": [1e-3] * 3}),
    "both tolerances zero": Bad(ValueError, ("rtol", "atol", "0"), {"rtol": 0.0, "atol": 0.0}),
    "both zero in one entry": Bad(
        ValueError, ("rtol", "atol", "0"), {"rtol": 0.0, "atol": torch.tensor([1e-3, 0.0, 1e-3])}
    ),
    "negative entry of atol": Bad(
        ValueError, ("atol", "-1", "at least 0"), {"atol": torch.tensor([1.0, -1.0, 1.0])}
    ),
    "atol of another shape": Bad(
        ValueError, ("atol", "(4,)", "broadcast", "(2, 3)"), {"atol": torch.ones(4)}
    ),
    "saveat before the start": Bad(
        ValueError, ("saveat[0]", "-0.1", "tspan (0.0, 1.0)"), {"saveat": [-0.1, 0.5]}
    ),
    "saveat behind the end": Bad(
        ValueError, ("saveat[1]", "1.2", "tspan (0.0, 1.0)", "Widen"), {"saveat": [0.5, 1.2]}
    ),
    "saveat not a number": Bad(ValueError, ("saveat[0]", "nan"), {"saveat": [math.nan]}),
    "saveat unsorted": Bad(
        ValueError, ("saveat[2]=0.3", "increasing", "Sort"), {"saveat": [0.1, 0.5, 0.3]}
    ),
    "saveat against time": Bad(
        ValueError, ("saveat[1]=0.5", "decreasing"), {"saveat": [0.1, 0.5]}, tspan=(1.0, 0.0)
    ),
    "saveat empty": Bad(ValueError, ("saveat", "at least one", "Leave it out"), {"saveat": []}),
    "saveat a step": Bad(TypeError, ("saveat", "sequence", "0.1"), {"saveat": 0.1}),
    "saveat a matrix": Bad(
        ValueError, ("saveat", "one-dimensional", "(1, 1)"), {"saveat": torch.ones(1, 1)}
    ),
    "tstops outside": Bad(ValueError, ("tstops[0]", "3.0", "tspan"), {"tstops": [3.0]}),
    "dt0 negative": Bad(ValueError, ("dt0", "positive", "-0.1", "sign"), {"dt0": -0.1}),
    "dt0 zero": Bad(ValueError, ("dt0", "positive", "0.0"), {"dt0": 0}),
    "dt0 infinite": Bad(ValueError, ("dt0", "finite", "inf"), {"dt0": math.inf}),
    "dt0 a word": Bad(TypeError, ("dt0", "number", "str"), {"dt0": "small"}),
    "dtmin negative": Bad(ValueError, ("dtmin", "positive"), {"dtmin": -1e-9}),
    "dtmax zero": Bad(ValueError, ("dtmax", "positive"), {"dtmax": 0.0}),
    "dtmin above dtmax": Bad(ValueError, ("dtmin=0.5", "dtmax=0.1"), {"dtmin": 0.5, "dtmax": 0.1}),
    "max_steps zero": Bad(ValueError, ("max_steps", "positive", "0"), {"max_steps": 0}),
    "max_steps a fraction": Bad(ValueError, ("max_steps", "whole", "10.0"), {"max_steps": 10.0}),
    "fixed steps without size": Bad(
        ValueError, ("FixedStep", "dt0"), {"controller": psn.FixedStep()}
    ),
    "events are no events": Bad(TypeError, ("events", "Event("), {"events": [decay]}),
}


def wrong(output: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    return lambda t, u: output(u)


FIELDS = {
    "output of another shape": Bad(
        ValueError, ("output", "shape (2, 3)", "(2,)"), f=wrong(lambda u: u.sum(-1))
    ),
    "output of another dtype": Bad(
        TypeError, ("output", "float64", "float32", ".to("), f=wrong(lambda u: u.float())
    ),
    "output on another device": Bad(
        ValueError, ("output", "cpu", "meta"), f=wrong(lambda u: u.to("meta"))
    ),
    "output is a number": Bad(TypeError, ("field", "tensor", "float"), f=wrong(lambda u: 1.0)),
    "no output": Bad(TypeError, ("field", "tensor", "NoneType"), f=wrong(lambda u: None)),
    "output is a tuple": Bad(TypeError, ("field", "tensor", "tuple"), f=wrong(lambda u: (u,))),
    "output is no tuple": Bad(
        TypeError, ("field", "tuple", "Tensor"), f=wrong(lambda u: u[0]), u0=(ones(), ones())
    ),
    "output of too few parts": Bad(
        TypeError, ("field", "tuple", "of 1"), f=wrong(lambda u: (u[0],)), u0=(ones(), ones())
    ),
    "output of other keys": Bad(
        TypeError, ("field", "dict"), f=wrong(lambda u: {"y": u["x"]}), u0={"x": ones()}
    ),
    "part of another shape": Bad(
        ValueError,
        ("output['x']", "(2, 3)", "(3,)"),
        f=wrong(lambda u: {"x": u["x"][0]}),
        u0={"x": ones()},
    ),
    "part is no tensor": Bad(
        TypeError, ("output[1]", "tensor", "int"), f=wrong(lambda u: (u[0], 0)), u0=(ones(), ones())
    ),
    "module in single precision": Bad(
        (RuntimeError, TypeError), ("dtype",), f=wrong(nn.Linear(3, 3)), u0=ones()
    ),
    "event of several numbers": Bad(
        TypeError, ("condition", "(2, 3)", "Reduce"), {"events": psn.Event(lambda t, u: u)}
    ),
    "event of a python number": Bad(
        TypeError, ("condition", "float"), {"events": psn.Event(lambda t, u: 1.0)}
    ),
}

ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


def check(case: Bad, run: Callable[[], Any]) -> None:
    with pytest.raises(case.error) as caught:
        run()
    message = str(caught.value)
    assert not isinstance(caught.value, AssertionError)
    for word in case.words:
        assert word in message, message


@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_bad_problems(case: Bad) -> None:
    check(case, lambda: psn.ODEProblem(case.f, case.u0, case.tspan, case.p))


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(case: Bad) -> None:
    check(case, case.run)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", FIELDS.values(), ids=FIELDS.keys())
def test_bad_fields(case: Bad, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        check(case, case.run)


def test_bad_output_in_the_middle_of_a_solve() -> None:
    """Every evaluation is looked at, not the first one alone."""
    case = Bad(ValueError, ("(2, 3)", "(3,)"), f=lambda t, u: -u if t < 0.5 else -u[0])
    check(case, case.run)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_dense_output_outside_the_interval(t: float) -> None:
    solution = psn.solve(psn.ODEProblem(decay, ones(), (0.0, 1.0)))
    with pytest.raises(ValueError, match=r"\[0.0, 1.0\].*\n.*Widen"):
        solution(t)
    with pytest.raises(ValueError, match=r"one-dimensional"):
        solution(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["rtol", "atol", "max_steps"])
def test_bad_options_of_adjoints(name: str) -> None:
    with pytest.raises(ValueError, match=rf"GaussAdjoint.*{name}.*positive"):
        psn.GaussAdjoint(**{name: -1})


def test_unknown_engines_by_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"torch.*'jax'"):
        psn.set_engine("jax")
    monkeypatch.setenv("PYSCIML_NODE_ENGINE", "jax")
    with pytest.raises(ValueError, match=r"PYSCIML_NODE_ENGINE.*torch.*'jax'"):
        psn.solve(psn.ODEProblem(decay, ones(), (0.0, 1.0)))


@dataclass(frozen=True)
class Failing:
    """A solve that stops at a known time, with its solution up to there.

    Near a pole the state's error grows without bound, and its reciprocal's does not.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    retcode: psn.ReturnCode
    words: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    before: float = 1.0  # the solve stops before this time ...
    behind: float = 0.0  # ... and behind this one
    tspan: tuple[float, float] = (0.0, 1.0)
    measure: Callable[[Tensor], Tensor] = torch.clone  # of a state, by which it is compared

    @property
    def problem(self) -> psn.ODEProblem:
        u0 = self.exact(torch.tensor(self.tspan[0], dtype=torch.float64)).reshape(1, 1)
        return psn.ODEProblem(self.f, u0, self.tspan)

    def compare(self, u: Tensor, t: Tensor) -> None:
        found, expected = self.measure(u), self.measure(self.exact(t))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def becomes(value: float, at: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, u: torch.where(t > at, torch.full_like(u, value), -u)


def exponential(t: Tensor) -> Tensor:
    return torch.exp(-t)


FIXED = {"controller": psn.FixedStep(), "dt0": 0.1}
FAILING = {
    "NaN at once": Failing(
        wrong(lambda u: u * math.nan),
        exponential,
        psn.ReturnCode.Unstable,
        ("NaN", "t=0 ", "f(t0, u0)", "component (0,)"),
        before=1e-300,
    ),
    "NaN at step n": Failing(
        becomes(math.nan, 0.6), exponential, psn.ReturnCode.Unstable, ("NaN",), {}, 0.61, 0.59
    ),
    "infinity at step n": Failing(
        becomes(math.inf, 0.6), exponential, psn.ReturnCode.Unstable, ("infinite",), {}, 0.61, 0.59
    ),
    "NaN in fixed steps": Failing(
        becomes(math.nan, 0.65), exponential, psn.ReturnCode.Unstable, ("dt0",), FIXED, 0.65, 0.59
    ),
    "NaN in reverse time": Failing(
        lambda t, u: torch.where(t < -0.6, math.nan, -u),
        exponential,
        psn.ReturnCode.Unstable,
        ("NaN",),
        {},
        -0.59,
        -0.61,
        (0.0, -1.0),
    ),
    # u' = u^2 has its pole at t = 1.
    "blow-up": Failing(
        wrong(torch.square),
        lambda t: 1 / (1 - t),
        psn.ReturnCode.DtLessThanMin,
        ("step size fell below", "may become infinite there", "ends before", "larger tolerances"),
        {},
        1.001,
        0.999,
        (0.0, 2.0),
        torch.reciprocal,
    ),
    "dtmin": Failing(
        wrong(torch.square),
        lambda t: 1 / (1 - t),
        psn.ReturnCode.DtLessThanMin,
        ("dtmin=0.001",),
        {"dtmin": 1e-3},
        1.0,
        0.5,
        (0.0, 2.0),
        torch.reciprocal,
    ),
    "stiff problem": Failing(
        lambda t, u: -1e6 * (u - torch.cos(t)) - torch.sin(t),
        torch.cos,
        psn.ReturnCode.MaxIters,
        ("max_steps=500", "stiff", "a stiff solver such as Rodas5P()", "|lambda|*dt", "Stiffness"),
        {"max_steps": 500},
        0.5,
    ),
    "max_steps": Failing(
        wrong(torch.neg),
        exponential,
        psn.ReturnCode.MaxIters,
        ("max_steps=5", "larger max_steps"),
        {"max_steps": 5, "dtmax": 0.01},
        0.06,
        0.01,
    ),
    "max_steps of fixed steps": Failing(
        wrong(torch.neg),
        exponential,
        psn.ReturnCode.MaxIters,
        ("max_steps=5",),
        {"max_steps": 5, **FIXED},
        0.51,
        0.49,
    ),
}
every_failure = pytest.mark.parametrize("case", FAILING.values(), ids=FAILING.keys())


@every_failure
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_failed_solves_carry_the_solution_up_to_there(
    case: Failing, adjoint: psn.DirectAdjoint
) -> None:
    with pytest.raises(psn.SolverFailure) as caught:
        psn.solve(
            case.problem,
            psn.RK4() if case.options == FIXED else None,
            adjoint=adjoint,
            **case.options,
        )
    failure = caught.value
    message = str(failure)
    for word in (*case.words, ".solution", "Try"):
        assert word in message, message
    solution = failure.solution
    assert failure.retcode is solution.retcode is case.retcode
    assert not solution.success
    low, high = sorted((case.before, case.behind))
    assert low <= solution.t[-1].item() <= high
    assert f"t={solution.t[-1].item():.6g}" in message
    assert bool(torch.isfinite(solution.u).all())
    case.compare(solution.u, solution.t.reshape(-1, 1, 1))
    assert torch.equal(solution.u[-1], solution.u1)
    assert len(solution.t) == solution.stats.naccept + 1
    if solution.stats.naccept:
        middle = 0.5 * (solution.t[0] + solution.t[-1])
        case.compare(solution(middle), middle.reshape(1, 1))


@every_failure
def test_failed_solves_are_returned_on_request(case: Failing) -> None:
    solution = psn.solve(case.problem, throw=False, **case.options)
    assert solution.retcode is case.retcode
    assert not solution.success
    assert "Success" not in repr(solution.retcode)


@every_failure
def test_saved_states_of_failed_solves_end_with_them(case: Failing) -> None:
    times = torch.linspace(*case.tspan, 51, dtype=torch.float64)
    options = {"throw": False, **case.options}
    steps = psn.solve(case.problem, **options)
    saved = psn.solve(case.problem, saveat=times, **options)
    sign = case.problem.direction
    reached = times[sign * times <= sign * steps.t[-1]]
    assert torch.equal(saved.t, reached)
    assert saved.u.shape == (len(reached), 1, 1)
    case.compare(saved.u, reached.reshape(-1, 1, 1))


def test_the_gradient_of_what_was_computed() -> None:
    u0 = ones(1).requires_grad_()
    for adjoint in ADJOINTS:
        for options in ({}, FIXED):
            problem = psn.ODEProblem(becomes(math.nan, 0.65), u0, (0.0, 1.0))
            solution = psn.solve(problem, psn.Tsit5(), adjoint=adjoint, throw=False, **options)
            (gradient,) = torch.autograd.grad(solution.u1.sum(), u0)
            expected = torch.exp(-solution.t[-1:])
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)


def test_a_start_that_is_not_finite() -> None:
    for options in ({}, FIXED):
        problem = psn.ODEProblem(decay, torch.tensor([[0.0, math.inf]]), (0.0, 1.0))
        with pytest.raises(
            psn.SolverFailure, match=r"u0 is not finite: sample 0, component \(1,\)"
        ):
            psn.solve(problem, **options)


def test_a_failing_backward_solve_says_what_to_try() -> None:
    u0 = ones(1).requires_grad_()
    adjoint = psn.InterpolatingAdjoint(max_steps=1)
    solution = psn.solve(psn.ODEProblem(decay, u0, (0.0, 10.0)), adjoint=adjoint)
    with pytest.raises(RuntimeError, match=r"InterpolatingAdjoint.*\n.*DiscreteAdjoint"):
        solution.u1.sum().backward()


def test_errors_of_the_field_pass_through() -> None:
    """What the field raises is the user's own, with its traceback."""

    class Own(Exception):
        pass

    def f(t: Tensor, u: Tensor) -> Tensor:
        if t > 0.5:
            raise Own("mine")
        return -u

    with pytest.raises(Own, match="mine"):
        psn.solve(psn.ODEProblem(f, ones(), (0.0, 1.0)))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (ones(), x), lambda x: {"x": x}])
def test_a_state_that_was_given_other_data_is_refused(wrap: Callable[[Tensor], Any]) -> None:
    """Native code would read, and write, beyond its end."""
    for shape in ((1, 3), (3, 3), (0,)):
        x = ones()
        problem = psn.ODEProblem(lambda t, u: u, wrap(x), (0.0, 1.0))
        assert psn.solve(problem).success
        x.data = ones(*shape)
        with pytest.raises(ValueError, match=r"u0 must have the shape .*\n.*ODEProblem"):
            psn.solve(problem)
