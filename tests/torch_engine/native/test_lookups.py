"""Native solves along data: paths, tables and schedules that are looked up by time or state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
KNOTS = torch.tensor([0.0, 0.2, 0.45, 0.7, 1.0], dtype=D)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def line(t: Tensor, values: Tensor) -> Tensor:
    """The straight lines through rows of values."""
    i = torch.searchsorted(KNOTS, t, right=True).sub(1).clamp(0, len(KNOTS) - 2)
    share = (t - KNOTS[i]) / (KNOTS[i + 1] - KNOTS[i])
    return values[i] + share * (values[i + 1] - values[i])


def drawn(t: Tensor, u: Tensor, values: Tensor) -> Tensor:
    """Draws each sample to the one before it, as fast as the line says."""
    return -u * line(t, values) + 0.5 * torch.sin(u.roll(1, 0))


def same(run: Callable[[Any], list[Tensor]], bound: float = 1e-12) -> None:
    """What native code gives is what Python gives."""
    for native, eager in zip(run(True), run(False), strict=True):
        size = float(eager.abs().max())
        torch.testing.assert_close(native, eager, rtol=bound, atol=bound * (1e-3 + size))


ALGORITHMS = [psn.Tsit5(), psn.Rodas5P(), psn.TRBDF2()]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
def test_a_line_through_data(algorithm: Any) -> None:
    """State, times and data have the gradients that they have in Python."""

    def run(compile: bool) -> list[Tensor]:
        u0, values = made(3, 2, seed=1).requires_grad_(), made(5, 2).requires_grad_()
        t0 = torch.tensor(0.05, dtype=D, requires_grad=True)
        problem = psn.ODEProblem(drawn, u0, (t0, 1.0), values)
        options: Any = {"rtol": 1e-6, "atol": 1e-6, "tstops": [0.2, 0.45, 0.7]}
        end = psn.solve(problem, algorithm, compile=compile, **options).u1
        return [end.detach(), *torch.autograd.grad(end.square().sum(), [u0, t0, values])]

    same(run, 1e-11)


def test_the_gradient_of_a_line_is_that_of_finite_differences() -> None:
    def end(values: Tensor, t0: Tensor) -> Any:
        problem = psn.ODEProblem(lambda t, u, p: -u * line(t, p), made(2), (t0, 1.0), values)
        options: Any = {"controller": psn.FixedStep(), "dt0": 0.05, "tstops": [0.2, 0.45, 0.7]}
        return psn.solve(problem, psn.Tsit5(), compile=True, **options).u1

    inputs = made(5, 2).requires_grad_(), torch.tensor(0.07, dtype=D, requires_grad=True)
    torch.autograd.gradcheck(end, inputs, rtol=1e-6, atol=1e-8)


def test_lines_have_the_integrals_of_their_trapezoids() -> None:
    """`u' = x(t)`: one step of the second order from knot to knot is exact."""
    values = made(5, 2).requires_grad_()
    problem = psn.ODEProblem(lambda t, u, p: line(t, p) + 0 * u, made(2), (0.0, 1.0), values)
    options: Any = {"controller": psn.FixedStep(), "dt0": 1.0, "tstops": KNOTS[1:-1].tolist()}
    end = psn.solve(problem, psn.Midpoint(), compile=True, **options).u1
    torch.testing.assert_close(end, made(2) + torch.trapezoid(values, KNOTS, dim=0))
    gap = KNOTS.diff()
    weight = 0.5 * torch.cat((gap[:1], gap[1:] + gap[:-1], gap[-1:]))
    (gradient,) = torch.autograd.grad(end.sum(), values)
    torch.testing.assert_close(gradient, weight[:, None].expand(5, 2))


@pytest.mark.parametrize("own", [False, True])
def test_members_look_up_by_times_of_their_own(own: bool) -> None:
    """In data that all share, or in each one's own."""

    def run(compile: bool) -> list[Tensor]:
        u0, values = made(7, 2, seed=1).requires_grad_(), made(7, 5, 2, seed=2).requires_grad_()
        shared = values[0].detach().requires_grad_()
        one = psn.ODEProblem(drawn, u0[0], (0.0, 1.0), values[0] if own else shared)
        given = {"u0": u0, "p": values} if own else {"u0": u0}
        members = psn.EnsembleProblem(one, **given)
        options: Any = {"rtol": 1e-7, "atol": 1e-7, "tstops": [0.2, 0.45, 0.7]}
        end = psn.solve(members, psn.Tsit5(), compile=compile, **options).u1
        inputs = [u0, values if own else shared]
        return [end.detach(), *torch.autograd.grad(end.square().sum(), inputs)]

    same(run, 1e-11)


def test_a_stochastic_equation_along_data() -> None:
    def run(compile: bool) -> list[Tensor]:
        u0, values = made(3, 2, seed=1).requires_grad_(), made(5, 2).requires_grad_()
        problem = psn.SDEProblem(
            drawn,
            lambda t, u, p: 0.1 * u * line(t, p),
            u0,
            (0.0, 1.0),
            p=values,
            interpretation="stratonovich",
        )
        generator = torch.Generator().manual_seed(4)
        end = psn.solve(problem, psn.EulerHeun(), dt0=0.02, generator=generator, compile=compile).u1
        return [end.detach(), *torch.autograd.grad(end.square().sum(), [u0, values])]

    same(run)


class Table(nn.Module):
    """Rows of a table by what the state is: by rows of a batch, or by a column that all share."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.net = nn.Linear(24, 24, dtype=D)
        self.table = nn.Embedding(4, 24, dtype=D)
        with torch.no_grad():
            for i, x in enumerate(self.parameters()):
                x.copy_(made(*x.shape, seed=i) - 0.5)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.wide:
            rows = torch.bucketize(u[:, 0].detach().contiguous(), KNOTS[1:4])
            return torch.tanh(self.net(u)) * self.table(rows)
        i = torch.searchsorted(KNOTS, t)
        return torch.tanh(self.net(u)) * u[:, i].unsqueeze(-1)


@pytest.mark.parametrize("wide", [False, True])
def test_a_large_batch_looks_up_by_rows(wide: bool) -> None:
    field = Table(wide)

    def run(compile: bool) -> list[Tensor]:
        u0 = made(512, 24, seed=3).requires_grad_()
        problem = psn.ODEProblem(field, u0, (0.1, 0.16))
        options: Any = {"controller": psn.FixedStep(), "dt0": 0.02, "compile": compile}
        end = psn.solve(problem, psn.Midpoint(), **options).u1
        inputs = [u0, *(field.parameters() if wide else field.net.parameters())]
        return [end.detach(), *torch.autograd.grad(end.square().sum(), inputs)]

    same(run)


def test_knots_may_change_between_solves() -> None:
    class Step(nn.Module):
        """1 before the knot, and 2 from there on."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("knots", torch.tensor([0.5], dtype=D))
            self.levels = nn.Parameter(torch.tensor([1.0, 2.0], dtype=D))

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.levels[torch.searchsorted(self.knots, t, right=True)] + 0 * u

    field, u0 = Step(), torch.zeros(1, dtype=D)
    for knot in (0.5, 0.25):
        field.knots.fill_(knot)
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        options: Any = {"controller": psn.FixedStep(), "dt0": 1.0, "tstops": [knot]}
        solution = psn.solve(problem, psn.Midpoint(), compile=True, **options)
        torch.testing.assert_close(solution.u1, torch.tensor([2.0 - knot], dtype=D))
        (gradient,) = torch.autograd.grad(solution.u1, field.levels)
        torch.testing.assert_close(gradient, torch.tensor([knot, 1.0 - knot], dtype=D))


@pytest.mark.parametrize("knots", [[0.2, 0.5, math.nan], [math.nan] * 3, [0.5, 0.2, 0.7]])
def test_knots_without_order_end_a_solve(knots: list[float]) -> None:
    """Torch searches by halves, and finds places that depend on which knots it meets."""
    given, values = torch.tensor([0.2, 0.5, 0.7], dtype=D), made(4)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return u * values[torch.searchsorted(given, t).clamp(0, 3)]

    problem = psn.ODEProblem(field, made(2), (0.0, 1.0))
    psn.solve(problem, psn.Tsit5(), compile=True)
    given.copy_(torch.tensor(knots))
    with pytest.raises(psn.SolverFailure, match="NaN"):
        psn.solve(problem, psn.Tsit5(), compile=True)
    with pytest.raises(psn.CompileError, match="another value"):
        psn.solve(psn.ODEProblem(lambda t, u: field(t, u), made(2), (0.0, 1.0)), compile=True)


def test_a_place_outside_ends_a_solve() -> None:
    problem = psn.ODEProblem(lambda t, u: u * KNOTS[(5 * t).long()], made(2), (0.0, 2.0))
    with pytest.raises(psn.SolverFailure, match="NaN"):
        psn.solve(problem, psn.Tsit5(), compile=True)


MAKERS = [psn.interpolate.linear, psn.interpolate.hermite_cubic, psn.interpolate.natural_cubic]


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 8, dtype=D)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.net(z)).view(-1, 4, 2)


class Product(Matrices):
    def prod(self, t: Tensor, z: Tensor, dx: Tensor) -> Tensor:
        return (super().forward(t, z) @ dx.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("kind", [Matrices, Product])
@pytest.mark.parametrize("maker", MAKERS)
def test_controlled_equations(maker: Any, kind: type[Matrices]) -> None:
    """One program for all paths of a length; data, state and weights have their gradients."""
    field = kind()
    layers = {c: psn.NeuralCDE(field, rtol=1e-5, atol=1e-5, compile=c) for c in (True, False)}

    def run(compile: bool) -> list[Tensor]:
        found = []
        for seed in (5, 6):
            x, z0 = made(3, 6, 2, seed=seed).requires_grad_(), made(3, 4).requires_grad_()
            path = maker(x, [0.0, 0.4, 1.0, 1.3, 2.0, 2.1])
            u = layers[compile](z0, path, saveat=path.times).u
            found += [u.detach(), *torch.autograd.grad(u.sum(), [x, z0, *field.parameters()])]
        return found

    same(run, 1e-11)


def test_a_controlled_equation_is_translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = psn.NeuralCDE(Matrices(), compile=True, output="u1")
    z0 = made(3, 4)
    first = layer(z0, psn.interpolate.linear(made(3, 6, 2)))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the field is traced again")

    monkeypatch.setattr(torch.export, "export", refuse)
    second = layer(z0, psn.interpolate.linear(2 * made(3, 6, 2)))
    assert not torch.equal(first, second)
