"""Fields as Julia has them: valid for what they were made from, protected, bounded, shared."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.julia_engine import fields, plans
from pysciml_node.julia_engine.process import runtime

pytestmark = pytest.mark.julia

D = torch.float64


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, dtype=D, **options)


class Conditioned(nn.Module):
    """A linear field with a context, a mask and a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3, dtype=D)
        self.context = torch.zeros(2, 3, dtype=D)
        self.table = {"mask": torch.tensor([True, False, True]), "gain": ones(3)}

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.layer(u) * self.context * self.table["gain"] + self.table["mask"].to(u)


def end(module: nn.Module, engine: str, u0: Tensor | None = None, **options: Any) -> Tensor:
    problem = psn.ODEProblem(module, ones(2, 3) if u0 is None else u0, (0.0, 1.0))
    tight = 1e-9 if problem.spec.dtype is D else 1e-5
    return psn.solve(problem, rtol=tight, atol=tight, engine=engine, **options).u1


@pytest.mark.parametrize(
    "adjoint", [psn.DiscreteAdjoint(), psn.GaussAdjoint()], ids=lambda a: type(a).__name__
)
def test_a_context_that_first_ran_without_gradients(adjoint: Any) -> None:
    module = Conditioned()
    end(module, "julia")
    gradients = []
    for engine in ("julia", "torch"):
        code = ones(3, requires_grad=True)
        module.context = (2 * code).expand(2, 3)  # an encoder's output
        module.table["gain"] = code * code
        value = end(module, engine, adjoint=adjoint)
        gradients.append([value, *torch.autograd.grad(value.sum(), (code, module.layer.weight))])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_what_changes_between_two_solves_is_seen() -> None:
    module = Conditioned()
    changes = [
        lambda: setattr(module, "context", ones(2, 3)),
        lambda: module.table.update(mask=torch.tensor([False, True, True])),
        lambda: module.table["mask"].logical_not_(),
        lambda: module.table["gain"].mul_(3),
        lambda: module.layer.register_forward_hook(lambda m, i, o: 0.5 * o),
        lambda: setattr(module, "context", ones(1, 3)),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(end(module, "julia"), end(module, "torch"), rtol=1e-7, atol=0)


def test_what_changes_before_the_backward_pass_is_not() -> None:
    """The gradient is that of what the solve saw: of a buffer changed in place too."""
    module = Conditioned()
    module.context.fill_(0.7)
    value = end(module, "julia").sum()
    (expected,) = torch.autograd.grad(end(module, "torch").sum(), module.layer.bias)
    module.context.fill_(5.0)
    (found,) = torch.autograd.grad(value, module.layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_autocast_and_inference_mode_at_the_first_solve() -> None:
    module = Conditioned().float()
    module.context, module.table["gain"] = torch.ones(2, 3), torch.ones(3)
    u0 = torch.ones(2, 3)
    expected = end(module, "torch", u0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = end(module, "julia", u0)
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(module)
    with torch.inference_mode():
        end(other, "julia", u0)
    end(other, "julia", u0).sum().backward()
    assert other.layer.weight.grad is not None


def test_the_losss_scale_is_the_gradients() -> None:
    w = torch.tensor(3.0, dtype=D, requires_grad=True)
    for adjoint in (psn.GaussAdjoint(), psn.InterpolatingAdjoint(), psn.QuadratureAdjoint()):
        problem = psn.ODEProblem(lambda t, u: -w * u * torch.cos(4 * t), ones(1, 1), (0.0, 3.0))
        value = psn.solve(problem, rtol=1e-4, atol=1e-4, engine="julia", adjoint=adjoint).u1.sum()
        reference = None
        for scale in (1.0, 1e-12, 1e-6, 1e6, 1e12):
            (gradient,) = torch.autograd.grad(value * scale, w, retain_graph=True)
            reference = gradient if reference is None else reference
            torch.testing.assert_close(gradient / scale, reference, rtol=1e-9, atol=0)
        exact = -torch.sin(torch.tensor(12.0, dtype=D)) / 4
        exact = exact * torch.exp(3.0 * exact)
        torch.testing.assert_close(reference, exact, rtol=1e-2, atol=0)


# Julia source.


def test_the_form_in_place_is_the_other_form() -> None:
    forms = (
        """
        (u, p, t) ->
            [p[1] * (u[2] - u[1]), u[1] * (p[2] - u[3]) - u[2], u[1] * u[2] - p[3] * u[3]]
        """,
        """
        function lorenz(du, u, p, t)
            du[1] = p[1] * (u[2] - u[1])
            @views du[2] = u[1] * (p[2] - u[3]) - u[2]
            du[3] = u[1] * u[2] - p[3] * u[3]
        end
        """,
    )
    for algorithm, adjoint in (
        (psn.Tsit5(), psn.DiscreteAdjoint()),
        (psn.Rodas5P(), psn.GaussAdjoint()),
    ):
        found = []
        for source in forms:
            u0 = torch.tensor([1.0, 0.0, 0.0], dtype=D, requires_grad=True)
            p = torch.tensor([10.0, 28.0, 8 / 3], dtype=D, requires_grad=True)
            problem = psn.ODEProblem(psn.JuliaField(source), u0, (0.0, 0.3), p=p)
            solution = psn.solve(
                problem, algorithm, rtol=1e-9, atol=1e-9, engine="julia", adjoint=adjoint
            )
            gradients = torch.autograd.grad(solution.u1.sum() + solution(0.2).sum(), (u0, p))
            found.append([solution.u1, *gradients])
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


def test_a_field_that_writes_to_its_arguments_changes_nothing_else() -> None:
    field = psn.JuliaField("(u, p, t) -> (u .*= -p[1]; p[1] += 1; p[1] -= 1; u)")
    u0, p = ones(2), torch.tensor([0.5], dtype=D)
    with torch.no_grad():
        problem = psn.ODEProblem(field, u0, (0.0, 1.0), p=p)
        solution = psn.solve(problem, rtol=1e-9, atol=1e-9, engine="julia")
    exact = torch.exp(torch.tensor(-0.5, dtype=D)).expand(2)
    torch.testing.assert_close(solution.u1, exact, rtol=1e-8, atol=0)
    assert torch.equal(u0, ones(2))


def test_functions_of_other_arguments_and_complex_p_are_refused() -> None:
    with pytest.raises(psn.JuliaError, match="f\\(u, p, t\\) or f\\(du, u, p, t\\)"):
        psn.solve(psn.ODEProblem(psn.JuliaField("u -> u"), ones(1), (0.0, 1.0)), engine="julia")
    field = psn.JuliaField("(u, p, t) -> -p[1] .* u")
    problem = psn.ODEProblem(field, ones(1), (0.0, 1.0), p=torch.tensor([1.0 + 1.0j]))
    with pytest.raises(TypeError, match="view_as_real"):
        psn.solve(problem, engine="julia")
    with pytest.raises(TypeError, match="view_as_real"):
        field(torch.tensor(0.0, dtype=D), ones(1), torch.tensor([1j]))


# Solves inside solves, and what is left of them.


def test_an_events_condition_may_solve_with_an_event() -> None:
    module = nn.Linear(1, 1, bias=False, dtype=D)
    module.weight.data.fill_(-1.0)

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.layer(u)

    decay = Decay()
    inner = psn.Event(lambda t, u: u[0, 0] - 0.5)

    def condition(t: Tensor, u: Tensor) -> Tensor:
        # The same module, over another interval: how long does it take to halve?
        problem = psn.ODEProblem(decay, u / u, (0.0, 5.0))
        half = psn.solve(problem, events=inner, engine="julia", rtol=1e-9, atol=1e-9)
        return u[0, 0] - 0.3 + 0 * half.u1.sum()

    with torch.no_grad():
        solution = psn.solve(
            psn.ODEProblem(decay, ones(1, 1), (10.0, 20.0)),
            events=psn.Event(condition),
            engine="julia",
            rtol=1e-9,
            atol=1e-9,
        )
    expected = 10 - torch.log(torch.tensor(0.3, dtype=D))
    torch.testing.assert_close(solution.event_t, expected, rtol=1e-7, atol=0)


def test_an_equation_is_not_held_to_the_interval_of_another() -> None:
    """A program that has been solved over (0, 1) drifts a stochastic equation over (2, 3)."""

    class Clock(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return t + 0 * u

    clock = Clock()
    quiet = psn.JuliaField("(u, p, t) -> 0 .* u")
    with torch.no_grad():
        psn.solve(psn.ODEProblem(clock, ones(1), (0.0, 1.0)), engine="julia")
        solution = psn.solve(
            psn.SDEProblem(clock, quiet, ones(1), (2.0, 3.0)),
            psn.SOSRI(),
            dt0=0.1,
            controller=psn.FixedStep(),
            engine="julia",
        )
    torch.testing.assert_close(solution.u1, ones(1) * 3.5, rtol=1e-9, atol=0)


def test_dense_output_of_a_stiff_solution_made_without_gradients() -> None:
    with torch.no_grad():
        problem = psn.ODEProblem(lambda t, u: -u, ones(1), (0.0, 1.0))
        solution = psn.solve(problem, psn.Rodas5P(), engine="julia", rtol=1e-9, atol=1e-9)
    exact = torch.exp(torch.tensor([-0.4], dtype=D))
    torch.testing.assert_close(solution(0.4), exact, rtol=1e-6, atol=0)


def test_copies_of_a_solution_free_nothing_twice() -> None:
    for algorithm in (psn.Tsit5(), psn.Rodas5P()):
        with torch.no_grad():
            module = Conditioned()
            problem = psn.ODEProblem(module, ones(2, 3), (0.0, 1.0))
            solution = psn.solve(problem, algorithm, engine="julia")
            twin = copy.deepcopy(solution)
            torch.testing.assert_close(twin(0.5), solution(0.5), rtol=0, atol=0)
            del twin
            gc.collect()
            runtime.free_pending()
            solution(0.5)
            psn.solve(problem, algorithm, engine="julia")
    field = psn.JuliaField("(u, p, t) -> -u")
    end(field, "julia")  # type: ignore[arg-type]
    for other in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
        torch.testing.assert_close(end(other, "julia"), end(field, "julia"), rtol=0, atol=0)


def test_programs_and_plans_are_bounded() -> None:
    """Seventy batch sizes, of which the last 32 programs are kept."""

    class Layer(nn.Linear):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return super().forward(u)

    module = Layer(3, 3, dtype=D)
    with torch.no_grad():
        for n in range(1, 71):
            end(module, "julia", ones(n, 3))
    assert len(fields._programs) <= 32
    assert len(plans._plans) <= 256
    gc.collect()
    runtime.free_pending()
    assert int(runtime.call("held")) < 700
