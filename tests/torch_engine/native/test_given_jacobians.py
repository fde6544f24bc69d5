"""What a problem says of its Jacobian, in native solves, beside the loop in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from properties.native_cases import quick_turns
from steps_again import assert_alike as assert_taken_alike
from stiff_fields import STEPS, D, Decay, assert_alike, solved, tensor
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

STIFF = (psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2())
SWITCHING = (psn.AutoTsit5(psn.Rodas5P()), psn.AutoTsit5(psn.TRBDF2()))
by_algorithm = pytest.mark.parametrize(
    "algorithm", [*STIFF, *SWITCHING], ids=lambda a: a.expression
)
SIZE = 7
EYE = torch.eye(SIZE, dtype=D)
BAND = EYE.roll(1, 1) - 2 * EYE + EYE.roll(-1, 1)


class Chain(nn.Module):
    """Diffusion, reaction and, where it is driven, a drive in time."""

    def __init__(self, driven: bool) -> None:
        super().__init__()
        self.rate, self.driven = nn.Parameter(tensor(40.0)), driven

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Any]) -> Tensor:
        spread = torch.cat((u[1:], u[:1])) - 2 * u + torch.cat((u[-1:], u[:-1]))
        drive = p["drive"] * torch.sin(9 * t) if self.driven else p["drive"]
        return self.rate * spread - p["n"] * u**3 + drive


def case(driven: bool) -> tuple[Any, Any, Any, list[Tensor]]:
    field, p = Chain(driven), {"drive": tensor(0.7, gradient=True), "n": 2.0}
    return field, torch.linspace(-1, 1.5, SIZE, dtype=D), p, [field.rate, p["drive"]]


def exact(field: Chain) -> Any:
    return lambda t, u, p: field.rate * BAND - torch.diag(3 * p["n"] * u**2)


def rough(field: Chain) -> Any:
    return lambda t, u, p: 0.8 * field.rate * BAND


@by_algorithm
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("given", ["jac", "jac_sparsity"])
def test_equal_steps_give_equal_states_and_gradients(
    algorithm: Any, driven: bool, given: str
) -> None:
    made = case(driven)
    said = {given: exact(made[0]) if given == "jac" else BAND != 0}
    options = {**STEPS, "dt0": 0.01, "saveat": tensor(0.0, 0.03, 0.045, 0.2), "span": (0.0, 0.2)}
    with quick_turns(0.02):
        found, expected, plain = (
            solved(made, algorithm, compile, **options, **how)
            for compile, how in ((True, said), (False, said), (True, {}))
        )
    methods = found[0].trajectory.record.methods
    assert 1 in methods or algorithm in STIFF
    assert_alike(found, expected)
    assert_alike(found, plain, 1e-11)


@by_algorithm
@pytest.mark.parametrize("given", ["jac", "jac_sparsity"])
def test_adaptive_steps_are_those_of_the_loop(algorithm: Any, given: str) -> None:
    f, u0, p, _ = case(driven=True)
    said = {given: exact(f) if given == "jac" else BAND != 0}
    problem = psn.ODEProblem(f, u0, (0.0, 0.3), p=p, **said)
    with torch.no_grad():  # where gradients are on the loop evaluates the field once more
        native, eager = (
            psn.solve(problem, algorithm, rtol=1e-6, atol=1e-8, compile=c) for c in (True, False)
        )
    assert native.stats == eager.stats
    torch.testing.assert_close(native.u, eager.u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("algorithm", STIFF[2:], ids=lambda a: a.expression)
def test_newtons_iteration_takes_an_approximation(algorithm: Any) -> None:
    """In as many evaluations as the loop in Python, which are more than with an exact one."""
    f, u0, p, _ = case(driven=True)
    ends, counts = [], []
    for jac, compile in ((rough(f), True), (rough(f), False), (exact(f), True)):
        problem = psn.ODEProblem(f, u0, (0.0, 0.3), p=p, jac=jac)
        with torch.no_grad():
            solution = psn.solve(problem, algorithm, rtol=1e-6, atol=1e-8, compile=compile)
        ends.append(solution.u1)
        counts.append(solution.stats.nfe)
    assert counts[0] == counts[1] > counts[2]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-6, atol=1e-8)
    made = f, u0, p, [f.rate, p["drive"]]
    found, expected = (solved(made, algorithm, c, jac=rough(f), **STEPS) for c in (True, False))
    assert_alike(found, expected, 1e-10)


@pytest.mark.parametrize("algorithm", [*STIFF[:2], SWITCHING[0]], ids=lambda a: a.expression)
def test_rosenbrock_methods_refuse_one_that_does_not_fit(algorithm: Any) -> None:
    """In the words of the loop in Python, also after solves of the same field without it."""
    f, u0, p, _ = case(driven=False)
    for _ in range(2):
        psn.solve(psn.ODEProblem(f, u0, (0.0, 0.3), p=p), algorithm, compile=True)
    problem = psn.ODEProblem(f, u0, (0.0, 0.3), p=p, jac=rough(f))
    words = []
    for compile in (True, "auto", False):
        with quick_turns(0.01), pytest.raises(ValueError, match="jac does not fit") as caught:
            psn.solve(problem, algorithm, compile=compile)
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert algorithm in SWITCHING or words[0] == words[2]


@by_algorithm
def test_patterns_with_holes_are_refused(algorithm: Any) -> None:
    f, u0, p, _ = case(driven=False)
    psn.solve(psn.ODEProblem(f, u0, (0.0, 0.3), p=p), algorithm, compile=True)
    problem = psn.ODEProblem(f, u0, (0.0, 0.3), p=p, jac_sparsity=EYE)
    with pytest.raises(ValueError, match="jac_sparsity does not fit"):
        psn.solve(problem, algorithm, compile=True)


@pytest.mark.parametrize("algorithm", STIFF[1:3], ids=lambda a: a.expression)
def test_states_in_parts(algorithm: Any) -> None:
    """The matrix is that of the flat state, in the order of its parts."""
    pull = tensor(90.0, gradient=True)

    def f(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"v": -pull * u["x"] - 30 * u["v"], "x": u["v"] * torch.cos(t)}

    def jac(t: Tensor, u: dict[str, Tensor]) -> Tensor:
        eye = torch.eye(2, dtype=D)
        return torch.cat(
            (torch.cat((-30 * eye, -pull * eye), 1), torch.cat((torch.cos(t) * eye, 0 * eye), 1))
        )

    made = f, {"v": tensor(0.3, -1.0), "x": tensor(1.0, 2.0)}, None, [pull]
    options = {**STEPS, "jac": jac, "tstops": [0.2]}
    found, expected = (solved(made, algorithm, c, **options) for c in (True, False))
    assert_alike(found, expected)


@pytest.mark.parametrize("algorithm", [STIFF[1], STIFF[2], SWITCHING[0]], ids=repr)
def test_dense_output(algorithm: Any) -> None:
    f, u0, p, inputs = case(driven=True)
    problem = psn.ODEProblem(f, u0.clone().requires_grad_(), (0.0, 0.3), p=p, jac=exact(f))
    with quick_turns(0.02):
        solution = psn.solve(problem, algorithm, compile=True, **STEPS | {"dt0": 0.01})
    times = tensor(0.003, 0.015, 0.111, 0.299)
    assert_taken_alike(solution, [problem.u0, *inputs], lambda s: (s(times),), 1e-10)


def test_tensors_that_it_captures_are_read_at_each_solve() -> None:
    """They may change, and receive no gradients: those of a solve are its field's."""
    rate = tensor(-50.0, gradient=True)
    matrix = (rate.detach() * torch.eye(2, dtype=D)).requires_grad_()
    counts = []
    for factor in (1.0, 0.7, 1.0):
        with torch.no_grad():
            matrix.copy_(factor * rate * torch.eye(2, dtype=D))
        problem = psn.ODEProblem(
            lambda t, u: rate * u, tensor(1.0, 2.0), (0.0, 1.0), jac=lambda t, u: matrix * 1.0
        )
        solution = psn.solve(problem, psn.KenCarp4(), compile=True)
        bars = torch.autograd.grad(solution.u1.sum(), [rate, matrix], allow_unused=True)
        assert bars[0] is not None
        assert bars[1] is None
        counts.append(solution.stats.nfe)
    assert counts[0] == counts[2] < counts[1]
    with torch.no_grad():
        still = psn.ODEProblem(
            lambda t, u: -50 * u, tensor(1.0, 2.0), (0.0, 1.0), jac=lambda t, u: matrix * 1.0
        )
    for algorithm in STIFF[1:3]:
        solution = psn.solve(still, algorithm, compile=True)
        assert not solution.u1.requires_grad


def test_a_field_whose_derivative_is_infinite_where_its_jacobian_is_not() -> None:
    """`u' = -sqrt(u)` from `u = 0`, which stays there."""
    problem = psn.ODEProblem(
        lambda t, u: -torch.sqrt(u), tensor(0.0, 4.0), (0.0, 1.0),
        jac=lambda t, u: torch.diag(-0.5 / torch.sqrt(u.clamp(min=1e-3))),
    )  # fmt: skip
    with torch.no_grad():
        end = psn.solve(problem, psn.KenCarp4(), rtol=1e-9, atol=1e-9, compile=True).u1
    torch.testing.assert_close(end, tensor(0.0, 1.5**2), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("algorithm", STIFF[:2], ids=lambda a: a.expression)
def test_gradients_are_those_of_the_solve_where_one_fits_the_first_state_alone(
    algorithm: Any,
) -> None:
    """A Rosenbrock step depends on its Jacobian, and its gradient on the Jacobian's derivative."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack([-7 * u[0] + u[1] * torch.sin(t), u[0] - u[1] ** 2])

    def jac(t: Tensor, u: Tensor) -> Tensor:
        zero = 0 * u[0]
        rows = [torch.stack([zero - 7, torch.sin(t) + zero]), torch.stack([zero + 1, -2 * u[1]])]
        return torch.stack(rows) * (1 + 0.3 * (t > 0.1).to(u.dtype))

    def end(u: Tensor) -> Tensor:
        problem = psn.ODEProblem(f, u, (0.0, 1.0), jac=jac)
        return psn.solve(problem, algorithm, compile=True, **STEPS | {"dt0": 0.125}).u1

    start = tensor(1.0, 0.5, gradient=True)
    assert torch.autograd.gradcheck(end, start, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("algorithm", STIFF[1:3], ids=lambda a: a.expression)
@torch.no_grad()
def test_refusals(algorithm: Any) -> None:
    def branching(t: Tensor, u: Tensor) -> Tensor:
        return -torch.eye(2, dtype=D) if float(u.sum()) > -1e9 else torch.zeros(2, 2, dtype=D)

    problem = psn.ODEProblem(Decay(), tensor(1.0, 2.0), (0.0, 1.0), jac=branching)
    if isinstance(algorithm, psn.Rodas5P):
        # Which takes the field's own.
        assert psn.solve(problem, algorithm, compile=True).success
    else:
        with pytest.raises(psn.CompileError, match="jac has no native code"):
            psn.solve(problem, algorithm, compile=True)
        attempt._told.clear()
        with pytest.warns(psn.PsnWarning, match="jac has no native code"):
            assert psn.solve(problem, algorithm, compile="auto").success
    for given in (lambda t, u: -u, lambda t, u: -torch.eye(2), lambda t, u: [[-1.0, 0], [0, -1]]):
        wrong = psn.ODEProblem(Decay(), tensor(1.0, 2.0), (0.0, 1.0), jac=given)
        for compile in (True, "auto", False):
            with pytest.raises(ValueError, match=r"jac must return .* of shape \(2, 2\)"):
                psn.solve(wrong, algorithm, compile=compile)
    # A method that takes no Jacobian does not ask.
    assert psn.solve(problem, psn.Tsit5(), compile=True).success


@pytest.mark.parametrize("algorithm", STIFF[:2], ids=lambda a: a.expression)
@torch.no_grad()
def test_a_jacobian_that_fits_the_start_alone_costs_no_order(algorithm: Any) -> None:
    """Natively a Rosenbrock method takes the field's own."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((20 * t * u[1] - 3 * u[0], 10 * t * u[0] - u[1]))

    jac = torch.diag(tensor(-3.0, -1.0))
    ends = []
    for given in ({}, {"jac": lambda t, u: jac + 0 * u}, {"jac_sparsity": torch.eye(2)}):
        problem = psn.ODEProblem(f, tensor(1.0, 2.0), (0.0, 1.0), **given)
        ends.append(psn.solve(problem, algorithm, compile=True, **STEPS).u1)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-13, atol=0)
