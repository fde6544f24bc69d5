"""Native stochastic steps beside the loop in Python, on the same Brownian paths."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import pysciml_node as psn
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.torch_engine.native import departure
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.stochastic_code import Translated

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
Made = tuple[psn.SDEProblem, list[Tensor]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """A small network of state and time, driven by `p`."""

    def __init__(self, out: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(out, 2, seed=seed, dtype=dtype) / 2)

    def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(u @ self.weight.T) * torch.cos(p[0] * t) - p[1]


def diagonal(interpretation: str = "ito", dtype: torch.dtype = D) -> Made:
    drift, diffusion = Layer(2, 1, dtype), Layer(2, 2, dtype)
    p = torch.tensor([0.7, 0.4], dtype=dtype, requires_grad=True)
    u0 = random(3, 2, dtype=dtype).requires_grad_()
    made = psn.SDEProblem(drift, diffusion, u0, (0.0, 1.0), "diagonal", interpretation, p)
    return made, [u0, p, *drift.parameters(), *diffusion.parameters()]


def scalar(interpretation: str = "ito") -> Made:
    made, inputs = diagonal(interpretation)
    given = made.drift, made.diffusion, made.u0, (0.0, 1.0), "scalar", interpretation, made.p
    return psn.SDEProblem(*given), inputs


def general(interpretation: str = "ito") -> Made:
    """Three motions of each of two samples; a captured tensor is read by both fields."""
    layer, rate = Layer(6, 3, D), torch.tensor(0.6, dtype=D, requires_grad=True)
    u0, p = random(2, 2).requires_grad_(), torch.tensor([0.7, 0.4], dtype=D, requires_grad=True)

    def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.sin(rate * u) - u * t

    def diffusion(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return rate * layer(t, u, p).view(-1, 2, 3)

    made = psn.SDEProblem(drift, diffusion, u0, (0.0, 1.0), "general", interpretation, p)
    return made, [u0, p, rate, *layer.parameters()]


def mixed() -> Made:
    """Additive noise by a matrix that depends on time."""
    matrix = random(2, 3, seed=4).requires_grad_()
    u0 = random(3, 2).requires_grad_()
    made = psn.SDEProblem(
        lambda t, u: torch.sin(2 * u) - t,
        lambda t, u: ((1 + t) * matrix).expand(3, 2, 3),
        u0,
        (0.0, 1.0),
        "additive",
    )
    return made, [u0, matrix]


def parts() -> Made:
    """Additive noise of a state in parts."""
    rate = torch.tensor(0.6, dtype=D, requires_grad=True)
    x, v = random(2).requires_grad_(), random(3, seed=1).requires_grad_()

    def drift(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": -rate * u["x"] * u["v"].sum(), "v": torch.sin(u["v"]) * t}

    def diffusion(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": rate * torch.ones_like(u["x"]), "v": (t + rate) * torch.ones_like(u["v"])}

    made = psn.SDEProblem(drift, diffusion, {"x": x, "v": v}, (0.0, 1.0), "additive")
    return made, [x, v, rate]


STRATONOVICH = (psn.RKMil(), psn.EulerHeun(), psn.StratonovichMidpoint(), psn.ReversibleHeun())
CASES: list[tuple[str, Any, Callable[[], Made]]] = [
    *(
        ("diagonal", method, diagonal)
        for method in (
            *(psn.EM(), psn.LambaEM(), psn.RKMil(), psn.SRIW1()),
            *(psn.SOSRI(), psn.SOSRI2(delta=0.5)),
        )
    ),
    *(("diagonal", method, lambda: diagonal("stratonovich")) for method in STRATONOVICH),
    ("scalar", psn.SRIW1(), scalar),
    ("scalar", psn.ReversibleHeun(), lambda: scalar("stratonovich")),
    ("additive matrix", psn.EM(), mixed),
    ("additive matrix", psn.SRA1(), mixed),
    ("additive matrix", psn.SOSRA2(), mixed),
    ("parts", psn.SOSRA(), parts),
    ("general", psn.LambaEM(), general),
    ("general", psn.EulerHeun(), lambda: general("stratonovich")),
    ("general", psn.ReversibleHeun(), lambda: general("stratonovich")),
]
of_every_kind = pytest.mark.parametrize(
    ("noise", "method", "make"),
    CASES,
    ids=[f"{type(method).__name__}-{noise}-{i}" for i, (noise, method, _) in enumerate(CASES)],
)
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.13}
LOOSE: dict[str, Any] = {"rtol": 0.3, "atol": 0.2}
STOPS: dict[str, Any] = {"saveat": [0.0, 0.11, 0.35, 0.36, 0.5, 1.0], "tstops": [0.5, 0.777]}


def flat(u: Any) -> Tensor:
    parts = u.values() if isinstance(u, dict) else (u,)
    return torch.cat([x.reshape(-1) for x in parts])


def solved(
    made: Made, method: Any, compile: Any, seed: int = 3, **options: Any
) -> tuple[psn.Solution, list[Tensor | None]]:
    """A solution and its gradients to all inputs, of a loss of all that a solution has."""
    problem, inputs = made
    generator = torch.Generator().manual_seed(seed)
    solution = psn.solve(
        problem, method, compile=compile, generator=generator, engine="torch", **options
    )
    states, end = flat(solution.u), flat(solution.u1)
    weights = torch.linspace(-1, 2, len(states), dtype=states.dtype)
    loss = (states * weights).sum() + (end**3).sum()
    return solution, [loss, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def assert_alike(found: Any, expected: Any, values: float = 1e-12, bars: float = 1e-11) -> None:
    (native, gradients), (eager, others) = found, expected
    assert native.retcode is eager.retcode
    assert native.stats.naccept == eager.stats.naccept
    assert native.stats.nreject == eager.stats.nreject
    assert native.stats.naccept_backward == eager.stats.naccept_backward
    assert native.stats.nvjp == eager.stats.nvjp
    torch.testing.assert_close(native.t, eager.t, rtol=0, atol=1e-13)
    torch.testing.assert_close(flat(native.u), flat(eager.u), rtol=values, atol=values)
    torch.testing.assert_close(flat(native.u1), flat(eager.u1), rtol=values, atol=values)
    for one, other in zip(gradients, others, strict=True):
        if other is None:  # of a solve without steps
            assert one is None or not one.any()
        else:
            scale = float(other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=bars, atol=bars * max(scale, 1.0))


@of_every_kind
def test_steps_states_and_gradients_are_those_of_the_loop_in_python(
    noise: str, method: Any, make: Callable[[], Made]
) -> None:
    made = make()
    ways: list[dict[str, Any]] = [{**FIXED, **STOPS}]
    if noise in method.adapts_to or noise not in ("diagonal", "scalar", "general"):
        ways += [{**LOOSE, **STOPS}]
    for options in ways:
        found, expected = (solved(made, method, compile, **options) for compile in (True, False))
        assert_alike(found, expected)
        assert found[0].engine == "torch"


@pytest.mark.parametrize("method", [psn.SRIW1(), psn.EM()])
def test_single_precision(method: Any) -> None:
    made = diagonal(dtype=torch.float32)
    found, expected = (solved(made, method, compile, **FIXED) for compile in (True, False))
    assert_alike(found, expected, values=1e-5, bars=1e-5)


ADAPTIVE: dict[str, dict[str, Any]] = {
    "sizes": {"dt0": 0.01, "dtmax": 0.05},
    "I control": {"controller": psn.IController()},
    "PID control": {"controller": psn.PIDController()},
    "tolerances by entries": {
        "rtol": torch.tensor([0.1, 0.01], dtype=D),
        "atol": torch.tensor([torch.inf, 0.01], dtype=D),
    },
    "tight": {"rtol": 0.02, "atol": 0.02},
    "a grid": {"controller": psn.FixedStep((0.1, 0.15, 0.4, 0.41))},
    "one step": {"controller": psn.FixedStep(), "dt0": 3.0},
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_options_of_steps(name: str) -> None:
    made, options = diagonal(), ADAPTIVE[name]
    found, expected = (solved(made, psn.SOSRI(), compile, **options) for compile in (True, False))
    assert_alike(found, expected)


def test_evaluations_are_counted() -> None:
    for options in (FIXED, LOOSE):
        with torch.no_grad():
            found, expected = (
                psn.solve(
                    diagonal()[0],
                    psn.SOSRI(),
                    compile=compile,
                    generator=torch.Generator().manual_seed(1),
                    **options,
                ).stats
                for compile in (True, False)
            )
        assert found.nfe == expected.nfe
        assert found.nfe_diffusion == expected.nfe_diffusion


def test_long_solves_come_back_to_python_and_go_on() -> None:
    made, options = diagonal(), {"controller": psn.FixedStep(), "dt0": 1e-4, "saveat": [0.5, 1.0]}
    with mock.patch.object(departure, "TURN", 0.0):
        found = solved(made, psn.EM(), True, max_steps=20_000, **options)
    # Other options: how a solve departs is kept with them.
    at_once = solved(made, psn.EM(), True, max_steps=20_001, **options)
    assert found[0].stats.naccept == 10_000
    assert torch.equal(found[0].u, at_once[0].u)
    for one, other in zip(found[1], at_once[1], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "make"),
    [(psn.SRIW1(), diagonal), (psn.ReversibleHeun(), lambda: general("stratonovich"))],
)
def test_steps_whose_stages_are_kept_have_the_gradients_of_others(
    method: Any, make: Callable[[], Made]
) -> None:
    """To the last bit, with none, some and all of them kept."""
    made, saved = make(), [0.11, 0.35, 0.5, 1.0]
    solved(made, method, True, **FIXED)  # as many are kept as the solve before has taken
    by = SDEMethod.of(method.tableau_for(made[0]), method.delta, D, torch.device("cpu"))
    slot = Translated.of(made[0]).library(by, D).slot * D.itemsize
    found = [
        solved(
            made, method, True, **FIXED, saveat=saved, adjoint=psn.DiscreteAdjoint(memory=memory)
        )
        for memory in (2**26, 3 * slot, 0)
    ]
    for solution, gradients in found[1:]:
        assert torch.equal(solution.u, found[0][0].u)
        assert all(torch.equal(x, y) for x, y in zip(gradients, found[0][1], strict=True))
    evaluations = [solution.stats.nfe_backward for solution, _ in found]
    assert evaluations[0] < evaluations[1] < evaluations[2]


def test_gradients_are_those_of_the_computation() -> None:
    """Finite differences on the same path."""
    problem, _ = diagonal()

    def end(u0: Tensor, p: Tensor) -> Tensor:
        given = psn.SDEProblem(problem.drift, problem.diffusion, u0, (0.0, 1.0), p=p)
        generator = torch.Generator().manual_seed(2)
        solution = psn.solve(
            given, psn.SOSRI(), compile=True, generator=generator, saveat=[0.4, 1.0], **FIXED
        )
        return solution.u

    p = torch.tensor([0.7, 0.4], dtype=D, requires_grad=True)
    assert gradcheck(end, (random(3, 2).requires_grad_(), p))


@pytest.mark.parametrize(
    ("method", "order"), [(psn.EM(), 0.5), (psn.RKMil(), 1.0), (psn.SRIW1(), 1.5)]
)
def test_strong_order(method: Any, order: float) -> None:
    """Geometric Brownian motion is `exp((mu - sigma^2 / 2) t + sigma W)`."""
    problem = psn.SDEProblem(
        lambda t, u: 0.1 * u, lambda t, u: 0.8 * u, torch.ones(400, dtype=D), (0.0, 1.0)
    )
    errors = []
    for k in (4, 6, 8):
        generator = torch.Generator().manual_seed(1)
        options = {"controller": psn.FixedStep(), "dt0": 2.0**-k}
        with torch.no_grad():
            solution = psn.solve(problem, method, compile=True, generator=generator, **options)
        exact = torch.exp(0.1 - 0.32 + 0.8 * solution.brownian(0.0, 1.0))
        errors.append((solution.u1 - exact).square().mean().log2().item() / 2)
    assert (errors[0] - errors[2]) / 4 == pytest.approx(order, abs=0.15)


def test_solutions_have_all_that_others_have() -> None:
    problem, inputs = diagonal()
    for options in (FIXED, LOOSE):
        found, expected = (
            psn.solve(
                problem,
                psn.SOSRI2(),
                compile=compile,
                generator=torch.Generator().manual_seed(4),
                **options,
            )
            for compile in (True, False)
        )
        near = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(found.brownian(0.1, 0.9), expected.brownian(0.1, 0.9), **near)
        torch.testing.assert_close(found(0.123), expected(0.123), **near)
        torch.testing.assert_close(found(0.5), expected(0.5), **near)
        penalties = [
            s.local_estimate(0.4).error + s.step_estimates()[-1].error for s in (found, expected)
        ]
        torch.testing.assert_close(*penalties, rtol=1e-9, atol=1e-12)
        one, other = (
            torch.autograd.grad(x + s(0.7).sum(), inputs)
            for x, s in zip(penalties, (found, expected), strict=True)
        )
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 4, "rtol": 1e-4, "atol": 1e-4},
        {"dtmin": 0.05, "rtol": 1e-6, "atol": 1e-6, "dt0": 0.3},
        {"max_steps": 5, **FIXED, "saveat": [0.1, 0.9]},
    ],
)
def test_failures_are_those_of_the_loop_in_python(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", psn.errors.PsnWarning)
        found, expected = (
            solved(diagonal(), psn.SRIW1(), compile, throw=False, **options)
            for compile in (True, False)
        )
    assert not found[0].success
    assert_alike(found, expected)
    with pytest.raises(psn.SolverFailure):
        solved(diagonal(), psn.SRIW1(), True, **options)


@pytest.mark.parametrize("options", [FIXED, LOOSE])
def test_solutions_that_do_not_stay_finite(options: dict[str, Any]) -> None:
    problem = psn.SDEProblem(
        lambda t, u: torch.exp(40 * u), lambda t, u: u, torch.ones(2, 2, dtype=D), (0.0, 1.0)
    )
    found, expected = (
        psn.solve(
            problem,
            psn.SRIW1(),
            compile=compile,
            throw=False,
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        for compile in (True, False)
    )
    assert found.retcode is expected.retcode
    assert not found.success
    assert found.stats.naccept == expected.stats.naccept
