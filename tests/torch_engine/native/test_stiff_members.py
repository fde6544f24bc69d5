"""Native implicit steps of members abreast: single solves, closed forms, finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import stiff_problems as known
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.torch_engine.native import attempt, member_code, member_library
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
M = 11  # more than go abreast, and no multiple of it
ROSENBROCK = (psn.Rosenbrock23(), psn.Rodas5P())
ALGORITHMS = (*ROSENBROCK, psn.KenCarp4(), psn.TRBDF2())
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}
SAVEAT = [0.0, 0.03, 0.1, 0.17, 0.5]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class Driven(nn.Module):
    """A stiff driven field of shared weights, and of a gain and a rate of each member's own."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random(size, size, seed=1) - 9 * torch.eye(size, dtype=D))
        self.net = nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, size)).double()
        with torch.no_grad():
            for i, x in enumerate(self.net.parameters()):
                x.copy_(random(*x.shape, seed=i) / 2)

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        return self.matrix @ u * p["gain"] + self.net(u) * torch.sin(t * p["rate"])


def driven(m: int = M, size: int = 3) -> psn.EnsembleProblem:
    p = {
        "gain": torch.linspace(1, 4, m, dtype=D).requires_grad_(),
        "rate": torch.linspace(0.5, 2, m * size, dtype=D).reshape(m, size).requires_grad_(),
    }
    u0 = random(m, size, seed=7).requires_grad_()
    first = {name: x[0].detach() for name, x in p.items()}
    problem = psn.ODEProblem(Driven(size), u0[0].detach(), (0.0, 0.5), p=first)
    return psn.EnsembleProblem(problem, u0, p)


def reactions() -> psn.EnsembleProblem:
    """POLLU with rates of like size, twenty entries of a state: more rows than stages."""
    rates = known._POLLU_RATES.log1p()

    def f(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        extended = torch.cat((y, y.new_ones(1)))
        return known._POLLU_BALANCE @ (
            rates * y[known._POLLU_FIRST] * extended[known._POLLU_SECOND]
        )

    p = (rates * (0.5 + random(3, len(rates), seed=2).sigmoid())).requires_grad_()
    u0 = random(3, 20).abs().requires_grad_()
    return psn.EnsembleProblem(
        psn.ODEProblem(f, u0[0].detach(), (0.0, 0.5), p=p[0].detach()), u0, p
    )


def parts() -> psn.EnsembleProblem:
    """A state of two parts, with the time and a closure."""
    stiffness = torch.tensor(40.0, dtype=D, requires_grad=True)

    def f(t: Tensor, u: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        return {"v": -stiffness * torch.sin(u["x"]) - p * u["v"], "x": u["v"] * torch.cosh(p * t)}

    u0 = {"x": random(M, 2).requires_grad_(), "v": random(M, 2, seed=3).requires_grad_()}
    p = torch.linspace(1, 9, M, dtype=D).requires_grad_()
    one = {name: x[0].detach() for name, x in u0.items()}
    return psn.EnsembleProblem(psn.ODEProblem(f, one, (0.0, 0.5), p=p[0].detach()), u0, p)


def normalized() -> psn.EnsembleProblem:
    """Normalizations go one member at a time."""
    norm = nn.LayerNorm(4).double()

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return norm(torch.sin(u)) * p - 3 * u

    u0, p = random(M, 4).requires_grad_(), torch.linspace(1, 2, M, dtype=D).requires_grad_()
    return psn.EnsembleProblem(
        psn.ODEProblem(f, u0[0].detach(), (0.0, 0.5), p=p[0].detach()), u0, p
    )


FIELDS: dict[str, Callable[[], psn.EnsembleProblem]] = {
    "driven": driven,
    "one entry": lambda: driven(5, 1),
    "reactions": reactions,
    "parts": parts,
    "normalized": normalized,
}


def solve(
    ensemble: psn.EnsembleProblem, algorithm: Any, compile: Any = True, **options: Any
) -> Any:
    options = {"rtol": 1e-6, "atol": 1e-9, "engine": "torch"} | options
    return psn.solve(ensemble, algorithm, compile=compile, **options)


def tensors(tree: Any) -> list[Tensor]:
    return list(tree.values()) if isinstance(tree, dict) else [tree]


def leaves(ensemble: psn.EnsembleProblem) -> list[Tensor]:
    found = [*tensors(ensemble.u0), *tensors(ensemble.p), ensemble.tspan]
    if isinstance(ensemble.problem.f, nn.Module):
        found += ensemble.problem.f.parameters()
    return [x for x in found if x is not None and x.requires_grad]


def flat(u: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors(u)])


def loss_of(solution: Any) -> Tensor:
    states = flat(solution.u) if solution.t is not None else solution.u1.new_zeros(1)
    weights = torch.linspace(-1, 2, len(states), dtype=states.dtype)
    return (states * weights).sum() + (flat(solution.u1) ** 3).sum()


def assert_alike(ensemble: psn.EnsembleProblem, algorithm: Any, **options: Any) -> Any:
    """Native members beside the batch in Python and native solves of one member each."""
    native, eager = (solve(ensemble, algorithm, compile, **options) for compile in (True, False))
    assert native.retcodes == eager.retcodes
    assert [s.naccept for s in native.member_stats] == [s.naccept for s in eager.member_stats]
    for a, b in zip(tensors(native.u1), tensors(eager.u1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if native.t is not None:
        torch.testing.assert_close(flat(native.u), flat(eager.u), rtol=1e-12, atol=1e-12)
    wanted = leaves(ensemble)
    bars, others = (torch.autograd.grad(loss_of(s), wanted) for s in (native, eager))
    for bar, other in zip(bars, others, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(bar, other, rtol=1e-10, atol=1e-10 * scale)
    saveat = torch.as_tensor(options.get("saveat", []))
    for m in (0, len(ensemble) - 1):
        own = options | ({"saveat": saveat[m]} if saveat.ndim == 2 else {})
        single = solve(ensemble.member(m), algorithm, **own)
        assert single.stats.nfe == native.member_stats[m].nfe
        for a, b in zip(tensors(native[m].u1), tensors(single.u1), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return native


@by_algorithm
@pytest.mark.parametrize("name", FIELDS)
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any, name: str) -> None:
    native = assert_alike(FIELDS[name](), algorithm, saveat=SAVEAT, **FIXED)
    assert (native.members.solve.library.abreast == 1) == (name == "normalized")


@by_algorithm
def test_adaptive_steps_stops_and_tolerances_of_their_own(algorithm: Any) -> None:
    ensemble, options = driven(), {"rtol": torch.logspace(-6, -3, M, dtype=D), "tstops": [0.2]}
    native, eager = (solve(ensemble, algorithm, c, saveat=SAVEAT, **options) for c in (True, False))
    assert [s.naccept for s in native.member_stats] == [s.naccept for s in eager.member_stats]
    torch.testing.assert_close(native.u, eager.u, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("algorithm", ROSENBROCK, ids=lambda a: type(a).__name__)
def test_mass_matrices(algorithm: Any) -> None:
    ensemble = driven()
    mass = random(3, 3, seed=5) / 3 + torch.eye(3, dtype=D)
    one = ensemble.problem
    problem = psn.ODEProblem(one.f, one.u0, one.tspan, p=one.p, mass_matrix=mass)
    massive = psn.EnsembleProblem(problem, ensemble.u0, ensemble.p)
    assert_alike(massive, algorithm, saveat=SAVEAT, **FIXED)


@by_algorithm
def test_gradients_of_intervals_are_those_of_the_batch(algorithm: Any) -> None:
    """With outputs inside of steps, at stops, and where steps end that move with their starts."""
    ensemble = driven()
    start = torch.linspace(0, 0.1, M, dtype=D)
    tspan = torch.stack([start, 0.3 + start * 2], 1).requires_grad_()
    own = psn.EnsembleProblem(ensemble.problem, ensemble.u0, ensemble.p, tspan=tspan)
    saveat = start[:, None] + torch.tensor([0.0, 0.05, 0.12, 0.2], dtype=D)
    assert_alike(own, algorithm, saveat=saveat, tstops=[0.22], **FIXED)


def test_intervals_of_explicit_members_move_too() -> None:
    ensemble = driven()
    start = torch.linspace(0, 0.1, M, dtype=D)
    tspan = torch.stack([start, 0.35 - start * 2], 1).requires_grad_()
    own = psn.EnsembleProblem(ensemble.problem, ensemble.u0, ensemble.p, tspan=tspan)
    saveat = torch.stack([start, start + 0.4 * (0.35 - 3 * start)], 1)
    for algorithm in (psn.Tsit5(), psn.Vern7()):
        assert_alike(own, algorithm, saveat=saveat, controller=psn.FixedStep(), dt0=0.04)


# Mathematics -----------------------------------------------------------------------------------


def robertson(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    slow, fast, back = p[0] * y[0], p[1] * y[1] ** 2, p[2] * y[1] * y[2]
    return torch.stack((back - slow, slow - fast - back, fast))


def robertsons(m: int = M, end: float = 40.0) -> psn.EnsembleProblem:
    """The first member has the rates of the published solution."""
    shares = random(m, 3, seed=4).tanh() / 2
    shares[0] = 0
    p = (torch.tensor([0.04, 3e7, 1e4], dtype=D) * (1 + shares)).requires_grad_()
    start = known.ROBERTSON_START.clone()
    return psn.EnsembleProblem(psn.ODEProblem(robertson, start, (0.0, end), p=p[0].detach()), p=p)


@by_algorithm
def test_robertson_conserves_mass_and_has_its_published_solution(algorithm: Any) -> None:
    ensemble = robertsons()
    end = solve(ensemble, algorithm, rtol=1e-7, atol=1e-11).u1
    torch.testing.assert_close(end.sum(1), torch.ones(M, dtype=D), rtol=0, atol=1e-13)
    torch.testing.assert_close(end[0], known.ROBERTSON_AT_40, rtol=1e-5, atol=0)
    # Whatever the rates are, the sum stays: its gradient is nothing beside that of an entry.
    (total,) = torch.autograd.grad(end.sum(), ensemble.p, retain_graph=True)
    (single,) = torch.autograd.grad(end[:, 0].sum(), ensemble.p)
    assert (total.abs() <= 1e-10 * single.abs()).all()


def test_a_differential_algebraic_equation() -> None:
    """Robertson's third rate replaced by the conservation of mass."""

    def f(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return torch.cat((robertson(t, y, p)[:2], (y.sum() - 1).reshape(1)))

    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=D))
    p = robertsons().p
    problem = psn.ODEProblem(
        f, known.ROBERTSON_START, (0.0, 40.0), p=p[0].detach(), mass_matrix=mass
    )
    end = solve(psn.EnsembleProblem(problem, p=p), psn.Rodas5P(), rtol=1e-8, atol=1e-12).u1
    torch.testing.assert_close(end[0].detach(), known.ROBERTSON_AT_40, rtol=1e-6, atol=0)
    ordinary = solve(robertsons(), psn.Rodas5P(), rtol=1e-8, atol=1e-12).u1
    torch.testing.assert_close(end, ordinary, rtol=1e-6, atol=1e-13)


@by_algorithm
def test_relaxation_to_a_curve_has_its_closed_form(algorithm: Any) -> None:
    """u' = -p (u - cos t) - sin t through u = cos t, however stiff: the time's derivatives too."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -p * (u - torch.cos(t)) - torch.sin(t)

    p = torch.logspace(0, 7, M, dtype=D)
    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 2.0), p=p[0])
    found = solve(
        psn.EnsembleProblem(problem, p=p), algorithm, rtol=1e-8, atol=1e-8, saveat=[1.0, 2.0]
    )
    expected = torch.cos(torch.tensor([1.0, 2.0], dtype=D)).expand(M, 2)
    torch.testing.assert_close(found.u[:, :, 0], expected, rtol=1e-5, atol=1e-5)


@by_algorithm
def test_gradients_agree_with_finite_differences(algorithm: Any) -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.stack((-30 * (u[0] - torch.cos(p[0] * t)) + u[1] ** 2, p[1] * u[0] * u[1]))

    def final(u0: Tensor, p: Tensor, tspan: Tensor) -> Tensor:
        problem = psn.ODEProblem(f, u0[0].detach(), (0.0, 1.0), p=p[0].detach())
        ensemble = psn.EnsembleProblem(problem, u0, p, tspan=tspan)
        solution = solve(
            ensemble, algorithm, saveat=[0.33, 0.57], controller=psn.FixedStep(), dt0=0.1
        )
        return torch.cat((solution.u, solution.u1[:, None]), 1)

    u0, p = random(3, 2).requires_grad_(), random(3, 2, seed=1).requires_grad_()
    # Steps move with the starts, and the last one grows with the end.
    tspan = torch.tensor([[0.0, 0.93], [0.11, 1.0], [0.2, 0.87]], dtype=D).requires_grad_()
    assert gradcheck(final, (u0, p, tspan), eps=1e-6, atol=1e-6)


# Each as alone ---------------------------------------------------------------------------------


@by_algorithm
def test_any_number_of_threads_gives_the_same_bits(algorithm: Any) -> None:
    results = []
    for count in (1, 3):
        ensemble = driven(200)
        with threads(count):
            solution = solve(ensemble, algorithm, saveat=SAVEAT)
            bars = torch.autograd.grad(loss_of(solution), leaves(ensemble))
        results.append([solution.u, *bars])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@by_algorithm
def test_a_member_is_as_alone_to_the_last_bit(algorithm: Any) -> None:
    """Members that exchange different rows in their linear systems, and reject different steps."""
    ensemble = robertsons(19, end=1000.0)
    together = solve(ensemble, algorithm)
    (bars,) = torch.autograd.grad(together.u1[:, 0].sum(), ensemble.p)
    for m in (0, 7, 18):
        own = ensemble.p[m : m + 1].detach().requires_grad_()
        alone = solve(psn.EnsembleProblem(ensemble.problem, p=own), algorithm)
        assert torch.equal(alone.u1[0], together.u1[m])
        assert alone.member_stats[0].nfe == together.member_stats[m].nfe
        (bar,) = torch.autograd.grad(alone.u1[:, 0].sum(), own)
        assert torch.equal(bar[0], bars[m])


def test_widths_follow_the_memory_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = solve(driven(), psn.Rodas5P(), saveat=SAVEAT, **FIXED)
    monkeypatch.setattr(member_code, "_MOST_MEMORY", 1)
    member_library._library.cache_clear()
    narrow = assert_alike(driven(), psn.Rodas5P(), saveat=SAVEAT, **FIXED)
    member_library._library.cache_clear()
    assert narrow.members.solve.library.abreast == 1
    torch.testing.assert_close(wide.u1, narrow.u1, rtol=1e-12, atol=1e-12)


def test_single_precision() -> None:
    p = torch.logspace(0, 3, 40).requires_grad_()
    problem = psn.ODEProblem(lambda t, u, p: -p * u, torch.ones(2), (0.0, 1.0), p=torch.tensor(1.0))
    found = solve(psn.EnsembleProblem(problem, p=p), psn.Rodas5P(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.u1[:, 0], torch.exp(-p), rtol=1e-4, atol=1e-4)
    (bar,) = torch.autograd.grad(found.u1.sum(), p)
    torch.testing.assert_close(bar, -2 * torch.exp(-p.detach()), rtol=1e-3, atol=1e-3)


def test_a_member_that_fails_leaves_its_neighbours_alone() -> None:
    """One needs more steps than are allowed."""

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.stack((u[1], p * ((1 - u[0] ** 2) * u[1]) - u[0]))

    p = torch.linspace(1, 20, M, dtype=D)
    start = torch.tensor([2.0, 0.0], dtype=D)
    tspan = torch.tensor([[0.0, 5.0]], dtype=D).repeat(M, 1)
    tspan[4, 1] = 1e4
    problem = psn.ODEProblem(f, start, (0.0, 5.0), p=p[0])
    options = {"max_steps": 500, "rtol": 1e-4, "atol": 1e-4, "dtmax": 0.1}
    calm = [m for m in range(M) if m != 4]
    whole = psn.EnsembleProblem(problem, p=p, tspan=tspan)
    found = solve(whole, psn.Rodas5P(), throw=False, **options)
    assert found.retcodes[4] is psn.ReturnCode.MaxIters
    others = solve(psn.EnsembleProblem(problem, p=p[calm]), psn.Rodas5P(), **options)
    assert torch.equal(found.u1[calm], others.u1)
    with pytest.raises(psn.EnsembleFailure, match="1 of 11 members failed: 4"):
        solve(whole, psn.Rodas5P(), **options)


# Borders ---------------------------------------------------------------------------------------


def test_second_derivatives_are_refused_by_name() -> None:
    ensemble = robertsons()
    bar = torch.autograd.grad(
        solve(ensemble, psn.Rodas5P()).u1.sum(), ensemble.p, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(bar[0].sum(), ensemble.p)


def test_what_compiles_by_itself_says_once_why_it_does_not() -> None:
    class Ranked(nn.Module):
        """Its second derivative needs the place of the greatest entry, which programs lack."""

        def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
            return -p * u * u.max(0, keepdim=True)[0]

    p = torch.linspace(1, 2, M, dtype=D).requires_grad_()
    problem = psn.ODEProblem(Ranked(), torch.ones(2, dtype=D), (0.0, 1.0), p=p[0].detach())
    ensemble = psn.EnsembleProblem(problem, p=p)
    with torch.no_grad():  # the loop needs none
        expected = solve(ensemble, psn.Rodas5P()).u1
    with pytest.raises(psn.CompileError, match="second derivatives"):
        solve(ensemble, psn.Rodas5P())
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match="second derivatives"):
        found = solve(ensemble, psn.Rodas5P(), "auto").u1
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(ensemble, psn.Rodas5P(), "auto")
