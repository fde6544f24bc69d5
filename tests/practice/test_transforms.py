"""Batched gradients, checkpoints, transforms of `torch.func`, and derivatives in forward mode."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian, jvp
from torch.utils.checkpoint import checkpoint

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint_adjoint

D = torch.float64
ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]
A = torch.tensor([[-0.5, 1.0], [-1.0, -0.2]], dtype=D)
EXACT = torch.linalg.matrix_exp(A)
U0 = torch.tensor([1.0, 0.5], dtype=D)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


def linear(t: Tensor, u: Tensor) -> Tensor:
    return A @ u


def flow(u0: Tensor, adjoint: psn.Adjoint, f: Any = linear, **options: Any) -> psn.Solution:
    problem = psn.ODEProblem(f, u0, (0.0, 1.0))
    return psn.solve(problem, rtol=1e-10, atol=1e-10, adjoint=adjoint, **options)


@each_adjoint
def test_the_jacobian_of_a_solve_at_once(adjoint: psn.Adjoint) -> None:
    found = jacobian(lambda u0: flow(u0, adjoint).u1, U0, vectorize=True)
    torch.testing.assert_close(found, EXACT, rtol=1e-8, atol=1e-8)
    saved = jacobian(lambda u0: flow(u0, adjoint, saveat=[0.0, 0.5, 1.0]).u, U0, vectorize=True)
    torch.testing.assert_close(saved[1], torch.linalg.matrix_exp(A / 2), rtol=1e-8, atol=1e-8)
    dense = jacobian(lambda u0: flow(u0, adjoint)(0.5), U0, vectorize=True)
    torch.testing.assert_close(dense, torch.linalg.matrix_exp(A / 2), rtol=1e-8, atol=1e-8)


@each_adjoint
def test_batches_of_gradients_of_all_inputs(adjoint: psn.Adjoint) -> None:
    k = torch.tensor(1.5, dtype=D, requires_grad=True)
    t1 = torch.tensor(1.0, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -k * u, U0, (0.0, t1))
    u1 = psn.solve(problem, rtol=1e-10, atol=1e-10, adjoint=adjoint).u1
    rows = torch.eye(2, dtype=D)
    of_k, of_t1 = torch.autograd.grad(u1, (k, t1), rows, is_grads_batched=True)
    torch.testing.assert_close(of_k, -U0 * math.exp(-1.5), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(of_t1, -1.5 * U0 * math.exp(-1.5), rtol=1e-7, atol=1e-8)


def test_batches_of_gradients_of_a_stochastic_solve_and_of_penalties() -> None:
    k = torch.tensor(1.5, dtype=D, requires_grad=True)
    problem = psn.SDEProblem(lambda t, u: -k * u, lambda t, u: 0.1 * u, U0, (0.0, 1.0))
    u1 = psn.solve(problem, generator=torch.Generator().manual_seed(0)).u1
    (found,) = torch.autograd.grad(
        u1, k, torch.eye(2, dtype=D), is_grads_batched=True, retain_graph=True
    )
    expected = torch.stack([torch.autograd.grad(x, k, retain_graph=True)[0] for x in u1])
    torch.testing.assert_close(found, expected)
    node = psn.NeuralODE(lambda t, u: -k * u.sin(), regularizers=[psn.GlobalError()])
    penalty = node(U0[None]).penalty
    scales = torch.tensor([1.0, 0.0, -2.0], dtype=D)
    (once,) = torch.autograd.grad(penalty, k, retain_graph=True)
    (found,) = torch.autograd.grad(penalty, k, scales, is_grads_batched=True)
    torch.testing.assert_close(found, scales * once)


def test_second_derivatives_of_batches_are_refused() -> None:
    def u1(u0: Tensor) -> Tensor:
        return flow(u0, psn.DiscreteAdjoint(), lambda t, u: -(u**2)).u1

    first = jacobian(u1, U0, vectorize=True, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@each_adjoint
def test_directions_by_two_backward_passes(adjoint: psn.Adjoint) -> None:
    """What `torch.autograd.functional.jvp` does: the first pass is differentiated in cotangents."""
    k = torch.tensor(1.5, dtype=D)

    def u1(k: Tensor) -> Tensor:
        return flow(U0, adjoint, lambda t, u: -k * u).u1

    if isinstance(adjoint, psn.DirectAdjoint):
        _, found = jvp(u1, k, torch.ones_like(k))
        torch.testing.assert_close(found, -math.exp(-1.5) * U0, rtol=1e-6, atol=1e-6)
        return
    with pytest.raises(RuntimeError, match="second derivative"):
        jvp(u1, k, torch.ones_like(k))


def test_directions_of_other_results_by_two_backward_passes() -> None:
    """They were zero, without a word."""
    k = torch.tensor(1.5, dtype=D)
    decay = partial(psn.ODEProblem, u0=U0, tspan=(0.0, 1.0))

    def native(k: Tensor) -> Tensor:
        return psn.solve(decay(lambda t, u: -k * u), compile=True).u1

    def members(k: Tensor) -> Tensor:
        many = psn.EnsembleProblem(decay(lambda t, u: -k * u), torch.stack((U0, 2 * U0)))
        return psn.solve(many).u1

    def stochastic(k: Tensor) -> Tensor:
        noisy = psn.SDEProblem(lambda t, u: -k * u, lambda t, u: 0.1 * u, U0, (0.0, 1.0))
        return psn.solve(noisy).u1

    def event(k: Tensor) -> Tensor:
        half = psn.Event(lambda t, u: u[0] - U0[0] / 2)
        recorded = psn.DirectAdjoint()
        found = psn.solve(decay(lambda t, u: -k * u), events=half, adjoint=recorded).event_t
        assert found is not None
        return found

    def penalty(k: Tensor) -> Tensor:
        field = psn.NeuralODE(lambda t, u: -k * u, regularizers=[psn.GlobalError()])
        return field(U0[None]).penalty

    for run in (native, members, stochastic, event, penalty):
        with pytest.raises(RuntimeError, match="second derivative"):
            jvp(run, k, torch.ones_like(k))


@each_adjoint
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(adjoint: psn.Adjoint, reentrant: bool) -> None:
    net = nn.Linear(2, 2, dtype=D)
    node = psn.NeuralODE(lambda t, u: net(u), adjoint=adjoint, regularizers=[psn.KineticEnergy()])
    u0 = U0.expand(3, 2).clone().requires_grad_()

    def run(u0: Tensor) -> Tensor:
        solution = node(u0)
        return solution.u1.square().sum() + solution(0.5).sum() + solution.penalty

    expected = torch.autograd.grad(run(u0), (u0, *net.parameters()))
    checkpoint(run, u0, use_reentrant=reentrant).backward()
    for x, gradient in zip((u0, *net.parameters()), expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)


def test_checkpoints_of_other_solves() -> None:
    net = nn.Linear(2, 2, dtype=D)
    span = torch.tensor([0.0, 1.0], dtype=D)

    def module(t: Tensor, u: Tensor) -> Tensor:
        found: Tensor = net(u)
        return found

    generator = torch.Generator()

    def stochastic(u0: Tensor) -> Tensor:
        problem = psn.SDEProblem(module, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
        return psn.solve(problem, generator=generator.manual_seed(0)).u1.sum()

    def every_step(u0: Tensor) -> Tensor:
        return psn.NeuralODE(net, regularizers=[psn.GlobalError()])(u0).penalty

    def adjoint(u0: Tensor) -> Tensor:
        module = psn.NeuralODE(net).function("field")
        found: Tensor = odeint_adjoint(module, u0, span)[-1].sum()
        return found

    def event(u0: Tensor) -> Tensor:
        fall = psn.ODEProblem(lambda t, u: -module(t, u).square() - 1, u0, (0.0, 9.0))
        found = psn.solve(fall, events=psn.Event(lambda t, u: u.mean() + 1)).event_t
        assert found is not None
        return found

    for run in (stochastic, every_step, adjoint, event):
        u0 = U0[None].clone().requires_grad_()
        expected = torch.autograd.grad(run(u0), (u0, net.weight))
        found = torch.autograd.grad(checkpoint(run, u0, use_reentrant=False), (u0, net.weight))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "transform",
    [torch.func.jacrev, torch.func.jacfwd, lambda f: torch.func.hessian(lambda u: f(u).sum())],
    ids=["jacrev", "jacfwd", "hessian"],
)
def test_transforms_of_recorded_solves(transform: Any) -> None:
    def u1(u0: Tensor) -> Tensor:
        return flow(u0, psn.DirectAdjoint(), lambda t, u: -(u**2)).u1

    found = transform(u1)(U0)
    first = 1 / (1 + U0) ** 2
    expected = torch.diag(first if found.ndim == 2 and found[0, 0] > 0 else -2 / (1 + U0) ** 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_one_direction_of_a_recorded_solve() -> None:
    value, tangent = torch.func.jvp(lambda u0: flow(u0, psn.DirectAdjoint()).u1, (U0,), (U0,))
    torch.testing.assert_close(value, EXACT @ U0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(tangent, EXACT @ U0, rtol=1e-7, atol=1e-7)
    with forward_ad.dual_level():
        dual = flow(forward_ad.make_dual(U0, U0), psn.DirectAdjoint()).u1
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, EXACT @ U0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradients", [True, False])
@each_adjoint
def test_forward_mode_is_never_lost(adjoint: psn.Adjoint, gradients: bool) -> None:
    """Of the state, of `p`, of the ends, of what the field captures at some time."""
    k = torch.tensor(1.5, dtype=D)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        dual = forward_ad.make_dual(k, torch.ones_like(k))

        def late(t: Tensor, u: Tensor) -> Tensor:
            return -(dual if 0.4 < t < 0.6 else k) * u

        cases = [
            (psn.ODEProblem(lambda t, u: -u, U0 * dual, (0.0, 1.0)), (), U0 * math.exp(-1)),
            (
                psn.ODEProblem(lambda t, u, p: -p * u, U0, (0.0, 1.0), p=dual),
                (),
                -U0 * math.exp(-1.5),
            ),
            (psn.ODEProblem(late, U0, (0.0, 1.0)), (0.4, 0.6), -0.2 * U0 * math.exp(-1.5)),
        ]
        for problem, tstops, expected in cases:
            options: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10, "tstops": tstops}
            if not isinstance(adjoint, psn.DirectAdjoint):
                with pytest.raises(RuntimeError, match="DirectAdjoint"):
                    psn.solve(problem, adjoint=adjoint, **options)
                continue
            u1 = psn.solve(problem, adjoint=adjoint, **options).u1
            tangent = forward_ad.unpack_dual(u1).tangent
            torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


def bent(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p * torch.tanh(A @ u) * (1 + t * t) - u**3


def few_steps(u0: Tensor, algorithm: Any) -> Tensor:
    """The end of large steps, whose derivative is not that of the equation."""
    problem = psn.ODEProblem(bent, u0, (0.0, 1.0), p=u0[0])
    steps: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}
    return psn.solve(problem, algorithm, adjoint=psn.DirectAdjoint(), **steps).u1


MATRIX_FREE = psn.TRBDF2(linsolve=psn.GMRES())
IMPLICIT = [psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2()]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("algorithm", [*IMPLICIT, MATRIX_FREE], ids=str)
def test_implicit_steps_have_one_derivative_in_both_modes(algorithm: Any, gradients: bool) -> None:
    """By the state and by `p`: Rosenbrock steps depend on both through the Jacobian too."""
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        dual = few_steps(forward_ad.make_dual(U0, U0), algorithm)
        tangent = forward_ad.unpack_dual(dual).tangent
    expected = jacobian(lambda u0: few_steps(u0, algorithm), U0) @ U0
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=str)
def test_transforms_of_implicit_steps(algorithm: Any) -> None:
    def end(u0: Tensor) -> Tensor:
        return few_steps(u0, algorithm)

    expected = jacobian(end, U0)
    exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    exactly(torch.func.jacrev(end)(U0), expected)
    exactly(torch.func.jacfwd(end)(U0), expected)
    curvature = hessian(lambda u0: end(u0).sin().sum(), U0)
    exactly(torch.func.hessian(lambda u0: end(u0).sin().sum())(U0), curvature)


@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.KenCarp4()], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_ends_of_a_field_that_hides_its_time(hidden: bool, algorithm: Any) -> None:
    """`u1 = u0 + sin(t1) - sin(t0)`, whatever the mode: a table has no derivative by its place."""

    def forced(t: Tensor, u: Tensor) -> Tensor:
        return torch.cos(t.detach() if hidden else t).expand_as(u)

    def end(ends: Tensor) -> Tensor:
        problem = psn.ODEProblem(forced, U0, (ends[0], ends[1]))
        options: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6, "adjoint": psn.DirectAdjoint()}
        return psn.solve(problem, algorithm, **options).u1[0]

    ends = torch.tensor([0.2, 1.5], dtype=D)
    expected = ends.cos() * torch.tensor([-1.0, 1.0], dtype=D)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(jacobian(end, ends), expected)
    close(torch.func.grad(end)(ends), expected)
    close(torch.func.jacfwd(end)(ends), expected)
    with forward_ad.dual_level():
        dual = end(forward_ad.make_dual(ends, torch.ones_like(ends)))
        close(forward_ad.unpack_dual(dual).tangent, expected.sum())


def test_a_transform_of_steps_that_gmres_solves_is_refused() -> None:
    with pytest.raises(RuntimeError, match="forward_ad, or use Rodas5P"):
        torch.func.jacrev(lambda u0: few_steps(u0, MATRIX_FREE))(U0)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_of_times(gradients: bool) -> None:
    one = torch.ones((), dtype=D)
    options: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10, "adjoint": psn.DirectAdjoint()}
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        moving = forward_ad.make_dual(torch.tensor(0.5, dtype=D), one)

        def tangent(x: Tensor) -> Tensor:
            found: Tensor = forward_ad.unpack_dual(x).tangent
            return found

        def decay(t: Tensor, u: Tensor) -> Tensor:
            return -u

        end = psn.solve(psn.ODEProblem(decay, U0, (0.0, moving)), **options)
        torch.testing.assert_close(tangent(end.u1), -U0 * math.exp(-0.5), rtol=1e-7, atol=0)
        start = psn.solve(psn.ODEProblem(decay, U0, (moving, 1.0)), **options)
        torch.testing.assert_close(tangent(start.u1), U0 * math.exp(-0.5), rtol=1e-7, atol=0)
        torch.testing.assert_close(tangent(start(0.75)), U0 * math.exp(-0.25), rtol=1e-7, atol=0)
        saved = psn.solve(psn.ODEProblem(decay, U0, (0.0, 1.0)), saveat=moving[None], **options)
        torch.testing.assert_close(tangent(saved.u[0]), -U0 * math.exp(-0.5), rtol=1e-7, atol=0)
        torch.testing.assert_close(tangent(saved(moving)), -U0 * math.exp(-0.5), rtol=1e-7, atol=0)
        falls = psn.Event(lambda t, u: u[0] - 0.7)
        with pytest.raises(RuntimeError, match="reverse mode"):
            psn.solve(psn.ODEProblem(decay, U0 * moving * 2, (0.0, 1.0)), events=falls, **options)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_score_of_a_flow(gradients: bool) -> None:
    """`d log p / dx` in all ways: for `u' = -u` the base's score times `exp(-2)`."""
    flow = psn.CNF(
        lambda t, u: -u, event_shape=2, rtol=1e-9, atol=1e-9, adjoint=psn.DirectAdjoint()
    )
    x = U0[None]
    expected = -x * math.exp(-2)

    def density(x: Tensor) -> Tensor:
        found: Tensor = flow.log_prob(x).sum()
        return found

    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(torch.func.grad(density)(x), expected, rtol=1e-6, atol=0)
        slope = torch.func.jvp(density, (x,), (x,))[1]
        torch.testing.assert_close(slope, (expected * x).sum(), rtol=1e-6, atol=0)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(density(forward_ad.make_dual(x, x)))
        torch.testing.assert_close(dual.tangent, (expected * x).sum(), rtol=1e-6, atol=0)


@each_adjoint
def test_vmap_is_refused_in_favour_of_ensembles(adjoint: psn.Adjoint) -> None:
    with pytest.raises(RuntimeError, match="EnsembleProblem"):
        torch.vmap(lambda u0: flow(u0, adjoint).u1)(U0[:, None])
    with pytest.raises(RuntimeError, match="EnsembleProblem"):
        torch.vmap(lambda k: flow(U0, adjoint, lambda t, u: -k * u).u1)(U0)
    with pytest.raises(RuntimeError, match="EnsembleProblem"):
        torch.vmap(lambda k: psn.NeuralODE(lambda t, u: -k * u, adjoint=adjoint)(U0).u1)(U0)
    with pytest.raises(RuntimeError, match="EnsembleProblem"):
        torch.vmap(lambda t1: psn.solve(psn.ODEProblem(linear, U0, (0.0, t1))).u1)(U0)
    solution = flow(U0, adjoint)
    with pytest.raises(RuntimeError, match=r"solution\(times\)"):
        torch.vmap(solution)(U0)


def test_a_solve_that_depends_on_nothing_batched_is_the_same_for_all() -> None:
    same = torch.vmap(lambda k: k * flow(U0, psn.DirectAdjoint()).u1)(U0)
    torch.testing.assert_close(same, U0[:, None] * (EXACT @ U0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("adjoint", [a for a in ADJOINTS if not isinstance(a, psn.DirectAdjoint)])
def test_other_adjoints_refuse_the_transforms_by_name(adjoint: psn.Adjoint) -> None:
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="DirectAdjoint"):
            transform(lambda u0: flow(u0, adjoint).u1.sum())(U0)


@each_adjoint
def test_gradients_go_to_the_parameters_of_a_functional_call(adjoint: psn.Adjoint) -> None:
    """Which are gone from the module when the gradients are taken."""
    node = psn.NeuralODE(nn.Linear(2, 2, dtype=D), rtol=1e-9, atol=1e-9, adjoint=adjoint)
    torch.manual_seed(0)
    given = {name: torch.randn_like(p) for name, p in node.named_parameters()}
    given = {name: p.requires_grad_() for name, p in given.items()}
    loss = torch.func.functional_call(node, given, (U0[None],)).u1.sum()
    found = torch.autograd.grad(loss, list(given.values()))
    copy = psn.NeuralODE(nn.Linear(2, 2, dtype=D), rtol=1e-9, atol=1e-9)
    copy.load_state_dict(given)
    expected = torch.autograd.grad(copy(U0[None]).u1.sum(), list(copy.parameters()))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_state_that_a_transform_has_left_behind(compiled: bool, gradients: bool) -> None:
    left: list[Tensor] = []

    def square(x: Tensor) -> Tensor:
        left.append(x * 1.0)
        return (x**2).sum()

    torch.func.grad(square)(U0)
    problem = psn.ODEProblem(lambda t, u: u @ A.T, left[0], (0.0, 1.0))
    with torch.set_grad_enabled(gradients):
        u1 = psn.solve(problem, rtol=1e-9, atol=1e-9, engine="torch", compile=compiled).u1
    torch.testing.assert_close(u1.detach(), EXACT @ U0, rtol=1e-7, atol=0)
