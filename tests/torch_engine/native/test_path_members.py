"""Native stochastic members: each is the native solve that it is alone, on the path of its seed."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import pysciml_node as psn
from pysciml_node.torch_engine.native import crew
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.path_members import NativePaths

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.13}
LOOSE: dict[str, Any] = {"rtol": 0.1, "atol": 0.1}
TIMES: dict[str, Any] = {"saveat": [0.0, 0.11, 0.26, 0.35, 0.5], "tstops": [0.3, 0.777]}


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Layer(nn.Module):
    """A network that all members share, driven by `p`."""

    def __init__(self, out: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, 3, generator=generator(seed), dtype=D) / 2)

    def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(u @ self.weight.T) * torch.cos(p * t)


class Mixing(Layer):
    """Two motions of each entry."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return super().forward(t, u, p).view(3, 2)


class Constant(Layer):
    """Noise that depends on time alone."""

    def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return self.weight.sum(1) * torch.cos(p * t)


DIFFUSIONS: dict[str, Callable[[], Layer]] = {
    "diagonal": lambda: Layer(3, 2),
    "scalar": lambda: Layer(3, 2),
    "additive": lambda: Constant(3, 2),
    "general": Mixing,
}


def many(
    noise: Any = "diagonal",
    interpretation: Any = "ito",
    own: bool = True,
    ends: bool = False,
    count: int = 5,
) -> tuple[psn.EnsembleProblem, list[Tensor]]:
    """An ensemble, and what receives gradients."""
    u0 = torch.randn(count, 3, generator=generator(1), dtype=D).requires_grad_()
    p = (1 + torch.rand(count, 1, generator=generator(2), dtype=D)).requires_grad_()
    drift, diffusion = Layer(3, 1), DIFFUSIONS[noise]()
    shared = torch.ones(1, dtype=D, requires_grad=True)
    problem = psn.SDEProblem(
        drift, diffusion, torch.zeros(3, dtype=D), (0.0, 1.0), noise, interpretation, p=shared
    )
    spans = torch.stack((torch.zeros(count), torch.linspace(0.5, 1, count)), 1).to(D)
    ensemble = psn.EnsembleProblem(problem, u0, p if own else None, spans if ends else None)
    return ensemble, [u0, p if own else shared, *drift.parameters(), *diffusion.parameters()]


def assert_as_alone(
    made: tuple[psn.EnsembleProblem, list[Tensor]], method: Any, **options: Any
) -> None:
    """Everything of native solves of one member each.

    To the last bit, but for members that take the same steps: these go abreast, and sums are formed
    in another order.
    """
    ensemble, inputs = made
    together = psn.solve(ensemble, method, compile=True, generator=generator(), **options)
    assert isinstance(together.members, NativePaths)
    draws, stops = generator(), options.pop("tstops", [])
    alone = []
    for problem in ensemble.members():
        mine = [t for t in stops if t < problem.t1]
        how: dict[str, Any] = {**options, "tstops": mine, "generator": draws}
        alone.append(psn.solve(problem, method, compile=True, **how))
    abreast = "dt0" in options and ensemble.tspan is None
    near = {"rtol": 1e-12, "atol": 1e-12} if abreast else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(together.u1, torch.stack([one.u1 for one in alone]), **near)
    losses = [(together.u1**3).sum(), torch.stack([(one.u1**3).sum() for one in alone]).sum()]
    if "saveat" in options:
        torch.testing.assert_close(together.u, torch.stack([one.u for one in alone]), **near)
        losses = [
            losses[0] + (together.u**2).sum(),
            losses[1] + torch.stack([(one.u**2).sum() for one in alone]).sum(),
        ]
    bars, others = (torch.autograd.grad(loss, inputs) for loss in losses)
    torch.testing.assert_close(bars, others, rtol=1e-12, atol=1e-12)
    for one, member in zip(alone, together, strict=True):
        assert torch.equal(one.t, member.t)
        torch.testing.assert_close(one.u, member.u, **near)
        for name in ("nfe", "nfe_diffusion", "naccept", "nreject", "naccept_backward", "nvjp"):
            assert getattr(one.stats, name) == getattr(member.stats, name)
    one, member = alone[-1], together[-1]
    times = torch.tensor([0.0, 0.2, 0.33, 0.5], dtype=D)
    torch.testing.assert_close(member(times), one(times), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(member.brownian(0.1, 0.4), one.brownian(0.1, 0.4))


@pytest.mark.parametrize(
    ("noise", "interpretation", "method", "options"),
    [
        ("diagonal", "ito", psn.EM(), FIXED),
        ("diagonal", "ito", psn.SOSRI(), FIXED),
        ("diagonal", "ito", psn.SRIW1(), LOOSE),
        ("diagonal", "ito", psn.SOSRI(), {**LOOSE, "controller": psn.PIDController()}),
        ("scalar", "ito", psn.SRIW1(), LOOSE),
        ("diagonal", "stratonovich", psn.ReversibleHeun(), FIXED),
        ("diagonal", "stratonovich", psn.EulerHeun(), LOOSE),
        ("scalar", "ito", psn.RKMil(), FIXED),
        ("additive", "ito", psn.SOSRA(), LOOSE),
        ("general", "ito", psn.LambaEM(), FIXED),
        ("general", "stratonovich", psn.StratonovichMidpoint(), FIXED),
        ("diagonal", "ito", psn.EM(), {"controller": psn.FixedStep((0.1, 0.15, 0.4, 0.6))}),
    ],
)
def test_members_are_single_solves(
    noise: str, interpretation: str, method: Any, options: dict[str, Any]
) -> None:
    for own, ends in ((True, False), (True, True), (False, False)):
        if not (ends and "dt0" not in options and "controller" in options):  # a grid beyond an end
            assert_as_alone(many(noise, interpretation, own, ends), method, **options, **TIMES)


def test_ends_of_steps_as_output() -> None:
    assert_as_alone(many(), psn.SRIW1(), **LOOSE)


def test_members_with_times_and_tolerances_of_their_own() -> None:
    ensemble, _ = many(count=4)
    saveat = torch.tensor([[0.1, 0.5], [0.2, 1.0], [0.0, 0.13], [0.3, 0.31]], dtype=D)
    rtol = torch.tensor([0.1, 0.02, 0.3, 0.05], dtype=D)
    how: dict[str, Any] = {"saveat": saveat, "rtol": rtol, "atol": 0.1}
    together = psn.solve(ensemble, psn.SOSRI(), compile=True, generator=generator(), **how)
    draws = generator()
    for m, member in enumerate(ensemble.members()):
        how |= {"saveat": saveat[m], "rtol": float(rtol[m])}
        alone = psn.solve(member, psn.SOSRI(), compile=True, generator=draws, **how)
        torch.testing.assert_close(together.u[m], alone.u, rtol=1e-12, atol=1e-12)
        assert together[m].stats.naccept == alone.stats.naccept


def test_tolerances_by_entries() -> None:
    rtol = torch.tensor([0.1, 0.02, 0.3], dtype=D)
    atol = torch.tensor([0.1, 0.02, torch.inf], dtype=D)
    assert_as_alone(many("diagonal"), psn.SRIW1(), rtol=rtol, atol=atol)
    assert_as_alone(many("diagonal", "stratonovich"), psn.EulerHeun(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [FIXED, LOOSE])
def test_members_are_those_of_the_loop_in_python(options: dict[str, Any]) -> None:
    ensemble, inputs = many(ends=True)
    found = []
    for compile in (True, False):
        solution = psn.solve(
            ensemble, psn.SOSRI(), compile=compile, generator=generator(), **options, **TIMES
        )
        loss = (solution.u1**3).sum() + (solution.u**2).sum()
        found.append((solution, torch.autograd.grad(loss, inputs)))
    (native, bars), (eager, others) = found
    torch.testing.assert_close(native.u, eager.u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bars, others, rtol=1e-9, atol=1e-9)
    for name in ("naccept", "nreject", "naccept_backward"):
        pairs = zip(native.member_stats, eager.member_stats, strict=True)
        assert all(getattr(x, name) == getattr(y, name) for x, y in pairs)


@pytest.mark.parametrize("options", [FIXED, LOOSE])
def test_threads_and_turns_change_nothing(options: dict[str, Any]) -> None:
    """To the last bit: states and gradients, with one thread and two, in one turn and in many."""
    ensemble, inputs = many(count=300)
    before, found = torch.get_num_threads(), []
    for threads, turn in ((1, 0.05), (2, 0.05), (2, 0.0), (1, 1e-4)):
        torch.set_num_threads(threads)
        with mock.patch.object(crew, "TURN", turn):
            solution = psn.solve(
                ensemble, psn.SRIW1(), compile=True, generator=generator(), **options, **TIMES
            )
            loss = (solution.u1**3).sum() + (solution.u**2).sum()
            found.append([loss, *torch.autograd.grad(loss, inputs)])
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("options", [FIXED, LOOSE])
def test_a_member_is_the_same_beside_others(options: dict[str, Any]) -> None:
    whole, _ = many(count=70)
    solution = psn.solve(whole, psn.SRIW1(), compile=True, generator=generator(), **options)
    first = psn.solve(
        whole.part(slice(0, 3)), psn.SRIW1(), compile=True, generator=generator(), **options
    )
    assert torch.equal(solution.u1[:3], first.u1)


def test_gradients_are_those_of_the_computation() -> None:
    """Finite differences on the same paths."""
    ensemble, _ = many(count=3)

    def end(u0: Tensor, p: Tensor) -> Tensor:
        given = psn.EnsembleProblem(ensemble.problem, u0, p)
        options = {**FIXED, "saveat": [0.4, 1.0]}
        solution = psn.solve(given, psn.SOSRI(), compile=True, generator=generator(), **options)
        return solution.u

    assert isinstance(ensemble.u0, Tensor)
    assert gradcheck(end, (ensemble.u0, ensemble.p))


def geometric(count: int, **given: Any) -> psn.EnsembleProblem:
    problem = psn.SDEProblem(
        lambda t, u: 0.3 * u, lambda t, u: 0.8 * u, torch.ones(1, dtype=D), (0.0, 1.0), **given
    )
    return psn.EnsembleProblem(problem, torch.ones(count, 1, dtype=D))


@pytest.mark.parametrize(
    ("method", "order"), [(psn.EM(), 0.5), (psn.RKMil(), 1.0), (psn.SRIW1(), 1.5)]
)
def test_strong_order(method: Any, order: float) -> None:
    """Geometric Brownian motion is `exp((mu - sigma^2 / 2) t + sigma W)` on each path."""
    ensemble, errors = geometric(400), []
    for k in (4, 6, 8):
        solution = psn.solve(
            ensemble,
            method,
            controller=psn.FixedStep(),
            dt0=2.0**-k,
            compile=True,
            generator=generator(1),
        )
        w = torch.stack([member.brownian(0.0, 1.0) for member in solution])
        exact = torch.exp(0.3 - 0.32 + 0.8 * w)
        errors.append((solution.u1 - exact).square().mean().log2().item() / 2)
    assert (errors[0] - errors[2]) / 4 == pytest.approx(order, abs=0.15)


def expect_moments(samples: Tensor, mean: float, variance: float, fourth: float) -> None:
    """Within four standard errors, by the fourth central moment."""
    count = len(samples)
    assert abs(float(samples.mean()) - mean) < 4 * (variance / count) ** 0.5
    error = ((fourth - variance**2) / count) ** 0.5
    assert abs(float((samples - mean).square().mean()) - variance) < 4 * error


def test_moments_of_geometric_brownian_motion() -> None:
    """Of its logarithm, which is normal: mean 0.3 - 0.32, variance 0.64."""
    solution = psn.solve(
        geometric(20_000),
        psn.SRIW1(),
        controller=psn.FixedStep(),
        dt0=1 / 64,
        compile=True,
        generator=generator(),
    )
    expect_moments(solution.u1.log(), 0.3 - 0.32, 0.64, 3 * 0.64**2)


@pytest.mark.parametrize("options", [{"controller": psn.FixedStep(), "dt0": 1 / 32}, LOOSE])
def test_moments_of_ornstein_and_uhlenbecks_process(options: dict[str, Any]) -> None:
    """`du = -k u dt + s dW` from one: mean `exp(-k)`, variance `s^2 (1 - exp(-2k)) / 2k`."""
    k, s = 1.5, 0.7
    problem = psn.SDEProblem(
        lambda t, u: -k * u, lambda t, u: s + 0 * u, torch.ones(1, dtype=D), (0.0, 1.0), "additive"
    )
    ensemble = psn.EnsembleProblem(problem, torch.ones(20_000, 1, dtype=D))
    solution = psn.solve(ensemble, psn.SOSRA(), compile=True, generator=generator(), **options)
    variance = s**2 * (1 - math.exp(-2 * k)) / (2 * k)
    expect_moments(solution.u1, math.exp(-k), variance, 3 * variance**2)


@pytest.mark.parametrize("options", [FIXED, {**LOOSE, "max_steps": 60}])
def test_a_member_that_fails_leaves_its_neighbours_alone(options: dict[str, Any]) -> None:
    u0 = torch.tensor([[0.1], [5.0], [0.2]], dtype=D, requires_grad=True)
    rate = torch.ones((), dtype=D, requires_grad=True)
    problem = psn.SDEProblem(
        lambda t, u: rate * u**9, lambda t, u: 0.1 + 0 * u, u0[0].detach(), (0.0, 1.0), "additive"
    )
    ensemble = psn.EnsembleProblem(problem, u0)
    how: dict[str, Any] = {**options, "compile": True, "throw": False, "saveat": [0.2, 0.5, 1.0]}
    together = psn.solve(ensemble, psn.SRA1(), generator=generator(), **how)
    draws = generator()
    alone = [psn.solve(member, psn.SRA1(), generator=draws, **how) for member in ensemble.members()]
    assert [code.successful for code in together.retcodes] == [True, False, True]
    loss = torch.zeros((), dtype=D)
    for m, one in enumerate(alone):
        assert together.retcodes[m] is one.retcode
        assert together[m].stats.naccept == one.stats.naccept
        torch.testing.assert_close(together[m].u, one.u, rtol=1e-12, atol=1e-12)
        assert torch.isnan(together.u[m, len(one.u) :]).all()
        loss = loss + (one.u**2).sum()
    bars = torch.autograd.grad(loss, [u0, rate])
    found = torch.autograd.grad(torch.nan_to_num(together.u).square().sum(), [u0, rate])
    torch.testing.assert_close(found, bars, rtol=1e-12, atol=1e-12)
    with pytest.raises(psn.EnsembleFailure, match="1 of 3 members failed: 1"):
        psn.solve(ensemble, psn.SRA1(), generator=generator(), **{**how, "throw": True})


def test_states_in_parts_copies_and_precision() -> None:
    def drift(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": u["y"], "y": -u["x"]}

    u0 = {"x": torch.rand(3), "y": torch.rand(3)}
    problem = psn.SDEProblem(
        drift,
        lambda t, u: {"x": 0.1 * u["x"], "y": 0.2 * u["y"]},
        {key: x[0] for key, x in u0.items()},
        (0.0, 0.5),
        interpretation="stratonovich",
    )
    ensemble = psn.EnsembleProblem(problem, u0)
    solutions = [
        psn.solve(ensemble, psn.ReversibleHeun(), compile=compile, generator=generator(), **FIXED)
        for compile in (True, False)
    ]
    native, eager = solutions
    assert isinstance(native.members, NativePaths)
    torch.testing.assert_close(native.u1, eager.u1, rtol=1e-5, atol=1e-5)
    assert native.u1["x"].dtype == torch.float32
    assert torch.equal(native[2].u1["y"], native.u1["y"][2])
    again = pickle.loads(pickle.dumps(native))
    assert torch.equal(again.u1["x"], native.u1["x"])
    assert torch.equal(native.detach()[1](0.2)["x"], native[1](0.2)["x"])


def test_parameters_that_change_after_a_solve() -> None:
    """Gradients are refused; estimates and dense output of members too."""
    ensemble, inputs = many()
    solution = psn.solve(ensemble, psn.EM(), compile=True, generator=generator(), **FIXED)
    with torch.no_grad():
        inputs[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(solution.u1.sum(), inputs)
    with pytest.raises(RuntimeError, match=r"f\.weight"):
        solution[0](0.2)


def test_what_is_refused_by_name() -> None:
    ensemble, _ = many()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"progress": True}, "a progress bar over members"),
        ({"adjoint": psn.DirectAdjoint()}, "DirectAdjoint"),
    ]
    for options, words in refused:
        with pytest.raises(psn.CompileError, match=words):
            psn.solve(ensemble, psn.EM(), compile=True, **FIXED, **options)
    u0 = torch.zeros(3, 1, dtype=D)
    problem = psn.SDEProblem(lambda t, u: u, lambda t, u: u, u0[0], (0.0, 1.0), "additive")
    with pytest.raises(ValueError, match="does not depend on the state"):
        psn.solve(psn.EnsembleProblem(problem, u0), psn.SRA1(), compile=True, **FIXED)
    wrong = psn.SDEProblem(lambda t, u: u, lambda t, u: u.sum(), torch.zeros(2), (0.0, 1.0))
    with pytest.raises(ValueError, match="must have shape"):
        psn.solve(psn.EnsembleProblem(wrong, torch.zeros(3, 2)), psn.EM(), compile=True, **FIXED)


MIXING = torch.randn(3, 6, generator=generator(9), dtype=D) / 2


def mixing(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return (torch.cos(u) @ MIXING).view(2, 3, 2) * p.sum()


def rows_of_p(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.cos(u) * p[1]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("noise", "method", "diffusion"),
    [
        ("diagonal", psn.SRIW1(), rows_of_p),
        ("scalar", psn.SRIW1(), rows_of_p),
        ("general", psn.EM(), mixing),
    ],
)
def test_members_of_several_samples(noise: Any, method: Any, diffusion: Any, own: bool) -> None:
    """Each sample has motions of its own; `p` is a matrix. More members than go abreast."""
    u0 = torch.randn(70, 2, 3, generator=generator(1), dtype=D).requires_grad_()
    p = (torch.randn(70, 3, 3, generator=generator(2), dtype=D) / 2).requires_grad_()
    shared = p[0].detach().requires_grad_()
    problem = psn.SDEProblem(
        lambda t, u, p: torch.softmax(u @ p, -1) - u * t,
        diffusion,
        torch.zeros(2, 3, dtype=D),
        (0.0, 1.0),
        noise,
        p=shared,
    )
    ensemble, found = psn.EnsembleProblem(problem, u0, p if own else None), []
    for compile in (True, False):
        solution = psn.solve(
            ensemble,
            method,
            compile=compile,
            generator=generator(),
            saveat=[0.0, 0.05, 0.13, 0.9],
            **FIXED,
        )
        loss = (solution.u1**2).sum() + (solution.u**3).sum()
        bars = torch.autograd.grad(loss, [u0, p if own else shared])
        found.append([solution.u, solution.u1, *bars])
    for native, eager in zip(*found, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-11, atol=1e-11)
