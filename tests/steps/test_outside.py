"""Fields that ask clocks, the system, or chance without a seed."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import time
import uuid
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from sloping import FOUR, D, problem, slope
from torch import Tensor, nn

import pysciml_node as psn

SWEEPS = psn.DiscreteAdjoint(memory=0)
AGAIN = [SWEEPS, psn.InterpolatingAdjoint(), psn.GaussAdjoint(), psn.BacksolveAdjoint()]


def inside() -> float:
    import time as clock

    return clock.time_ns() % 1_000_003


ASKED: dict[str, Callable[[], float]] = {
    "time": lambda: time.time() % 10,
    "perf_counter_ns": lambda: perf_counter_ns() % 1_000_003,
    "monotonic_ns": lambda: time.monotonic_ns() % 1_000_003,
    "process_time_ns": lambda: time.process_time_ns() % 1_000_003,
    "time_ns": inside,
    "datetime": lambda: 1 + datetime.datetime.now(datetime.UTC).microsecond,
    "uuid4": lambda: uuid.uuid4().int % 1_000_003,
    "urandom": lambda: int.from_bytes(os.urandom(4), "little"),
    "randbelow": lambda: secrets.randbelow(1_000_003),
    "SystemRandom": lambda: random.SystemRandom().uniform(0, 1),
    "Random": lambda: random.Random().gauss(0, 1),
    "SeedSequence": lambda: int(np.random.SeedSequence().entropy) % 1_000_003,  # type: ignore[arg-type]
    "default_rng": lambda: float(default_rng().integers(1_000_003)),
    "Generator": lambda: torch.Generator().seed() % 1_000_003,
}
NAMELESS: dict[str, Callable[[], float]] = {
    "object": partial(random.SystemRandom().randrange, 1_000_003),
    "randbits": partial(secrets.randbits, 20),
}


class Asking(nn.Module):
    """`-u`, whose derivative in `k` is `-x u` with an answer `x`, or `-u`."""

    def __init__(self, ask: Callable[[], float], reads: bool = True) -> None:
        super().__init__()
        self.k, self.ask = nn.Parameter(torch.tensor(0.0, dtype=D)), ask
        self.reads, self.answers = reads, list[float]()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        x = self.ask()
        self.answers.append(x)
        return -u * (1 + (x if self.reads else 1.0) * (self.k - self.k.detach()))


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
@pytest.mark.parametrize("name", ASKED)
def test_derivatives_that_depend_on_answers_are_refused_by_name(
    name: str, adjoint: psn.Adjoint
) -> None:
    with pytest.raises(RuntimeError, match=rf"asks .*\b{name}\(\).*, and its derivatives are oth"):
        slope(Asking(ASKED[name]), adjoint)


@pytest.mark.parametrize("name", NAMELESS)
def test_so_are_those_of_what_only_an_object_knows(name: str) -> None:
    with pytest.raises(RuntimeError, match="its derivatives"):
        slope(Asking(NAMELESS[name]), SWEEPS)


@pytest.mark.parametrize("name", ["time", "uuid4", "Generator"])
def test_also_of_members_and_stochastic_equations(name: str) -> None:
    field, starts = Asking(ASKED[name]), torch.ones(2, 1, dtype=D)
    one = problem(field)
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, one.u0, (0.0, 1.0))
    for given in (noisy, psn.EnsembleProblem(noisy, starts), psn.EnsembleProblem(one, starts)):
        with pytest.raises(RuntimeError, match=rf"{name}\(\).*, and its derivatives are others"):
            slope(field, SWEEPS, given)


@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint()], ids=repr)
@pytest.mark.parametrize("name", ASKED)
def test_graphs_that_were_kept_have_the_answers_of_the_solve(
    name: str, adjoint: psn.Adjoint
) -> None:
    """`du/dk = -h (1 - h)^3 sum x`."""
    field = Asking(ASKED[name])
    end = psn.solve(problem(field), psn.Euler(), adjoint=adjoint, **FOUR).u1.sum()
    total = sum(field.answers)
    (found,) = torch.autograd.grad(end, field.k)
    assert float(found) == pytest.approx(-0.25 * 0.75**3 * total, rel=1e-12)


def test_functions_of_cython_are_walked_past() -> None:
    """`du/dk = -3 h (1 - h)^3`."""
    field = Asking(lambda: float(default_rng(0).integers(3, 4)))
    assert slope(field, psn.DiscreteAdjoint()) == pytest.approx(-3 * 0.75**3, rel=1e-12)
    assert slope(field, SWEEPS) == pytest.approx(-3 * 0.75**3, rel=1e-12)


def test_dense_output_is_refused() -> None:
    """It evaluates the field again, with any adjoint."""
    direct = psn.DirectAdjoint()
    solution = psn.solve(problem(Asking(ASKED["time"])), psn.Euler(), adjoint=direct, **FOUR)
    with pytest.raises(RuntimeError, match=r"asks time\(\).*Dense output and estimates take steps"):
        solution(0.1)


@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint(), *AGAIN], ids=repr)
@pytest.mark.parametrize("name", ASKED)
def test_a_log_of_answers_does_no_harm(name: str, adjoint: psn.Adjoint) -> None:
    """It has as many entries as the statistics have evaluations; `du/dk = -4 h (1 - h)^3`."""
    field = Asking(ASKED[name], reads=False)
    solution = psn.solve(problem(field), psn.Euler(), adjoint=adjoint, **FOUR)
    (found,) = torch.autograd.grad(solution.u1.sum(), field.k)
    assert float(found) == pytest.approx(-(0.75**3), rel=1e-12 if adjoint.discrete else 0.4)
    assert len(field.answers) == solution.stats.nfe + solution.stats.nfe_backward
