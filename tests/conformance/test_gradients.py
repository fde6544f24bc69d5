"""Gradients of closed-form solutions, by every adjoint that engines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

ADJOINTS = {
    "default": None,
    "interpolating": psn.InterpolatingAdjoint(),
    "gauss": psn.GaussAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
}
TIGHT = {"rtol": 1e-11, "atol": 1e-11}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS.keys())


def leaf(*values: float) -> Tensor:
    tensor = torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)
    return tensor.requires_grad_()


def logistic(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """A rate that grows with time, so that both ends of the interval matter."""
    return p[0] * t * u * (1 - u / p[1])


def logistic_solution(u0: Tensor, p: Tensor, t0: Tensor, t: Tensor) -> Tensor:
    return p[1] / (1 + (p[1] / u0 - 1) * torch.exp(-p[0] * (t**2 - t0**2) / 2))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return leaf(0.3, 0.9), leaf(1.2, 2.0), leaf(0.4), leaf(1.7)


@every_adjoint
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_the_end(
    adjoint: psn.InterpolatingAdjoint | None, reverse: bool, engine: str
) -> None:
    u0, p, t0, t1 = inputs()
    span = (t1, t0) if reverse else (t0, t1)
    problem = psn.ODEProblem(logistic, u0, span, p=p)
    solution = psn.solve(problem, psn.Vern7(), adjoint=adjoint, engine=engine, **TIGHT)
    exact = logistic_solution(u0, p, *span)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = torch.autograd.grad(solution.u1 @ weights, (u0, p, t0, t1))
    expected = torch.autograd.grad(exact @ weights, (u0, p, t0, t1))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@every_adjoint
def test_gradients_of_saved_states_and_of_their_times(
    adjoint: psn.InterpolatingAdjoint | None, engine: str
) -> None:
    """Times saved on the ends of the interval move with these, without gradients of their own."""
    u0, p, t0, t1 = inputs()
    saveat = leaf(0.4, 0.7, 0.71, 1.3, 1.7)
    problem = psn.ODEProblem(logistic, u0, (t0, t1), p=p)
    solution = psn.solve(
        problem, psn.Vern7(), adjoint=adjoint, saveat=saveat, engine=engine, **TIGHT
    )
    times = torch.stack((t0, *saveat[1:4], t1))
    exact = logistic_solution(u0, p, t0, times[:, None])
    torch.testing.assert_close(solution.u, exact, rtol=1e-9, atol=1e-9)
    wanted = (u0, p, t0, t1, saveat)
    # The state saved at t0 is u0 itself.
    found = torch.autograd.grad((solution.u[1:] ** 2).sum() + solution.u[0].sum(), wanted)
    expected = torch.autograd.grad((exact[1:] ** 2).sum() + u0.sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@every_adjoint
def test_gradients_of_the_steps(adjoint: psn.InterpolatingAdjoint | None, engine: str) -> None:
    """Without `saveat` the states are those at the solver's own times."""
    u0, p, t0, t1 = inputs()
    problem = psn.ODEProblem(logistic, u0, (t0.item(), t1.item()), p=p)
    solution = psn.solve(problem, psn.Vern7(), adjoint=adjoint, engine=engine, **TIGHT)
    exact = logistic_solution(u0, p, t0.detach(), solution.t[:, None])
    found = torch.autograd.grad(solution.u.square().sum(), (u0, p))
    expected = torch.autograd.grad(exact.square().sum(), (u0, p))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_adjoint
def test_gradients_of_dense_output(adjoint: psn.InterpolatingAdjoint | None, engine: str) -> None:
    """With respect to all that the solution depends on, and to the time it is asked for."""
    u0, p, t0, t1 = inputs()
    t = leaf(0.5, 0.9, 1.6)
    problem = psn.ODEProblem(logistic, u0, (t0, t1), p=p)
    solution = psn.solve(problem, psn.Vern7(), adjoint=adjoint, engine=engine, **TIGHT)
    exact = logistic_solution(u0, p, t0, t[:, None])
    found = torch.autograd.grad(solution(t).square().sum(), (u0, p, t0, t))
    expected = torch.autograd.grad(exact.square().sum(), (u0, p, t0, t))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_adjoint
def test_gradients_of_a_complex_solution(
    adjoint: psn.InterpolatingAdjoint | None, engine: str
) -> None:
    """`z' = (a + i w t) z`, with a complex `a`, a real `w` and complex `z`."""
    z0 = torch.tensor([1.0 - 0.5j, 0.3j], dtype=torch.complex128, requires_grad=True)
    a = torch.tensor(-0.4 + 0.7j, dtype=torch.complex128, requires_grad=True)
    w = leaf(1.3)
    problem = psn.ODEProblem(lambda t, z, p: (p[0] + 1j * p[1] * t) * z, z0, (0.0, 1.0), p=(a, w))
    solution = psn.solve(problem, psn.Vern7(), adjoint=adjoint, engine=engine, **TIGHT)
    exact = z0 * torch.exp(a + 0.5j * w)
    weights = torch.tensor([0.3 + 1j, -1.0 + 0.2j], dtype=torch.complex128)
    found = torch.autograd.grad((solution.u1 @ weights).abs(), (z0, a, w))
    expected = torch.autograd.grad((exact @ weights).abs(), (z0, a, w))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


class Encoder(nn.Module):
    """Makes a context that is no leaf: gradients must reach its weight and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.8, -0.3], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * x)


def conditioned(t: Tensor, u: Tensor, c: Tensor) -> Tensor:
    return torch.sin(u * c[0] + t) * c[1] - u


class Holder(nn.Module):
    """A field with its context as a plain attribute."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return conditioned(t, u, self.context)


def by_argument(c: Tensor) -> tuple[Any, Tensor | None]:
    return conditioned, c


def by_closure(c: Tensor) -> tuple[Any, Tensor | None]:
    return lambda t, u: conditioned(t, u, c), None


def by_attribute(c: Tensor) -> tuple[Any, Tensor | None]:
    field = Holder()
    field.context = c
    return field, None


@every_adjoint
@pytest.mark.parametrize("capture", [by_closure, by_attribute])
def test_captured_tensors_receive_the_gradients_of_arguments(
    capture: Callable[[Tensor], tuple[Any, Tensor | None]],
    adjoint: psn.InterpolatingAdjoint | None,
    engine: str,
) -> None:
    u0 = torch.tensor([0.2, 1.0], dtype=torch.float64)

    def gradients(way: Callable[[Tensor], tuple[Any, Tensor | None]]) -> tuple[Tensor, ...]:
        encoder, x = Encoder(), leaf(0.5, 2.0)
        field, p = way(encoder(x))
        problem = psn.ODEProblem(field, u0, (0.0, 1.0), p=p)
        solution = psn.solve(problem, psn.Vern7(), adjoint=adjoint, engine=engine, **TIGHT)
        solution.u1.square().sum().backward()
        assert encoder.weight.grad is not None
        assert x.grad is not None
        return encoder.weight.grad, x.grad

    torch.testing.assert_close(gradients(capture), gradients(by_argument), rtol=1e-9, atol=1e-10)


@every_adjoint
def test_the_initial_state_may_be_used_by_the_field(
    adjoint: psn.InterpolatingAdjoint | None, engine: str
) -> None:
    """`u' = u0 u`: its exponent and its start."""
    u0 = leaf(0.7)
    problem = psn.ODEProblem(lambda t, u: u0 * u, u0, (0.0, 1.0))
    solution = psn.solve(problem, psn.Vern7(), adjoint=adjoint, engine=engine, **TIGHT)
    (found,) = torch.autograd.grad(solution.u1, u0)
    expected = (1 + u0) * torch.exp(u0)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-8, atol=0)


@every_adjoint
def test_what_the_field_does_not_use_has_no_gradient(
    adjoint: psn.InterpolatingAdjoint | None, engine: str
) -> None:
    field = nn.Linear(2, 2, dtype=torch.float64)
    frozen = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    unused = leaf(1.0)
    problem = psn.ODEProblem(
        lambda t, u, p: frozen(torch.tanh(field(u))),
        torch.ones(3, 2).double(),
        (0.0, 1.0),
        p=unused,
    )
    solution = psn.solve(problem, adjoint=adjoint, engine=engine)
    solution.u1.sum().backward()
    assert unused.grad is None
    assert frozen.weight.grad is None
    assert field.weight.grad is not None
    assert field.weight.grad.abs().sum() > 0


class Partly(nn.Module):
    """A field that does not read all of its parameters."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.read, self.beside = (nn.Parameter(torch.ones(2).double()) for _ in range(2))
        self.seen: list[float] | None = [] if counts else None

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(0.0)
        return -self.read * u


@pytest.mark.parametrize("called_back", [False, True])
@every_adjoint
def test_parameters_of_the_field_that_it_does_not_read_have_no_gradient(
    adjoint: psn.InterpolatingAdjoint | None, called_back: bool, engine: str
) -> None:
    field = Partly(called_back)
    f = (lambda t, u: field(t, u)) if called_back else field
    solution = psn.solve(
        psn.ODEProblem(f, torch.ones(2).double(), (0.0, 1.0)), adjoint=adjoint, engine=engine
    )
    solution.u1.sum().backward()
    assert field.beside.grad is None
    expected = torch.full((2,), -1.0).double().exp()
    torch.testing.assert_close(field.read.grad, -expected, rtol=1e-4, atol=1e-5)


@every_adjoint
def test_backward_twice_adds_up(adjoint: psn.InterpolatingAdjoint | None, engine: str) -> None:
    u0, p, _, _ = inputs()
    problem = psn.ODEProblem(logistic, u0, (0.0, 1.0), p=p)
    solution = psn.solve(problem, adjoint=adjoint, saveat=[0.5, 1.0], engine=engine)
    first = torch.autograd.grad(solution.u[0].sum(), (u0, p), retain_graph=True)
    second = torch.autograd.grad(solution.u1.sum(), (u0, p), retain_graph=True)
    both = torch.autograd.grad(solution.u[0].sum() + solution.u1.sum(), (u0, p))
    for one, other, total in zip(first, second, both, strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-5, atol=1e-6)


@every_adjoint
def test_backward_statistics(adjoint: psn.InterpolatingAdjoint | None, engine: str) -> None:
    u0, p, _, _ = inputs()
    solution = psn.solve(
        psn.ODEProblem(logistic, u0, (0.0, 1.0), p=p), adjoint=adjoint, engine=engine
    )
    stats = solution.stats
    assert stats.nfe > 0
    assert (stats.nfe_backward, stats.nvjp, stats.naccept_backward) == (0, 0, 0)
    solution.u1.sum().backward()
    assert stats.nvjp > 0
    if adjoint is None and engine == "torch":
        # Its steps were kept with their graphs: none is evaluated again, and all are pulled back.
        assert stats.nfe_backward == 0
        assert stats.nvjp >= 2 * stats.naccept_backward
    else:
        assert stats.nfe_backward >= stats.nvjp
    assert stats.naccept_backward > 0
    assert stats.nreject_backward >= 0


def test_states_saved_between_steps_keep_backsolve_on_the_solution(engine: str) -> None:
    """`u' = -30 u`, backward from 1e-13: without the saved states it would not come back.

    The gradient of `sum u(t_i)^2` needs the state itself, since the field is not linear.
    """
    u0 = leaf(1.0)
    times = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)[1:]
    problem = psn.ODEProblem(lambda t, u: -30 * torch.sin(u), u0, (0.0, 1.0))

    def gradient(adjoint: psn.BacksolveAdjoint | None) -> Tensor:
        solution = psn.solve(
            problem, psn.Vern7(), adjoint=adjoint, saveat=times, engine=engine, rtol=1e-9, atol=1e-9
        )
        return torch.autograd.grad(solution.u.sum(), u0)[0]

    torch.testing.assert_close(
        gradient(psn.BacksolveAdjoint()), gradient(None), rtol=1e-4, atol=1e-6
    )
