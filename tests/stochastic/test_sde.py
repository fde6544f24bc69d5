"""Stochastic solves of the torch engine: gradients, dense output, stops, devices of choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.tableaus import stochastic as tableaus
from pysciml_node.tableaus.stochastic import SDETableau

SRI = {"SRIW1": tableaus.SRIW1, "SOSRI": tableaus.SOSRI, "SOSRI2": tableaus.SOSRI2}
SRA = {"SRA1": tableaus.SRA1, "SOSRA": tableaus.SOSRA, "SOSRA2": tableaus.SOSRA2}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: tableaus.Rows, kind: str, count: int) -> Tensor:
    row = dict(rows).get(kind, ())
    return torch.tensor([*row, *[0.0] * (count - len(row))], dtype=torch.float64)


def matrix(stages: tuple[tableaus.Stage | None, ...], kind: str) -> Tensor:
    """Stage weights of the drifts (`"a"`) or of the diffusions with an integral."""
    rows = []
    for stage in stages:
        row = () if stage is None else stage.a if kind == "a" else dict(stage.noise).get(kind, ())
        rows.append([*row, *[0.0] * (len(stages) - len(row))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("tableau", SRI.values(), ids=SRI.keys())
def test_order_conditions_for_diagonal_noise(tableau: SDETableau) -> None:
    """Roessler's conditions of strong order 1.5 (SIAM J. Numer. Anal. 48, theorem 5.2)."""
    s = tableau.stages
    e = torch.ones(s, dtype=torch.float64)
    alpha = torch.tensor(tableau.alpha, dtype=torch.float64)
    b1, b2, b3, b4 = (weights(tableau.beta, k, s) for k in ("w", "i11", "i10", "i111"))
    a0, a1 = matrix(tableau.drift, "a"), matrix(tableau.diffusion, "a")
    n0, n1 = matrix(tableau.drift, "i10"), matrix(tableau.diffusion, "sqrt_h")
    conditions = {
        "mean": (alpha @ e, 1), "w": (b1 @ e, 1), "i11": (b2 @ e, 0), "i10": (b3 @ e, 0),
        "i111": (b4 @ e, 0), "w n": (b1 @ n1 @ e, 0), "i11 n": (b2 @ n1 @ e, 1),
        "i10 n": (b3 @ n1 @ e, 0), "i111 n": (b4 @ n1 @ e, 0), "drift": (alpha @ a0 @ e, 0.5),
        "noise in drift": (alpha @ n0 @ e, 1), "square": (alpha @ (n0 @ e) ** 2, 1.5),
        "w a": (b1 @ a1 @ e, 1), "i11 a": (b2 @ a1 @ e, 0), "i10 a": (b3 @ a1 @ e, -1),
        "i111 a": (b4 @ a1 @ e, 0), "w n2": (b1 @ (n1 @ e) ** 2, 1),
        "i11 n2": (b2 @ (n1 @ e) ** 2, 0), "i10 n2": (b3 @ (n1 @ e) ** 2, -1),
        "i111 n2": (b4 @ (n1 @ e) ** 2, 2), "w nn": (b1 @ n1 @ n1 @ e, 0),
        "i11 nn": (b2 @ n1 @ n1 @ e, 0), "i10 nn": (b3 @ n1 @ n1 @ e, 0),
        "i111 nn": (b4 @ n1 @ n1 @ e, 1),
    }  # fmt: skip
    for name, (found, expected) in conditions.items():
        assert float(found) == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("tableau", SRA.values(), ids=SRA.keys())
def test_order_conditions_for_additive_noise(tableau: SDETableau) -> None:
    """Roessler's conditions of strong order 1.5 (SIAM J. Numer. Anal. 48, theorem 5.1)."""
    s = tableau.stages
    e = torch.ones(s, dtype=torch.float64)
    alpha = torch.tensor(tableau.alpha, dtype=torch.float64)
    b1, b2 = (weights(tableau.beta, kind, s) for kind in ("w", "i10"))
    a0, n0 = matrix(tableau.drift, "a"), matrix(tableau.drift, "i10")
    c1 = torch.tensor([stage.c for stage in tableau.diffusion if stage], dtype=torch.float64)
    found = [alpha @ e, b1 @ e, b2 @ e, alpha @ n0 @ e, alpha @ a0 @ e, alpha @ (n0 @ e) ** 2,
             b1 @ c1, b2 @ c1]  # fmt: skip
    expected = [1, 1, 0, 1, 0.5, 1.5, 1, -1]
    assert [float(x) for x in found] == pytest.approx(expected, abs=1e-9)


METHODS = [
    (psn.EM(), "ito"), (psn.RKMil(), "ito"), (psn.SRIW1(), "ito"), (psn.SOSRI(), "ito"),
    (psn.RKMil(), "stratonovich"), (psn.EulerHeun(), "stratonovich"),
    (psn.ReversibleHeun(), "stratonovich"), (psn.StratonovichMidpoint(), "stratonovich"),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "interpretation"), METHODS)
def test_gradcheck(algorithm: Any, interpretation: Any) -> None:
    """Finite differences of the whole solve on one path, by the default adjoint."""

    def run(u0: Tensor, p: Tensor) -> Tensor:
        problem = psn.SDEProblem(
            lambda t, u, p: -p[0] * torch.sin(u),
            lambda t, u, p: 0.3 * p[1] * torch.cos(u) + 0.1 * t,
            u0,
            (0.0, 1.0),
            interpretation=interpretation,
            p=p,
        )
        solution = psn.solve(
            problem, algorithm, dt0=0.25, controller=psn.FixedStep(), saveat=[0.4, 1.0],
            generator=seeded(),
        )  # fmt: skip
        return torch.cat((solution.u, solution(0.8).unsqueeze(0)))

    u0 = torch.tensor([0.4, -1.1], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.8, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (u0, p))


def test_direct_adjoint_allows_second_derivatives() -> None:
    u0 = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)

    def run(u0: Tensor, adjoint: Any) -> Tensor:
        problem = psn.SDEProblem(
            lambda t, u: torch.sin(u), lambda t, u: torch.cos(u), u0, (0.0, 1.0)
        )
        options = {"dt0": 0.25, "controller": psn.FixedStep(), "adjoint": adjoint}
        return psn.solve(problem, psn.SOSRI(), generator=seeded(), **options).u1

    assert torch.autograd.gradgradcheck(
        lambda u: run(u, psn.DirectAdjoint()), (u0,), atol=1e-4, rtol=1e-3
    )
    (first,) = torch.autograd.grad(run(u0, psn.DiscreteAdjoint()).sum(), u0, create_graph=True)
    with pytest.raises(RuntimeError, match="DirectAdjoint"):
        first.sum().backward()


@pytest.mark.parametrize("noise", ["diagonal", "general", "additive"])
@pytest.mark.parametrize(
    "algorithm", [psn.EulerHeun(), psn.ReversibleHeun(), psn.StratonovichMidpoint()]
)
def test_backsolve_converges_to_the_discrete_adjoint(algorithm: Any, noise: Any) -> None:
    """Both tend to the gradient of the equation; their difference shrinks with the steps."""
    weight = torch.tensor([[0.3, -0.5], [0.2, 0.4]], dtype=torch.float64)

    def diffusion(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if noise == "general":
            return 0.3 * p[1] * torch.stack((torch.sin(u), u), -1)
        return 0.4 * p[1] * (torch.ones_like(u) if noise == "additive" else torch.cos(u))

    def gradients(adjoint: Any, halvings: int) -> Tensor:
        u0 = torch.tensor([[0.4, -0.7]] * 20, dtype=torch.float64, requires_grad=True)
        p = torch.tensor([0.7, 1.1], dtype=torch.float64, requires_grad=True)
        problem = psn.SDEProblem(
            lambda t, u, p: torch.tanh(u @ weight) * p[0] - u, diffusion, u0, (0.0, 1.0),
            noise=noise, interpretation="stratonovich", p=p,
        )  # fmt: skip
        solution = psn.solve(
            problem, algorithm, dt0=2.0**-halvings, controller=psn.FixedStep(), adjoint=adjoint,
            saveat=[0.3, 0.5, 1.0], generator=seeded(),
        )  # fmt: skip
        found = torch.autograd.grad(solution.u.square().mean(), (u0, p))
        return torch.cat([x.reshape(-1) for x in found])

    differences = []
    for halvings in (5, 9):
        exact, found = (
            gradients(a, halvings) for a in (psn.DiscreteAdjoint(), psn.BacksolveAdjoint())
        )
        differences.append(((found - exact).norm() / exact.norm()).item())
    assert differences[0] < 0.2
    assert differences[1] < differences[0] / 2.5


def test_dense_output_lies_on_the_same_path() -> None:
    """Between steps the solution has the method's strong order, not a straight line's."""
    problem = psn.SDEProblem(
        lambda t, u: 0.2 * u, lambda t, u: 0.5 * u, torch.ones(2000).double(), (0.0, 1.0)
    )
    solution = psn.solve(
        problem, psn.SOSRI(), dt0=1 / 16, controller=psn.FixedStep(), generator=seeded()
    )
    t = 0.4 / 16 + 0.5
    exact = torch.exp((0.2 - 0.125) * t + 0.5 * solution.brownian(0.0, t))
    assert (solution(t) / exact - 1).square().mean().sqrt() < 1e-3
    straight = 0.6 * solution(0.5) + 0.4 * solution(0.5625)
    assert (straight / exact - 1).square().mean().sqrt() > 0.04
    assert torch.equal(solution(1.0), solution.u1)
    assert torch.equal(solution(0.5), solution.u[8])


def test_saved_states_do_not_change_the_solve() -> None:
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: 0.5 * u, torch.ones(3).double(), (0.0, 1.0)
    )
    plain = psn.solve(problem, generator=seeded())
    saved = psn.solve(problem, saveat=[0.0, 0.123, 0.9, 1.0], generator=seeded())
    assert torch.equal(plain.u1, saved.u1)
    assert torch.equal(saved.u[0], problem.u0)
    assert torch.equal(saved.u[-1], saved.u1)
    assert torch.equal(saved.u[1], plain(0.123))
    torch.testing.assert_close(saved.t, torch.tensor([0.0, 0.123, 0.9, 1.0]).double())


def test_steps_end_on_stops() -> None:
    problem = psn.SDEProblem(
        lambda t, u: torch.where(t < 0.3, 1.0, -1.0) * u, lambda t, u: 0.1 * u,
        torch.ones(3).double(), (0.0, 1.0),
    )  # fmt: skip
    solution = psn.solve(problem, tstops=[0.3, 0.7], generator=seeded())
    times = solution.step_times.tolist()
    assert 0.3 in times
    assert 0.7 in times
    assert times[-1] == 1.0


def test_the_path_is_the_same_for_all_steps_and_methods() -> None:
    problem = psn.SDEProblem(
        lambda t, u: 0 * u, lambda t, u: torch.ones_like(u), torch.zeros(4).double(), (0.0, 1.0)
    )
    ends = [
        psn.solve(problem, algorithm, generator=seeded(), **options).u1
        for algorithm, options in (
            (psn.RKMil(), {"rtol": 0.1, "atol": 0.1}),
            (psn.SOSRI(), {"rtol": 1e-3, "atol": 1e-3}),
            (psn.SRIW1(), {"dt0": 1 / 8, "controller": psn.FixedStep()}),
            (psn.EM(), {"dt0": 1 / 32, "controller": psn.FixedStep()}),
        )
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)


def test_scalar_noise_is_one_motion_for_each_sample() -> None:
    for shape, count in (((5, 3), (5,)), ((4,), ())):
        problem = psn.SDEProblem(
            lambda t, u: 0 * u, lambda t, u: torch.ones_like(u), torch.zeros(shape).double(),
            (0.0, 1.0), noise="scalar",
        )  # fmt: skip
        solution = psn.solve(problem, generator=seeded())
        w = solution.brownian(0.0, 1.0)
        assert w.shape == count
        expected = w.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        torch.testing.assert_close(solution.u1, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: 0.5 * u, torch.ones(3, dtype=dtype), (0.0, 1.0)
    )
    solution = psn.solve(problem, saveat=[0.2, 1.0], generator=seeded())
    for tensor in (solution.u1, solution.u, solution.t, solution(0.3), solution.brownian(0, 1)):
        assert tensor.dtype == dtype


def test_reversible_heun_costs_one_evaluation_a_step() -> None:
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: 0.5 * u, torch.ones(3).double(), (0.0, 1.0),
        interpretation="stratonovich",
    )  # fmt: skip
    with torch.no_grad():
        solution = psn.solve(
            problem, psn.ReversibleHeun(), dt0=1 / 16, controller=psn.FixedStep(),
            generator=seeded(),
        )  # fmt: skip
    assert solution.stats.nfe == 17
    assert solution.stats.nfe_diffusion == 17


def test_backward_keeps_states_and_nothing_else() -> None:
    """The noise is computed again: what autograd saves is one state a step."""
    u0 = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    problem = psn.SDEProblem(lambda t, u: -u, lambda t, u: 0.5 * u, u0, (0.0, 1.0))
    saved = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        solution = psn.solve(
            problem, psn.SOSRI(), dt0=1 / 32, controller=psn.FixedStep(), generator=seeded()
        )
    assert saved <= 1000 * (solution.stats.naccept + 2)


@pytest.mark.parametrize("several", [False, True])
def test_a_time_that_a_step_ends_at_but_for_rounding(several: bool) -> None:
    # Ten steps of 0.05 end at 0.49999999999999994; a path has nothing in what is left.
    def value(p: torch.Tensor) -> torch.Tensor:
        u0 = torch.tensor([0.3, 0.1], dtype=torch.float64)
        one = p[0].detach() if several else p
        problem: Any = psn.SDEProblem(
            lambda t, u, p: -p * u, lambda t, u, p: 0.3 * p * torch.cos(u), u0, (0.0, 1.0), p=one
        )
        if several:
            problem = psn.EnsembleProblem(problem, p=p)
        solution = psn.solve(
            problem,
            psn.RKMil(),
            saveat=[0.5, 1.0],
            dt0=0.05,
            controller=psn.FixedStep(),
            generator=torch.Generator().manual_seed(3),
        )
        parts = solution if several else [solution]
        return torch.stack([part.u for part in parts]).square().sum()

    shape = (3,) if several else ()
    assert torch.autograd.gradcheck(value, torch.ones(shape, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("members", [False, True])
def test_the_first_size_is_no_reason_to_fail(members: bool) -> None:
    """What Hairer's rule guesses is raised to `dtmin`: only an error asks for less."""
    problem = psn.SDEProblem(
        lambda t, u: -u, lambda t, u: 0.1 * u, torch.ones(2, dtype=torch.float64), (0.0, 1.0)
    )
    options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "dtmin": 0.5, "throw": False}
    if members:
        many = psn.EnsembleProblem(problem, u0=torch.ones(3, 2, dtype=torch.float64))
        solution = psn.solve(many, psn.SOSRI(), **options)[1]
    else:
        solution = psn.solve(problem, psn.SOSRI(), **options)
    assert solution.retcode is psn.ReturnCode.DtLessThanMin
    assert solution.stats.nreject == 1
