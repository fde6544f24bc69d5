"""Compiled solves against the eager engine: same steps, same gradients, nothing compiled twice."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.tableaus import BS3, EULER, HEUN, TSIT5
from pysciml_node.torch_engine.compiled.stepper import (
    CompiledResult,
    CompileError,
    Status,
    StepControl,
    compiled_solver,
    compiler_available,
)

pytestmark = pytest.mark.skipif(not compiler_available()[0], reason=compiler_available()[1])

PI5 = StepControl(*psn.PIController().exponents(TSIT5.error_order))
PI3 = StepControl(*psn.PIController().exponents(BS3.error_order))


class Rotor(nn.Module):
    """A driven, damped rotation with a nonlinear part, of parameters and of `p`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        self.matrix = nn.Parameter(matrix - matrix.T - 0.2 * torch.eye(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(u @ self.matrix.T) * p["gain"] + self.frozen * torch.sin(t * p["rate"])


@pytest.fixture(scope="module")
def rotor() -> Rotor:
    return Rotor()


@pytest.fixture
def u0() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.fixture
def p() -> dict[str, Tensor]:
    return {
        "gain": torch.tensor([1.0, 0.7, 1.3], dtype=torch.float64, requires_grad=True),
        "rate": torch.tensor(2.0, dtype=torch.float64),
    }


@pytest.fixture
def no_compilation() -> Iterator[None]:
    """Whatever is compiled for a second time inside is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


SAVEAT = torch.tensor([0.0, 0.3, 0.31, 1.7, 2.5], dtype=torch.float64)


def solve_rotor(
    rotor: Rotor,
    u0: Tensor,
    p: dict[str, Tensor],
    t0: float = 0.0,
    t1: float = 2.5,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    control: StepControl = PI5,
    saveat: Tensor = SAVEAT,
    **options: float,
) -> CompiledResult:
    solver = compiled_solver(rotor, TSIT5)
    return solver(u0, t0, t1, rtol, atol, control, saveat=saveat, p=p, **options)


def solve_eagerly(rotor: Rotor, u0: Tensor, p: dict[str, Tensor], **options: object) -> object:
    t0, t1 = options.pop("t0", 0.0), options.pop("t1", 2.5)
    settings = {"rtol": 1e-6, "atol": 1e-8, "saveat": SAVEAT, "engine": "torch"} | options
    problem = psn.ODEProblem(rotor, u0, (t0, t1), p=p)
    return psn.solve(problem, psn.Tsit5(), **settings)


def gradients(
    solution: object, saved: Tensor, rotor: Rotor, u0: Tensor, p: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, saved.numel(), dtype=torch.float64).reshape(saved.shape)
    loss = (saved * weights).sum() + (solution.u1**3).sum()
    return torch.autograd.grad(loss, [u0, rotor.matrix, p["gain"]])


def assert_same(compiled: CompiledResult, eager: object) -> None:
    assert compiled.status is Status.SUCCESS
    assert (compiled.naccept, compiled.nreject) == (eager.stats.naccept, eager.stats.nreject)
    torch.testing.assert_close(compiled.u1, eager.u1, rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled.saved, eager.u, rtol=0, atol=1e-12)


def test_steps_states_and_gradients_are_those_of_the_eager_engine(
    rotor: Rotor, u0: Tensor, p: dict[str, Tensor]
) -> None:
    compiled, eager = solve_rotor(rotor, u0, p), solve_eagerly(rotor, u0, p)
    assert_same(compiled, eager)
    assert compiled.nfe == eager.stats.nfe
    # Error estimates are small differences of large numbers, so their rounding errors show.
    torch.testing.assert_close(compiled.steps[:, 2], eager.step_times[1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(compiled.steps[:, 3], eager.step_errors, rtol=1e-4, atol=1e-6)
    assert torch.equal(compiled.steps[1:, 0], compiled.steps[:-1, 2])
    found = gradients(compiled, compiled.saved, rotor, u0, p)
    expected = gradients(eager, eager.u, rotor, u0, p)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(
    ("changed", "control"),
    [
        ({"rtol": 1e-3, "atol": 1e-3}, PI5),
        ({"dt0": 0.4}, PI5),
        ({"dtmax": 0.05}, PI5),
        ({"t0": 2.5, "t1": -1.0, "saveat": torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])}, PI5),
        ({"controller": psn.IController()}, StepControl(1 / 5)),
        ({"controller": psn.FixedStep(), "dt0": 0.11}, StepControl(1 / 5, fixed=True)),
        # More steps than one buffer holds, forward and backward through its seams.
        ({"rtol": 1e-12, "atol": 1e-13}, PI5),
        ({"dtmax": 0.013}, PI5),
    ],
    ids=["tolerance", "dt0", "dtmax", "reversed", "integral", "fixed", "overflow", "overflow-2"],
)
def test_values_change_without_compiling(
    rotor: Rotor, u0: Tensor, p: dict[str, Tensor], changed: dict, control: StepControl
) -> None:
    with torch.no_grad():
        rotor.matrix.mul_(1.01)
        u0.mul_(1.5)
        p["gain"].mul_(0.9)
    ours = {k: v for k, v in changed.items() if k != "controller"}
    compiled = solve_rotor(rotor, u0, p, control=control, **ours)
    eager = solve_eagerly(rotor, u0, p, **changed)
    assert compiled.status is Status.SUCCESS
    if not control.fixed:
        assert_same(compiled, eager)
    torch.testing.assert_close(compiled.u1, eager.u1, rtol=0, atol=1e-12)
    found = gradients(compiled, compiled.saved, rotor, u0, p)
    expected = gradients(eager, eager.u, rotor, u0, p)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(
            solve_rotor(rotor, u0, p, control=control, **ours).u1, compiled.u1, rtol=0, atol=0
        )


@pytest.mark.usefixtures("no_compilation")
def test_failures_are_told(rotor: Rotor, u0: Tensor, p: dict[str, Tensor]) -> None:
    few = solve_rotor(rotor, u0, p, max_steps=3)
    assert few.status is Status.OUT_OF_STEPS
    assert few.naccept + few.nreject == 3
    assert few.t < 2.5
    # The gradient of what was reached: the last state depends on the first.
    reached = torch.autograd.grad(few.u1.sum(), u0)[0]
    assert bool(torch.isfinite(reached).all())
    assert solve_rotor(rotor, u0, p, dtmin=0.5, dt0=0.6).status is Status.SIZE_TOO_SMALL
    assert solve_rotor(rotor, u0 * math.nan, p).status is Status.NON_FINITE
    bad = {**p, "rate": torch.tensor(math.nan, dtype=torch.float64)}
    assert solve_rotor(rotor, u0, bad, dt0=0.1).status is Status.NON_FINITE


@pytest.mark.usefixtures("no_compilation")
def test_the_end_and_saved_ends_of_steps_are_exact(
    rotor: Rotor, u0: Tensor, p: dict[str, Tensor]
) -> None:
    found = solve_rotor(rotor, u0, p)
    assert found.t == 2.5
    assert torch.equal(found.saved[-1], found.u1)
    assert torch.equal(found.saved[0], u0)


def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p * u + torch.cos(t)


def exact_decay(t: float, u0: Tensor, p: Tensor) -> Tensor:
    # u' = -p u + cos t: the particular solution is (p cos t + sin t) / (1 + p^2).
    def particular(s: float) -> Tensor:
        return (p * math.cos(s) + math.sin(s)) / (1 + p**2)

    return particular(t) + (u0 - particular(0.0)) * torch.exp(-p * t)


def solve_decay(u0: Tensor, p: Tensor, **options: object) -> CompiledResult:
    tolerance = options.pop("tolerance", 1e-6)
    control = options.pop("control", PI3)
    solver = compiled_solver(decay, BS3)
    return solver(u0, 0.0, 2.0, tolerance, tolerance, control, p=p, **options)


def test_error_follows_tolerance_and_order() -> None:
    u0, p = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    exact = exact_decay(2.0, u0, p)
    errors = [
        float((solve_decay(u0, p, tolerance=tolerance).u1 - exact).abs().max())
        for tolerance in (1e-4, 1e-6, 1e-8)
    ]
    assert all(e < 10 * tolerance for e, tolerance in zip(errors, (1e-4, 1e-6, 1e-8), strict=True))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    fixed = StepControl(1.0, fixed=True)
    coarse, fine = (
        float((solve_decay(u0, p, control=fixed, dt0=h).u1 - exact).abs().max())
        for h in (0.1, 0.05)
    )
    assert math.log2(coarse / fine) == pytest.approx(3.0, abs=0.25)


def test_gradcheck_with_the_states_of_the_steps() -> None:
    u0 = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.7, 1.1], dtype=torch.float64, requires_grad=True)
    # Step sizes are constants of the discrete adjoint: hold them fixed.
    fixed = StepControl(1.0, fixed=True)

    def end(u0: Tensor, p: Tensor) -> Tensor:
        return solve_decay(u0, p, control=fixed, dt0=0.3).u1

    def states(u0: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        found = solve_decay(u0, p, control=fixed, dt0=0.3, keep_states=True)
        return found.states, found.u1

    assert torch.autograd.gradcheck(end, (u0, p))
    assert torch.autograd.gradcheck(states, (u0, p))


def test_long_solves_without_states() -> None:
    u0, p = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    fixed = StepControl(1.0, fixed=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = solve_decay(u0, p, control=fixed, dt0=2.0 / 3000)
        kept = solve_decay(u0, p, control=fixed, dt0=2.0 / 3000, keep_states=True)
    assert found.naccept == kept.naccept == len(found.steps) == len(kept.states)
    assert torch.equal(found.u1, kept.u1)
    torch.testing.assert_close(found.u1, exact_decay(2.0, u0, p), rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="keep_states"):
        _ = found.states


def test_methods_whose_last_stage_is_not_the_next_first() -> None:
    u0 = torch.tensor([0.3, -0.4], dtype=torch.float32)
    saveat = torch.tensor([0.5, 1.0])

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack([u[1], -torch.sin(u[0])])

    control = StepControl(*psn.PIController().exponents(HEUN.error_order))
    found = compiled_solver(field, HEUN)(u0, 0.0, 1.0, 1e-4, 1e-4, control, saveat=saveat)
    eager = psn.solve(
        psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Heun(), rtol=1e-4, atol=1e-4, saveat=saveat
    )
    assert (found.naccept, found.nreject) == (eager.stats.naccept, eager.stats.nreject)
    torch.testing.assert_close(found.saved, eager.u, rtol=1e-6, atol=1e-6)
    assert found.u1.dtype is torch.float32


def test_fields_that_do_not_compile_say_why() -> None:
    def branching(t: Tensor, u: Tensor) -> Tensor:
        return u if u.sum() > 0 else -u

    weight = torch.ones(2, requires_grad=True)
    u0 = torch.ones(2)
    with pytest.raises(CompileError, match="compile=False") as caught:
        compiled_solver(branching, BS3)(u0, 0.0, 1.0, 1e-3, 1e-3, PI3)
    assert caught.value.__cause__ is not None

    def capturing(t: Tensor, u: Tensor) -> Tensor:
        return weight * u

    with pytest.raises(CompileError, match="captures"):
        compiled_solver(capturing, BS3)(u0, 0.0, 1.0, 1e-3, 1e-3, PI3)
    with pytest.raises(CompileError, match="complex"):
        compiled_solver(lambda t, u: u, BS3)(u0 + 1j, 0.0, 1.0, 1e-3, 1e-3, PI3)
    with pytest.raises(CompileError, match="p must hold tensors"):
        compiled_solver(lambda t, u, p: u, BS3)(u0, 0.0, 1.0, 1e-3, 1e-3, PI3, p=(1.0,))
    with pytest.raises(NotImplementedError, match="compile=False"):
        compiled_solver(decay, BS3)(u0, 0.0, torch.ones((), requires_grad=True), 1e-3, 1e-3, PI3)
    with pytest.raises(ValueError, match="shape"):
        compiled_solver(lambda t, u: u[:1], BS3)(u0, 0.0, 1.0, 1e-3, 1e-3, PI3)


FACTOR = 2.0


class Scaled(nn.Module):
    """A field that reads an attribute, a submodule and a global."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.activation = 1.0, nn.Tanh()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return FACTOR * self.scale * self.activation(u)


def test_fields_that_change_are_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    field, u0 = Scaled(), torch.tensor([0.3, -0.4])
    control = StepControl(1.0, fixed=True)

    def step() -> Tensor:
        return compiled_solver(field, EULER)(u0, 0.0, 0.5, 1e-3, 1e-3, control, dt0=0.5).u1

    torch.testing.assert_close(step(), u0 + torch.tanh(u0))
    field.scale, field.activation = 3.0, nn.ReLU()
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    torch.testing.assert_close(step(), u0 + 6 * torch.relu(u0))


def test_solvers_are_made_once_and_go_with_their_fields() -> None:
    field = Rotor()
    assert compiled_solver(field, TSIT5) is compiled_solver(field, TSIT5)
    assert compiled_solver(field, TSIT5) is not compiled_solver(field, BS3)
    # A function without captures is known by its code, as in a training loop.
    first, second = (compiled_solver(lambda t, u: -u, BS3) for _ in range(2))
    assert first is second
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None
