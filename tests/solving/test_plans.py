"""What is worked out once for equal solves is worked out again for those that only look equal."""

from __future__ import annotations

import math

import pytest
import torch

import pysciml_node as psn
from pysciml_node import tableaus
from pysciml_node.algorithms.controllers import StepSizes
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.tableaus import Tableau


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
