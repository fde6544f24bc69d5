"""Solutions, failures and layers are copied, pickled and moved as any object of PyTorch is."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64


class Decay(nn.Module):
    def __init__(self, k: float = 1.0) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=D))

    def forward(self, t: Tensor, u: Any) -> Any:
        return -self.k * u


def noise(t: Tensor, u: Tensor) -> Tensor:
    return 0.1 * u


def without_noise(t: Tensor, u: Tensor) -> Tensor:
    return 0 * u


def blow_up(t: Tensor, u: Tensor) -> Tensor:
    return u**2


def solve(f: Any = None, **options: Any) -> psn.Solution:
    problem = psn.ODEProblem(Decay() if f is None else f, torch.ones(2, 1, dtype=D), (0.0, 1.0))
    return psn.solve(problem, rtol=1e-9, atol=1e-9, **options)


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
@pytest.mark.parametrize("again", [sent, copy.deepcopy, psn.Solution.detach])
def test_a_copy_has_the_values_and_no_graph(again: Any, adjoint: psn.Adjoint) -> None:
    solution = solve(saveat=[0.5, 1.0], adjoint=adjoint)
    found = again(solution)
    assert solution.u1.requires_grad
    assert not found.u1.requires_grad
    assert not found(0.3).requires_grad
    assert found.retcode is psn.ReturnCode.Success
    assert found.stats.nfe == found.stats.asdict()["nfe"] > 0
    torch.testing.assert_close(found.u, solution.u.detach(), rtol=0, atol=0)
    exact = torch.full((2, 1), math.exp(-0.3), dtype=D)
    torch.testing.assert_close(found(0.3), exact, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.step_times, solution.step_times)


def test_a_shallow_copy_keeps_the_graph() -> None:
    assert copy.copy(solve()).u1.requires_grad


def test_a_field_that_cannot_be_pickled_is_missed_by_dense_output_alone() -> None:
    k = torch.ones((), dtype=D, requires_grad=True)
    found = sent(solve(lambda t, u: -k * u, saveat=[0.5]))
    assert found.u[0, 0, 0].item() == pytest.approx(math.exp(-0.5), rel=1e-8)
    with pytest.raises(RuntimeError, match=r"lambda.*could not be pickled[\s\S]*saveat="):
        found(0.3)


def test_of_a_stochastic_solve() -> None:
    problem = psn.SDEProblem(Decay(), noise, torch.ones(3, 2, dtype=D), (0.0, 1.0))
    solution = psn.solve(problem, generator=torch.Generator().manual_seed(0))
    for found in (sent(solution), copy.deepcopy(solution)):
        torch.testing.assert_close(found.u, solution.u.detach(), rtol=0, atol=0)
        torch.testing.assert_close(found(0.37), solution(0.37).detach(), rtol=0, atol=0)
        torch.testing.assert_close(found.brownian(0.2, 0.9), solution.brownian(0.2, 0.9))


def test_of_an_ensemble() -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=D), (0.0, 1.0))
    starts = torch.tensor([[1.0], [2.0]], dtype=D, requires_grad=True)
    solution = psn.solve(psn.EnsembleProblem(problem, starts), saveat=[1.0])
    for found in (sent(solution), copy.deepcopy(solution), solution.detach()):
        assert not found.u1.requires_grad
        torch.testing.assert_close(found.u, solution.u.detach(), rtol=0, atol=0)
        assert found[1].success


def failing() -> None:
    psn.solve(psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 2.0)), max_steps=50)


def failing_members() -> None:
    problem = psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 2.0))
    starts = torch.tensor([[0.1], [1.0]], dtype=D)
    psn.solve(psn.EnsembleProblem(problem, starts), max_steps=50)


@pytest.mark.slow
def test_failures_come_out_of_a_pool_of_processes() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(psn.SolverFailure, match="max_steps") as raised:
            pool.submit(failing).result()
        assert raised.value.retcode is psn.ReturnCode.MaxIters
        assert 0.9 < raised.value.solution.step_times[-1] <= 1.0
        with pytest.raises(psn.EnsembleFailure, match="1 of 2") as of_members:
            pool.submit(failing_members).result()
        assert of_members.value.members == (1,)
        assert of_members.value.ensemble[0].success


def test_failures_are_pickled() -> None:
    for fail in (failing, failing_members):
        with pytest.raises(psn.SolverFailure) as raised:
            fail()
        found = sent(raised.value)
        assert type(found) is type(raised.value)
        assert str(found) == str(raised.value)
    error = psn.UnsupportedModule("no", "sin", captured=True)
    assert str(sent(error)) == str(error)
    assert (sent(error).operation, sent(error).captured) == ("sin", True)


@pytest.mark.parametrize("again", [sent, copy.deepcopy])
def test_layers(again: Any) -> None:
    regularizers = [psn.LocalError(weight=2.0), psn.KineticEnergy()]
    node = psn.NeuralODE(Decay(), psn.Tsit5(), regularizers=regularizers)
    node(torch.ones(2, 1, dtype=D)).u1.sum().backward()
    found = again(node)
    u0 = torch.ones(2, 1, dtype=D)
    torch.testing.assert_close(found(u0).u1, node(u0).u1, rtol=0, atol=0)
    found.field.k.data.fill_(2.0)
    assert node.field.k.item() == 1.0
    solution = again(node(u0))
    assert solution.penalties.keys() == node(u0).penalties.keys()
    assert solution(0.5)[0, 0].item() == pytest.approx(math.exp(-0.5), rel=1e-5)


def test_moving_to_another_precision() -> None:
    found = solve(saveat=[0.5]).to(torch.float32)
    assert found.u.dtype == found.u1.dtype == found.t.dtype == torch.float32
    assert found.u1.requires_grad
    turn = psn.ODEProblem(lambda t, u: 1j * u, torch.ones(1, dtype=torch.complex128), (0.0, 1.0))
    solution = psn.solve(turn, rtol=1e-9, atol=1e-9).to(torch.float32)
    assert (solution.u1.dtype, solution.t.dtype) == (torch.complex64, torch.float32)
    assert solution(1.0).dtype == torch.complex64


def test_arrays() -> None:
    t, u = solve(saveat=[0.0, 1.0]).numpy()
    assert t.tolist() == [0.0, 1.0]
    assert u[1, 0, 0] == pytest.approx(math.exp(-1), rel=1e-8)
    parts = psn.ODEProblem(
        lambda t, u: {"a": -u["a"]}, {"a": torch.ones(1, dtype=D, requires_grad=True)}, (0.0, 1.0)
    )
    assert psn.solve(parts, saveat=[1.0]).numpy()[1]["a"].shape == (1, 1)


def test_repr_is_short() -> None:
    text = repr(solve())
    assert len(text) < 200
    assert text.startswith("Solution(Success by Tsit5() on torch, t=0 to 1, ")
    assert text.endswith("u1 of shape (2, 1))")


@pytest.mark.parametrize("kind", ["ordinary", "stochastic", "members"])
@pytest.mark.parametrize("way", ["deepcopy", "detach", "pickle"])
def test_a_copy_of_a_solution_whose_field_has_changed_is_refused(kind: str, way: str) -> None:
    """Dense output of a copy is that of the solve, or it is refused as that of the solution is."""
    field = Decay()
    u0 = torch.ones(2, 1, dtype=D)
    problem = psn.ODEProblem(field, u0[0], (0.0, 1.0))
    if kind == "members":
        solved = psn.solve(psn.EnsembleProblem(problem, u0=u0), rtol=1e-9, atol=1e-9)
    elif kind == "ordinary":
        solved = psn.solve(problem, rtol=1e-9, atol=1e-9)
    else:
        noisy = psn.SDEProblem(field, without_noise, u0[0], (0.0, 1.0))
        solved = psn.solve(noisy, psn.SOSRI())
    one: Any = {
        "deepcopy": copy.deepcopy,
        "detach": lambda x: x.detach(),
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    }[way]

    def middle(solution: Any) -> float:
        return float((solution[0] if kind == "members" else solution)(0.35))

    assert middle(one(solved)) == pytest.approx(math.exp(-0.35), rel=1e-3)
    with torch.no_grad():
        field.k.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed"):
        middle(one(solved))
