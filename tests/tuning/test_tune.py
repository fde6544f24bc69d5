"""The choice of a solver by measurement."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
QUICK: dict[str, Any] = {"repeats": 1, "compile": False, "adjoints": (), "work": "nfe"}


class Decay(nn.Module):
    """`u' = -rate u`: the end state is known."""

    def __init__(self, rate: float = 2.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.rate * u


class Branching(Decay):
    """Cannot be exported."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return super().forward(t, u) if float(u.sum()) > 0 else -u


def layer(field: nn.Module | None = None, **options: Any) -> psn.NeuralODE:
    settings: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7, **options}
    return psn.NeuralODE(Decay() if field is None else field, psn.Dopri5(), **settings)


def start() -> Tensor:
    return torch.linspace(0.5, 2.0, 8, dtype=D).reshape(4, 2)


@pytest.mark.parametrize("slack", [1e-2, 1e-4, 1e-6])
def test_what_is_called_equal_is_near_the_exact_solution(slack: float) -> None:
    """And a smaller slack costs more."""
    tuning = psn.tune(layer(), start(), slack=slack, **QUICK)
    exact = start() * math.exp(-2.0)
    node = layer()
    for trial in tuning.trials:
        trial.choice.apply(node)
        error = (node(start()).u1 - exact).norm() / exact.norm()
        assert trial.deviation == pytest.approx(error.item(), rel=1e-3, abs=1e-9)
        assert trial.equal == (trial.deviation <= slack)
    assert tuning.best.nfe == min(trial.nfe for trial in tuning.trials if trial.equal)
    tighter = psn.tune(layer(), start(), slack=slack / 100, **QUICK)
    assert tighter.best.nfe >= tuning.best.nfe


def test_a_metric_says_what_equal_is() -> None:
    """A sign is right with any solver, and the cheapest is one step of Euler's."""

    def sign(solution: psn.Solution) -> float:
        return float((solution.u1.prod(1) > 0).double().mean())

    tuning = psn.tune(layer(Decay(0.5)), start(), sign, **QUICK)
    assert tuning.metric == 1.0
    assert all(trial.deviation == 0.0 for trial in tuning.trials)
    assert tuning.best.choice.algorithm == psn.Euler()
    assert tuning.best.nfe == 1


def test_fixed_steps_have_the_sizes_asked_for() -> None:
    tuning = psn.tune(
        layer(tspan=(0.0, 2.0)), start(), algorithms=(), fixed=[psn.RK4()], steps=[4, 8], **QUICK
    )
    found = {trial.choice.dt0: trial.nfe for trial in tuning.trials}
    assert found == {0.5: 16, 0.25: 32}


def test_the_layer_is_left_as_it_was_until_the_choice_is_applied() -> None:
    node = layer(dt0=0.01, max_steps=500, regularizers=psn.KineticEnergy())
    before = {**vars(node)}
    tuning = psn.tune(node, start(), slack=1e-5, **QUICK)
    assert {name: vars(node)[name] for name in before} == before
    assert node.training
    tuning.apply(node)
    assert node.algorithm == tuning.best.choice.algorithm
    assert node.options["max_steps"] == 500
    node.eval()
    assert node(start()).stats.nfe == tuning.best.nfe


def test_native_code_is_tried_too() -> None:
    tuning = psn.tune(
        layer(), start(), algorithms=[psn.Tsit5()], tolerances=[1e-3], fixed=(), repeats=1
    )
    native = [trial for trial in tuning.trials if trial.choice.compile]
    plain = [trial for trial in tuning.trials if not trial.choice.compile]
    assert native[0].nfe == plain[0].nfe
    assert native[0].deviation == pytest.approx(plain[0].deviation, rel=1e-6)
    # Whatever is best, it can be applied with its adjoint.
    node = layer()
    tuning.apply(node)
    node(start()).u1.sum().backward()


def test_what_fails_is_a_row_with_the_reason() -> None:
    tuning = psn.tune(
        layer(Branching()),
        start(),
        algorithms=[psn.Tsit5()],
        tolerances=[1e-3],
        fixed=(),
        repeats=1,
        adjoints=(),
    )
    assert [bool(trial.failure) for trial in tuning.trials] == [False, True]
    assert tuning.trials[1].choice.compile
    assert tuning.trials[1].failure in tuning.table()
    assert not tuning.best.choice.compile


def test_adjoints_are_compared_by_their_gradients() -> None:
    """Of discrete adjoints the gradient is that of the solution, which is equal, and one that keeps
    the graphs of its steps evaluates nothing more.
    """
    kept, replayed = psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0)
    continuous = psn.InterpolatingAdjoint()
    tuning = psn.tune(
        layer(),
        start(),
        algorithms=[psn.Tsit5()],
        tolerances=[1e-6],
        fixed=(),
        compile=False,
        adjoints=[kept, replayed, continuous, psn.QuadratureAdjoint()],
        repeats=1,
    )
    trials = {trial.adjoint: trial for trial in tuning.adjoints}
    assert trials[kept].equal
    assert trials[kept].nfe == 0
    assert trials[replayed].equal
    assert trials[replayed].nfe > 0
    assert trials[continuous].deviation < 1e-4
    assert trials[continuous].nfe > 0
    assert tuning.best_adjoint is not None
    assert tuning.best_adjoint.seconds == min(t.seconds for t in tuning.adjoints if t.equal)
    assert "with DiscreteAdjoint" in tuning.table()


def test_where_nothing_is_equal_the_nearest_is_named() -> None:
    tuning = psn.tune(
        layer(), start(), algorithms=(), fixed=[psn.Euler()], steps=[1, 2], slack=1e-9, **QUICK
    )
    with pytest.raises(ValueError, match=r"the nearest is Euler\(\) dt0=0.5"):
        _ = tuning.best
    assert tuning.best_adjoint is None


def test_errors_of_a_metric_are_not_hidden() -> None:
    def wrong(solution: psn.Solution) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        psn.tune(layer(), start(), wrong, **QUICK)


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="node"):
        psn.tune(nn.Linear(2, 2), start())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to try"):
        psn.tune(layer(), start(), algorithms=(), fixed=())
    with pytest.raises(TypeError, match="a NeuralCDE needs a path"):
        psn.tune(psn.NeuralCDE(Decay()), start())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": lambda solution: "high"}, r"metric\(solution\) must be a number"),
        ({"metric": lambda solution: solution.u1}, r"metric\(solution\) must be a number"),
        ({"metric": lambda solution: math.nan}, r"metric\(solution\) must be .* is nan"),
        ({"tolerances": "1e-3"}, "tolerances must be a sequence of numbers"),
        ({"tolerances": [1e-3, 0.0]}, r"tolerances\[1\] must be positive"),
        ({"algorithms": 5}, "algorithms must be a sequence"),
        ({"algorithms": [psn.Tsit5]}, r"algorithms\[0\] must be an instance"),
        ({"adjoints": ["direct"]}, r"adjoints\[0\] must be an instance"),
        ({"batch": "four"}, "must be a tensor, or a tuple or dict of tensors"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        psn.tune(layer(), **{"batch": start(), **QUICK, **given})


def test_one_algorithm_is_a_sequence_of_one() -> None:
    tuning = psn.tune(layer(), start(), **QUICK, algorithms=psn.Tsit5(), fixed=())
    assert {type(trial.choice.algorithm) for trial in tuning.trials} == {psn.Tsit5}


def test_inference_mode_around_it_changes_nothing() -> None:
    node, few = layer(), {**QUICK, "adjoints": (psn.DiscreteAdjoint(),), "steps": [64]}
    with torch.inference_mode():
        tuning = psn.tune(node, start(), **few)
    assert tuning.best_adjoint is not None


def test_the_picture_has_a_curve_for_each_algorithm() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    tuning = psn.tune(layer(), start(), **QUICK)
    axes = tuning.plot(axes=figures.Figure().subplots())
    names = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"Tsit5()", "BS3()", "RK4(), fixed steps"} <= names
