"""What a problem says of its Jacobian, in native solves of members, beside the loop in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from properties.native_cases import quick_turns
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native import attempt, member_code, member_library
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
M = 9  # more than go abreast, and no multiple of it
STIFF = (psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2())
SWITCHING = (psn.AutoTsit5(psn.Rodas5P()), psn.AutoTsit5(psn.TRBDF2()))
by_algorithm = pytest.mark.parametrize(
    "algorithm", [*STIFF, *SWITCHING], ids=lambda a: a.expression
)
SIZE = 4
EYE = torch.eye(SIZE, dtype=D)
BAND = EYE.roll(1, 1) - 2 * EYE + EYE.roll(-1, 1)
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.01}


class Chain(nn.Module):
    """Diffusion and reaction, each member with a strength of its own, and a drive in time."""

    def __init__(self, driven: bool = True) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(40.0, dtype=D))
        self.driven = driven

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        spread = torch.cat((u[1:], u[:1])) - 2 * u + torch.cat((u[-1:], u[:-1]))
        drive = p["drive"] * torch.sin(9 * t) if self.driven else p["drive"]
        return self.rate * spread - p["n"] * u**3 + drive


def exact(field: Chain) -> Any:
    return lambda t, u, p: field.rate * BAND - torch.diag(3 * p["n"] * u**2)


def rough(field: Chain) -> Any:
    return lambda t, u, p: 0.8 * field.rate * BAND


def chains(field: Chain, u0: Tensor | None = None, **said: Any) -> psn.EnsembleProblem:
    p = {
        "drive": torch.linspace(-1, 1, M * SIZE, dtype=D).reshape(M, SIZE).requires_grad_(),
        "n": torch.linspace(1, 3, M, dtype=D).requires_grad_(),
    }
    start = torch.linspace(-1, 1.5, M * SIZE, dtype=D).reshape(M, SIZE) if u0 is None else u0
    one = {name: x[0].detach() for name, x in p.items()}
    problem = psn.ODEProblem(field, start[0].detach(), (0.0, 0.2), p=one, **said)
    return psn.EnsembleProblem(problem, start.requires_grad_(), p)


def solve(
    ensemble: psn.EnsembleProblem, algorithm: Any, compile: Any = True, **options: Any
) -> Any:
    options = {"rtol": 1e-6, "atol": 1e-8, "engine": "torch"} | options
    return psn.solve(ensemble, algorithm, compile=compile, **options)


def graded(ensemble: psn.EnsembleProblem, solution: Any) -> list[Tensor]:
    """The states, and gradients of all that they depend on."""
    inputs = [ensemble.u0, *ensemble.p.values(), *ensemble.problem.f.parameters()]
    weights = torch.linspace(-1, 2, solution.u.numel(), dtype=D)
    loss = (solution.u.reshape(-1) * weights).sum() + (solution.u1**3).sum()
    return [solution.u.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * scale)


@by_algorithm
@pytest.mark.parametrize("given", ["jac", "jac_sparsity"])
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any, given: str) -> None:
    field = Chain()
    said = {given: exact(field) if given == "jac" else BAND != 0}
    results = []
    with quick_turns(0.02):
        for compile, how in ((True, said), (False, said), (True, {})):
            ensemble = chains(field, **how)
            solution = solve(ensemble, algorithm, compile, saveat=[0.0, 0.03, 0.045, 0.2], **FIXED)
            results.append(graded(ensemble, solution))
            if compile:
                taken = {x for one in solution for x in one.trajectory.record.methods}
                assert taken == {0, 1} or algorithm in STIFF
    found, expected, plain = results
    assert_close(found, expected, 1e-11)
    assert_close(found, plain, 1e-11)


@by_algorithm
@pytest.mark.parametrize("given", ["jac", "jac_sparsity"])
@pytest.mark.parametrize("driven", [True, False])
@torch.no_grad()  # where gradients are on the loop evaluates the field once more
def test_adaptive_steps_are_those_of_the_loop(algorithm: Any, given: str, driven: bool) -> None:
    field = Chain(driven)
    ensemble = chains(field, **{given: exact(field) if given == "jac" else BAND != 0})
    native, eager = (solve(ensemble, algorithm, c) for c in (True, False))
    for one, other in zip(native.member_stats, eager.member_stats, strict=True):
        assert (one.naccept, one.nreject) == (other.naccept, other.nreject)
    single = solve(ensemble.member(3), algorithm)
    assert native.member_stats[3].nfe == single.stats.nfe
    torch.testing.assert_close(native.u1, eager.u1, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("algorithm", STIFF[2:], ids=lambda a: a.expression)
@torch.no_grad()
def test_newtons_iteration_takes_an_approximation(algorithm: Any) -> None:
    """In as many evaluations as a loop of one member in Python, more than with an exact one."""
    field, counts, ends = Chain(), [], []
    for jac, compile in ((rough(field), True), (rough(field), False), (exact(field), True)):
        solution = solve(chains(field, jac=jac), algorithm, compile)
        counts.append([x.nfe for x in solution.member_stats])
        ends.append(solution.u1)
    alone = solve(chains(field, jac=rough(field)).member(4), algorithm, False)
    assert counts[0][4] == alone.stats.nfe
    assert all(a > b for a, b in zip(counts[0], counts[2], strict=True))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_one_that_reads_what_is_each_members_own() -> None:
    """Iterations take longer the worse the guess of a member is, whatever its neighbours guess."""
    guess = torch.linspace(1.0, 0.7, M, dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: -50 * u, torch.ones(2, dtype=D), (0.0, 1.0), p=guess[0],
        jac=lambda t, u, p: -50 * p * torch.eye(2, dtype=D),
    )  # fmt: skip
    found = solve(psn.EnsembleProblem(problem, p=guess), psn.KenCarp4())
    counts = [x.nfe for x in found.member_stats]
    assert counts[0] == min(counts) < max(counts) == counts[-1]
    for m in (0, 4, M - 1):
        alone = solve(psn.EnsembleProblem(problem, p=guess[m : m + 1]), psn.KenCarp4())
        assert torch.equal(alone.u1[0], found.u1[m])
        assert alone.member_stats[0].nfe == counts[m]


def test_tensors_that_it_captures_receive_no_gradients() -> None:
    rate = torch.tensor(-50.0, dtype=D, requires_grad=True)
    matrix = (rate.detach() * torch.eye(2, dtype=D)).requires_grad_()
    problem = psn.ODEProblem(
        lambda t, u: rate * u, torch.ones(2, dtype=D), (0.0, 1.0), jac=lambda t, u: matrix * 1.0
    )
    many = psn.EnsembleProblem(problem, torch.ones(M, 2, dtype=D))
    end = solve(many, psn.KenCarp4()).u1
    bars = torch.autograd.grad(end.sum(), [rate, matrix], allow_unused=True)
    assert bars[0] is not None
    assert bars[1] is None
    rate.requires_grad_(False)
    for algorithm in STIFF[1:3]:
        assert not solve(many, algorithm).u1.requires_grad


def test_fields_that_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Chain()
    ensemble = chains(field, jac=exact(field))
    for algorithm in (psn.Rodas5P(), psn.TRBDF2()):
        with torch.no_grad():
            wide = solve(ensemble, algorithm, **FIXED).u1
            monkeypatch.setattr(member_code, "_MOST_MEMORY", 1)
            member_library._library.cache_clear()
            narrow = solve(ensemble, algorithm, **FIXED)
            monkeypatch.undo()
            member_library._library.cache_clear()
        assert narrow.members.solve.library.abreast == 1
        torch.testing.assert_close(wide, narrow.u1, rtol=1e-12, atol=1e-12)


# Borders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [*STIFF[:2], SWITCHING[0]], ids=lambda a: a.expression)
def test_rosenbrock_methods_refuse_one_that_fits_all_members_but_one(algorithm: Any) -> None:
    """Also after solves of the same field without it."""
    field = Chain()
    solve(chains(field), algorithm)

    def jac(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        wrong = 1 + 0.3 * (p["n"] > 2.9).to(u.dtype)
        return field.rate * BAND - torch.diag(3 * p["n"] * u**2 * wrong)

    for compile in (True, "auto", False):
        with quick_turns(0.01), pytest.raises(ValueError, match="jac does not fit"):
            solve(chains(field, jac=jac), algorithm, compile)


@by_algorithm
def test_patterns_with_holes_are_refused(algorithm: Any) -> None:
    ensemble = chains(Chain(), jac_sparsity=EYE)
    with pytest.raises(ValueError, match="jac_sparsity does not fit"):
        solve(ensemble, algorithm)


@pytest.mark.parametrize("algorithm", STIFF[1:3], ids=lambda a: a.expression)
@torch.no_grad()
def test_what_is_no_jacobian_is_refused_in_the_words_of_the_loop(algorithm: Any) -> None:
    for given in (
        lambda t, u, p: -u,
        lambda t, u, p: -torch.eye(SIZE),
        lambda t, u, p: [[-1.0, 0], [0, -1]],
    ):
        wrong = chains(Chain(), jac=given)
        for compile in (True, "auto", False):
            with pytest.raises(ValueError, match=r"jac must return .* of shape \(4, 4\)"):
                solve(wrong, algorithm, compile)


@pytest.mark.parametrize("algorithm", STIFF[2:], ids=lambda a: a.expression)
@torch.no_grad()
def test_one_without_native_code_is_named(algorithm: Any) -> None:
    """A branch on values, which is taken for each member by itself."""
    field = Chain()

    def branching(t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        matrix = exact(field)(t, u, p)
        return matrix if float(u.sum()) > -1e9 else 0 * matrix

    ensemble = chains(field, jac=branching)
    with pytest.raises(psn.CompileError, match="jac has no native code"):
        solve(ensemble, algorithm)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match="jac has no native code"):
        assert solve(ensemble, algorithm, "auto").success
    # A method that takes no Jacobian does not ask.
    assert solve(ensemble, psn.Tsit5()).success
