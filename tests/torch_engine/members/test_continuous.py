"""Continuous adjoints of many members in one march: each goes back as it would alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.replay.members.stacked import StackedMembers
from pysciml_node.solutions.members import ListedMembers
from pysciml_node.torch_engine.members import costates, quadrature

D = torch.float64
ADJOINTS = [psn.InterpolatingAdjoint(), psn.GaussAdjoint(), psn.BacksolveAdjoint()]
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
METHODS = [psn.Tsit5(), psn.DP8(), psn.Vern7(), psn.BS3(), psn.RK4()]
TOLERANCES: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}
LOOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


def swing(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """A driven pendulum with a frequency of its own."""
    return torch.stack((u[1], -(p[0] ** 2) * torch.sin(u[0]) + torch.cos(p[1] * t)))


def swings(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Those of a batch."""
    force = torch.cos(p[:, 1] * t[:, 0])
    return torch.stack((u[:, 1], -(p[:, 0] ** 2) * torch.sin(u[:, 0]) + force), dim=1)


def pendulums(
    count: int = 3, span: tuple[float, float] = (0.0, 1.0), **options: Any
) -> psn.EnsembleProblem:
    generator = torch.Generator().manual_seed(2)
    u0 = torch.randn(count, 2, generator=generator, dtype=D).requires_grad_()
    p = 1 + 4 * torch.rand(count, 2, generator=generator, dtype=D)
    field = swings if options.get("batched") else swing
    problem = psn.ODEProblem(field, torch.zeros(2, dtype=D), span, p=torch.ones(2, dtype=D))
    return psn.EnsembleProblem(problem, u0, p.requires_grad_(), **options)


def inputs_of(ensemble: psn.EnsembleProblem) -> list[Tensor]:
    given = (ensemble.u0, ensemble.p, ensemble.tspan)
    return [x for x in given if isinstance(x, Tensor) and x.requires_grad]


def loss(solution: psn.Solution) -> Tensor:
    """Of the end, and of dense output inside a step."""
    middle = 0.37 * solution.problem.t0 + 0.63 * solution.problem.t1
    return (solution.u1**3).sum() + solution(middle).sum()


def compare(
    ensemble: psn.EnsembleProblem,
    algorithm: psn.Algorithm,
    inputs: list[Tensor] | None = None,
    near: float = 1e-10,
    **options: Any,
) -> None:
    """Gradients and backward steps of a batch are those of single solves."""
    options = {**TOLERANCES, **options}
    together = psn.solve(ensemble, algorithm, **options)
    assert isinstance(together.members, StackedMembers)
    alone = [psn.solve(problem, algorithm, **options) for problem in ensemble.members()]
    wanted = inputs_of(ensemble) if inputs is None else inputs
    saved = "saveat" in options
    found, expected = (
        torch.autograd.grad(
            torch.stack([loss(s) + (s.u**2).sum() if saved else loss(s) for s in many]).sum(),
            wanted,
            retain_graph=True,
        )
        for many in (together, alone)
    )
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    for one, other in zip(together.member_stats, (s.stats for s in alone), strict=True):
        assert (one.naccept_backward, one.nreject_backward) == (
            other.naccept_backward,
            other.nreject_backward,
        )
        assert one.nfe_backward > 0
        assert one.nvjp > 0


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda a: type(a).__name__)
@adjoints
def test_members_go_back_as_alone(algorithm: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    times = [0.0, 0.3, 0.31, 0.32, 0.8, 1.0]
    compare(pendulums(), algorithm, adjoint=adjoint, saveat=times, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"saveat": [1.0]},
        {"saveat": [0.0]},
        {"tstops": [0.25, 0.6], "saveat": [0.25, 0.5]},
        {"dt0": 0.05, "dtmax": 0.1},
        {"controller": psn.IController()},
        {"controller": psn.PIDController()},
        {"controller": psn.FixedStep(), "dt0": 0.15, "saveat": [0.1, 0.8]},
        {"controller": psn.FixedStep((0.2, 0.4, 0.6)), "tstops": [0.5], "saveat": [0.35, 0.6]},
        {"rtol": torch.tensor([1e-4, 1e-7], dtype=D)},
        {"max_steps": 500},
    ],
    ids=lambda o: "-".join(o),
)
@adjoints
def test_options_hold_for_each(adjoint: psn.Adjoint, options: dict[str, Any]) -> None:
    options = {**LOOSE, **options}
    compare(pendulums(), psn.Tsit5(), adjoint=adjoint, **options)
    if not isinstance(adjoint, psn.InterpolatingAdjoint):
        return
    reverse = {**options}
    for name in ("saveat", "tstops"):
        if name in reverse:
            reverse[name] = reverse[name][::-1]
    if getattr(reverse.get("controller"), "times", ()):
        reverse["controller"] = psn.FixedStep((0.6, 0.4, 0.2))
    compare(pendulums(3, (1.0, 0.0)), psn.Tsit5(), adjoint=adjoint, **reverse)


@pytest.mark.parametrize("kind", [psn.InterpolatingAdjoint, psn.GaussAdjoint, psn.BacksolveAdjoint])
def test_tolerances_of_the_adjoint_and_of_each_member(kind: Any) -> None:
    compare(pendulums(), psn.Tsit5(), adjoint=kind(rtol=1e-3, atol=1e-5))
    ensemble = pendulums(2)
    each = torch.tensor([[1e-4], [1e-8]], dtype=D)
    together = psn.solve(ensemble, adjoint=kind(), rtol=each, atol=each)
    assert isinstance(together.members, StackedMembers)
    alone = [
        psn.solve(problem, adjoint=kind(), rtol=float(x), atol=float(x))
        for problem, x in zip(ensemble.members(), each, strict=True)
    ]
    inputs = inputs_of(ensemble)
    found, expected = (
        torch.autograd.grad(torch.stack([loss(s) for s in many]).sum(), inputs)
        for many in (together, alone)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@adjoints
def test_own_intervals_receive_gradients_in_both_directions(adjoint: psn.Adjoint) -> None:
    one = pendulums()
    spans = torch.tensor([[0.0, 1.0], [1.2, 0.3], [0.9, 0.2]], dtype=D, requires_grad=True)
    for options in ({}, {"tstops": [0.6]}, {"controller": psn.FixedStep(), "dt0": 0.1}):
        own = psn.EnsembleProblem(one.problem, one.u0, one.p, spans)
        given: dict[str, Any] = options
        compare(own, psn.Tsit5(), adjoint=adjoint, **{**LOOSE, **given})


@adjoints
def test_a_field_that_hides_time_has_gradients_of_its_ends(adjoint: psn.Adjoint) -> None:
    """`u = exp(-(t1^2 - t0^2) / 2)`; the steps themselves would lack them."""
    problem = psn.ODEProblem(lambda t, u: -u * t.detach(), torch.ones(1, dtype=D), (0.0, 1.0))
    spans = torch.tensor([[0.1, 1.0], [0.2, 0.9]], dtype=D, requires_grad=True)
    many = psn.EnsembleProblem(problem, tspan=spans)
    solution = psn.solve(many, adjoint=adjoint, rtol=1e-10, atol=1e-10)
    assert isinstance(solution.members, StackedMembers)
    exact = torch.exp((spans[:, 0] ** 2 - spans[:, 1] ** 2) / 2)
    one, other = (torch.autograd.grad(x.sum(), spans)[0] for x in (solution.u1, exact))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=0)


@adjoints
def test_a_field_of_batches(adjoint: psn.Adjoint) -> None:
    compare(pendulums(batched=True), psn.Tsit5(), adjoint=adjoint, saveat=[0.3, 0.9])


@pytest.mark.parametrize("entries", [1, 300])
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.DP8()], ids=lambda a: type(a).__name__)
@adjoints
def test_gradients_do_not_depend_on_how_much_is_kept(
    adjoint: psn.Adjoint,
    algorithm: psn.Algorithm,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backward steps go over several forward ones, of which two blocks are kept."""
    for module in (costates, quadrature):
        monkeypatch.setattr(module, "_ENTRIES", entries)
    loose = type(adjoint)(**LOOSE)
    for each in (adjoint, loose):
        compare(pendulums(2), algorithm, adjoint=each, saveat=[0.3, 0.9])


def test_the_gradient_does_not_hold_one_of_each_member() -> None:
    """A shared parameter's gradient is summed up as it comes."""
    seen: list[int] = []

    class Wide(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return weight.sum(0)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(cotangent.ndim)
            return cotangent.expand_as(ctx.saved_tensors[0])

    weight = torch.rand(7, 2, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(
        lambda t, u: -u * Wide.apply(weight), torch.ones(2, dtype=D), (0.0, 1.0)
    )
    u0 = torch.rand(5, 2, dtype=D)
    many = psn.EnsembleProblem(problem, u0, batched=True)
    end = psn.solve(many, adjoint=psn.InterpolatingAdjoint(), rtol=1e-9, atol=1e-9).u1
    (found,) = torch.autograd.grad(end.sum(), weight)
    rate = weight.detach().sum(0)
    exact = -(u0 * torch.exp(-rate)).sum(0).expand(7, 2)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=0)
    assert set(seen) == {1}


class Weights(nn.Module):
    """A field with parameters of its own, and states of several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2).double() * 0.5)

    def forward(self, t: Tensor, u: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        return {"a": -p * u["a"] @ self.weight, "b": u["a"].sum(0) * torch.sin(t)}


@adjoints
def test_shared_parameters_of_each_kind(adjoint: psn.Adjoint) -> None:
    field = Weights()
    u0 = {"a": torch.rand(4, 2, 2, dtype=D).requires_grad_(), "b": torch.rand(4, 2, dtype=D)}
    p = torch.linspace(0.5, 2, 4, dtype=D)
    parts = psn.ODEProblem(field, {k: x[0] for k, x in u0.items()}, (0.0, 1.0), p=p[0])
    many = psn.EnsembleProblem(parts, u0, p)
    options: dict[str, Any] = {"adjoint": adjoint, "saveat": [0.5, 1.0], **TOLERANCES}
    together = psn.solve(many, **options)
    assert isinstance(together.members, StackedMembers)
    alone = [psn.solve(problem, **options) for problem in many.members()]
    losses = ((together.u["b"] ** 2).sum(), sum((s.u["b"] ** 2).sum() for s in alone))
    found, expected = (torch.autograd.grad(x, [u0["a"], field.weight]) for x in losses)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    shared = torch.tensor([2.0, 3.0], dtype=D, requires_grad=True)
    starts = pendulums().u0
    assert isinstance(starts, Tensor)
    problem = psn.ODEProblem(swing, torch.zeros(2, dtype=D), (0.0, 1.0), p=shared)
    compare(psn.EnsembleProblem(problem, starts), psn.Tsit5(), [shared, starts], adjoint=adjoint)
    # Captured, and computed by something else.
    linear, c = nn.Linear(2, 2).double(), torch.tensor(2.0, dtype=D, requires_grad=True)
    scale = c.sin()
    problem = psn.ODEProblem(
        lambda t, u: torch.tanh(linear(u)) * scale, torch.zeros(2, dtype=D), (0.0, 1.0)
    )
    inputs = [c, *linear.parameters()]
    compare(psn.EnsembleProblem(problem, starts), psn.Tsit5(), inputs, adjoint=adjoint, **LOOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@adjoints
def test_other_dtypes(adjoint: psn.Adjoint, dtype: torch.dtype) -> None:
    """Rotations that decay: `u = u0 exp(-p t)`."""
    u0 = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=dtype, requires_grad=True)
    rate = torch.tensor([[1.0], [2.0]], dtype=dtype)
    if dtype.is_complex:
        rate = rate * (1 + 0.5j)
    rate.requires_grad_()
    problem = psn.ODEProblem(lambda t, u, p: -p * u, u0[0].detach(), (0.0, 1.0), p=rate[0].detach())
    tight = 1e-5 if dtype is torch.float32 else 1e-9
    many = psn.EnsembleProblem(problem, u0, rate)
    together = psn.solve(many, adjoint=adjoint, rtol=tight, atol=tight)
    assert isinstance(together.members, StackedMembers)
    one, other = (
        torch.autograd.grad((x * (2 + 1j if dtype.is_complex else 2)).real.sum(), [u0, rate])
        for x in (together.u1, u0 * torch.exp(-rate))
    )
    torch.testing.assert_close(one, other, rtol=20 * tight, atol=20 * tight)


def blow_up(t: Tensor, u: Tensor) -> Tensor:
    return u**2


@adjoints
def test_a_failure_leaves_its_neighbours_alone(adjoint: psn.Adjoint) -> None:
    u0 = torch.tensor([[0.1], [2.0], [0.3], [torch.nan]], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 1.5))
    options: dict[str, Any] = {"saveat": [0.25, 1.0], "throw": False, "rtol": 1e-9, "atol": 1e-9}
    many = psn.solve(psn.EnsembleProblem(problem, u0), adjoint=adjoint, **options)
    assert isinstance(many.members, StackedMembers)
    assert many.u1.isnan().any(1).tolist() == [False, True, False, True]
    start = u0.detach()
    (end,) = torch.autograd.grad(many.u1.sum(), u0, retain_graph=True)
    torch.testing.assert_close(end[[0, 2]], (1 - 1.5 * start[[0, 2]]) ** -2, rtol=1e-7, atol=0)
    assert end[1].item() == 0.0
    # What it got to before it failed counts.
    (early,) = torch.autograd.grad(many.u[:3, 0].sum(), u0)
    torch.testing.assert_close(early[:3], (1 - 0.25 * start[:3]) ** -2, rtol=1e-7, atol=0)


@adjoints
def test_intervals_of_members_that_fail_have_no_gradient(adjoint: psn.Adjoint) -> None:
    u0 = torch.tensor([[0.3], [torch.nan], [2.0]], dtype=D)
    spans = torch.tensor([[0.0, 1.5]] * 3, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 1.5))
    many = psn.EnsembleProblem(problem, u0, tspan=spans)
    end = psn.solve(many, adjoint=adjoint, throw=False, rtol=1e-9, atol=1e-9).u1
    (gradient,) = torch.autograd.grad(end.sum(), spans)
    rate = (0.3 / (1 - 0.3 * 1.5)) ** 2
    exact = torch.tensor([[-rate, rate], [0.0, 0.0], [0.0, 0.0]], dtype=D)
    torch.testing.assert_close(gradient, exact, rtol=1e-7, atol=0)


@adjoints
def test_a_loss_that_is_not_finite_has_such_a_gradient(adjoint: psn.Adjoint) -> None:
    ensemble = pendulums()
    weights = torch.tensor([[1.0], [torch.inf], [1.0]], dtype=D)
    end = psn.solve(ensemble, adjoint=adjoint).u1
    for gradient in torch.autograd.grad((end * weights).sum(), inputs_of(ensemble)):
        assert gradient.isnan().all(1).tolist() == [False, True, False]


@adjoints
def test_scales_of_losses_go_through(adjoint: psn.Adjoint) -> None:
    """Steps are those of the cotangent's own size, whatever that is."""
    ensemble = pendulums()
    end, inputs = psn.solve(ensemble, adjoint=adjoint).u1, inputs_of(ensemble)
    each = torch.tensor([[1e-12], [1.0], [1e12]], dtype=D)
    plain = torch.autograd.grad(end.sum(), inputs, retain_graph=True)
    scaled = torch.autograd.grad((end * each).sum(), inputs)
    torch.testing.assert_close([x / each for x in scaled], list(plain), rtol=1e-9, atol=0)


@adjoints
def test_gradients_converge_to_those_of_the_steps(adjoint: psn.Adjoint) -> None:
    ensemble = pendulums()
    inputs = inputs_of(ensemble)

    def gradients(adjoint: psn.Adjoint, tolerance: float) -> Tensor:
        solution = psn.solve(ensemble, adjoint=adjoint, rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad((solution.u1**3).sum(), inputs)
        return torch.cat([x.flatten() for x in found])

    exact = gradients(psn.DiscreteAdjoint(), 1e-12)
    off = [float((gradients(adjoint, x) - exact).abs().max()) for x in (1e-4, 1e-7, 1e-10)]
    assert off[0] > 100 * off[1] > 100 * 100 * off[2]
    assert off[2] < 1e-8


@adjoints
def test_a_march_that_fails_names_its_member(adjoint: psn.Adjoint) -> None:
    """One of them turns fifty times as fast."""
    rate = torch.tensor([[1.0], [50.0], [1.0]], dtype=D, requires_grad=True)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: p * (turn @ u), torch.tensor([1.0, 0.0], dtype=D), (0.0, 3.0), p=rate[0]
    )
    limited = type(adjoint)(max_steps=100)
    solution = psn.solve(psn.EnsembleProblem(problem, p=rate), adjoint=limited)
    with pytest.raises(RuntimeError, match=r"1 members failed: 1\. That of member 1 stopped at t="):
        solution.u1.sum().backward()


def test_a_slow_member_does_not_cost_the_others() -> None:
    """Oscillators, one 20 times faster: each goes back in as many steps as alone."""
    rate = torch.ones(8, 1, dtype=D)
    rate[5] = 20
    rate.requires_grad_()
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: p * (turn @ u), torch.tensor([1.0, 0.0], dtype=D), (0.0, 2.0), p=rate[0]
    )
    many = psn.EnsembleProblem(problem, p=rate)
    solution = psn.solve(many, adjoint=psn.GaussAdjoint(), **TOLERANCES)
    (found,) = torch.autograd.grad(solution.u1[:, 0].sum(), rate)
    torch.testing.assert_close(found, -2 * torch.sin(2 * rate.detach()), rtol=1e-3, atol=1e-3)
    steps = [stats.naccept_backward for stats in solution.member_stats]
    alone = psn.solve(many.member(0), adjoint=psn.GaussAdjoint(), **TOLERANCES)
    alone.u1[0].backward()
    assert steps[0] == steps[7] == alone.stats.naccept_backward
    assert steps[5] > 8 * steps[0]


STIFF = [
    *itertools.product([psn.KenCarp4(), psn.TRBDF2()], ADJOINTS[:2]),
    *itertools.product([psn.Rodas5P(), psn.Rosenbrock23()], ADJOINTS[1:2]),
]


@pytest.mark.parametrize(("algorithm", "adjoint"), STIFF)
def test_implicit_methods(algorithm: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    compare(pendulums(2), algorithm, adjoint=adjoint, saveat=[0.3, 0.9], rtol=1e-4, atol=1e-4)


def test_a_mass_matrix() -> None:
    one, mass = pendulums(2), torch.tensor([[2.0, 0.3], [0.1, 1.0]], dtype=D)
    problem = psn.ODEProblem(
        swing, torch.zeros(2, dtype=D), (0.0, 1.0), p=torch.ones(2, dtype=D), mass_matrix=mass
    )
    spans = torch.tensor([[0.0, 1.0], [0.1, 0.7]], dtype=D, requires_grad=True)
    many = psn.EnsembleProblem(problem, one.u0, one.p, spans)
    compare(many, psn.Rodas5P(), adjoint=psn.GaussAdjoint(), saveat=[0.5])


def test_what_goes_one_by_one() -> None:
    """Rosenbrock methods with the gradient beside the costate, and times that move for all."""
    moving = torch.tensor([0.5], dtype=D, requires_grad=True)
    for given in (
        {"algorithm": psn.Rodas5P(), "adjoint": psn.InterpolatingAdjoint()},
        {"algorithm": psn.AutoTsit5(), "adjoint": psn.GaussAdjoint()},
        {"saveat": moving, "adjoint": psn.GaussAdjoint()},
    ):
        options: dict[str, Any] = given
        assert isinstance(psn.solve(pendulums(2), **options).members, ListedMembers)


@adjoints
def test_a_second_derivative_is_refused(adjoint: psn.Adjoint) -> None:
    ensemble = pendulums(2)
    (gradient,) = torch.autograd.grad(
        psn.solve(ensemble, adjoint=adjoint).u1.sum(), ensemble.p, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


@adjoints
def test_a_field_that_has_changed_is_refused(adjoint: psn.Adjoint) -> None:
    scale = torch.ones(1, dtype=D)
    problem = psn.ODEProblem(lambda t, u: -scale * u, torch.ones(2, dtype=D), (0.0, 1.0))
    u0 = torch.rand(3, 2, dtype=D, requires_grad=True)
    end = psn.solve(psn.EnsembleProblem(problem, u0), adjoint=adjoint).u1
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="scale has been changed in place"):
        end.sum().backward()


@adjoints
def test_rows_of_a_layer_with_a_regularizer(adjoint: psn.Adjoint) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(5, 2, dtype=D, requires_grad=True)
    found = []
    for each in (adjoint, psn.DiscreteAdjoint()):
        layer = psn.NeuralODE(
            net,
            independent=True,
            adjoint=each,
            rtol=1e-10,
            atol=1e-10,
            regularizers=[psn.LocalError(weight=0.1)],
        )
        torch.manual_seed(1)
        rows = layer(x)
        assert isinstance(rows.members, StackedMembers)
        total = (rows.u1**2).sum() + rows.penalty
        found.append(torch.autograd.grad(total, [x, *net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)
