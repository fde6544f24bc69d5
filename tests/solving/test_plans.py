"""What is worked out once for equal solves is worked out again for those that only look equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pysciml_node as psn
from pysciml_node import tableaus
from pysciml_node.algorithms.controllers import StepSizes
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.julia_engine.process import runtime
from pysciml_node.solving import plans
from pysciml_node.solving.plans import Plan, plan_of
from pysciml_node.tableaus import Tableau
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.library import cross_in_c


class _Own(ExplicitRungeKutta):
    """A method by a tableau of its object, which the base's comparison does not see."""

    def __init__(self, tableau: Tableau) -> None:
        self.__dict__["tableau"] = tableau


class _Cautious(psn.PIController):
    """A controller with more than what the base compares."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.__dict__["factor"] = factor

    def start(self, error_order: float) -> StepSizes:
        return psn.PIController(gamma=self.__dict__["factor"]).start(error_order)


def _problem() -> psn.ODEProblem:
    return psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (0.0, 1.0))


@pytest.mark.parametrize("compiled", [True, False])
def test_algorithms_of_a_users_class_are_themselves(compiled: bool) -> None:
    ends = [
        psn.solve(
            _problem(),
            _Own(tableau),
            controller=psn.FixedStep(),
            dt0=0.5,
            engine="torch",
            compile=compiled,
        ).u1.item()
        for tableau in (tableaus.EULER, tableaus.RK4, tableaus.EULER)
    ]
    # Of each step the factor is the method's Taylor polynomial of exp(-1/2).
    euler, fourth = 0.5, sum((-0.5) ** n / math.factorial(n) for n in range(5))
    assert ends == pytest.approx([euler**2, fourth**2, euler**2], rel=1e-14)


def test_controllers_of_a_users_class_are_themselves() -> None:
    def steps(controller: psn.PIController) -> int:
        return psn.solve(_problem(), controller=controller, engine="torch").stats.naccept

    expected = [steps(psn.PIController(gamma=x)) for x in (0.9, 0.3)]
    assert [steps(_Cautious(x)) for x in (0.9, 0.3)] == expected
    assert expected[0] < expected[1]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_times_that_are_equal_and_not_the_same(zero: float) -> None:
    """`1 / t` tells them apart."""
    for t in (zero, -zero, zero):
        problem = psn.ODEProblem(_problem().f, torch.ones(1, dtype=torch.float64), (t, 1.0))
        solution = psn.solve(problem, saveat=[t, 0.5], engine="torch")
        assert math.copysign(1.0, solution.t[0].item()) == math.copysign(1.0, t)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_saved_times_that_were_changed_in_place_are_seen(compiled: bool, kind: str) -> None:
    tensor = torch.tensor([0.25, 0.5], dtype=torch.float64)
    saveat = tensor if kind == "tensor" else tensor.numpy()
    for last in (0.5, 0.5, 0.75, 1.0, 0.5):
        saveat[1] = last
        solution = psn.solve(
            _problem(), saveat=saveat, rtol=1e-10, atol=1e-10, engine="torch", compile=compiled
        )
        expected = torch.tensor([[0.25], [last]], dtype=torch.float64)
        torch.testing.assert_close(solution.u, torch.exp(-expected), rtol=1e-9, atol=0)
        assert torch.equal(solution.t, expected[:, 0])
    saveat[1] = 1.5
    with pytest.raises(ValueError, match="inside tspan"):
        psn.solve(_problem(), saveat=saveat, engine="torch", compile=compiled)


def test_saved_times_of_another_kind_are_themselves() -> None:
    """Single precision may stand beyond the end by what it rounds; gradients are asked anew."""
    beyond = torch.nextafter(torch.tensor([1.0]), torch.tensor(2.0))
    problem = _problem()
    assert psn.solve(problem, saveat=beyond, engine="torch").t.item() == 1.0
    with pytest.raises(ValueError, match="inside tspan"):
        psn.solve(problem, saveat=beyond.double(), engine="torch")
    times = torch.tensor([0.5], dtype=torch.float64)
    for needed in (False, True, False, True):
        times.requires_grad_(needed)
        solution = psn.solve(problem, saveat=times, rtol=1e-10, atol=1e-10, compile=True)
        assert solution.u.requires_grad == needed
        if needed:
            (slope,) = torch.autograd.grad(solution.u.sum(), times)
            torch.testing.assert_close(slope, -torch.exp(-times.detach()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
def test_tolerances_of_parts_go_by_their_numbers_and_names(compiled: bool) -> None:
    """Of two decays the faster one needs the steps, as far as its tolerance asks for them."""
    start = torch.ones(1, dtype=torch.float64)
    problem = psn.ODEProblem(
        lambda t, u: {"slow": -u["slow"], "fast": -20 * u["fast"]},
        {"slow": start, "fast": start.clone()},
        (0.0, 1.0),
    )

    def steps(atol: dict[str, float]) -> int:
        options: dict[str, Any] = {"engine": "torch", "compile": compiled}
        return psn.solve(problem, rtol=1e-3, atol=atol, **options).stats.naccept

    atol = {"slow": 10.0, "fast": 1e-8}
    many = steps(atol)
    atol["slow"], atol["fast"] = 1e-8, 10.0
    few = steps(atol)
    assert few < many / 2
    for _ in range(2):
        assert steps({"fast": 10.0, "slow": 1e-8}) == few
        assert steps({"fast": 1e-8, "slow": 10.0}) == many
    with pytest.raises(ValueError, match="parts of u0"):
        steps({"fast": 1e-8, "other": 10.0})


def test_a_layer_with_integrals_is_solved_by_the_plan_of_the_time_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of `du/dt = -u` the kinetic energy is `int exp(-2 t) dt`."""
    node = psn.NeuralODE(lambda t, u: -u, regularizers=psn.KineticEnergy(), engine="torch")
    u0, energy = torch.ones(2, 1, dtype=torch.float64), (1 - math.exp(-2)) / 2

    def never(*_: Any) -> Any:
        raise AssertionError("looked up by more than what was given")

    for _ in range(3):
        assert node(u0).penalty.item() == pytest.approx(energy, rel=1e-5)
        monkeypatch.setattr(plans, "_key", never)


def test_stochastic_solves_are_told_apart_by_their_noise_and_have_seeds_of_their_own() -> None:
    def problem(**given: str) -> psn.SDEProblem:
        u0 = torch.ones(2, 2, dtype=torch.float64)
        return psn.SDEProblem(lambda t, u: -u, lambda t, u: 0.1 * u, u0, (0.0, 1.0), **given)

    def solved(asked: psn.SDEProblem, seed: int = 1) -> psn.Solution:
        generator = torch.Generator().manual_seed(seed)
        return psn.solve(asked, psn.EM(), controller=psn.FixedStep(), dt0=0.25, generator=generator)

    diagonal, scalar = solved(problem()), solved(problem(noise="scalar"))
    assert not torch.equal(diagonal.u1, scalar.u1)
    assert torch.equal(solved(problem()).u1, diagonal.u1)
    assert not torch.equal(solved(problem(), seed=2).u1, diagonal.u1)
    with pytest.raises(ValueError, match="stratonovich"):
        solved(problem(interpretation="stratonovich"))
    with pytest.raises(TypeError, match="generator"):
        psn.solve(problem(), psn.EM(), controller=psn.FixedStep(), dt0=0.25, generator=3)


def test_whether_julia_is_there_is_asked_each_time_where_nobody_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing: list[str | None] = [None]
    monkeypatch.setattr(runtime, "unavailable_reason", lambda: missing[0])
    problem = _problem()
    adjoint = psn.QuadratureAdjoint()

    def plan(engine: str) -> Plan:
        usual: dict[str, Any] = dict.fromkeys(
            ("saveat", "dt0", "dtmin", "dtmax", "controller", "generator")
        )
        usual |= {"rtol": 1e-3, "atol": 1e-3, "adjoint": None, "tstops": (), "events": ()}
        usual |= {"max_steps": 100, "progress": False, "throw": True, "compile": False}
        return plan_of(problem, None, {"engine": engine, "adjoint": adjoint}, usual)

    assert plan("auto").engine.NAME == "julia"
    missing[0] = "it is gone"
    with pytest.raises(psn.EngineUnavailable, match="it is gone"):
        plan("auto")
    assert plan("julia") is plan("julia")


def test_the_same_objects_for_another_kind_of_problem_are_another_solve() -> None:
    u0, span, how = torch.ones(1, dtype=torch.float64), (0.0, 1.0), psn.Euler()
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.5, "engine": "torch"}
    plain = psn.ODEProblem(lambda t, u: -u, u0, span)
    with_mass = psn.ODEProblem(lambda t, u: -u, u0, span, mass_matrix=2 * torch.eye(1))
    for _ in range(2):
        assert float(psn.solve(plain, how, **options).u1) == 0.25
        with pytest.raises(psn.EngineUnavailable, match="mass"):
            psn.solve(with_mass, how, **options)


def test_the_engine_that_is_set_is_asked_for_at_each_solve() -> None:
    problem, options = _problem(), {"rtol": 1e-6, "atol": 1e-6}
    for _ in range(2):
        assert psn.solve(problem, **options).engine == "torch"
    psn.set_engine("julia")
    try:
        engine = psn.solve(problem, **options).engine
    except psn.EngineUnavailable:
        engine = "julia"  # which is not here
    finally:
        psn.set_engine(None)
    assert engine == "julia"
    assert psn.solve(problem, **options).engine == "torch"


def test_methods_and_controllers_made_anew_have_the_plan_of_equal_ones() -> None:
    """And lists by their entries, as they are now, and of floating-point numbers."""

    def solved(saveat: Any, dt0: float = 0.5) -> psn.Solution:
        controller = psn.FixedStep()
        options: dict[str, Any] = {"controller": controller, "dt0": dt0, "engine": "torch"}
        return psn.solve(_problem(), psn.Euler(), saveat=saveat, **options)

    times = [0.5, 1.0]
    for _ in range(3):
        assert solved(times).u.flatten().tolist() == [0.5, 0.25]
        assert solved(times, 0.25).u.flatten().tolist() == [0.75**2, 0.75**4]
    times[0] = 0.0
    for _ in range(2):
        assert solved(times).u.flatten().tolist() == [1.0, 0.25]
    with pytest.raises(TypeError, match="saveat"):
        solved([False, 1.0])


WHOLE: dict[str, Any] = {"rtol": 1e-6, "saveat": [0.0, 1.0], "tstops": (0.5,), "throw": True}
OTHERS: dict[str, dict[str, Any]] = {
    "the same": {},
    "equal ones": {"saveat": [0.0, float("1.0")], "tstops": (float("0.5"),)},
    "another zero": {"saveat": [-0.0, 1.0]},
    "another time": {"saveat": [0.0, 0.75]},
    "more times": {"saveat": [0.0, 0.5, 1.0]},
    "a tuple": {"saveat": (0.0, 1.0)},
    "a kind that equals": {"throw": 1},
    "another tolerance": {"rtol": 1e-7},
    "tolerances": {"rtol": {"u": 1e-6}},
    "a further option": {"atol": 1e-6},
    "an engine": {"engine": "torch"},
    "a controller": {"controller": psn.PIController()},
}


@pytest.mark.skipif(not available()[0], reason=available()[1])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("start", [0.0, -0.0])
def test_c_and_python_find_the_same_plans(
    other: str, start: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was given the same things, or equal ones of the same kinds."""
    cross_in_c()

    def found(given: dict[str, Any], in_c: bool) -> Plan | None:
        problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1).double(), (start, 1.0))
        with monkeypatch.context() as patched:
            if not in_c:
                patched.setattr(plans.repeated, "recall", None)
            return plans.recent_plan(problem, psn.Tsit5(), given)

    for _ in range(3):
        psn.solve(_problem(), psn.Tsit5(), **WHOLE)
    given = {**WHOLE, **OTHERS[other]}
    plan = found(given, True)
    assert plan is found(given, False)
    same = other in ("the same", "equal ones") and math.copysign(1.0, start) > 0
    assert (plan is not None) == same
    if other == "the same" and same and plans.repeated.recall is not None:
        monkeypatch.setattr(plans, "_among", lambda *_: None)  # what is in Python
        assert found(given, True) is plan


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_tolerances_by_parts_are_found_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the very numbers of a dict, which may change."""
    cross_in_c()

    def problem() -> psn.ODEProblem:
        state = {"u": torch.ones(1).double(), "v": torch.ones(1).double()}
        return psn.ODEProblem(lambda t, x: {"u": -x["u"], "v": -x["v"]}, state, (0.0, 1.0))

    given: dict[str, Any] = {"rtol": {"u": 1e-6, "v": 1e-3}, "atol": 1e-6}
    for _ in range(3):
        psn.solve(problem(), psn.Tsit5(), **given)
    plan = plans.recent_plan(problem(), psn.Tsit5(), given)
    assert plan is not None
    if plans.repeated.recall is not None:
        monkeypatch.setattr(plans, "_among", lambda *_: None)  # what is in Python
        assert plans.recent_plan(problem(), psn.Tsit5(), given) is plan
    for change in ({"v": 1e-4}, {"w": 1e-3}):
        other = {**given, "rtol": {**given["rtol"], **change}}
        assert plans.recent_plan(problem(), psn.Tsit5(), other) is None
    given["rtol"]["v"] = 1e-4
    assert plans.recent_plan(problem(), psn.Tsit5(), given) is None
