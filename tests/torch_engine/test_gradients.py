"""Gradients of the discretised solve: gradcheck of every algorithm and adjoint.

With fixed steps the solve is a smooth function of all its inputs, the ends of the interval
included, and finite differences of it are clean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.problems import ALGORITHMS
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import pysciml_node as psn

DISCRETE = {"discrete": psn.DiscreteAdjoint(), "direct": psn.DirectAdjoint()}
CONTINUOUS = {
    "interpolating": psn.InterpolatingAdjoint(),
    "gauss": psn.GaussAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
}
# Random projections of the Jacobian, and room for what tells the equation from its discretisation.
CONTINUOUS_BOUND: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5, "fast_mode": True}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
discrete = pytest.mark.parametrize("adjoint", DISCRETE.values(), ids=DISCRETE.keys())
continuous = pytest.mark.parametrize("adjoint", CONTINUOUS.values(), ids=CONTINUOUS.keys())
any_adjoint = pytest.mark.parametrize(
    "adjoint", [*DISCRETE.values(), *CONTINUOUS.values()], ids=[*DISCRETE, *CONTINUOUS]
)


def leaf(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    tensor = torch.tensor(values if len(values) > 1 else values[0], dtype=dtype)
    return tensor.requires_grad_()


def field(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    x, y = u.unbind(-1)
    return torch.stack((y * p[0] - x * t, torch.cos(p[1] * t) - x * y), -1)


def fixed(adjoint: psn.DirectAdjoint, name: str = "Tsit5", dt0: float = 0.4) -> dict[str, Any]:
    return {
        "algorithm": getattr(psn, name)(),
        "adjoint": adjoint,
        "controller": psn.FixedStep(),
        "dt0": dt0,
    }


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`u0`, `p`, `t0`, `t1`, `saveat`: two steps of 0.4 and a shorter one."""
    return leaf(0.7, -0.4), leaf(1.1, 0.6), leaf(0.1), leaf(1.2), leaf(0.25, 0.6, 0.8, 1.1)


@every_algorithm
@discrete
def test_gradcheck_of_every_algorithm(name: str, adjoint: psn.DirectAdjoint) -> None:
    """With respect to the state, the argument, the ends and the saved times."""

    def solve(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
        solution = psn.solve(problem, saveat=saveat, **fixed(adjoint, name))
        return solution.u, solution.u1

    assert gradcheck(solve, inputs())


@discrete
def test_gradcheck_in_reverse_time(adjoint: psn.DirectAdjoint) -> None:
    def solve(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        problem = psn.ODEProblem(field, u0, (t1, t0), p=p)
        solution = psn.solve(problem, saveat=saveat.flip(0), **fixed(adjoint))
        return solution.u, solution.u1

    assert gradcheck(solve, inputs())


@discrete
def test_gradcheck_with_stops(adjoint: psn.DirectAdjoint) -> None:
    """A stop keeps its place when the start moves."""

    def solve(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
        solution = psn.solve(
            problem, saveat=saveat, tstops=[0.3, 0.55], **fixed(adjoint, "Heun", 0.12)
        )
        return solution.u, solution.u1

    assert gradcheck(solve, inputs())


@discrete
def test_gradcheck_of_times_on_the_ends_of_steps(adjoint: psn.DirectAdjoint) -> None:
    """Saved times that coincide with steps: the dense output has both sides' derivative there."""
    saveat = leaf(0.25, 0.5, 0.75)

    def solve(u0: Tensor, saveat: Tensor) -> Tensor:
        problem = psn.ODEProblem(lambda t, u: torch.sin(3 * t) - u, u0, (0.0, 1.0))
        return psn.solve(problem, saveat=saveat, **fixed(adjoint, "RK4", 0.25)).u

    assert gradcheck(solve, (leaf(0.7, -0.4), saveat))


@discrete
@pytest.mark.parametrize("name", ["Euler", "Heun", "RK4", "Tsit5", "Vern7"])
def test_gradcheck_of_dense_output(name: str, adjoint: psn.DirectAdjoint) -> None:
    def dense(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, t: Tensor) -> Tensor:
        problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
        return psn.solve(problem, **fixed(adjoint, name))(t)

    assert gradcheck(dense, inputs())


@discrete
def test_gradcheck_of_the_steps(adjoint: psn.DirectAdjoint) -> None:
    def steps(u0: Tensor, p: Tensor) -> Tensor:
        return psn.solve(psn.ODEProblem(field, u0, (0.1, 1.2), p=p), **fixed(adjoint)).u

    assert gradcheck(steps, inputs()[:2])


@continuous
def test_gradcheck_of_the_continuous_adjoints(adjoint: psn.InterpolatingAdjoint) -> None:
    """Steps small enough for the adjoint equation's own error to vanish beside the bound."""

    def solve(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
        solution = psn.solve(problem, saveat=saveat, **fixed(adjoint, "Vern7", 0.16))
        return solution.u, solution.u1

    assert gradcheck(solve, inputs(), **CONTINUOUS_BOUND)


@continuous
def test_continuous_adjoints_reach_the_last_digits(adjoint: psn.InterpolatingAdjoint) -> None:
    """The forward solution is read at places in its steps that double precision has."""
    u0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    p = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u, p: p * u * (1 - u), u0, (0.0, 1.0), p=p)
    u1 = psn.solve(problem, psn.Tsit5(), adjoint=adjoint, rtol=1e-12, atol=1e-12).u1
    exact = u0 * p.exp() / (1 - u0 + u0 * p.exp())
    one, other = (torch.autograd.grad(x, (u0, p)) for x in (u1, exact))
    torch.testing.assert_close(one, other, rtol=0, atol=5e-12)


@any_adjoint
def test_gradcheck_of_a_modules_parameters(adjoint: psn.DirectAdjoint) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.network(u) * torch.cos(t)

    def solve(u0: Tensor, *parameters: Tensor) -> Tensor:
        # Finite differences change the parameters in place.
        problem = psn.ODEProblem(Field(), u0, (0.0, 1.0))
        return psn.solve(problem, **fixed(adjoint, "Vern7", 0.15)).u1

    u0 = torch.tensor([[0.3, -0.2], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(solve, (u0, *network.parameters()), **CONTINUOUS_BOUND)


@any_adjoint
def test_gradcheck_of_complex_states(adjoint: psn.DirectAdjoint) -> None:
    def solve(z0: Tensor, a: Tensor, w: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        problem = psn.ODEProblem(
            lambda t, z, p: p[0] * z + 1j * p[1] * t * z - 0.1 * z * z.abs() ** 2,
            z0,
            (t0, t1),
            p=(a, w),
        )
        solution = psn.solve(problem, saveat=saveat, **fixed(adjoint, "Vern7", 0.15))
        return solution.u, solution.u1

    z0 = leaf(1.0 - 0.5j, 0.3j, dtype=torch.complex128)
    a = leaf(-0.4 + 0.7j, dtype=torch.complex128)
    wanted = (z0, a, leaf(1.3), leaf(0.1), leaf(1.2), leaf(0.4, 0.95))
    assert gradcheck(solve, wanted, **CONTINUOUS_BOUND)


@any_adjoint
def test_gradcheck_of_complex_parameters_of_real_states(adjoint: psn.DirectAdjoint) -> None:
    """As the spectral weights of a Fourier neural operator are."""

    def solve(u0: Tensor, w: Tensor, a: Tensor) -> Tensor:
        def f(t: Tensor, u: Tensor) -> Tensor:
            return torch.fft.irfft(w * torch.fft.rfft(torch.tanh(a * u)), n=4)

        return psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), **fixed(adjoint, "Vern7", 0.15)).u1

    w = leaf(0.3, -0.4 + 0.2j, 0.7j, dtype=torch.complex128)
    assert gradcheck(solve, (leaf(0.5, -1.0, 0.3, 0.8), w, leaf(0.9)), **CONTINUOUS_BOUND)


@any_adjoint
def test_gradcheck_of_structures(adjoint: psn.DirectAdjoint) -> None:
    def solve(x: Tensor, y: Tensor, p: Tensor) -> Any:
        def f(t: Tensor, u: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
            return {"y": u["x"] * p[0] * u["y"], "x": -u["y"].sum() * p[1] + 0 * u["x"]}

        problem = psn.ODEProblem(f, {"x": x, "y": y}, (0.0, 1.0), p=p)
        solution = psn.solve(problem, saveat=[0.3, 1.0], **fixed(adjoint, "Vern7", 0.15))
        return (*solution.u.values(), *solution.u1.values())

    assert gradcheck(solve, (leaf(0.7), leaf(0.2, 0.3), leaf(1.1, 0.6)), **CONTINUOUS_BOUND)


@pytest.mark.parametrize("name", ["Heun", "Tsit5"])
def test_second_derivatives_through_the_direct_adjoint(name: str) -> None:
    def solve(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
        return psn.solve(problem, **fixed(psn.DirectAdjoint(), name)).u1

    assert gradgradcheck(solve, inputs()[:4])


def gradients(adjoint: psn.DirectAdjoint, name: str, **options: Any) -> tuple[Tensor, ...]:
    """Of a loss on saved states, the end and dense output; the times moving too."""
    u0, p, t0, t1, saveat = inputs()
    problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
    solution = psn.solve(problem, getattr(psn, name)(), adjoint=adjoint, saveat=saveat, **options)
    loss = solution.u.square().sum() + solution.u1.prod() + solution(0.5).sum()
    return torch.autograd.grad(loss, (u0, p, t0, t1, saveat))


@every_algorithm
@pytest.mark.parametrize(
    "options",
    [
        {"controller": psn.FixedStep(), "dt0": 0.13},
        {"rtol": 1e-4, "atol": 1e-4},
        {"rtol": 1e-4, "atol": 1e-4, "tstops": (0.3, 0.55), "dtmax": 0.2},
    ],
    ids=["fixed", "adaptive", "stops"],
)
def test_the_discrete_adjoint_is_the_direct_one(name: str, options: dict[str, Any]) -> None:
    """The step sizes are constants to both."""
    replayed = gradients(psn.DiscreteAdjoint(), name, **options)
    recorded = gradients(psn.DirectAdjoint(), name, **options)
    torch.testing.assert_close(replayed, recorded, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outputs", [2, 8, 9, 300])
def test_any_number_of_outputs_within_a_step(outputs: int) -> None:
    """Beyond as many as the method has stages, sums stand for them."""

    def pulled(adjoint: psn.DirectAdjoint, dtype: torch.dtype) -> tuple[Tensor, ...]:
        u0, p, t0, t1, _ = inputs()
        saveat = torch.linspace(0.1, 0.9, outputs, dtype=torch.float64, requires_grad=True)
        problem = psn.ODEProblem(field, u0.to(dtype), (t0, t1), p=p)
        options = {"controller": psn.FixedStep(), "dt0": 0.5}
        solution = psn.solve(problem, psn.Tsit5(), adjoint=adjoint, saveat=saveat, **options)
        loss = solution.u.abs().square().sum() + solution.u1.abs().sum()
        return torch.autograd.grad(loss, (u0, p, t0, t1, saveat))

    for dtype in (torch.float64, torch.complex128):
        replayed = pulled(psn.DiscreteAdjoint(), dtype)
        recorded = pulled(psn.DirectAdjoint(), dtype)
        torch.testing.assert_close(replayed, recorded, rtol=1e-11, atol=1e-11)


def test_saved_times_in_single_precision_are_exact_where_they_receive_gradients() -> None:
    times = torch.linspace(-5, -4, 7, dtype=torch.float32)
    rate = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -rate * u, torch.ones(1, dtype=torch.float64), (-5, -4))
    saveat = times.clone().requires_grad_()
    solution = psn.solve(problem, psn.Tsit5(), rtol=1e-11, atol=1e-11, saveat=saveat)
    expected = torch.exp(-0.7 * (times.double() + 5))[:, None]
    torch.testing.assert_close(solution.u.detach(), expected, rtol=0, atol=1e-9)


@any_adjoint
def test_gradients_in_single_precision(adjoint: psn.DirectAdjoint) -> None:
    """Times in float64 above a state in float32, and gradients of the right dtypes and shapes."""
    u0 = torch.tensor([[1.0, 2.0]], requires_grad=True)
    t0 = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    t1 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    saveat = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -u, u0, (t0, t1))
    solution = psn.solve(problem, adjoint=adjoint, saveat=saveat, rtol=1e-5, atol=1e-5)
    (solution.u1.sum() + solution.u.sum()).backward()
    e = torch.exp(-torch.tensor([0.25, 0.5, 1.0]))
    for tensor, expected in (
        (u0, e.sum().expand(1, 2)),
        (t0, (3 * e.sum()).reshape(1)),
        (t1, -3 * e[2]),
        (saveat, -3 * e[:2]),
    ):
        assert tensor.grad is not None
        assert tensor.grad.dtype is tensor.dtype
        assert tensor.grad.shape == tensor.shape
        torch.testing.assert_close(tensor.grad.float(), expected, rtol=1e-3, atol=1e-3)


@any_adjoint
@pytest.mark.parametrize("where", ["saved", "steps", "dense"])
def test_no_gradients_no_graph(adjoint: psn.DirectAdjoint, where: str) -> None:
    with torch.no_grad():
        u0, p, t0, t1, saveat = inputs()
        problem = psn.ODEProblem(field, u0, (t0, t1), p=p)
        solution = psn.solve(problem, adjoint=adjoint, saveat=saveat if where == "saved" else None)
        state = solution(0.5) if where == "dense" else solution.u
    assert not state.requires_grad
    assert not solution.u1.requires_grad


def test_a_scalar_function_of_one_solve_by_torch_func() -> None:
    u0, p, *_ = (x.detach() for x in inputs())

    def end(u0: Tensor, p: Tensor) -> Tensor:
        problem = psn.ODEProblem(field, u0, (0.1, 1.2), p=p)
        return psn.solve(problem, adjoint=psn.DirectAdjoint(), rtol=1e-8, atol=1e-8).u1

    def reference(function: Callable[..., Any]) -> Any:
        return function(lambda u0: end(u0, p), u0)

    jacobian = reference(torch.autograd.functional.jacobian)
    torch.testing.assert_close(torch.func.jacrev(end)(u0, p), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(end)(u0, p), jacobian)
    gradient = torch.func.grad(lambda u0: end(u0, p).square().sum())(u0)
    torch.testing.assert_close(gradient, 2 * end(u0, p) @ jacobian)


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), *CONTINUOUS.values()], ids=["discrete", *CONTINUOUS]
)
def test_other_adjoints_refuse_torch_func_with_the_remedy(adjoint: psn.DiscreteAdjoint) -> None:
    u0, p, *_ = (x.detach() for x in inputs())

    def loss(u0: Tensor) -> Tensor:
        problem = psn.ODEProblem(field, u0, (0.1, 1.2), p=p)
        return psn.solve(problem, adjoint=adjoint).u1.sum()

    with pytest.raises(RuntimeError, match="DirectAdjoint"):
        torch.func.grad(loss)(u0)


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), *CONTINUOUS.values()], ids=["discrete", *CONTINUOUS]
)
def test_other_adjoints_refuse_double_backward(adjoint: psn.DiscreteAdjoint) -> None:
    """Also where the loss is linear in the state, and its cotangent a constant."""
    u0, p, *_ = inputs()
    for square in (False, True):
        solution = psn.solve(psn.ODEProblem(field, u0, (0.1, 1.2), p=p), adjoint=adjoint)
        loss = (solution.u1.square() if square else solution.u1).sum()
        (gradient,) = torch.autograd.grad(loss, u0, create_graph=True)
        with pytest.raises(RuntimeError, match="DirectAdjoint"):
            torch.autograd.grad(gradient.sum(), p)


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), *CONTINUOUS.values()], ids=["discrete", *CONTINUOUS]
)
def test_parameters_changed_in_place_before_backward_are_noticed(
    adjoint: psn.DiscreteAdjoint,
) -> None:
    """The replay would otherwise differentiate another solve than the one that ran."""
    weight = leaf(1.1, 0.6)
    problem = psn.ODEProblem(lambda t, u: field(t, u, weight), inputs()[0], (0.1, 1.2))
    solution = psn.solve(problem, adjoint=adjoint)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="weight has been changed in place"):
        solution.u1.sum().backward()


class Switching:
    """No module itself: one network before 1/2, another one after."""

    def __init__(self, listed: bool) -> None:
        torch.manual_seed(0)
        first, second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.networks: Any = [first, second] if listed else first
        self.second = second

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        first = self.networks[0] if isinstance(self.networks, list) else self.networks
        return torch.tanh(first(u) if t < 0.5 else self.second(u))


@any_adjoint
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("way", ["object", "method", "closure"])
def test_modules_that_come_into_use_later(
    adjoint: psn.DirectAdjoint, listed: bool, way: str
) -> None:
    """Seen in the callable, though the evaluation at the start does not use them."""
    field = Switching(listed)
    second = field.second
    call = {
        "object": field,
        "method": field.__call__,
        "closure": lambda t, u: (
            torch.tanh(field.networks[0](u) if t < 0.5 else second(u))
            if listed
            else field(t, u) + 0 * second(u)
        ),
    }[way]
    u0 = torch.ones(3, 2, dtype=torch.float64)
    solution = psn.solve(psn.ODEProblem(call, u0, (0.0, 1.0)), adjoint=adjoint, tstops=[0.5])
    solution.u1.sum().backward()
    assert second.weight.grad is not None
    assert second.weight.grad.abs().sum().item() > 0


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), *CONTINUOUS.values()], ids=["discrete", *CONTINUOUS]
)
def test_tensors_that_come_into_use_later_are_not_lost(adjoint: psn.DiscreteAdjoint) -> None:
    """What cannot be found from the start is refused, with the remedy."""
    a, b = leaf(1.0), leaf(2.0)

    def switching(t: Tensor, u: Tensor, p: tuple[Tensor, Tensor]) -> Tensor:
        """Continuous: both rates vanish where they meet."""
        return u * (p[0] * (0.5 - t) if t < 0.5 else p[1] * (t - 0.5))

    u0 = torch.ones(1, dtype=torch.float64)
    hidden = threading.local()
    hidden.rates = (a, b)
    captured = psn.ODEProblem(lambda t, u: switching(t, u, hidden.rates), u0, (0.0, 1.0))
    solution = psn.solve(captured, adjoint=adjoint, dtmax=0.1)
    with pytest.raises(RuntimeError, match=r"not seen at t0.*\n.*p="):
        solution.u1.backward()
    end = torch.exp((a + b).detach() / 8)
    by_argument = psn.ODEProblem(switching, u0, (0.0, 1.0), (a, b))
    by_closure = psn.ODEProblem(lambda t, u: switching(t, u, (a, b)), u0, (0.0, 1.0))
    for problem in (by_argument, by_closure):
        solution = psn.solve(problem, adjoint=adjoint, tstops=[0.5])
        found = torch.autograd.grad(solution.u1, (a, b))
        torch.testing.assert_close(found, (end / 8, end / 8), rtol=1e-5, atol=0)


def test_times_stay_inside_with_every_operation_recorded() -> None:
    """In single precision, where sums of steps round."""
    times: list[float] = []

    def f(t: Tensor, u: Tensor) -> Tensor:
        times.append(t.item())
        return torch.cos(9 * t) - u

    for span in ((0.1, 0.7), (1.3, -0.4)):
        times.clear()
        ends = tuple(torch.tensor(t, requires_grad=True) for t in span)
        problem = psn.ODEProblem(f, torch.ones(2), ends)
        psn.solve(problem, adjoint=psn.DirectAdjoint(), dtmax=0.013, tstops=[0.31])
        low, high = sorted(end.item() for end in ends)
        assert low <= min(times)
        assert max(times) <= high


@pytest.mark.parametrize("algorithm", [psn.Euler(), psn.Tsit5()])
def test_states_before_a_step_that_is_not_finite_have_their_gradients(algorithm: Any) -> None:
    """`DirectAdjoint` gave NaN: derivatives of the saved states that are left out, times zero."""
    a, found = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), []
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint()):
        solution = psn.solve(
            psn.ODEProblem(lambda t, u: a * u / (t < 0.5), torch.ones_like(a)[None], (0.0, 1.0)),
            algorithm,
            adjoint=adjoint,
            engine="torch",
            controller=psn.FixedStep(),
            dt0=0.09,
            saveat=[0.2, 0.55, 1.0],
            throw=False,
        )
        assert solution.retcode is psn.ReturnCode.Unstable
        assert len(solution.u) == 1
        found.append(torch.autograd.grad(solution.u.sum() + solution.u1.sum(), a))
    torch.testing.assert_close(*found)
