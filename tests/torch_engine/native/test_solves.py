"""Native solves against the loop in Python: the same steps, states, gradients and refusals."""

from __future__ import annotations

import dataclasses
import gc
import math
import signal
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.torch_engine.native import attempt, prepared
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
ALGORITHMS = [
    psn.Euler(), psn.Midpoint(), psn.Heun(), psn.Ralston(), psn.BS3(), psn.RK4(), psn.Tsit5(),
    psn.DP5(), psn.DP8(), psn.Vern7(), psn.Vern9(),
]  # fmt: skip


class Rotor(nn.Module):
    """A driven, damped rotation with a nonlinear part, of parameters and of `p`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(3, 3, dtype=D, generator=generator)
        self.matrix = nn.Parameter(matrix - matrix.T - 0.2 * torch.eye(3, dtype=D))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=D), requires_grad=False)

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(u @ self.matrix.T) * p["gain"] + self.frozen * torch.sin(t * p["rate"])


ROTOR = Rotor()


def inputs(seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    p = {
        "gain": torch.tensor([1.0, 0.7, 1.3], dtype=D, requires_grad=True),
        "rate": torch.tensor(2.0, dtype=D, requires_grad=True),
    }
    return torch.randn(2, 3, dtype=D, generator=generator).requires_grad_(), p


def run(compile: Any, algorithm: Any = None, span: Any = (0.0, 2.5), **options: Any) -> Any:
    """A solution and its gradients to all inputs, of a loss of all that a solution has."""
    u0, p = inputs()
    problem = psn.ODEProblem(ROTOR, u0, span, p=p)
    # Neither keeps the stages of a step, so both count the same evaluations backward.
    options = {"adjoint": psn.DiscreteAdjoint(memory=0), "engine": "torch"} | options
    options = {"rtol": 1e-6, "atol": 1e-8} | options
    solution = psn.solve(problem, algorithm or psn.Tsit5(), compile=compile, **options)
    weights = torch.linspace(-1, 2, solution.u.numel(), dtype=D).reshape(solution.u.shape)
    loss = (solution.u * weights).sum() + (solution.u1**3).sum()
    wanted = [u0, ROTOR.matrix, p["gain"], p["rate"]]
    wanted += [x for x in (*span, options.get("saveat")) if isinstance(x, Tensor)]
    return solution, torch.autograd.grad(loss, [x for x in wanted if x.requires_grad])


def assert_alike(found: Any, expected: Any, atol: float = 1e-12) -> None:
    (native, bars), (eager, others) = found, expected
    assert native.retcode is eager.retcode
    assert native.stats == eager.stats
    assert native.t.shape == eager.t.shape
    torch.testing.assert_close(native.u, eager.u, rtol=atol, atol=atol)
    torch.testing.assert_close(native.u1, eager.u1, rtol=atol, atol=atol)
    for one, other in zip(bars, others, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * atol, atol=10 * atol)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any) -> None:
    saveat = torch.tensor([0.0, 0.3, 0.31, 0.55, 0.6, 1.7, 2.5], dtype=D)
    options = {"controller": psn.FixedStep(), "dt0": 0.25, "saveat": saveat}
    assert_alike(run(True, algorithm, **options), run(False, algorithm, **options))
    adaptive = {"rtol": 1e-4, "atol": 1e-4}
    found, expected = run(True, algorithm, **adaptive), run(False, algorithm, **adaptive)
    assert found[0].stats == expected[0].stats
    # Error estimates are small differences of large numbers, so their rounding errors show.
    torch.testing.assert_close(found[0].step_errors, expected[0].step_errors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0].u1, expected[0].u1, rtol=1e-7, atol=1e-7)


def test_events_at_given_times_change_the_state_between_native_pieces() -> None:
    jump = psn.Event(at=[0.4, 1.1], affect=lambda t, u, p: u * p["gain"] + t)
    options: Any = {"events": [jump], "controller": psn.FixedStep(), "dt0": 0.25}
    found, expected = run(True, **options), run(False, **options)
    assert len(found[0].jumps) == 2
    assert_alike(found, expected)


def tensor(*values: float, gradient: bool = False) -> Tensor:
    made = torch.tensor(values, dtype=D)
    made = made if len(values) > 1 else made[0]
    return made.clone().requires_grad_(gradient)


OPTIONS: dict[str, dict[str, Any]] = {
    "loose": {"rtol": 1e-3, "atol": 1e-3},
    "first step": {"dt0": 0.4},
    "longest step": {"dtmax": 0.05},
    "reversed": {"span": (2.5, -1.0), "saveat": tensor(2.0, 1.0, 0.5, 0.0, -1.0)},
    "integral": {"controller": psn.IController(), "saveat": tensor(0.1, 2.5)},
    "derivative": {"controller": psn.PIDController(), "saveat": tensor(0.1, 2.5)},
    "stops": {"tstops": [0.4, 1.1, 2.0], "saveat": tensor(0.4, 0.5, 2.0)},
    "tolerances by entries": {
        "rtol": tensor(1e-6, 1e-4, 1e-5), "atol": tensor(1e-8, 1e-6, math.inf),
    },
    "absolute only": {"rtol": 0.0, "atol": 1e-5},
    "times": {
        "span": (tensor(0.1, gradient=True), tensor(2.4, gradient=True)),
        "saveat": tensor(0.1, 0.5, 0.9, 2.4, gradient=True), "tstops": [0.5, 1.3],
    },
    "saved times on fixed ends": {
        "saveat": tensor(0.0, 0.5, 2.5, gradient=True),
        "controller": psn.FixedStep(), "dt0": 0.11, "tstops": [0.5],
    },
    "fixed steps and times": {
        "span": (tensor(0.1, gradient=True), tensor(2.4, gradient=True)),
        "saveat": tensor(0.1, 0.5, 0.9, 2.4, gradient=True),
        "controller": psn.FixedStep(), "dt0": 0.11, "tstops": [0.5],
    },
    "a grid": {
        "controller": psn.FixedStep((0.1, 0.35, 0.9, 2.0)), "tstops": [0.5, 1.3],
        "saveat": tensor(0.1, 0.5, 0.6, 2.5), "dt0": 0.3,
    },
    "saved times at ends and between": {
        "controller": psn.FixedStep(), "dt0": 0.25,
        "saveat": tensor(0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 1.5, 1.6, 2.0, 2.5),
    },
    "many steps": {"dtmax": 0.013},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options = OPTIONS[name]
    found, expected = run(True, **options), run(False, **options)
    assert found[0].stats == expected[0].stats
    if "saveat" in options or name == "many steps":
        # Steps differ by the rounding of their error estimates; what is asked for does not.
        assert_alike(found, expected, 1e-12 if "FixedStep" in str(options) else 1e-7)
    torch.testing.assert_close(found[0].t, expected[0].t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 3},
        {"dtmin": 0.5, "dt0": 0.6},
        {"dtmin": 0.2},
    ],
)
def test_failures_are_those_of_the_loop(options: dict[str, Any]) -> None:
    u0, p = inputs()
    options = {"rtol": 1e-6, "atol": 1e-8, "saveat": [0.1, 2.5]} | options
    native, eager = (
        psn.solve(
            psn.ODEProblem(ROTOR, u0, (0.0, 2.5), p=p), throw=False, compile=compile, **options
        )
        for compile in (True, False)
    )
    assert (native.retcode, native.stats) == (eager.retcode, eager.stats)
    assert not native.success
    assert native.u.shape == eager.u.shape
    with pytest.raises(psn.SolverFailure, match=r"max_steps|step size"):
        psn.solve(psn.ODEProblem(ROTOR, u0, (0.0, 2.5), p=p), compile=True, **options)
    if options.get("max_steps"):
        bar, other = (torch.autograd.grad(x.u1.sum(), u0)[0] for x in (native, eager))
        torch.testing.assert_close(bar, other, rtol=1e-6, atol=1e-6)


def squared(t: Tensor, u: Tensor) -> Tensor:
    return u * u


def test_what_is_not_finite_is_seen() -> None:
    u0 = torch.ones(2, dtype=D)
    for options in ({}, {"controller": psn.FixedStep(), "dt0": 0.05}):
        problem = psn.ODEProblem(squared, u0, (0.0, 3.0))
        native, eager = (
            psn.solve(problem, throw=False, compile=c, **options) for c in (True, False)
        )
        assert (native.retcode, native.stats) == (eager.retcode, eager.stats)
        assert native.t.shape == eager.t.shape
        assert bool(torch.isfinite(native.u).all())
    problem = psn.ODEProblem(squared, u0 * math.nan, (0.0, 3.0))
    assert psn.solve(problem, throw=False, compile=True).retcode is psn.ReturnCode.Unstable


def test_dense_output_estimates_and_stiffness_are_there() -> None:
    found, expected = run(True)[0], run(False)[0]
    times = torch.linspace(0.0, 2.5, 17, dtype=D)
    torch.testing.assert_close(found(times), expected(times), rtol=1e-7, atol=1e-7)
    for name in ("error", "stiffness"):
        one, other = (getattr(x.local_estimate(0.7), name) for x in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.step_stiffness, expected.step_stiffness, rtol=1e-3, atol=1e-3)


def test_penalties_flow_through_native_states() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    found = []
    for compile in (True, False):
        node = psn.NeuralODE(
            _Autonomous(net),
            psn.Tsit5(),
            rtol=1e-5,
            atol=1e-5,
            compile=compile,
            regularizers=[psn.GlobalError()],
        )
        solution = node(torch.ones(2, 3, dtype=D))
        loss = solution.u1.square().sum() + solution.penalty
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class _Autonomous(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.net(u)
        return out


FACTOR = 1.5


def test_functions_with_closures_and_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(2, 2).double()
    weight = torch.tensor([0.5, -0.4], dtype=D, requires_grad=True)
    shifted = weight * 2
    data = torch.tensor([0.1, 0.2], dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return FACTOR * torch.tanh(net(u)) + shifted * u + data

    u0 = torch.ones(3, 2, dtype=D)

    def both() -> None:
        found = []
        for compile in (True, False):
            problem = psn.ODEProblem(field, u0, (0.0, 1.0))
            end = psn.solve(problem, psn.BS3(), compile=compile, rtol=1e-8, atol=1e-8).u1
            wanted = [weight, net.weight, net.bias]
            bars = torch.autograd.grad(end.square().sum(), wanted, retain_graph=True)
            found.append([end.detach(), *bars])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)

    both()
    monkeypatch.setitem(globals(), "FACTOR", -0.5)
    both()
    data.mul_(-3)
    both()
    with torch.no_grad():
        net.weight.add_(1.0)
    both()
    for compile in (True, False):  # functions made anew at each turn
        sol = psn.solve(psn.ODEProblem(lambda t, u, p: -p[0] * u, u0, (0.0, 1.0), p=[weight[0]]),
                        compile=compile)  # fmt: skip
        torch.testing.assert_close(sol.u1, u0 * torch.exp(-weight[0]), rtol=1e-5, atol=1e-5)


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.activation, self.calls = 1.0, nn.Tanh(), 0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * self.activation(u)


def test_fields_that_change_are_translated_again() -> None:
    field, u0 = Changing(), torch.tensor([0.3, -0.4], dtype=D)

    def step() -> Tensor:
        problem = psn.ODEProblem(field, u0, (0.0, 0.5))
        options = {"controller": psn.FixedStep(), "dt0": 0.5}
        return psn.solve(problem, psn.Euler(), compile=True, **options).u1

    torch.testing.assert_close(step(), u0 + 0.5 * torch.tanh(u0))
    field.scale, field.activation = 3.0, nn.ReLU()
    torch.testing.assert_close(step(), u0 + 1.5 * torch.relu(u0))
    field.calls = 0
    torch.testing.assert_close(step(), u0 + 1.5 * torch.relu(u0))


def test_states_of_several_parts() -> None:
    weight = torch.tensor(0.7, dtype=D, requires_grad=True)

    def field(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"v": -weight * torch.sin(u["x"]) * t, "x": u["v"]}

    found = []
    for compile in (True, False):
        u0 = {"x": torch.ones(3, 5, dtype=D, requires_grad=True), "v": torch.ones(3, 5, dtype=D)}
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        sol = psn.solve(
            problem, psn.DP5(), compile=compile, saveat=[0.5, 1.0], atol={"x": 1e-6, "v": math.inf}
        )
        loss = sol.u["x"].square().sum() + sol.u1["v"].sum()
        found.append([sol.u["x"], sol.u["v"], *torch.autograd.grad(loss, [u0["x"], weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def pair(t: Tensor, u: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return u[1].sum() * u[0], u[1].T.reshape(2, 3)

    ends = []
    for compile in (True, False):
        both = (torch.ones(5, dtype=D), torch.ones(2, 3, dtype=D) / 7)
        ends.append(psn.solve(psn.ODEProblem(pair, both, (0.0, 1.0)), compile=compile).u1)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_finite_differences() -> None:
    options = {"controller": psn.FixedStep(), "dt0": 0.3, "saveat": [0.2, 1.0], "compile": True}

    def values(u0: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        problem = psn.ODEProblem(lambda t, u, p: torch.cos(t) - p * u**2, u0, (0.0, 1.0), p=a)
        sol = psn.solve(problem, psn.BS3(), **options)
        return sol.u, sol.u1

    u0 = torch.tensor([1.0, -0.5], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(values, (u0, torch.tensor(0.7, dtype=D, requires_grad=True)))


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def captured_branch(t: Tensor, u: Tensor) -> Tensor:
    return u if u.sum() > 0 else -u


REFUSED: dict[str, tuple[Any, Tensor, dict[str, Any], str]] = {
    "direct": (decay, torch.ones(2), {"adjoint": psn.DirectAdjoint()}, "DirectAdjoint"),
    "continuous": (decay, torch.ones(2), {"adjoint": psn.GaussAdjoint()}, "GaussAdjoint"),
    "complex": (decay, torch.ones(2) + 0j, {}, "complex64"),
    "branches": (captured_branch, torch.ones(2), {}, "exported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_native_code_is_named(name: str) -> None:
    field, u0, options, named = REFUSED[name]
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    with pytest.raises(psn.CompileError, match=named) as caught:
        psn.solve(problem, compile=True, **options)
    assert "\n  " in str(caught.value)
    assert "compile=False" in str(caught.value)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match=named):
        found = psn.solve(problem, compile="auto", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psn.solve(problem, compile="auto", **options)
    assert found.success


def test_compile_is_a_choice_of_three() -> None:
    problem = psn.ODEProblem(decay, torch.ones(2), (0.0, 1.0))
    with pytest.raises((TypeError, ValueError), match="compile"):
        psn.solve(problem, compile="yes")
    with torch.autocast("cpu"), pytest.raises(psn.CompileError, match="autocast"):
        psn.solve(problem, compile=True)


def test_a_second_derivative_is_refused() -> None:
    u0 = torch.ones(2, dtype=D, requires_grad=True)
    end = psn.solve(psn.ODEProblem(decay, u0, (0.0, 1.0)), compile=True).u1
    (bar,) = torch.autograd.grad(end.sum(), u0, create_graph=True)
    with pytest.raises(RuntimeError, match="DirectAdjoint"):
        bar.sum().backward()


def test_single_precision_and_inference() -> None:
    u0 = torch.tensor([0.3, -0.4])

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack([u[1], -torch.sin(u[0])])

    found, expected = (
        psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Heun(), rtol=1e-4, atol=1e-4,
                  saveat=[0.5, 1.0], compile=compile) for compile in (True, False)
    )  # fmt: skip
    assert found.u1.dtype is torch.float32
    assert found.stats == expected.stats
    torch.testing.assert_close(found.u, expected.u, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        again = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Heun(), rtol=1e-4, atol=1e-4,
                          saveat=[0.5, 1.0], compile=True)  # fmt: skip
    assert torch.equal(again.u, found.u)


def test_members_and_threads() -> None:
    starts = torch.linspace(0.5, 2.0, 5, dtype=D).reshape(5, 1)
    problem = psn.ODEProblem(decay, starts[0], (0.0, 1.0))
    found = psn.solve(psn.EnsembleProblem(problem, u0=starts), compile=True)
    torch.testing.assert_close(found.u1, starts * math.exp(-1), rtol=1e-5, atol=1e-5)
    ends = [psn.solve(psn.ODEProblem(decay, u0, (0.0, 1.0)), compile=True).u1 for u0 in starts]
    results: list[Tensor] = []
    together: list[Tensor] = []

    def work() -> None:
        for u0 in starts:
            results.append(psn.solve(psn.ODEProblem(decay, u0, (0.0, 1.0)), compile=True).u1)
        together.append(psn.solve(psn.EnsembleProblem(problem, u0=starts), compile=True).u1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(float(x.detach()) for x in results) == sorted([float(x) for x in ends] * 4)
    assert all(torch.equal(u1, found.u1) for u1 in together)


def test_an_interrupt_ends_a_solve() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    problem = psn.ODEProblem(decay, torch.ones(1, dtype=D), (0.0, 1.0))
    options = {"controller": psn.FixedStep(), "dt0": 1e-9, "max_steps": 10**9, "compile": True}
    psn.solve(problem, psn.Vern9(), **options | {"dt0": 0.1})
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            psn.solve(problem, psn.Vern9(), **options)
        assert time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_training_keeps_nothing() -> None:
    u0 = torch.ones(2, dtype=D, requires_grad=True)

    def tensors() -> int:
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def train() -> None:
        psn.solve(psn.ODEProblem(decay, u0, (0.0, 1.0)), compile=True).u.sum().backward()

    train()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(50):
            train()
        assert tensors() <= before
    finally:
        gc.enable()


def test_native_code_knows_every_option() -> None:
    """Whoever adds an option or a field of a controller brings it to native code, or refuses it."""
    options = {field.name for field in dataclasses.fields(SolveOptions)}
    assert options == {
        *("tolerances", "saveat", "saveat_tensor", "adjoint", "dt0", "dtmin", "dtmax"),
        *("tstops", "max_steps", "controller", "events", "progress", "throw", "compile", "seed"),
        *("fired", "defaulted", "unseeded"),
    }
    fields = {c: {x.name for x in dataclasses.fields(c)} for c in prepared._CONTROLS}
    assert fields == {
        psn.PIController: {"beta1", "beta2", "gamma", "qmin", "qmax"},
        psn.IController: {"gamma", "qmin", "qmax"},
        psn.PIDController: {"beta1", "beta2", "beta3", "safety"},
        psn.FixedStep: {"times"},
    }
