"""The two engines are each other's oracle: equal steps, states, estimates and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.problems import ALGORITHMS, dense_rounding, step_rounding
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.julia

ENGINES = ("julia", "torch")
TIMES = [0.0, 0.13, 0.5, 0.77, 1.0]


class Network(nn.Module):
    """A small field that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.cat((u, t.expand(len(u), 1)), 1))))


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def start() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, dtype=torch.float64, generator=generator)


def both(run: Callable[[str], Any]) -> tuple[Any, Any]:
    julia, torch_ = (run(engine) for engine in ENGINES)
    return julia, torch_


def fixed_steps(name: str, engine: str, field: Any, u0: Tensor) -> psn.Solution:
    return psn.solve(
        psn.ODEProblem(field, u0, (0.0, 1.0)),
        getattr(psn, name)(),
        controller=psn.FixedStep(),
        dt0=0.5,
        rtol=1.0,
        atol=1.0,
        saveat=TIMES,
        engine=engine,
    )


@pytest.mark.parametrize("translated", [True, False], ids=["translated", "called back"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_fixed_steps_agree(name: str, translated: bool) -> None:
    """States at the steps and between them, and the estimates of every step, up to rounding."""
    module = network()
    field = module if translated else lambda t, u: module(t, u)
    with torch.no_grad():
        found, expected = both(lambda engine: fixed_steps(name, engine, field, start()))
        assert found.engine == "julia"
        assert found.stats.naccept == expected.stats.naccept
        tableau = getattr(psn, name)().tableau
        rates = torch.stack([module(t, u) for t, u in zip(expected.t, expected.u, strict=True)])
        step = step_rounding(tableau, 2, 0.5, expected.u, rates)
        bound = step + dense_rounding(tableau, 0.5, expected.u, rates)
        torch.testing.assert_close(found.u, expected.u, rtol=0, atol=bound)
        torch.testing.assert_close(found.u1, expected.u1, rtol=0, atol=step)
        between = torch.tensor([0.1, 0.37, 0.96], dtype=torch.float64)
        torch.testing.assert_close(found(between), expected(between), rtol=0, atol=bound)
        steps = zip(
            found.trajectory.step_estimates(), expected.trajectory.step_estimates(), strict=True
        )
        for one, other in steps:
            torch.testing.assert_close(one.error, other.error, rtol=1e-12, atol=1e-14)
            # A quotient of differences of stages, of which high orders leave few digits.
            torch.testing.assert_close(
                one.stiffness, other.stiffness, rtol=1e-5, atol=1e-12, equal_nan=True
            )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_discrete_gradients_on_the_same_steps_agree(name: str) -> None:
    """Of the saved states with respect to the start and all parameters, to 1e-10."""

    def gradients(engine: str) -> tuple[Tensor, ...]:
        field, u0 = network(), start().requires_grad_()
        solution = fixed_steps(name, engine, field, u0)
        loss = solution.u.square().sum() + solution.u1.sum()
        return torch.autograd.grad(loss, (u0, *field.parameters()))

    found, expected = both(gradients)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("translated", [True, False], ids=["translated", "called back"])
def test_gradients_of_the_estimates_of_all_steps_agree(translated: bool) -> None:
    """Of the global penalties, with respect to the start and all parameters."""

    def gradients(engine: str) -> tuple[Tensor, ...]:
        module, u0 = network(), start().requires_grad_()
        field = module if translated else lambda t, u: module(t, u)
        solution = fixed_steps("Tsit5", engine, field, u0)
        penalty = psn.GlobalError()(solution) + psn.GlobalStiffness()(solution)
        return torch.autograd.grad(penalty, (u0, *module.parameters()))

    found, expected = both(gradients)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["Tsit5", "Vern9"])
def test_adaptive_solves_agree(name: str) -> None:
    field = network()

    def run(engine: str) -> Tensor:
        problem = psn.ODEProblem(field, start(), (0.0, 2.0))
        with torch.no_grad():
            return psn.solve(
                problem, getattr(psn, name)(), rtol=1e-10, atol=1e-10, engine=engine
            ).u1

    found, expected = both(run)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_gradients_of_the_ends_of_the_interval_agree() -> None:
    """Of a translated field, whose sweep runs in Julia."""

    def gradients(engine: str) -> tuple[Tensor, ...]:
        field, u0 = network(), start().requires_grad_()
        t0, t1, at = (torch.tensor(t, dtype=torch.float64) for t in (0.1, 1.2, [0.3, 0.71]))
        inputs = (u0, t0.requires_grad_(), t1.requires_grad_(), at.requires_grad_())
        solution = psn.solve(
            psn.ODEProblem(field, u0, (t0, t1)), saveat=at, engine=engine, rtol=1e-11, atol=1e-11
        )
        return torch.autograd.grad(solution.u.square().sum() + solution.u1.sum(), inputs)

    found, expected = both(gradients)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "adjoint",
    [
        psn.GaussAdjoint(),
        psn.InterpolatingAdjoint(),
        psn.BacksolveAdjoint(),
        psn.QuadratureAdjoint(),
        psn.ForwardDiffSensitivity(),
    ],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_adjoints_of_sciml_agree_with_the_discrete_one(adjoint: psn.adjoints.Adjoint) -> None:
    def gradients(engine: str) -> tuple[Tensor, ...]:
        field, u0 = network(), start()[:1].requires_grad_()
        solution = psn.solve(
            psn.ODEProblem(field, u0, (0.0, 1.0)),
            psn.Vern7(),
            adjoint=adjoint if engine == "julia" else None,
            saveat=TIMES,
            engine=engine,
            rtol=1e-11,
            atol=1e-11,
        )
        return torch.autograd.grad(solution.u.square().sum(), (u0, *field.parameters()))

    found, expected = both(gradients)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_gradcheck() -> None:
    field, u0 = network(), start()[:2].requires_grad_()

    def run(u0: Tensor, *parameters: Tensor) -> Tensor:
        solution = psn.solve(
            psn.ODEProblem(field, u0, (0.0, 1.0)),
            controller=psn.FixedStep(),
            dt0=0.25,
            engine="julia",
        )
        return solution.u1

    assert torch.autograd.gradcheck(run, (u0, *field.parameters()), fast_mode=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_julia_source_is_a_field_on_both_engines(engine: str) -> None:
    """`u' = -p1 u + p2 t` has a closed solution."""
    field = psn.JuliaField("(u, p, t) -> -p[1] .* u .+ p[2] * t")
    u0 = torch.tensor([[0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.0, 1.5), p=p)
    solution = psn.solve(problem, rtol=1e-11, atol=1e-11, engine=engine)

    def exact(t: float) -> Tensor:
        decay = torch.exp(-p[0] * t)
        return u0 * decay + p[1] * (p[0] * t - 1 + decay) / p[0] ** 2

    torch.testing.assert_close(solution.u1, exact(1.5), rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(solution.u1.sum() + solution(0.4).sum(), (u0, p))
    expected = torch.autograd.grad(exact(1.5).sum() + exact(0.4).sum(), (u0, p))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_local_estimates_agree() -> None:
    """From the same state, error and stiffness of one step and their gradients."""

    def run(engine: str) -> tuple[Tensor, ...]:
        field, u0 = network(), start().requires_grad_()
        solution = fixed_steps("Tsit5", engine, field, u0)
        estimate = solution.local_estimate(0.4, dt=0.2, stop_gradient=False)
        inputs = (u0, *field.parameters())
        gradients = torch.autograd.grad(estimate.error * 1e3 + estimate.stiffness, inputs)
        return (estimate.error, estimate.stiffness, *gradients)

    found, expected = both(run)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("source", ["1 + 1", '(u, p, t) -> error("no")', "(u, p, t) -> u[1:1]"])
def test_faulty_source_says_what_is_wrong(source: str) -> None:
    problem = psn.ODEProblem(psn.JuliaField(source), torch.ones(3), (0.0, 1.0))
    with pytest.raises(psn.JuliaError, match=r"source|no|size"):
        psn.solve(problem, engine="julia")


class HidesTime(nn.Module):
    """`u' = cos(t) u`, of whose time autograd sees nothing."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.cos(t.detach()) * u


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), psn.BacksolveAdjoint()], ids=lambda a: type(a).__name__
)
def test_the_ends_where_the_field_hides_its_time(adjoint: psn.Adjoint) -> None:
    """`f(t1, u1)` and `-(du/du0) f(t0, u0)`: at the end, inside, and of members."""
    spans = torch.tensor([[0.1, 0.7], [0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    u0 = torch.ones(1, dtype=torch.float64)
    options: dict[str, Any] = {"adjoint": adjoint, "engine": "julia", "rtol": 1e-9, "atol": 1e-9}
    problem = psn.ODEProblem(HidesTime(), u0, (spans[0, 0], spans[0, 1]))
    solution = psn.solve(problem, psn.Vern9(), **options)

    def growth(t: float) -> float:
        return math.exp(math.sin(t) - math.sin(0.1))

    for value, t in ((solution.u1, 0.7), (solution(0.101), 0.101), (solution(0.5), 0.5)):
        (found,) = torch.autograd.grad(value.sum(), spans, retain_graph=True)
        end = math.cos(0.7) * growth(0.7) if t == 0.7 else 0.0
        assert found[0].tolist() == pytest.approx([-math.cos(0.1) * growth(t), end], abs=1e-7)
    many = psn.EnsembleProblem(
        psn.ODEProblem(HidesTime(), u0, (0.0, 1.0)), torch.stack((u0, u0)), tspan=spans
    )
    (found,) = torch.autograd.grad(psn.solve(many, psn.Vern9(), **options).u1.sum(), spans)
    ends = torch.exp(torch.sin(spans[:, 1]) - torch.sin(spans[:, 0]))
    (expected,) = torch.autograd.grad(ends.sum(), spans)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "adjoint",
    [psn.GaussAdjoint(), psn.InterpolatingAdjoint(), psn.BacksolveAdjoint()],
    ids=lambda a: type(a).__name__,
)
def test_adjoint_solves_end_where_rounding_ends_them(adjoint: psn.Adjoint) -> None:
    """Their last step may be an ulp beside the start of the interval."""

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.cos(t) * u

    u0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.1, 0.7))
    options: dict[str, Any] = {"adjoint": adjoint, "engine": "julia", "rtol": 1e-8, "atol": 1e-8}
    solution = psn.solve(problem, psn.Vern9(), **options)
    (found,) = torch.autograd.grad(solution(0.6).sum(), u0)
    assert found.item() == pytest.approx(math.exp(math.sin(0.6) - math.sin(0.1)), rel=1e-6)
