"""Dense output and estimates of native solves, beside those of single steps in Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from row_fields import Field, net, parts, start
from steps_again import assert_alike, errors_of_steps, gradients, in_python, natively
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.problems.state import tensors_of
from pysciml_node.solutions.solution import Solution
from pysciml_node.torch_engine.native import emit, library
from pysciml_node.torch_engine.native import parts as splitting
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
PAIRS = [
    psn.Euler(), psn.Midpoint(), psn.Heun(), psn.Ralston(), psn.BS3(), psn.RK4(), psn.Tsit5(),
    psn.DP5(), psn.DP8(), psn.Vern7(), psn.Vern9(),
]  # fmt: skip
STOPS: list[Any] = [True, "state", False]


class Driven(nn.Module):
    """A driven rotation with a nonlinear part, of parameters and of `p`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(3, 3, dtype=D, generator=generator)
        self.matrix = nn.Parameter(3 * (matrix - matrix.T) - 0.5 * torch.eye(3, dtype=D))

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        driven = self.matrix[0] * torch.sin(t * p["rate"])
        return torch.tanh(u @ self.matrix.T) * p["gain"] * 2 + driven


FIELD = Driven()


def solve(**options: Any) -> tuple[Solution, list[Tensor]]:
    """A native solution in large steps, and what it depends on."""
    generator = torch.Generator().manual_seed(1)
    p = {
        "gain": torch.tensor([1.0, 0.7, 1.3], dtype=D, requires_grad=True),
        "rate": torch.tensor(2.0, dtype=D, requires_grad=True),
    }
    u0 = torch.randn(2, 3, dtype=D, generator=generator).requires_grad_()
    problem = psn.ODEProblem(FIELD, u0, options.pop("span", (0.0, 2.5)), p=p)
    steps = {"controller": psn.FixedStep(), "dt0": 0.4} if "controller" not in options else {}
    chosen = {"rtol": 1e-2, "atol": 1e-3} | steps | options
    algorithm = chosen.pop("algorithm", psn.Tsit5())
    solution = psn.solve(problem, algorithm, compile=True, engine="torch", **chosen)
    return solution, [u0, FIELD.matrix, *p.values()]


def local(**how: Any) -> Callable[[Solution], tuple[Tensor, ...]]:
    def read(solution: Solution) -> tuple[Tensor, ...]:
        step = solution.local_estimate(how.get("t", 0.7), **{k: how[k] for k in how if k != "t"})
        assert step.dt.shape == step.error.shape == step.stiffness.shape == ()
        return step.error, step.stiffness, step.error * step.dt

    return read


@pytest.mark.parametrize("stop_gradient", STOPS)
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_local_estimates(pair: Any, stop_gradient: Any) -> None:
    solution, inputs = solve()
    # Without the size that Hairer's rule gives, which is too small to tell errors from rounding.
    assert_alike(
        solution, inputs, local(algorithm=pair, stop_gradient=stop_gradient, dt=0.6), 1e-10
    )


@pytest.mark.parametrize(
    "options", [{}, {"span": (2.5, -1.0)}, {"tstops": [0.5, 0.7]}, {"dt0": 2.0}]
)
def test_sizes_of_local_steps_are_hairers(options: dict[str, Any]) -> None:
    solution, _ = solve(**options)
    for t in (0.31, 0.7, 2.4):
        with natively(2):
            found = solution.local_estimate(t, psn.Tsit5())
        expected = in_python(solution).local_estimate(t, psn.Tsit5())
        torch.testing.assert_close(found.dt, expected.dt, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.error, expected.error, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_estimates_of_all_steps(pair: Any) -> None:
    def read(solution: Solution) -> list[Tensor]:
        steps = solution.step_estimates()
        assert [float(x.dt) for x in steps] == solution.trajectory.record.sizes
        return [
            torch.stack([x.error for x in steps]), torch.stack([x.stiffness for x in steps]),
        ]  # fmt: skip

    solution, inputs = solve(algorithm=pair, tstops=[0.5])
    # Arguments of stages differ by little: native code forms that of the stages.
    assert_alike(solution, inputs, read, 1e-8)
    if getattr(pair.tableau, "stiffness_stages", None):
        expected = in_python(solution).step_stiffness
        torch.testing.assert_close(solution.step_stiffness, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_dense_output(pair: Any) -> None:
    solution, inputs = solve(algorithm=pair)
    times = torch.tensor([2.2, 0.3, 0.31, 0.0, 1.0, 0.8, 2.5], dtype=D)
    for asked in (times, 0.3, [0.1, 0.2, 0.9]):
        assert_alike(solution, inputs, lambda s, asked=asked: (s(asked),))
    assert torch.equal(solution(0.4), solution.u[1])


OPTIONS: dict[str, dict[str, Any]] = {
    "backward in time": {"span": (2.5, -1.0)},
    "stops": {"tstops": [0.7, 1.1]},
    "stages that are not kept": {"adjoint": psn.DiscreteAdjoint(memory=0)},
    "tolerances by entries": {
        "rtol": torch.tensor([1e-2, 3e-2, 2e-2], dtype=D),
        "atol": torch.tensor([1e-3, math.inf, 1e-2], dtype=D),
    },
    "an event": {"events": psn.Event(lambda t, u: u[0, 0] - 10.0)},
    "saved times": {"saveat": torch.tensor([0.1, 1.0], dtype=D)},
    "a tiny rtol": {"rtol": 1e-12, "atol": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    solution, inputs = solve(**OPTIONS[options])
    for stop_gradient in STOPS:
        assert_alike(solution, inputs, local(stop_gradient=stop_gradient, dt=0.5), 1e-10)
    assert_alike(solution, inputs, errors_of_steps, 1e-10)
    assert_alike(solution, inputs, lambda s: (s([0.33, 0.35, 1.9]),))


def test_derivatives_are_those_of_finite_differences() -> None:
    """Also those that reach the solve through the state where the step begins."""
    how: Any = {"controller": psn.FixedStep(), "dt0": 0.4, "rtol": 1e-2, "atol": 1e-3}

    def read(u0: Tensor, gain: Tensor) -> Tensor:
        problem = psn.ODEProblem(FIELD, u0, (0.0, 1.1), p={"gain": gain, "rate": gain.sum()})
        solution = psn.solve(problem, psn.Tsit5(), compile=True, **how)
        steps = [
            solution.local_estimate(0.5, pair, dt=0.5, stop_gradient=False)
            for pair in (psn.Tsit5(), psn.DP8())
        ]
        steps += solution.step_estimates()
        numbers = [x for step in steps for x in (step.error, step.stiffness)]
        return torch.cat([torch.stack(numbers), solution([0.2, 0.9, 1.05]).reshape(-1)])

    _, (u0, _, gain, _) = solve()
    with natively():
        assert torch.autograd.gradcheck(read, (u0, gain), atol=1e-6, rtol=1e-4)


def test_higher_derivatives_are_those_of_torch() -> None:
    solution, inputs = solve()

    def second(solution: Solution) -> list[Tensor]:
        step = solution.local_estimate(0.7, dt=0.6)
        first = torch.autograd.grad(
            step.error + step.stiffness, inputs[1:], create_graph=True, allow_unused=True
        )
        return gradients([x for x in first if x is not None], inputs[1:])

    with natively(2):
        found = second(solution)
    for one, other in zip(found, second(in_python(solution)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))


def test_higher_derivatives_through_the_solve_are_refused() -> None:
    solution, inputs = solve()
    first = solution.step_estimates()[0].error
    for value in (solution(0.3).sum(), first):
        (bar,) = torch.autograd.grad(value, inputs[1], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative through a solve"):
            torch.autograd.grad(bar.sum(), inputs[1])


def twice(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return FIELD(t, u, p) * p["again"]


@pytest.mark.parametrize(
    "kind", ["through the solve", "of the step alone", "with a tensor in two places"]
)
def test_a_graph_of_first_derivatives_leaves_them_as_they_are(kind: str) -> None:
    """Also where one of the sources depends on another: states on weights, parts of p on others."""
    gain = torch.tensor([1.0, 0.7, 1.3], dtype=D, requires_grad=True)
    p = {"gain": gain, "rate": gain.square().sum()}
    if kind == "with a tensor in two places":
        p = {"gain": gain, "rate": FIELD.matrix.detach()[0, 0], "again": gain}
    problem = psn.ODEProblem(
        twice if "again" in p else FIELD, torch.ones(2, 3, dtype=D), (0.0, 2.5), p=p
    )
    solution = psn.solve(
        problem, psn.Tsit5(), compile=True, engine="torch", controller=psn.FixedStep(), dt0=0.4,
        rtol=1e-2, atol=1e-3,
    )  # fmt: skip
    through = kind == "through the solve"
    step = solution.local_estimate(0.7, dt=0.6, stop_gradient=not through)
    values = [step.error, step.stiffness, *([solution(0.3).sum()] if through else [])]
    inputs = [gain, FIELD.matrix]
    for value in values:
        once = torch.autograd.grad(value, inputs, retain_graph=True)
        for one, other in zip(
            torch.autograd.grad(value, inputs, create_graph=True), once, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_sweeps_of_several_threads_through_one_graph() -> None:
    field = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    u0 = torch.linspace(-1, 1, 512, dtype=D).reshape(32, 16)
    problem = psn.ODEProblem(lambda t, u: field(u), u0, (0.0, 1.0))
    solution = psn.solve(problem, psn.Tsit5(), compile=True, controller=psn.FixedStep(), dt0=0.01)
    value = solution(torch.linspace(0.001, 0.999, 100, dtype=D)).square().sum()

    def gradient(factor: float) -> Tensor:
        return torch.autograd.grad(factor * value, field[0].weight, retain_graph=True)[0]

    alone = gradient(1.0)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, [1.0, 2.0, 4.0, 8.0] * 2))
    for factor, found in zip([1.0, 2.0, 4.0, 8.0] * 2, together, strict=True):
        torch.testing.assert_close(found, factor * alone, rtol=1e-12, atol=1e-15)


READS: dict[str, Callable[[Solution], Any]] = {
    "between": lambda s: s(0.3),
    "local": lambda s: s.local_estimate(0.7),
    "local, at the end of a step": lambda s: s.local_estimate(0.4),
    "steps": lambda s: s.step_estimates(),
    "stiffness": lambda s: s.step_stiffness,
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("read", READS)
def test_weights_that_have_changed_since_are_refused(read: str, hidden: bool) -> None:
    """Also where torch does not count the change."""
    field = Driven()
    with mock.patch(f"{__name__}.FIELD", field):
        solution, _ = solve()
    READS[read](solution)
    with torch.no_grad():
        (field.matrix.data if hidden else field.matrix).mul_(1.1)
    with pytest.raises(RuntimeError, match=r"could not reproduce|changed in place|modified"):
        READS[read](solution)


def test_weights_that_change_before_the_sweep_are_noticed_by_torch() -> None:
    field = Driven()
    with mock.patch(f"{__name__}.FIELD", field):
        solution, _ = solve()
    error = solution.local_estimate(0.7).error
    with torch.no_grad():
        field.matrix.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        error.backward()


def test_single_precision() -> None:
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    found = []
    for dtype in (torch.float32, D):
        net = copy.deepcopy(field).to(dtype)
        problem = psn.ODEProblem(lambda t, u: net(u) * 8, torch.ones(4, 3, dtype=dtype), (0.0, 1.0))  # noqa: B023
        solution = psn.solve(problem, psn.Tsit5(), compile=True, rtol=1e-3, atol=1e-3)
        with natively(2):
            error = solution.local_estimate(0.3, dt=0.7, stop_gradient="state").error
        found.append([solution([0.1, 0.9]), error, *torch.autograd.grad(error, net.parameters())])
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3 * size)


class Scaled(nn.Module):
    """A field with a number that may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3).double(), 2.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.layer(u)) * self.scale


def test_a_state_beside_which_rates_are_integrated() -> None:
    """Its estimates are of the field alone, as it was when it was solved."""
    torch.manual_seed(0)
    field, found = Scaled(), []
    for compile in (True, False):
        field.scale = 2.0
        node = psn.NeuralODE(
            field, psn.Tsit5(), regularizers=[psn.KineticEnergy()], compile=compile,
            controller=psn.FixedStep(), dt0=0.4, rtol=1e-2, atol=1e-2,
        )  # fmt: skip
        solution = node(torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3))
        field.scale = 3.0
        with natively(2) if compile else nullcontext():
            step = solution.local_estimate(0.5, dt=0.5, stop_gradient=False)
        values = [step.error, step.stiffness, solution(0.3)]
        found.append([*values, *gradients(values, list(field.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_members_with_parameters_of_their_own() -> None:
    gain = torch.linspace(0.5, 1.5, 9, dtype=D).reshape(3, 3).requires_grad_()
    rate = torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True)
    u0 = torch.linspace(-1, 1, 18, dtype=D).reshape(3, 2, 3)
    one = psn.ODEProblem(FIELD, u0[0], (0.0, 1.0), p={"gain": gain[0], "rate": rate[0]})
    members = psn.EnsembleProblem(one, u0, p={"gain": gain, "rate": rate})
    solution = psn.solve(
        members, psn.Tsit5(), compile=True, engine="torch", rtol=1e-2, atol=1e-3,
        controller=psn.FixedStep(), dt0=0.4,
    )  # fmt: skip
    for m in (0, 2):
        inputs = [FIELD.matrix, gain, rate]
        assert_alike(solution[m], inputs, local(stop_gradient=False, dt=0.5), 1e-10)
        assert_alike(solution[m], inputs, errors_of_steps, 1e-10)
        assert_alike(solution[m], inputs, lambda s: (s([0.1, 0.5]),))


def test_copies_have_them_too() -> None:
    solution, _ = solve()
    expected = [solution(0.3).detach(), solution.local_estimate(0.7, dt=0.5).error.detach()]
    copies = [solution.detach(), copy.deepcopy(solution), solution.to(D)]
    for other in copies:
        found = [other(0.3), other.local_estimate(0.7, dt=0.5).error]
        for one, x in zip(found, expected, strict=True):
            torch.testing.assert_close(one, x, rtol=1e-9, atol=0)
    assert not any(x.requires_grad for x in (copies[0](0.3), copies[1](0.3)))


def test_derivatives_in_time_are_had_in_python() -> None:
    solution, _ = solve()
    t = torch.tensor(0.3, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(solution(t).sum(), t)
    expected = (solution(0.3 + 1e-6).sum() - solution(0.3 - 1e-6).sum()) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=0)
    end = torch.tensor(2.5, dtype=D, requires_grad=True)
    moving, _ = solve(span=(0.0, end))
    # The last step ends with the interval, and what lies inside of it moves with it.
    assert torch.autograd.grad(moving(2.45).sum(), end)[0] != 0


def test_a_checkpoint_around_a_penalty() -> None:
    def loss(gain: Tensor) -> Tensor:
        p = {"gain": gain, "rate": gain[0]}
        problem = psn.ODEProblem(FIELD, torch.ones(2, 3, dtype=D), (0.0, 1.0), p=p)
        solution = psn.solve(problem, psn.Tsit5(), compile=True, rtol=1e-2, atol=1e-2)
        value: Tensor = solution.local_estimate(0.3, dt=0.5).error + solution(0.4).sum()
        return value

    gain = torch.tensor([1.0, 0.7, 1.3], dtype=D, requires_grad=True)
    values = loss(gain), checkpoint(loss, gain, use_reentrant=False)
    one, other = (torch.autograd.grad(value, gain)[0] for value in values)
    assert torch.equal(one, other)


def test_batches_of_cotangents() -> None:
    solution, inputs = solve()
    outputs = solution([0.3, 0.5]).reshape(2, -1).sum(1)
    eye, gain = torch.eye(2, dtype=D), inputs[2]
    (rows,) = torch.autograd.grad(outputs, gain, eye, is_grads_batched=True, retain_graph=True)
    for row, bar in zip(rows, eye, strict=True):
        (alone,) = torch.autograd.grad(outputs, gain, bar, retain_graph=True)
        torch.testing.assert_close(row, alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [net, parts])
@pytest.mark.parametrize("kind", ["whole", "by rows", "in parts"])
def test_batches_and_states_in_parts(function: Any, kind: str) -> None:
    rows: Any = {"_NEAR": 0, "_FEWEST_ROWS": 2, "_MOST_ROWS": 5}
    cut = nullcontext() if kind == "whole" else mock.patch.multiple(emit, **rows)
    split = mock.patch.multiple(
        splitting, _LEAST_WORK=1, _MOST_PARTS=3 if kind == "in parts" else 1
    )
    library._library.cache_clear()
    with cut, split:
        field, u0 = Field(function), start(function)
        tensors = list(tensors_of(u0))
        for x in tensors:
            x.requires_grad_()
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        with threads(2):
            solution = psn.solve(
                problem, psn.Tsit5(), compile=True, engine="torch", controller=psn.FixedStep(),
                dt0=0.5, rtol=1e-2, atol=1e-3,
            )  # fmt: skip
            inputs = [*tensors, *field.parameters()]
            for stop_gradient in STOPS:
                read = local(stop_gradient=stop_gradient, dt=0.5)
                assert_alike(solution, inputs, read, 1e-9)
            assert_alike(solution, inputs, errors_of_steps, 1e-9)
            assert_alike(solution, inputs, lambda s: tensors_of(s([0.3, 0.8])))
    library._library.cache_clear()
