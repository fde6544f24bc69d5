"""Fields that draw random numbers of Python, of NumPy or of torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import rand
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
ADJOINTS = [psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0), psn.GaussAdjoint()]
FOUR: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25}
own, generator = random.Random(0), np.random.default_rng(0)

DRAWS: dict[str, Callable[[], float]] = {
    "random": lambda: random.random(),
    "gauss": random.gauss,
    "numpy": lambda: float(np.random.normal()),  # noqa: NPY002
    "rand": rand,
    "own": lambda: own.uniform(0.0, 1.0),
    "generator": lambda: float(generator.random()),
    "torch": lambda: float(torch.rand(())),
}


class Drawing(nn.Module):
    """`-u`, whose derivative in `k` is `-x u` with a number `x` that is drawn."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.k, self.draw = nn.Parameter(torch.tensor(0.0, dtype=D)), draw

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u * (1 + self.draw() * (self.k - self.k.detach()))


def seed() -> None:
    global generator
    random.seed(1)
    own.seed(2)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(4)
    generator.bit_generator.state = np.random.default_rng(5).bit_generator.state


@pytest.fixture(params=DRAWS)
def field(request: pytest.FixtureRequest) -> Drawing:
    seed()
    return Drawing(DRAWS[request.param])


def problem(field: nn.Module) -> psn.ODEProblem:
    return psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_derivatives_that_are_drawn_are_refused(field: Drawing, adjoint: psn.Adjoint) -> None:
    members = psn.EnsembleProblem(problem(field), torch.ones(2, 1, dtype=D))
    for one in (problem(field), members):
        with pytest.raises(ValueError, match="draws random numbers"):
            psn.solve(one, psn.Euler(), adjoint=adjoint, **FOUR)


def test_also_those_of_stochastic_equations(field: Drawing) -> None:
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, torch.ones(1, dtype=D), (0.0, 1.0))
    for adjoint in ADJOINTS[:2]:
        with pytest.raises(ValueError, match="draws random numbers"):
            psn.solve(noisy, psn.EM(), adjoint=adjoint, generator=torch.Generator(), **FOUR)


def test_the_graph_has_the_numbers_of_the_solve(field: Drawing) -> None:
    """`du/dk = -h (1 - h)^3 sum x`, each member with four numbers of its own."""
    adjoint = psn.DirectAdjoint()
    members = psn.EnsembleProblem(problem(field), torch.ones(3, 1, dtype=D))
    found = []
    for one in (problem(field), members):
        end = psn.solve(one, psn.Euler(), adjoint=adjoint, **FOUR).u1.sum()
        found += torch.autograd.grad(end, field.k)
    seed()
    for slope, count in zip(found, (4, 12), strict=True):
        total = sum(field.draw() for _ in range(count))
        assert float(slope) == pytest.approx(-0.25 * 0.75**3 * total, rel=1e-12)


def test_numbers_that_are_drawn_once_are_kept() -> None:
    seed()

    class Table(Drawing):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            if not hasattr(self, "x"):
                self.x = self.draw()
            return -u * (1 + self.x * (self.k - self.k.detach()))

    field = Table(DRAWS["numpy"])
    end = psn.solve(problem(field), psn.Euler(), adjoint=psn.DiscreteAdjoint(memory=0), **FOUR).u1
    (slope,) = torch.autograd.grad(end.sum(), field.k)
    assert float(slope) == pytest.approx(-(0.75**3) * field.x, rel=1e-12)


def test_adaptive_steps_are_refused(field: Drawing) -> None:
    def noisy(t: Tensor, u: Tensor) -> Tensor:
        return -u * (1 + field.draw())

    with torch.no_grad(), pytest.raises(ValueError, match="draws random numbers"):
        psn.solve(problem(noisy), psn.Tsit5())  # type: ignore[arg-type]
