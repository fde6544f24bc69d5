"""What native stochastic solves refuse, and what they do in layers and around other code."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.errors import PsnWarning
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}


class Scaled(nn.Module):
    """`a u`."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.a * u


def problem(drift: Any = None, diffusion: Any = None, **given: Any) -> psn.SDEProblem:
    drift = Scaled(0.3) if drift is None else drift
    diffusion = Scaled(0.4) if diffusion is None else diffusion
    u0 = given.pop("u0", torch.ones(3, dtype=D))
    return psn.SDEProblem(drift, diffusion, u0, (0.0, 1.0), **given)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noisy(t: Tensor, u: Tensor) -> Tensor:
    return u + torch.randn_like(u)


def branching(t: Tensor, u: Tensor) -> Tensor:
    return u if u.sum() > 0 else -u


STRATONOVICH: dict[str, Any] = {"interpretation": "stratonovich"}
REFUSED: dict[str, tuple[psn.SDEProblem, dict[str, Any], str]] = {
    "the adjoint": (
        problem(**STRATONOVICH),
        {"adjoint": psn.BacksolveAdjoint(), "algorithm": psn.EulerHeun()},
        "BacksolveAdjoint",
    ),
    "a graph of all": (problem(), {"adjoint": psn.DirectAdjoint()}, "DirectAdjoint"),
    "random drift": (problem(noisy), {}, "randn"),
    "random diffusion": (problem(diffusion=noisy), {}, "randn"),
    "branches": (problem(branching), {}, "torch.export"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_native_code_is_refused_by_name(name: str) -> None:
    asked, options, word = REFUSED[name]
    options = {"algorithm": psn.SRIW1(), **FIXED, **options}
    with pytest.raises(psn.CompileError, match=word) as caught:
        psn.solve(asked, compile=True, engine="torch", **options)
    assert "compile=False" in str(caught.value).split("\n", 1)[1]


def test_dropout_is_refused() -> None:
    drift = psn.NeuralSDE(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), Scaled(0.1)).drift
    with pytest.raises(psn.CompileError, match="drift or the diffusion"):
        psn.solve(
            psn.SDEProblem(lambda t, u: drift(u), lambda t, u: u, torch.ones(2, 3), (0.0, 1.0)),
            psn.SRIW1(),
            compile=True,
            engine="torch",
            **FIXED,
        )


def test_ensembles_without_native_code_go_on() -> None:
    many = psn.EnsembleProblem(problem(diffusion=noisy), u0=torch.ones(4, 3, dtype=D))
    with pytest.raises(psn.CompileError, match="randn"):
        psn.solve(many, psn.SRIW1(), compile=True, engine="torch", **FIXED)
    many = psn.EnsembleProblem(problem(), u0=torch.ones(4, 3, dtype=D))
    attempt._told.clear()
    how: dict[str, Any] = {**FIXED, "adjoint": psn.DirectAdjoint(), "generator": seeded()}
    with pytest.warns(PsnWarning, match="DirectAdjoint"):
        found = psn.solve(many, psn.SRIW1(), compile="auto", **how)
    expected = psn.solve(many, psn.SRIW1(), generator=seeded(), **FIXED)
    assert torch.equal(found.u1, expected.u1)


def test_shapes_and_noise_are_checked_as_in_python() -> None:
    wrong: list[tuple[psn.SDEProblem, Any]] = [
        (problem(diffusion=lambda t, u: u[:1]), psn.SRIW1()),
        (problem(diffusion=lambda t, u: u, noise="general"), psn.EM()),
        (problem(noise="additive"), psn.SRA1()),
    ]
    for asked, method in wrong:
        messages = []
        for compile in (True, False):
            with pytest.raises(ValueError) as caught:
                psn.solve(asked, method, compile=compile, engine="torch", **FIXED)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_auto_goes_on_in_python_and_says_so_once() -> None:
    attempt._told.clear()
    asked = problem(branching)
    with pytest.warns(PsnWarning, match="without native code"):
        found = psn.solve(asked, psn.SRIW1(), compile="auto", generator=seeded(), **FIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psn.solve(asked, psn.SRIW1(), compile="auto", generator=seeded(), **FIXED)
    expected = psn.solve(asked, psn.SRIW1(), generator=seeded(), **FIXED)
    assert torch.equal(found.u1, expected.u1)


def test_weights_changed_in_place_are_noticed_in_backward() -> None:
    asked = problem()
    solution = psn.solve(asked, psn.SRIW1(), compile=True, **FIXED)
    with torch.no_grad():
        asked.drift.a.mul_(2)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="inplace"):
        solution.u1.sum().backward()


def test_new_weights_need_no_new_code_and_seeds_are_new() -> None:
    asked = problem()
    ends = []
    for compile in (True, False):
        generator, drift = seeded(), copy.deepcopy(asked.drift)
        for _ in range(2):
            with torch.no_grad():
                drift.a.add_(0.1)  # type: ignore[attr-defined]
            given = problem(drift, asked.diffusion)
            options = {"compile": compile, "generator": generator, **FIXED}
            ends.append(psn.solve(given, psn.SRIW1(), **options).u1)
    torch.testing.assert_close(ends[:2], ends[2:], rtol=1e-13, atol=0)
    assert not torch.equal(ends[0], ends[1])


def test_a_tensor_that_both_fields_read_gets_the_sum_of_its_gradients() -> None:
    a = torch.tensor(0.5, dtype=D, requires_grad=True)
    hidden = a.square()
    gradients = []
    for compile in (True, False):
        asked = problem(lambda t, u: hidden * u, lambda t, u: hidden * torch.cos(u))
        solution = psn.solve(asked, psn.SRIW1(), compile=compile, generator=seeded(), **FIXED)
        (gradient,) = torch.autograd.grad(solution.u1.sum(), a, retain_graph=True)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_solutions_can_be_pickled_and_changed_in_precision() -> None:
    solution = psn.solve(problem(), psn.SRIW1(), compile=True, **FIXED)
    again = pickle.loads(pickle.dumps(solution))
    torch.testing.assert_close(again(0.4), solution(0.4).detach(), rtol=1e-13, atol=0)
    assert solution.to(torch.float32).u1.dtype == torch.float32


def test_layers_train_with_it() -> None:
    penalties, gradients = [], []
    for compile in (True, False):
        node = psn.NeuralSDE(
            Scaled(0.3),
            Scaled(0.4),
            psn.SRIW1(),
            generator=seeded(),
            regularizers=[psn.LocalError("biased", weight=10.0), psn.GlobalError(weight=2.0)],
            compile=compile,
            rtol=0.05,
            atol=0.05,
        )
        torch.manual_seed(0)
        solution = node(torch.ones(4, 3, dtype=D))
        loss = solution.u1.square().mean() + solution.penalty
        gradients += torch.autograd.grad(loss, list(node.parameters()))
        penalties.append(solution.penalty.detach())
    torch.testing.assert_close(*penalties, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-9, atol=0)


def test_latent_equations_train_with_it() -> None:
    found = []
    for compile in (True, False):
        torch.manual_seed(0)
        posterior = nn.Linear(2, 2)
        latent = psn.LatentSDE(
            posterior,
            lambda t, z: -z,
            lambda t, z: 0.5 * torch.ones_like(z),
            psn.SRIW1(),
            compile=compile,
            generator=seeded(),
            rtol=0.1,
            atol=0.1,
        )
        paths = latent(torch.ones(3, 2), saveat=[0.0, 0.5, 1.0])
        loss = paths.u.square().mean() + paths.kl.mean()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(posterior.parameters()))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
