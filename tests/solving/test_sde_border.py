"""Bad stochastic problems and options are refused where they enter, with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def ones(*shape: int) -> Tensor:
    return torch.ones(shape or (2, 3), dtype=torch.float64)


def problem(**changes: Any) -> psn.SDEProblem:
    given = {"drift": decay, "diffusion": decay, "u0": ones(), "tspan": (0.0, 1.0), **changes}
    return psn.SDEProblem(**given)


FIXED: dict[str, Any] = {"dt0": 0.25, "controller": psn.FixedStep()}

PROBLEMS = [
    (TypeError, ("drift", "callable"), {"drift": ones()}),
    (TypeError, ("diffusion", "callable"), {"diffusion": 0.1}),
    (TypeError, ("u0", "list"), {"u0": [ones()]}),
    (TypeError, ("real", "complex128", "two entries"), {"u0": ones().to(torch.complex128)}),
    (ValueError, ("noise", "diagonal", "'white'"), {"noise": "white"}),
    (ValueError, ("interpretation", "stratonovich", "'Ito'"), {"interpretation": "Ito"}),
    (ValueError, ("forward", "(1.0, 0.0)"), {"tspan": (1.0, 0.0)}),
    (ValueError, ("tspan", "different"), {"tspan": (1.0, 1.0)}),
    (ValueError, ("gradients", "float(t0)"), {"tspan": (torch.tensor(0.0, requires_grad=True), 1)}),
    (ValueError, ("general noise", "2 parts"), {"u0": (ones(), ones()), "noise": "general"}),
]


@pytest.mark.parametrize(("error", "words", "changes"), PROBLEMS)
def test_bad_problems(error: type[Exception], words: tuple[str, ...], changes: Any) -> None:
    with pytest.raises(error) as caught:
        problem(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


SERVED = {
    "EM": [(n, "ito") for n in ("diagonal", "scalar", "additive", "general")],
    "RKMil": [(n, i) for n in ("diagonal", "scalar") for i in ("ito", "stratonovich")],
    "EulerHeun": [(n, "stratonovich") for n in ("diagonal", "scalar", "additive", "general")],
    "ReversibleHeun": [(n, "stratonovich") for n in ("diagonal", "scalar", "additive", "general")],
    "StratonovichMidpoint": [
        (n, "stratonovich") for n in ("diagonal", "scalar", "additive", "general")
    ],
    **{name: [("additive", "ito")] for name in ("SRA1", "SOSRA", "SOSRA2")},
    **{name: [(n, "ito") for n in ("diagonal", "scalar")] for name in ("SRIW1", "SOSRI", "SOSRI2")},
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("noise", ["diagonal", "scalar", "additive", "general"])
@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
def test_which_method_serves_which_problem(name: str, noise: Any, interpretation: Any) -> None:
    """Others are refused with a method that serves; additive noise is the same in both readings."""

    def constant(t: Tensor, u: Tensor) -> Tensor:
        return 0.1 * torch.ones((*u.shape, 2) if noise == "general" else u.shape).double()

    algorithm = getattr(psn, name)()
    asked = problem(diffusion=constant, noise=noise, interpretation=interpretation)
    readings = [interpretation] if noise != "additive" else ["ito", "stratonovich"]
    if any((noise, reading) in SERVED[name] for reading in readings):
        assert psn.solve(asked, algorithm, engine="torch", **FIXED).success
        return
    with pytest.raises(ValueError, match=name) as caught:
        psn.solve(asked, algorithm, **FIXED)
    remedy = caught.value.args[0].split("Use ")[1].split("(")[0]
    assert psn.solve(asked, getattr(psn, remedy)(), engine="torch", **FIXED).success


def mixing(t: Tensor, u: Tensor) -> Tensor:
    return 0.1 * torch.stack((u, torch.ones_like(u)), -1)


@pytest.mark.parametrize("engine", [None, "torch", "julia"])
@pytest.mark.parametrize("controller", [None, psn.IController(), psn.PIDController()])
@pytest.mark.parametrize(
    ("algorithm", "noise"),
    [
        *((a, n) for a in (psn.EM(), psn.LambaEM()) for n in ("diagonal", "scalar", "general")),
        (None, "general"),
    ],
)
def test_euler_maruyama_takes_adaptive_steps_for_additive_noise_only(
    algorithm: Any, noise: Any, controller: Any, engine: Any
) -> None:
    """Steps that follow the path bias it elsewhere; the message says what does not."""
    asked = problem(diffusion=mixing if noise == "general" else decay, noise=noise)
    for given in (asked, psn.EnsembleProblem(asked, torch.stack((ones(), ones())))):
        with pytest.raises(ValueError, match="with adaptive steps is for additive noise") as caught:
            psn.solve(given, algorithm, controller=controller, engine=engine)
        first, remedy = str(caught.value).split("\n")
        assert f'"{noise}"' in first
        assert remedy.startswith("  Use controller=FixedStep(), dt0=0.01; or ")
        assert ("EulerHeun()" if noise == "general" else "SOSRI(), SRIW1() or RKMil()") in remedy
    options: Any = {"controller": psn.FixedStep(), "dt0": 0.01, "engine": "torch"}
    assert psn.solve(asked, algorithm, **options).success


def test_the_remedies_for_adaptive_euler_maruyama_adapt_their_steps() -> None:
    for algorithm in (psn.SOSRI(), psn.SRIW1(), psn.RKMil()):
        for noise in ("diagonal", "scalar"):
            assert psn.solve(problem(noise=noise), algorithm, engine="torch").success
    general = problem(diffusion=mixing, noise="general", interpretation="stratonovich")
    assert psn.solve(general, psn.EulerHeun(), engine="torch").success
    constant = problem(diffusion=lambda t, u: 0.1 * torch.ones_like(u), noise="additive")
    for algorithm in (psn.EM(), psn.LambaEM()):
        assert psn.solve(constant, algorithm, engine="torch").success


OPTIONS = [
    (ValueError, ("ordinary equations", "SOSRI"), {"algorithm": psn.Tsit5()}),
    (ValueError, ("InterpolatingAdjoint", "Discrete"), {"adjoint": psn.InterpolatingAdjoint()}),
    (ValueError, ("Backsolve", "Stratonovich", "ito"), {"adjoint": psn.BacksolveAdjoint()}),
    (ValueError, ("events", "stochastic"), {"events": psn.Event(lambda t, u: u.sum())}),
    (TypeError, ("generator", "torch.Generator"), {"generator": 3}),
    (ValueError, ("saveat", "detach"), {"saveat": torch.tensor([0.5, 1.0], requires_grad=True)}),
    (ValueError, ("saveat[0]",), {"saveat": [2.0]}),
    (ValueError, ("FixedStep", "dt0"), {"controller": psn.FixedStep()}),
]


@pytest.mark.parametrize(("error", "words", "options"), OPTIONS)
def test_bad_options(error: type[Exception], words: tuple[str, ...], options: Any) -> None:
    with pytest.raises(error) as caught:
        psn.solve(problem(), **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_stochastic_options_are_refused_for_ordinary_problems() -> None:
    ordinary = psn.ODEProblem(decay, ones(), (0.0, 1.0))
    with pytest.raises(ValueError, match="generator"):
        psn.solve(ordinary, generator=torch.Generator())
    with pytest.raises(ValueError, match="SDEProblem"):
        psn.solve(ordinary, psn.SOSRI())
    with pytest.raises(TypeError, match="no Brownian motion"):
        psn.solve(ordinary).brownian(0.0, 1.0)


DIFFUSIONS = [
    (ValueError, ("(2, 3)", "(2,)", "ones_like"), "diagonal", lambda t, u: u[:, 0]),
    (TypeError, ("tensors", "float"), "diagonal", lambda t, u: 0.1),
    (TypeError, ("float64", "float32"), "diagonal", lambda t, u: u.float()),
    (ValueError, ("(2, 3, m)", "(2, 3)"), "general", lambda t, u: u),
    (ValueError, ("(2, 3) or (2, 3, m)", "(3, 2)"), "additive", lambda t, u: u.T),
    (ValueError, ("m", "float"), "general", lambda t, u: 0.1),
]


@pytest.mark.parametrize(("error", "words", "noise", "diffusion"), DIFFUSIONS)
def test_bad_diffusions(
    error: type[Exception], words: tuple[str, ...], noise: Any, diffusion: Any
) -> None:
    with pytest.raises(error) as caught:
        psn.solve(problem(noise=noise, diffusion=diffusion), engine="torch", **FIXED)
    assert all(word in str(caught.value) for word in words), caught.value


def test_times_have_no_gradients() -> None:
    solution = psn.solve(problem(), engine="torch")
    with pytest.raises(ValueError, match="no derivative in time"):
        solution(torch.tensor(0.3, requires_grad=True))
    with pytest.raises(ValueError, match="in order"):
        solution.brownian(0.5, 0.2)


def test_what_a_field_uses_late_receives_its_gradient() -> None:
    """A tensor that the drift uses from the middle of the interval on, as recorded steps do."""
    late = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
        using = problem(drift=lambda t, u: -u * (late if t > 0.6 else 1.0), u0=ones())
        solution = psn.solve(
            using,
            engine="torch",
            generator=torch.Generator().manual_seed(0),
            adjoint=adjoint,
            tstops=[0.6],
        )
        gradients += torch.autograd.grad(solution.u1.sum(), late)
    assert gradients[1] != 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=0)


def test_a_failure_says_where() -> None:
    broken = problem(diffusion=lambda t, u: u / 0.0)
    with pytest.raises(psn.SolverFailure, match=r"diffusion\(t0, u0\) is not finite: sample 0"):
        psn.solve(broken, engine="torch")


def test_noise_that_is_called_additive_and_depends_on_the_state() -> None:
    def make(diffusion: Any) -> psn.SDEProblem:
        return psn.SDEProblem(
            lambda t, u: -u, diffusion, torch.zeros(3).double(), (0.0, 1.0), noise="additive"
        )

    with pytest.raises(ValueError, match=r"does not depend on the state.*\n.*diagonal"):
        psn.solve(make(lambda t, u: 0.1 + u.square()))
    for constant in (lambda t, u: 0.1 + 0 * u, lambda t, u: torch.ones(3, 2).double() * t):
        assert psn.solve(make(constant)).success
