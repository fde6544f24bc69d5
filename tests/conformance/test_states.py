"""States of every dtype, shape and structure; extra arguments; tolerances."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from conformance.problems import ALGORITHMS
from torch import Tensor, nn

import pysciml_node as psn

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
KINDS = ("tensor", "tuple", "dict")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_dtype(name: str, dtype: torch.dtype, engine: str) -> None:
    """`u' = lambda u`, with a complex lambda where the state is complex."""
    rate: complex = -0.5 + 2j if dtype.is_complex else -0.5
    algorithm = getattr(psn, name)()
    tolerance = 1e-4 if algorithm.order < 3 else 1e-5
    u0 = torch.tensor([[1.0, 2.0, -0.5]], dtype=dtype)
    seen: set[torch.dtype] = set()

    def f(t: Tensor, u: Tensor) -> Tensor:
        seen.update((t.dtype, u.dtype))
        assert t.shape == ()
        assert u.shape == u0.shape
        return rate * u

    solution = psn.solve(
        psn.ODEProblem(f, u0, (0.0, 1.0)), algorithm, rtol=tolerance, atol=tolerance, engine=engine
    )
    assert seen == {dtype, dtype.to_real()}
    assert solution.u.dtype is dtype
    assert solution.t.dtype is dtype.to_real()
    exact = u0 * torch.exp(torch.tensor(rate, dtype=dtype))
    bound = 20 * (tolerance if name != "Euler" else math.sqrt(tolerance))
    assert (solution.u1 - exact).abs().max().item() < bound


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 4, 5)])
def test_every_shape(shape: tuple[int, ...], engine: str) -> None:
    u0 = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    problem = psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0))
    solution = psn.solve(problem, rtol=1e-9, atol=1e-9, saveat=[0.0, 0.5, 1.0], engine=engine)
    assert solution.u.shape == (3, *shape)
    assert solution.u1.shape == solution(0.3).shape == shape
    assert solution(torch.tensor([0.1, 0.3])).shape == (2, *shape)
    torch.testing.assert_close(solution.u1, u0 * math.exp(-1), rtol=1e-7, atol=1e-8)


def test_states_need_not_be_contiguous(engine: str) -> None:
    u0 = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T
    problem = psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0))
    solution = psn.solve(problem, rtol=1e-9, atol=1e-9, engine=engine)
    torch.testing.assert_close(solution.u1, u0 * math.exp(-1), rtol=1e-7, atol=1e-8)


def split(kind: str, u: Tensor) -> Any:
    """A `(..., 3)` tensor as a structure of two parts."""
    x, y = u[..., :1], u[..., 1:]
    return {"tensor": u, "tuple": (x, y), "dict": {"x": x, "y": y}}[kind]


def join(kind: str, state: Any) -> Tensor:
    if kind == "tensor":
        return state
    return torch.cat(state if kind == "tuple" else (state["x"], state["y"]), -1)


def lorenz(t: Tensor, u: Tensor) -> Tensor:
    x, y, z = u.unbind(-1)
    return torch.stack((10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z), -1)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_structures_are_their_flat_tensor(kind: str, engine: str) -> None:
    """Same steps, same states, same gradients; of a chaotic system, so that nothing else passes."""
    u0 = torch.tensor([1.0, 1.0, 25.0], dtype=torch.float64)
    times = [0.0, 0.3, 0.77, 1.0]

    def solve(kind: str) -> tuple[psn.Solution, Tensor]:
        start = u0.clone().requires_grad_()
        problem = psn.ODEProblem(
            lambda t, s: split(kind, lorenz(t, join(kind, s))), split(kind, start), (0.0, 1.0)
        )
        return psn.solve(problem, saveat=times, engine=engine), start

    (flat, flat_start), (built, start) = solve("tensor"), solve(kind)
    assert type(built.u) is type(built.u1) is {"tuple": tuple, "dict": dict}[kind]
    assert flat.stats.naccept == built.stats.naccept
    torch.testing.assert_close(join(kind, built.u), flat.u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(join(kind, built(0.4)), flat(0.4), rtol=1e-12, atol=1e-12)
    join(kind, built.u1).square().sum().backward()
    flat.u1.square().sum().backward()
    torch.testing.assert_close(start.grad, flat_start.grad, rtol=1e-9, atol=1e-9)


class Motion(NamedTuple):
    """A place, and the velocity at it."""

    x: Tensor
    v: Tensor


def test_named_tuples_are_named_in_field_events_and_solution(engine: str) -> None:
    """Half a quarter swing of `x'' = -k x`, a stop of half the velocity at `x = 0`, the rest."""
    k = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)

    def swing(t: Tensor, s: Motion) -> Motion:
        return Motion(s.v, -k * s.x)

    brake = psn.Event(lambda t, s: s.x[0], affect=lambda t, s: Motion(s.x, s.v / 2))
    problem = psn.ODEProblem(swing, Motion(one, 0 * one), (0.0, 1.0))
    tight = Motion(1e-10, 1e-10)
    solution = psn.solve(
        problem, rtol=1e-10, atol=tight, saveat=[0.5, 1.0], events=brake, engine=engine
    )
    for state in (solution.u, solution.u1, solution(0.7), solution.jumps[0].after):
        assert type(state) is Motion
    w = k.detach().sqrt().requires_grad_()
    exact = -torch.sin(w - math.pi / 2) / 2
    assert solution.u1.x.item() == pytest.approx(exact.item(), rel=1e-8)
    solution.u1.x.sum().backward()
    exact.backward()
    assert k.grad.item() == pytest.approx(w.grad.item() / (2 * w.item()), rel=1e-7)
    arrays = psn.ODEProblem(swing, Motion(one.numpy(), 0 * one.numpy()), (0.0, 0.5))
    assert type(psn.solve(arrays, engine=engine).u1) is Motion


def test_parts_keep_their_shapes_and_order(engine: str) -> None:
    """A dict's order is that of `u0`, whatever order the field answers in."""
    u0 = {"b": torch.ones(2, 3).double(), "a": torch.tensor(2.0).double()}
    problem = psn.ODEProblem(lambda t, u: {"a": -2 * u["a"], "b": -u["b"]}, u0, (0.0, 1.0))
    solution = psn.solve(problem, rtol=1e-9, atol=1e-9, saveat=[0.5, 1.0], engine=engine)
    assert list(solution.u) == ["b", "a"]
    assert solution.u["b"].shape == (2, 2, 3)
    assert solution.u["a"].shape == (2,)
    assert solution.u1["a"].item() == pytest.approx(2 * math.exp(-2), rel=1e-7)
    assert solution.u1["b"][1, 2].item() == pytest.approx(math.exp(-1), rel=1e-7)


def parameters(kind: str, a: Tensor, b: Tensor) -> Any:
    return {
        "tensor": torch.stack((a, b)),
        "tuple": (a, (b, 3)),
        "dict": {"a": a, "rest": [b], "note": "free"},
    }[kind]


def field_of(kind: str) -> Any:
    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        a, b = {
            "tensor": lambda: (p[0], p[1]),
            "tuple": lambda: (p[0], p[1][0]),
            "dict": lambda: (p["a"], p["rest"][0]),
        }[kind]()
        return a * u * (1 - u / b)

    return f


@pytest.mark.parametrize("kind", KINDS)
def test_extra_arguments_and_their_gradients(kind: str, engine: str) -> None:
    """Logistic growth: `u = b / (1 + (b / u0 - 1) e^(-a t))`."""
    u0 = torch.tensor([0.2, 0.7], dtype=torch.float64)

    def leaves() -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, 2.0))

    a, b = leaves()
    problem = psn.ODEProblem(field_of(kind), u0, (0.0, 1.0), p=parameters(kind, a, b))
    solution = psn.solve(problem, rtol=1e-10, atol=1e-10, engine=engine)
    found = torch.autograd.grad(solution.u1.sum(), (a, b))
    a, b = leaves()
    exact = b / (1 + (b / u0 - 1) * torch.exp(-a))
    torch.testing.assert_close(solution.u1, exact, rtol=1e-8, atol=1e-8)
    expected = torch.autograd.grad(exact.sum(), (a, b))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_a_module_is_a_field(engine: str) -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.rate * u

    field = Decay()
    u0 = torch.ones(1, dtype=torch.float64)
    solution = psn.solve(
        psn.ODEProblem(field, u0, (0.0, 2.0)), rtol=1e-10, atol=1e-10, engine=engine
    )
    solution.u1.sum().backward()
    assert solution.u1.item() == pytest.approx(math.exp(-1.4), rel=1e-8)
    assert field.rate.grad is not None
    assert field.rate.grad.item() == pytest.approx(-2 * math.exp(-1.4), rel=1e-7)


# Estimates of an error of this size are differences of stages that keep ten digits, and so do the
# steps that follow from them.
STEPS = 1e-5


def uncoupled(t: Tensor, u: Tensor) -> Tensor:
    """A slow component and a fast one that does not act on it."""
    return torch.stack((-u[..., 0], 50 * torch.cos(50 * t) * torch.ones_like(u[..., 1])), -1)


def test_components_of_infinite_tolerance_do_not_drive_the_steps(engine: str) -> None:
    u0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    both = psn.ODEProblem(uncoupled, u0, (0.0, 1.0))
    masked = torch.tensor([STEPS, math.inf], dtype=torch.float64)
    solution = psn.solve(both, rtol=STEPS, atol=masked, dt0=0.1, engine=engine)
    slow = psn.ODEProblem(lambda t, u: -u, u0[:1], (0.0, 1.0))
    alone = psn.solve(slow, rtol=STEPS, atol=STEPS, dt0=0.1, engine=engine)
    torch.testing.assert_close(solution.t, alone.t, rtol=1e-8, atol=0)
    torch.testing.assert_close(solution.u1[:1], alone.u1, rtol=1e-8, atol=0)
    full = psn.solve(both, rtol=STEPS, atol=STEPS, dt0=0.1, engine=engine)
    assert full.stats.naccept > 5 * solution.stats.naccept


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("first", [False, True])
def test_parts_of_infinite_tolerance_do_not_drive_the_steps(
    kind: str, first: bool, engine: str
) -> None:
    """Wherever the part stands in the state."""
    slow, fast = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.0))

    def build(a: Any, b: Any) -> Any:
        a, b = (b, a) if first else (a, b)
        if kind == "tuple":
            return a, b
        return {"fast": a, "slow": b} if first else {"slow": a, "fast": b}

    def f(t: Tensor, state: Any) -> Any:
        parts = list(state.values() if kind == "dict" else state)
        return build(-parts[-1 if first else 0], 50 * torch.cos(50 * t) * torch.ones_like(fast))

    problem = psn.ODEProblem(f, build(slow, fast), (0.0, 1.0))
    solution = psn.solve(problem, rtol=STEPS, atol=build(STEPS, math.inf), dt0=0.1, engine=engine)
    alone = psn.ODEProblem(lambda t, u: -u, slow, (0.0, 1.0))
    expected = psn.solve(alone, rtol=STEPS, atol=STEPS, dt0=0.1, engine=engine)
    torch.testing.assert_close(solution.t, expected.t, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 8, 64])
def test_infinite_tolerances_in_states_of_whole_vector_registers(
    size: int, dtype: torch.dtype, engine: str
) -> None:
    """Processors divide eight numbers at a time, and by an infinite one in a way of their own."""

    def f(t: Tensor, state: Any) -> Any:
        return {"u": -state["u"], "path": state["u"]}

    start = {"u": torch.ones(size, dtype=dtype), "path": torch.zeros(size, dtype=dtype)}
    options: dict[str, Any] = {"rtol": 1e-5, "atol": {"u": 1e-5, "path": math.inf}}
    u1 = psn.solve(psn.ODEProblem(f, start, (0.0, 1.0)), engine=engine, **options).u1
    torch.testing.assert_close(u1["u"], start["u"] * math.exp(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(u1["path"], start["u"] * (1 - math.exp(-1)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("which", ["rtol", "atol"])
def test_tolerances_as_tensors(which: str, engine: str) -> None:
    """A constant tensor is the number; a looser entry takes fewer steps."""
    u0 = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    problem = psn.ODEProblem(uncoupled, u0, (0.0, 1.0))

    def steps(tolerance: float | Tensor) -> psn.Solution:
        options: dict[str, Any] = {"rtol": STEPS, "atol": STEPS} | {which: tolerance}
        return psn.solve(problem, dt0=0.1, engine=engine, **options)

    number, tensor = steps(STEPS), steps(torch.full((2, 2), STEPS, dtype=torch.float64))
    torch.testing.assert_close(number.t, tensor.t, rtol=1e-8, atol=0)
    last_axis = steps(torch.tensor([STEPS, STEPS], dtype=torch.float64))
    torch.testing.assert_close(number.t, last_axis.t, rtol=1e-8, atol=0)
    loose = steps(torch.tensor([STEPS, 1e-3], dtype=torch.float64))
    assert loose.stats.naccept < number.stats.naccept


@pytest.mark.parametrize(
    "controller", [psn.IController(), psn.PIController(), psn.PIDController()], ids=str
)
def test_controllers_meet_the_tolerance(controller: psn.IController, engine: str) -> None:
    problem = psn.ODEProblem(
        lambda t, u: -torch.sin(t) * u, torch.ones(1, dtype=torch.float64), (0.0, 10.0)
    )
    solution = psn.solve(problem, controller=controller, rtol=1e-7, atol=1e-7, engine=engine)
    exact = torch.exp(torch.cos(solution.t) - 1)
    assert (solution.u[:, 0] - exact).abs().max().item() < 1e-6
    assert solution.stats.nreject < 0.3 * solution.stats.naccept
    assert bool((solution.step_errors <= 1).all())


def test_an_equilibrium_is_kept(engine: str) -> None:
    """No error at all must not stop or divide anything."""
    for name in ALGORITHMS:
        problem = psn.ODEProblem(lambda t, u: 0 * u, torch.ones(2, dtype=torch.float64), (0.0, 9.0))
        solution = psn.solve(problem, getattr(psn, name)(), engine=engine)
        assert torch.equal(solution.u1, problem.u0)
        assert solution.stats.nreject == 0
