"""Many members in one batch: each goes as it would alone."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pysciml_node as psn
from pysciml_node.replay.members.stacked import StackedMembers
from pysciml_node.solutions.members import ListedMembers
from pysciml_node.torch_engine.members import sweep

D = torch.float64
TOLERANCES: dict[str, float] = {"rtol": 1e-7, "atol": 1e-7}
# Batched kernels round differently. Sizes follow from error estimates, which are differences.
NEAR: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}


def swing(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """A driven pendulum with a frequency of its own."""
    return torch.stack((u[1], -(p[0] ** 2) * torch.sin(u[0]) + torch.cos(p[1] * t)))


def pendulums(count: int = 7, span: tuple[float, float] = (0.0, 2.0)) -> psn.EnsembleProblem:
    generator = torch.Generator().manual_seed(2)
    u0 = torch.randn(count, 2, generator=generator, dtype=D).requires_grad_()
    p = 1 + 4 * torch.rand(count, 2, generator=generator, dtype=D)
    problem = psn.ODEProblem(swing, torch.zeros(2, dtype=D), span, p=torch.ones(2, dtype=D))
    return psn.EnsembleProblem(problem, u0, p.requires_grad_())


def compare(ensemble: psn.EnsembleProblem, algorithm: psn.Algorithm, **options: Any) -> None:
    """States, gradients and counts of a batch are those of single solves."""
    together = psn.solve(ensemble, algorithm, **options)
    assert isinstance(together.members, StackedMembers)
    saveat = options.pop("saveat", None)
    own = isinstance(saveat, Tensor)
    stops = options.pop("tstops", ())
    alone = [
        psn.solve(
            problem,
            algorithm,
            saveat=saveat[m] if own else saveat,
            tstops=[t for t in stops if min(problem.tspan) < t < max(problem.tspan)],
            **options,
        )
        for m, problem in enumerate(ensemble.members())
    ]
    torch.testing.assert_close(together.u1, torch.stack([s.u1 for s in alone]), **NEAR)
    losses = [(together.u1**3).sum(), sum((s.u1**3).sum() for s in alone)]
    if saveat is not None:
        torch.testing.assert_close(together.u, torch.stack([s.u for s in alone]), **NEAR)
        losses[0] = losses[0] + (together.u**2).sum()
        losses[1] = losses[1] + sum((s.u**2).sum() for s in alone)
    assert together.member_stats == tuple(s.stats for s in alone)
    inputs = [x for x in (ensemble.u0, ensemble.p) if isinstance(x, Tensor)]
    found, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert together.member_stats == tuple(s.stats for s in alone)


EXPLICIT = [psn.Tsit5(), psn.DP8(), psn.Vern7(), psn.BS3(), psn.RK4()]


@pytest.mark.parametrize("algorithm", EXPLICIT, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_members_go_as_alone(algorithm: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "adjoint": adjoint}
    compare(pendulums(3), algorithm, saveat=[0.0, 0.3, 0.31, 0.32, 1.7, 2.0], **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"saveat": [2.0]},
        {"tstops": [0.5, 1.25], "saveat": [0.5, 1.0]},
        {"dt0": 0.05, "dtmax": 0.1},
        {"controller": psn.IController()},
        {"controller": psn.PIDController()},
        {"controller": psn.FixedStep(), "dt0": 0.15, "saveat": [0.1, 1.5]},
        {"controller": psn.FixedStep((0.5, 0.75, 1.1)), "tstops": [1.0], "saveat": [0.7, 1.1]},
        {"rtol": torch.tensor([1e-4, 1e-7], dtype=D)},
    ],
    ids=lambda o: "-".join(o) or "usual",
)
def test_options_hold_for_each(options: dict[str, Any]) -> None:
    compare(pendulums(5), psn.Tsit5(), **{**TOLERANCES, **options})
    backward = pendulums(3, (2.0, 0.0))
    reverse = {**options}
    for name in ("saveat", "tstops"):
        if name in reverse:
            reverse[name] = reverse[name][::-1]
    if getattr(reverse.get("controller"), "times", ()):
        reverse["controller"] = psn.FixedStep((1.1, 0.75, 0.5))
    compare(backward, psn.Tsit5(), **{**TOLERANCES, **reverse})


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Vern7()], ids=lambda a: type(a).__name__)
def test_gradients_do_not_depend_on_how_many_steps_are_taken_again_at_once(
    rows: int, algorithm: psn.Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with dense output, which share a stage with those after them, at once or later."""
    monkeypatch.setattr(sweep, "_ROWS", rows)
    times = torch.linspace(0.01, 1.99, 14, dtype=D).tolist()
    compare(pendulums(3), algorithm, saveat=times, tstops=[0.7], rtol=1e-5, atol=1e-5)


def test_own_intervals_and_times_in_both_directions() -> None:
    ensemble = pendulums(3)
    spans = torch.tensor([[0.0, 2.0], [5.0, 5.5], [1.0, -1.0]], dtype=D)
    share = torch.tensor([0.0, 0.1, 0.11, 0.6, 1.0], dtype=D)
    times = spans[:, :1] + share * (spans[:, 1:] - spans[:, :1])
    own = psn.EnsembleProblem(ensemble.problem, ensemble.u0, ensemble.p, spans)
    compare(own, psn.Tsit5(), saveat=times, tstops=[0.25], **TOLERANCES)


@pytest.mark.parametrize("saveat", [None, [0.5, 2.0]])
def test_each_member_is_a_solution(saveat: list[float] | None) -> None:
    ensemble = pendulums(3)
    together = psn.solve(ensemble, saveat=saveat, **TOLERANCES)
    for member, problem in zip(together, ensemble.members(), strict=True):
        alone = psn.solve(problem, saveat=saveat, **TOLERANCES)
        torch.testing.assert_close(member.u, alone.u, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(member.step_times, alone.step_times, rtol=1e-6, atol=0)
        torch.testing.assert_close(member.step_errors, alone.step_errors, rtol=1e-5, atol=1e-8)
        values = [member([0.3, 1.1]), alone([0.3, 1.1])]
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-8)
        steps = [sum(e.error for e in s.step_estimates()) for s in (member, alone)]
        inputs = [ensemble.u0, ensemble.p]
        for pair in (values, steps):
            found, expected = (
                torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in pair
            )
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_second_derivatives_through_direct() -> None:
    ensemble = pendulums(2, (0.0, 0.4))

    def end(u0: Tensor, p: Tensor) -> Tensor:
        given = psn.EnsembleProblem(ensemble.problem, u0, p)
        options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.2}
        solution = psn.solve(given, psn.Heun(), adjoint=psn.DirectAdjoint(), **options)
        assert isinstance(solution.members, StackedMembers)
        return solution.u1

    inputs = (ensemble.u0, ensemble.p)
    assert torch.autograd.gradcheck(end, inputs)
    assert torch.autograd.gradgradcheck(end, inputs)


class Weights(nn.Module):
    """A field with weights that all members share, and a scale for each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator, dtype=D))

    def forward(self, t: Tensor, u: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        both = torch.cat((u["a"].reshape(-1), u["b"]))
        out = torch.tanh(self.weight @ both) * p * (1 + t)
        return {"a": out[:4].reshape(2, 2), "b": out[4:]}


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_shared_weights_get_the_sum(adjoint: psn.Adjoint) -> None:
    """More entries than are replayed by Jacobians, in several parts."""
    field = Weights()
    u0 = {"a": torch.rand(4, 2, 2, dtype=D).requires_grad_(), "b": torch.rand(4, 2, dtype=D)}
    p = torch.linspace(0.5, 2, 4, dtype=D)
    shared = psn.ODEProblem(field, {k: x[0] for k, x in u0.items()}, (0.0, 1.0), p=p[0])
    ensemble = psn.EnsembleProblem(shared, u0, p)
    together = psn.solve(ensemble, adjoint=adjoint, saveat=[0.5, 1.0], **TOLERANCES)
    assert isinstance(together.members, StackedMembers)
    alone = [
        psn.solve(q, adjoint=adjoint, saveat=[0.5, 1.0], **TOLERANCES) for q in ensemble.members()
    ]
    losses = ((together.u["b"] ** 2).sum(), sum((s.u["b"] ** 2).sum() for s in alone))
    found, expected = (torch.autograd.grad(x, [u0["a"], field.weight]) for x in losses)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_shared_p_and_a_loss_at_early_times() -> None:
    """Steps behind the last time that counts have nothing to pull back."""
    ensemble = pendulums(3)
    shared = torch.tensor([2.0, 3.0], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(swing, torch.zeros(2, dtype=D), (0.0, 2.0), p=shared)
    together = psn.solve(psn.EnsembleProblem(problem, ensemble.u0), saveat=[0.2, 2.0], **TOLERANCES)
    found = torch.autograd.grad(together.u[:, 0].sum(), [shared, ensemble.u0])
    problems = psn.EnsembleProblem(problem, ensemble.u0).members()
    alone = [psn.solve(q, saveat=[0.2, 2.0], **TOLERANCES) for q in problems]
    expected = torch.autograd.grad(sum(s.u[0].sum() for s in alone), [shared, ensemble.u0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def blow_up(t: Tensor, u: Tensor) -> Tensor:
    return u**2


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_failure_leaves_its_neighbours_alone(adaptive: bool) -> None:
    u0 = torch.tensor([[0.1], [2.0], [0.3], [torch.nan]], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 1.5))
    options: dict[str, Any] = {"saveat": [0.25, 1.0], "throw": False}
    if not adaptive:
        options |= {"controller": psn.FixedStep(), "dt0": 0.1}
    together = psn.solve(psn.EnsembleProblem(problem, u0), **options)
    assert isinstance(together.members, StackedMembers)
    alone = [psn.solve(q, **options) for q in psn.EnsembleProblem(problem, u0).members()]
    assert together.retcodes == tuple(s.retcode for s in alone)
    assert together.u1.isnan().any(1).tolist() == [not s.success for s in alone]
    for member, s in zip(together, alone, strict=True):
        torch.testing.assert_close(member.u1, s.u1, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert member.stats.naccept == s.stats.naccept
    (gradient,) = torch.autograd.grad(together.u1[[0, 2]].sum(), u0)
    expected = 1 / (1 - u0.detach() * 1.5) ** 2
    torch.testing.assert_close(gradient[[0, 2]], expected[[0, 2]], rtol=1e-2, atol=0)
    assert gradient[1].item() == 0.0


def test_a_failed_member_is_explained() -> None:
    u0 = torch.tensor([[0.1], [2.0]], dtype=D)
    problem = psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 1.5))
    with pytest.raises(psn.EnsembleFailure, match=r"1 of 2.*Member 1: max_steps=30[\s\S]*scaled"):
        psn.solve(psn.EnsembleProblem(problem, u0), max_steps=30)


def test_the_slow_one_does_not_cost_the_others() -> None:
    """64 oscillators, one 50 times faster: each is evaluated as often as alone."""
    rows: list[int] = []

    def turn(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        rows.append(len(u))
        return p * torch.stack((u[:, 1], -u[:, 0]), dim=1)

    rate = torch.ones(64, 1, dtype=D)
    rate[17] = 50
    problem = psn.ODEProblem(turn, torch.tensor([1.0, 0.0], dtype=D), (0.0, 3.0))
    with torch.no_grad():
        together = psn.solve(psn.EnsembleProblem(problem, p=rate, batched=True), **TOLERANCES)
        evaluated = sum(rows)
        alone = [
            psn.solve(q, **TOLERANCES)
            for q in psn.EnsembleProblem(problem, p=rate, batched=True).members()[16:18]
        ]
    assert [s.nfe for s in together.member_stats[16:18]] == [s.stats.nfe for s in alone]
    # Two looks at the first evaluation, by single members, are the price of the batch.
    assert evaluated == together.stats.nfe + 2
    exact = torch.stack((torch.cos(3 * rate), -torch.sin(3 * rate)), dim=1).squeeze(2)
    error = (together.u1 - exact).abs().amax(1)
    assert error[17] <= 1.01 * (alone[1].u1 - exact[17]).abs().max() + 1e-12


def one_by_one(field: Any, **options: Any) -> psn.EnsembleSolution:
    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    u0 = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=D, requires_grad=True)
    solution = psn.solve(psn.EnsembleProblem(problem, u0), **options)
    assert isinstance(solution.members, ListedMembers)
    return solution


def test_fields_that_vmap_cannot_run_go_one_by_one() -> None:
    def branch(t: Tensor, u: Tensor) -> Tensor:
        return -u if t < 0.5 else -2 * u

    solution = one_by_one(branch, tstops=[0.5], rtol=1e-9, atol=1e-9)
    exact = torch.exp(torch.tensor(-1.5)).double()
    torch.testing.assert_close(solution.u1[0, 0], exact, rtol=1e-7, atol=0)


def test_fields_that_differentiate_are_batched() -> None:
    """A Hamiltonian, whose gradient the field takes by `torch.func`."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def flow(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda x: net(x).squeeze() * p)(u)
        return torch.stack((gradient[1], -gradient[0]))

    ensemble = pendulums(3)
    one = torch.ones((), dtype=D)
    problem = psn.ODEProblem(flow, torch.zeros(2, dtype=D), (0.0, 1.0), p=one)
    p = torch.linspace(1, 4, 3, dtype=D).requires_grad_()
    compare(psn.EnsembleProblem(problem, ensemble.u0, p), psn.Tsit5(), **TOLERANCES)


def test_statistics_over_a_batch_go_one_by_one() -> None:
    """Batch normalization in train mode writes to its buffers."""
    norm = nn.BatchNorm1d(2, dtype=D)
    one_by_one(lambda t, u: norm(torch.stack((u, -u)))[0], rtol=1e-2, atol=1e-2)


def test_hooks_run_for_each_member() -> None:
    linear = nn.Linear(2, 2, dtype=D)
    shapes: set[torch.Size] = set()
    linear.register_forward_hook(lambda module, given, out: shapes.add(out.shape))
    one_by_one(lambda t, u: linear(u))
    assert shapes == {torch.Size([2])}


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_checkpoints_go_one_by_one(adjoint: psn.Adjoint) -> None:
    """They evaluate again when the map over members is over."""
    rate = torch.tensor(0.5, dtype=D, requires_grad=True)
    again = functools.partial(checkpoint, lambda u: -rate * u, use_reentrant=False)
    solution = one_by_one(lambda t, u: again(u), adjoint=adjoint, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(solution.u1.sum(), rate)
    exact = -21 * torch.exp(torch.tensor(-0.5, dtype=D))  # the starts sum up to 21
    torch.testing.assert_close(gradient, exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_hooks_that_a_field_puts_on_tensors_go_one_by_one(adjoint: psn.Adjoint) -> None:
    """They change gradients, and would not run inside of `torch.vmap`: here `d/dr` comes twice."""
    rate = torch.tensor(0.5, dtype=D, requires_grad=True)

    def decay(t: Tensor, u: Tensor) -> Tensor:
        factor = rate + 0 * t
        if factor.requires_grad:
            factor.register_hook(lambda gradient: 2 * gradient)
        return -factor * u

    solution = one_by_one(decay, adjoint=adjoint, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(solution.u1.sum(), rate)
    exact = -2 * 21 * torch.exp(torch.tensor(-0.5, dtype=D))
    torch.testing.assert_close(gradient, exact, rtol=1e-7, atol=0)


def test_hooks_on_all_modules_run_for_each_member() -> None:
    linear, sizes = nn.Linear(2, 2, dtype=D), set()
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: sizes.add(y.shape))
    try:
        one_by_one(lambda t, u: linear(u))
    finally:
        hook.remove()
    assert sizes == {torch.Size([2])}


def test_fields_that_keep_tensors_go_one_by_one() -> None:
    """What they keep is of one member, and is as it was when the first of them begins."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total: Any = 0
            self.kept: dict[str, list[Tensor]] = {}

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            self.total = self.total + 1 + 0 * t.detach()
            self.kept["u"] = [u.detach()]
            return -u

    field = Keeping()
    solution = one_by_one(field, controller=psn.FixedStep(), dt0=0.5, algorithm=psn.RK4())
    assert float(field.total) == solution.stats.nfe
    assert field.kept["u"][0].shape == (2,)


def test_what_else_goes_one_by_one() -> None:
    def decay(t: Tensor, u: Tensor) -> Tensor:
        return -u

    one_by_one(decay, saveat=torch.tensor([0.5], requires_grad=True))
    one_by_one(decay, algorithm=psn.AutoTsit5())


def test_random_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="random numbers"):
        one_by_one(lambda t, u: torch.rand_like(u))
    problem = psn.ODEProblem(lambda t, u: torch.rand_like(u), torch.ones(2), (0.0, 1.0))
    with pytest.raises(ValueError, match="random numbers"):
        psn.solve(psn.EnsembleProblem(problem, torch.ones(3, 2), batched=True))


def test_a_batch_that_mixes_members_is_refused() -> None:
    problem = psn.ODEProblem(lambda t, u: -u + u.mean(0), torch.ones(2, dtype=D), (0.0, 1.0))
    ensemble = psn.EnsembleProblem(problem, torch.rand(3, 2, dtype=D), batched=True)
    with pytest.raises(ValueError, match="not each for itself"):
        psn.solve(ensemble)


def test_a_field_that_works_in_place_is_refused() -> None:
    problem = psn.ODEProblem(lambda t, u: u.neg_(), torch.ones(2, dtype=D), (0.0, 1.0))
    for batched in (False, True):
        ensemble = psn.EnsembleProblem(problem, torch.rand(3, 2, dtype=D), batched=batched)
        with pytest.raises(RuntimeError, match=r"in.place"):
            psn.solve(ensemble)


def test_a_field_that_has_changed_is_refused_in_backward() -> None:
    scale = torch.ones(1, dtype=D)
    problem = psn.ODEProblem(lambda t, u: -scale * u, torch.ones(2, dtype=D), (0.0, 1.0))
    u0 = torch.rand(3, 2, dtype=D, requires_grad=True)
    solution = psn.solve(psn.EnsembleProblem(problem, u0))
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="scale has been changed in place"):
        solution.u1.sum().backward()


def test_late_parameters_get_their_gradients() -> None:
    """A field whose parameters are used from a time on."""
    late = nn.Parameter(torch.tensor(0.5, dtype=D))

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -u * torch.where(t > 0.5, late, torch.ones_like(late))

    problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    u0 = torch.ones(2, 1, dtype=D)
    solution = psn.solve(psn.EnsembleProblem(problem, u0), tstops=[0.5], rtol=1e-9, atol=1e-9)
    solution.u1.sum().backward()
    expected = -2 * 0.5 * torch.exp(torch.tensor(-0.75, dtype=D))
    torch.testing.assert_close(late.grad, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    u0 = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=dtype, requires_grad=True)
    rate = torch.tensor([[1.0], [2.0]], dtype=dtype)
    problem = psn.ODEProblem(lambda t, u, p: -p * u, u0[0].detach(), (0.0, 1.0), p=rate[0])
    together = psn.solve(psn.EnsembleProblem(problem, u0, rate), saveat=[0.5], rtol=1e-5, atol=1e-5)
    assert isinstance(together.members, StackedMembers)
    (gradient,) = torch.autograd.grad(together.u1.abs().sum(), u0)
    exact = torch.exp(-rate.detach())
    torch.testing.assert_close(together.u1.detach(), exact * u0.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, exact.expand(2, 2), rtol=1e-4, atol=0)


def test_large_states_of_steps_are_let_go() -> None:
    u0 = torch.ones(3000, 100, dtype=D)
    problem = psn.ODEProblem(lambda t, u: -u, u0[0], (0.0, 1.0))
    with torch.no_grad():
        solution = psn.solve(psn.EnsembleProblem(problem, u0), saveat=[1.0], rtol=1e-10, atol=1e-10)
    assert isinstance(solution.members, StackedMembers)
    assert solution.members.thinned
    assert len(solution.members.states) == 3000
    torch.testing.assert_close(solution.u[:, 0], solution.u1, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="not kept"):
        solution[0](0.5)


def test_members_may_be_shuffled() -> None:
    """What a member does has nothing to do with its place."""
    ensemble = pendulums(5)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert isinstance(ensemble.u0, Tensor)
    shuffled = psn.EnsembleProblem(ensemble.problem, ensemble.u0[order], ensemble.p[order])
    first, second = (psn.solve(x, **TOLERANCES).u1 for x in (ensemble, shuffled))
    torch.testing.assert_close(first[order], second, **NEAR)
    pairs = itertools.pairwise(first[:, 0].tolist())
    assert all(a != b for a, b in pairs)


@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Rodas5P()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
@pytest.mark.parametrize(
    "options", [{}, {"tstops": [0.6]}, {"controller": psn.FixedStep(), "dt0": 0.1}]
)
def test_ends_of_own_intervals_receive_gradients(
    algorithm: psn.Algorithm, adjoint: psn.Adjoint, options: dict[str, Any]
) -> None:
    ensemble, generator = pendulums(3), torch.Generator().manual_seed(3)
    spans = torch.tensor([0.0, 1.5]) + 0.5 * torch.rand(3, 2, generator=generator)
    spans = spans.double().requires_grad_()
    own = psn.EnsembleProblem(ensemble.problem, ensemble.u0, ensemble.p, spans)
    options = {"rtol": 1e-5, "atol": 1e-5, "saveat": [0.5, 1.1], "adjoint": adjoint, **options}
    together = psn.solve(own, algorithm, **options)
    assert isinstance(together.members, StackedMembers)
    alone = [psn.solve(problem, algorithm, **options) for problem in own.members()]
    one = (together.u1**3).sum() + (together.u**2).sum()
    other = sum((s.u1**3).sum() + (s.u**2).sum() for s in alone)
    inputs = [spans, ensemble.u0, ensemble.p]
    found, expected = (torch.autograd.grad(loss, inputs) for loss in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_ends_of_a_field_that_hides_time_go_one_by_one() -> None:
    problem = psn.ODEProblem(
        lambda t, u: -u * float(t.detach() + 1), torch.ones(1, dtype=D), (0.0, 1.0)
    )
    spans = torch.tensor([[0.0, 1.0], [0.2, 0.9]], dtype=D, requires_grad=True)
    solution = psn.solve(psn.EnsembleProblem(problem, tspan=spans), **TOLERANCES)
    assert isinstance(solution.members, ListedMembers)
