"""What newcomers write: each common mistake is answered with what was probably meant."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pysciml_node as psn
from pysciml_node.solving import checks as solving_checks


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def scaled(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return -p * u


class Backward(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -x


one = torch.ones(2, dtype=torch.float64)


def make(f: Any = decay, **options: Any) -> psn.ODEProblem:
    return psn.ODEProblem(f, one, (0.0, 1.0), **options)


def solve(*arguments: Any, **options: Any) -> psn.Solution:
    return psn.solve(make(), *arguments, **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "f(u, t)": (lambda: make(lambda u, t: -u), r"time first, but takes \(u, t\)(.*\n)+.*f\(t, u\)"),
    "f(y, t)": (lambda: make(lambda y, t: -y), r"Swap its arguments: f\(t, y\)"),
    "f(u, p, t)": (lambda: make(lambda u, p, t: -p * u, p=one), r"Swap its arg.*f\(t, u, p\)"),
    "f(du, u, p, t)": (lambda: make(lambda du, u, p, t: None), "It returns the derivative"),
    "f(u, rate=1.0)": (
        lambda: make(lambda u, rate=1.0: -rate * u),
        r"takes \(u, rate=1\.0\), whose second argument.*lambda t, u: f\(u\)",
    ),
    "a module of (x, t) that is compiled": (
        lambda: make(torch.compile(Backward(), backend="eager")),
        r"takes \(x: .*, t: .*\)\.\n  Swap",
    ),
    "a cell for a field": (
        lambda: psn.NeuralODE(nn.GRUCell(2, 2))(torch.ones(3, 2)),
        r"second argument has a default.*lambda t, input: f\(input\)",
    ),
    "drift(u, p, t)": (
        lambda: psn.SDEProblem(lambda u, p, t: -p * u, scaled, one, (0.0, 1.0), p=one),
        r"drift is called as drift\(t, u\).*Swap its arguments: drift\(t, u, p\)",
    ),
    "condition(u, t)": (lambda: psn.Event(lambda u, t: u[0]), r"condition\(t, u\), the time first"),
    "affect(u, p, t)": (
        lambda: psn.Event(decay, affect=lambda u, p, t: u),
        r"Swap its arguments: affect\(t, u, p\)",
    ),
    "a list from f": (
        lambda: psn.solve(make(lambda t, u: [-u[0], -u[1]])),
        r"returned list of 2\.\n  .*torch\.stack",
    ),
    "a number from f": (lambda: psn.solve(make(lambda t, u: 1.0)), "returned float.*full_like"),
    "an array from f": (
        lambda: psn.solve(make(lambda t, u: -u.detach().numpy())),
        "returned ndarray.*Compute with torch",
    ),
    "a list of tensors for u0": (
        lambda: psn.ODEProblem(decay, [one, one], (0.0, 1.0)),  # type: ignore[arg-type]
        r"but is list\.\n  Convert it: torch\.stack",
    ),
    "numbers for many p": (
        lambda: psn.EnsembleProblem(make(scaled), p=[1.0, 2.0]),
        r"p holds no tensor\.\n  Convert it: p=torch\.as_tensor",
    ),
    "f(u)": (lambda: make(lambda u: -u), r"takes \(u\)\.\n  .*lambda t, u: f\(u\)"),
    "f()": (lambda: make(lambda: one), r"f must be callable as f\(t, u\), but takes \(\)"),
    "a class for f": (lambda: make(nn.Linear), "f must be callable.*the class Linear"),
    "p forgotten": (lambda: psn.solve(make(scaled)), "p is not given: write p="),
    "p superfluous": (lambda: psn.solve(make(p=one)), r"p is given: let .* \(t, u, p\)"),
    "p misspelled": (lambda: make(params=one), "takes no argument 'params'"),
    "arguments swapped": (lambda: psn.ODEProblem(one, decay, (0.0, 1.0)), "The order is ODEProb"),
    "times for tspan": (lambda: psn.ODEProblem(decay, one, (0.0, 0.5, 1.0)), "saveat"),
    "solve(f, y0, t)": (lambda: psn.solve(decay, one, one), r"compat.torchdiffeq.odeint\(f, u0, t"),
    "solve(f, y0)": (lambda: psn.solve(decay, one), r"solve\(ODEProblem\(f, u0"),
    "three places": (lambda: solve(psn.Tsit5(), [0.5]), "Name the options"),
    "no problem": (lambda: psn.solve(), r"solve needs a problem"),
    "method": (lambda: solve(method="dopri5"), r"Did you mean algorithm=Tsit5\(\)"),
    "reltol": (lambda: solve(reltol=1e-3), "Did you mean rtol"),
    "abstol": (lambda: solve(abstol=1e-3), "Did you mean atol"),
    "t_eval": (lambda: solve(t_eval=[0.5]), "Did you mean saveat"),
    "callback": (lambda: solve(callback=decay), "Did you mean events"),
    "rtoll": (lambda: solve(rtoll=1e-3), "Did you mean 'rtol'"),
    "algoritm": (lambda: solve(algoritm=psn.Tsit5()), "Did you mean 'algorithm'"),
    "nonsense": (
        lambda: solve(colour="red"),
        "solve takes no argument 'colour'.\n  It takes problem",
    ),
    "name of an algorithm": (lambda: solve("tsit5"), r"Did you mean Tsit5\(\)"),
    "name of an adjoint": (lambda: solve(adjoint="gaus_adjoint"), r"Did you mean GaussAdjoint\(\)"),
    "class of an algorithm": (lambda: solve(psn.Tsit5), r"Write Tsit5\(\)"),
    "a function for events": (
        lambda: solve(events=decay),
        r"events must be.*\n  Write Event\(cond",
    ),
    "a number for events": (lambda: solve(events=5), "events must be a sequence of objects"),
    "words for times": (lambda: solve(saveat=["a"]), r"saveat\[0\] must be a number, but is 'a'"),
    "a word for throw": (lambda: solve(throw="julia"), "throw must be True or False"),
    "nan for dtmin": (lambda: solve(dtmin=float("nan")), "dtmin must be positive and finite"),
    "negative delta": (lambda: psn.SOSRI(delta=-1), "delta must be finite and at least 0"),
    "gama": (lambda: psn.PIController(gama=0.9), "Did you mean 'gamma'"),  # type: ignore[call-arg]
    "noize": (lambda: psn.SDEProblem(decay, decay, one, (0.0, 1.0), noise="diagnal"), "'diagonal'"),
    "a solution in a sequence": (
        lambda: nn.Sequential(psn.NeuralODE(nn.Linear(2, 2)), nn.Linear(2, 2))(torch.ones(3, 2)),
        r'linear takes tensors, but was given a Solution\.\n  .*output="u1"',
    ),
    "a solution for a tensor": (lambda: torch.cat([solve(), one]), r"given(.|\n)*solution\.u1"),
    "the last of a solution": (lambda: solve()[-1], r"last state is solution\.u1"),
    "noize of a layer": (
        lambda: psn.NeuralSDE(nn.Linear(2, 2), nn.Linear(2, 2), noize="diagonal"),  # type: ignore[call-overload]
        "NeuralSDE takes no argument 'noize'.\n  Did you mean 'noise'",
    ),
    "solver of a layer": (
        lambda: psn.NeuralODE(nn.Linear(2, 2), solver="dopri5"),  # type: ignore[call-overload]
        r"NeuralODE takes no argument 'solver'.\n  Did you mean algorithm=Tsit5\(\)",
    ),
    "a layer's algorithm by its name": (
        lambda: psn.NeuralODE(nn.Linear(2, 2), "dopri5"),  # type: ignore[call-overload]
        r"Did you mean DP5\(\)",
    ),
    "a layer's adjoint by its name": (
        lambda: psn.NeuralODE(nn.Linear(2, 2), adjoint="backsolve"),  # type: ignore[call-overload]
        r"Did you mean BacksolveAdjoint\(\)",
    ),
    "a layer's end alone": (
        lambda: psn.NeuralODE(nn.Linear(2, 2), tspan=1.0),  # type: ignore[call-overload]
        r"tspan must be a pair \(t0, t1\)",
    ),
    "times behind the input of a layer": (
        lambda: psn.NeuralODE(nn.Linear(2, 2))(one, torch.linspace(0, 1, 5)),
        "Times are saveat=",
    ),
    "event_shap of a flow": (
        lambda: psn.CNF(nn.Linear(2, 2), event_shap=2),  # type: ignore[call-arg]
        "Did you mean 'event_shape'",
    ),
    "name of SciPy's method": (lambda: solve("RK45"), r"Did you mean DP5\(\)"),
    "name of a stiff method": (lambda: solve("LSODA"), r"Did you mean AutoTsit5\(\)"),
    "args of a problem": (
        lambda: make(args=(one,)),
        r"ODEProblem takes no argument 'args'\.\n  Did you mean p, the argument of f\(t, u, p\)",
    ),
    "y0 of a problem": (
        lambda: psn.ODEProblem(decay, y0=one, tspan=(0.0, 1.0)),  # type: ignore[call-arg]
        "Did you mean u0",
    ),
    "saveat of a problem": (lambda: make(saveat=[0.5]), "saveat=... of solve"),
    "f of a stochastic problem": (
        lambda: psn.SDEProblem(f=decay, g=decay, u0=one, tspan=(0.0, 1.0)),  # type: ignore[call-arg]
        "Did you mean drift",
    ),
    "a layer for a problem": (
        lambda: psn.solve(psn.NeuralODE(nn.Linear(2, 2)), one),
        r"A layer is called: layer\(u0\)",
    ),
    "a class for a field": (
        lambda: psn.NeuralODE(nn.Linear),
        r"is the class Linear\.\n  Make one: Linear\(\.\.\.\)",
    ),
    "a class for a diffusion": (
        lambda: psn.NeuralSDE(nn.Linear(2, 2), nn.Linear),
        r"diffusion must be .* is the class Linear\.",
    ),
    "no return": (lambda: psn.solve(make(lambda t, u: None)), "the function ends without a return"),
    "a solution less a tensor": (lambda: solve() - one, r"was given a Solution\.\n.*solution\.u1"),
    "a tensor less a solution": (lambda: one - solve(), r"was given a Solution\.\n.*solution\.u1"),
    "an array of a solution": (lambda: np.asarray(solve()), r"solution\.u1\.numpy"),
    "unpacking": (lambda: tuple(solve()), r"not a pair\.\n  Its times are solution\.t"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_with_what_was_meant(name: str) -> None:
    call, words = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s){words}"):
        call()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("ys", "u"), ("y", "u"), ("values", "u"), ("ts", "t"), ("retcod", "retcode")),
        *(("shape", "u1.shape"), ("backward", "u1.backward"), ("mean", "u1.mean")),
    ],
)
def test_names_of_other_packages_on_a_solution(name: str, meant: str) -> None:
    solution = solve()
    with pytest.raises(
        AttributeError, match=rf"no attribute '{name}'.\n  Did you mean solution.{meant}\?"
    ):
        getattr(solution, name)
    assert not hasattr(solution, "_repr_html_")
    assert copy.copy(solution).success
    assert pickle.loads(pickle.dumps(solution)).success


def test_names_of_other_packages_on_the_counts() -> None:
    stats = solve().stats
    with pytest.raises(AttributeError, match=r"'nfev'\.\n  Did you mean solution\.stats\.nfe\?"):
        stats.nfev  # type: ignore[attr-defined]  # noqa: B018
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats


def test_what_there_is_can_be_listed() -> None:
    """Where names are completed: also parts that are made when they are read, and no others."""
    assert {"t", "u", "u1", "penalty", "stats", "plot"} <= set(dir(solve()))
    listed = {name for name in dir(psn) if not name.startswith("_")}
    assert listed >= {*psn.__all__, "data"}
    assert listed.isdisjoint({"importlib", "ModuleType", "checks", "steps", "torch_engine"})
    assert all(hasattr(psn, name) for name in dir(psn))


two_rows = torch.ones(3, 2)
FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "sizes": (
        lambda: psn.NeuralODE(nn.Linear(3, 3))(two_rows),
        r"state of shape \(3, 2\)(.|\n)*last ax",
    ),
    "precisions": (
        lambda: psn.NeuralODE(nn.Linear(2, 2))(two_rows.double()),
        r"float64(.|\n)*module\.to",
    ),
    "no axes of the time": (
        lambda: psn.solve(psn.ODEProblem(lambda t, u: torch.cat((u, t), 1), two_rows, (0.0, 1.0))),
        r"time of shape \(\)(.|\n)*t\.expand\(len\(u\), 1\)",
    ),
    "NumPy": (
        lambda: solve_with(lambda t, u: torch.from_numpy(-u.numpy())),
        r"Compute with torch(.|\n)*torch\.no_grad",
    ),
    "math": (lambda: solve_with(lambda t, u: math.sin(u) * u), r"torch\.sin"),
    "no samples": (
        lambda: psn.NeuralODE(nn.BatchNorm1d(2))(torch.ones(2)),
        r"state of shape \(2,\)(.|\n)*u0\.unsqueeze",
    ),
    "parts": (
        lambda: psn.solve(
            psn.ODEProblem(lambda t, u: nn.Linear(9, 2)(u[0]), (one, one), (0.0, 1.0))
        ),
        r"whose parts have shapes \(2,\), \(2,\)",
    ),
    "diffusion": (
        lambda: psn.solve(psn.SDEProblem(decay, lambda t, u: torch.cat((u, t)), one, (0.0, 1.0))),
        "The diffusion was called with a time",
    ),
    "members": (
        lambda: psn.solve(
            psn.EnsembleProblem(make(lambda t, u: nn.Linear(3, 2)(u)), torch.ones(4, 2).double())
        ),
        r"field was called with .* state of shape \(2,\)",
    ),
}


def solve_with(f: Any) -> psn.Solution:
    return psn.solve(make(f))


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", FOREIGN)
def test_errors_of_torch_in_a_field_say_what_it_was_given(name: str) -> None:
    """And what mostly helps, in a note behind the error that torch raises."""
    call, words = FOREIGN[name]
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        call()
    notes = "\n".join(caught.value.__notes__)
    assert re.search(words, notes)


def test_errors_with_a_remedy_are_left_as_they_are() -> None:
    def refuses(t: Tensor, u: Tensor) -> Tensor:
        raise ValueError("u must be positive.\n  Take its logarithm.")

    with pytest.raises(ValueError, match="positive") as caught:
        psn.solve(make(refuses))
    assert not hasattr(caught.value, "__notes__")


class Unregistered(nn.Module):
    """Layers in a list, a tensor that is no parameter, and one that is kept out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.layers = [nn.Linear(2, 2)]
        self.scale = torch.ones(2, requires_grad=True)
        self.again = [self.own]
        self.frozen = [nn.Linear(2, 2).requires_grad_(False)]
        self._teacher = [nn.Linear(2, 2)]

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.scale * self.layers[0](self.own(u))


def test_parameters_that_are_not_registered_are_named() -> None:
    node = psn.NeuralODE(Unregistered())
    with pytest.warns(psn.PsnWarning, match=r"lack those in layers, scale, .*\n.*nn\.ModuleList"):
        assert len(list(node.parameters())) == 2
    list(node.parameters())  # it is said once
    list(psn.NeuralODE(nn.Sequential(nn.Linear(2, 2))).parameters())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("Tsit", "Tsit5"), ("odeint", "compat.torchdiffeq.odeint"), ("solve_ivp", "solve")),
        *(("dopri5", "Dopri5"), ("sdeint", "compat.torchsde.sdeint")),
    ],
)
def test_names_of_other_packages_on_this_one(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=rf"Did you mean pysciml_node\.{meant}\?"):
        getattr(psn, name)
    assert not hasattr(psn, "__wrapped__")


def test_what_speaks_dlpack_is_a_state() -> None:
    """An array is lent, not copied, and a state in it is right."""
    array = np.array([1.0, 2.0])
    exact = torch.from_numpy(array) * np.exp(-1.0)
    problem = psn.ODEProblem(decay, array, (0.0, 1.0))  # type: ignore[arg-type]
    assert isinstance(problem.u0, Tensor)
    assert problem.u0.data_ptr() == array.ctypes.data
    torch.testing.assert_close(
        psn.solve(problem, rtol=1e-9, atol=1e-9).u1, exact, rtol=1e-8, atol=0
    )
    parts = psn.ODEProblem(lambda t, u: {"x": -u["x"]}, {"x": array}, (0.0, 1.0))  # type: ignore[dict-item]
    found = psn.solve(parts, rtol=1e-9, atol=1e-9).u1["x"]
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=0)
    with pytest.raises(TypeError, match="int64"):
        psn.ODEProblem(decay, np.arange(3), (0.0, 1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("f", [decay, lambda t, u: torch.ones_like(u)])
def test_states_that_are_not_finite_fail_clearly(bad: float, f: Any) -> None:
    u0 = torch.tensor([1.0, bad], dtype=torch.float64)
    with pytest.raises(psn.SolverFailure, match="component"):
        psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)))


def test_numbers_of_numpy_and_tensors_without_axes_are_numbers() -> None:
    plain = solve(rtol=1e-5, atol=1e-6, dt0=0.1, max_steps=50, saveat=[0.5, 1.0])
    same = solve(
        rtol=np.float64(1e-5),
        atol=torch.tensor(1e-6, dtype=torch.float64),
        dt0=np.float64(0.1),
        max_steps=np.int64(50),
        saveat=np.array([0.5, 1.0]),
        throw=np.bool_(True),
    )
    assert torch.equal(plain.u, same.u)


def inside_out(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(f)
    def adapted(t: Tensor, u: Tensor) -> Tensor:
        return f(u, 1.0, t)

    return adapted


class InsideOut:
    def __init__(self, f: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, f)

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return self.__wrapped__(u, 1.0, t)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("adapter", [inside_out, InsideOut])
def test_an_adapter_that_looks_like_what_it_wraps_is_called_as_itself(adapter: Any) -> None:
    def elsewhere(u: Tensor, p: float, t: Tensor) -> Tensor:
        return -p * u * t

    u1 = psn.solve(make(adapter(elsewhere)), psn.Tsit5(), rtol=1e-9, atol=1e-9).u1
    torch.testing.assert_close(u1, one * math.exp(-0.5), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "around",
    [lambda m: torch.compile(m, backend="eager"), nn.DataParallel, torch.jit.script, AveragedModel],
    ids=["compile", "data", "script", "average"],
)
def test_modules_that_stand_for_others_take_what_those_take(around: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False, dtype=torch.float64))
    net[0].weight.data = -torch.eye(2, dtype=torch.float64)
    u1 = psn.NeuralODE(around(net), tspan=(0.0, 1.0), rtol=1e-9, atol=1e-9)(one.expand(3, 2)).u1
    torch.testing.assert_close(u1, one.expand(3, 2) * math.exp(-1), rtol=1e-7, atol=0)


def test_an_optimizer_for_a_field_that_is_a_function() -> None:
    net = nn.Linear(2, 2)
    node = psn.NeuralODE(lambda t, u: net(u))
    with pytest.warns(psn.PsnWarning, match=r"no parameters: its field is a function.*Linear"):
        assert list(node.parameters()) == []
    assert len(list(psn.NeuralODE(nn.Linear(2, 2)).parameters())) == 2
    assert list(psn.NeuralODE(decay).parameters()) == []
    with pytest.raises(ValueError, match=r"(?s)params is empty.*write it as an nn\.Module"):
        psn.optim.VarianceCorrected([])


def test_the_size_of_fixed_steps_is_not_the_controllers() -> None:
    with pytest.raises(TypeError, match=r"times must be a sequence(.|\n)*dt0=0\.1"):
        psn.FixedStep(0.1)  # type: ignore[arg-type]


def test_a_first_size_that_may_have_been_meant_for_all_steps_is_told_once(monkeypatch):
    monkeypatch.setattr(solving_checks, "_told", set())
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
    with pytest.warns(psn.PsnWarning, match=r"RK4 adapts(.|\n)*controller=FixedStep\(\)"):
        psn.solve(problem, psn.RK4(), dt0=0.123)
    # Said once; and nothing to say where a tolerance or a controller shows what is meant.
    psn.solve(problem, psn.RK4(), dt0=0.124)
    psn.solve(problem, psn.Heun(), dt0=0.125, rtol=1e-3)
    psn.solve(problem, psn.Heun(), dt0=0.125, controller=psn.PIController())
    psn.solve(problem, psn.Tsit5(), dt0=0.125)


@pytest.mark.parametrize("u0", [1.0, 2, [1.0, 2.0], [[1, 2], [3, 4]], 1j, [1.0, 2j]])
def test_numbers_and_lists_of_them_are_states_of_the_default_dtype(u0: Any) -> None:
    solution = psn.solve(psn.ODEProblem(decay, u0, (0.0, 1.0)), rtol=1e-5)
    start = torch.as_tensor(u0, dtype=torch.complex64 if "j" in str(u0) else torch.float32)
    assert solution.u1.dtype == start.dtype
    torch.testing.assert_close(solution.u1, start * math.exp(-1), rtol=1e-4, atol=0)
    many = psn.EnsembleProblem(psn.ODEProblem(decay, u0, (0.0, 1.0)), u0=[u0, u0])
    torch.testing.assert_close(psn.solve(many, rtol=1e-5).u1[0], solution.u1)


def test_a_field_that_cuts_the_graph_is_told_of() -> None:
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    problem = make(lambda t, u: torch.tensor([-k.item() * x for x in u.tolist()], dtype=u.dtype))
    u1 = psn.solve(problem).u1
    with pytest.warns(psn.PsnWarning, match=r"cuts the graph(.|\n)*torch\.stack"):
        u1.sum().backward()
    assert k.grad is None


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.InterpolatingAdjoint()])
def test_members_of_a_field_that_cuts_the_graph_are_told_of(adjoint: Any) -> None:
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(
        lambda t, u: -k.detach() * u.detach(), torch.ones(2, dtype=torch.float64), (0.0, 1.0)
    )
    starts = torch.ones(3, 2, dtype=torch.float64)
    u1 = psn.solve(psn.EnsembleProblem(problem, starts), adjoint=adjoint).u1
    with pytest.warns(psn.PsnWarning, match=r"cuts the graph(.|\n)*torch\.stack"):
        u1.sum().backward()
    assert k.grad is None
    # Nothing is missing where the starts have gradients, and a warning would be an error here.
    starts.requires_grad_()
    psn.solve(psn.EnsembleProblem(problem, starts), adjoint=adjoint).u1.sum().backward()
    assert starts.grad is not None
    assert starts.grad.tolist() == [[1.0, 1.0]] * 3


def test_a_drift_and_a_diffusion_that_cut_the_graph_are_told_of() -> None:
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def cut(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tensor([-k.item() * x for x in u.tolist()], dtype=u.dtype)

    def whole(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 0.1 * k * u

    start = torch.ones(2, dtype=torch.float64)
    how: Any = {"controller": psn.FixedStep(), "dt0": 0.25}
    u1 = psn.solve(psn.SDEProblem(cut, cut, start, (0.0, 1.0)), psn.EM(), **how).u1
    with pytest.warns(psn.PsnWarning, match=r"cuts the graph(.|\n)*torch\.stack"):
        u1.sum().backward()
    assert k.grad is None
    psn.solve(psn.SDEProblem(cut, whole, start, (0.0, 1.0)), psn.EM(), **how).u1.sum().backward()
    assert k.grad is not None  # and no warning, which would be an error here


def test_a_field_that_uses_its_inputs_late_has_not_cut_its_graph() -> None:
    """The first of two solves gives no gradient, and nothing is amiss."""
    late = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    start = torch.ones(1, dtype=torch.float64)

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return late * u if t > 0.5 else u

    for span in ((0.0, 0.5), (0.5 + 1e-9, 1.0)):
        start = psn.solve(psn.ODEProblem(field, start, span), rtol=1e-8, atol=1e-8).u1
    start.sum().backward()
    expected = 0.5 * torch.exp(torch.tensor(1.5, dtype=torch.float64))
    torch.testing.assert_close(late.grad, expected, rtol=1e-6, atol=0)
