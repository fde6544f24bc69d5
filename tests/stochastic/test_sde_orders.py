"""Strong and weak orders of the stochastic methods, and the errors adaptive solves end with."""

from __future__ import annotations

import math

import pytest
import torch
from conformance.problems import observed_order
from stochastic.sde_problems import KNOWN, SEED, errors

import pysciml_node as psn
from pysciml_node.algorithms.stochastic import StochasticRungeKutta

# The nominal order of each method on each kind of noise.
STRONG = [
    (psn.EM(), "noisy", 0.5),
    (psn.EM(), "rotation", 0.5),
    (psn.EM(), "pendulum", 1.0),
    (psn.RKMil(), "noisy", 1.0),
    (psn.RKMil(), "noisy stratonovich", 1.0),
    (psn.RKMil(), "scalar", 1.0),
    (psn.EulerHeun(), "noisy stratonovich", 1.0),
    (psn.EulerHeun(), "scalar stratonovich", 1.0),
    (psn.EulerHeun(), "rotation stratonovich", 1.0),
    (psn.EulerHeun(), "heisenberg", 0.5),
    (psn.EulerHeun(), "pendulum", 1.0),
    (psn.StratonovichMidpoint(), "noisy stratonovich", 1.0),
    (psn.StratonovichMidpoint(), "rotation stratonovich", 1.0),
    (psn.StratonovichMidpoint(), "heisenberg", 0.5),
    (psn.StratonovichMidpoint(), "pendulum", 1.0),
    (psn.ReversibleHeun(), "pendulum", 1.0),
    (psn.ReversibleHeun(), "heisenberg", 0.5),
    *((method, "pendulum", 1.5) for method in (psn.SRA1(), psn.SOSRA(), psn.SOSRA2())),
    *(
        (method, problem, 1.5)
        for method in (psn.SRIW1(), psn.SOSRI(), psn.SOSRI2())
        for problem in ("noisy", "scalar", "sinh")
    ),
]
WEAK = [
    (psn.EM(), "geometric", 1, 1.0),
    (psn.EM(), "additive", 2, 1.0),
    (psn.RKMil(), "geometric", 1, 1.0),
    (psn.RKMil(), "geometric stratonovich", 1, 1.0),
    (psn.EulerHeun(), "geometric stratonovich", 1, 1.0),
    (psn.EulerHeun(), "rotation stratonovich", 2, 1.0),
    (psn.StratonovichMidpoint(), "geometric stratonovich", 1, 1.0),
    (psn.ReversibleHeun(), "geometric stratonovich", 1, 1.0),
    (psn.ReversibleHeun(), "rotation stratonovich", 2, 1.0),
    *((method, "additive", 2, 2.0) for method in (psn.SRA1(), psn.SOSRA(), psn.SOSRA2())),
    *((method, "geometric", 1, 2.0) for method in (psn.SRIW1(), psn.SOSRI(), psn.SOSRI2())),
]


def label(value: object) -> str:
    return type(value).__name__ if isinstance(value, StochasticRungeKutta) else str(value)


@pytest.mark.parametrize(("method", "problem", "order"), STRONG, ids=label)
def test_strong_order(method: StochasticRungeKutta, problem: str, order: float) -> None:
    """Root-mean-square error over 3,000 paths; they are the same for all step sizes."""
    sizes = [2.0**-k for k in range(4, 9)]
    found = [errors(problem, method, h, 3000)[0].square().mean().sqrt().item() for h in sizes]
    assert observed_order(sizes, found) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("method", "problem", "moment", "order"), WEAK, ids=label)
def test_weak_order(method: StochasticRungeKutta, problem: str, moment: int, order: float) -> None:
    """Error of a mean or mean square over 20,000 paths that the exact solution shares.

    What is left of Monte Carlo's error is that of the difference, at most a fifth of it.
    """
    sizes = [2.0**-k for k in range(2, 6)]
    found = []
    for h in sizes:
        error, solution = errors(problem, method, h, 20_000)
        exact = solution.u1 - error
        difference = (solution.u1**moment - exact**moment).mean(-1)
        spread = difference.std().item() / math.sqrt(len(difference))
        found.append(abs(difference.mean().item()))
        assert spread < found[-1] / 5
    assert observed_order(sizes, found) == pytest.approx(order, abs=0.3)


ADAPTIVE = [
    (psn.EulerHeun(), "rotation stratonovich", 3e-2),
    (psn.RKMil(), "noisy", 1e-2),
    (psn.RKMil(), "noisy stratonovich", 1e-2),
    (psn.EulerHeun(), "noisy stratonovich", 1e-2),
    (psn.StratonovichMidpoint(), "noisy stratonovich", 1e-2),
    (psn.ReversibleHeun(), "noisy stratonovich", 1e-2),
    (psn.SRA1(), "pendulum", 1e-2),
    (psn.SOSRA(), "pendulum", 1e-2),
    (psn.SRIW1(), "noisy", 1e-3),
    (psn.SOSRI(), "noisy", 1e-2),
    (psn.SOSRI2(), "sinh", 1e-2),
]


@pytest.mark.parametrize(("method", "problem", "tolerance"), ADAPTIVE, ids=label)
def test_adaptive_solves_reach_the_strong_error_asked_for(
    method: StochasticRungeKutta, problem: str, tolerance: float
) -> None:
    """The root-mean-square error at the end, in units of `atol + rtol |u|`."""
    known = KNOWN[problem]
    with torch.no_grad():
        solution = psn.solve(
            known.make(200),
            method,
            rtol=tolerance,
            atol=tolerance,
            generator=torch.Generator().manual_seed(SEED),
        )
        exact = known.exact(solution)
    error = (solution.u1 - exact) / (tolerance * (1 + exact.abs()))
    assert error.square().mean().sqrt() < 1.0
    assert solution.step_errors.max() <= 1.0


@pytest.mark.parametrize(
    ("method", "problem"), [(psn.SRIW1(), "noisy"), (psn.EM(), "pendulum")], ids=label
)
def test_errors_follow_the_tolerance(method: StochasticRungeKutta, problem: str) -> None:
    known, found = KNOWN[problem], []
    for tolerance in (1e-2, 1e-3):
        solution = psn.solve(
            known.make(200),
            method,
            rtol=tolerance,
            atol=tolerance,
            generator=torch.Generator().manual_seed(SEED),
        )
        found.append((solution.u1 - known.exact(solution)).square().mean().sqrt().item())
    assert found[0] > 3 * found[1]


class UncheckedEM(psn.EM):
    """Euler-Maruyama as it is refused: with steps that follow the path for any noise."""

    adapts_to = psn.EM.noises


@pytest.mark.parametrize(
    ("method", "solves", "biased"),
    [(psn.RKMil(), 1000, False), (UncheckedEM(), 60, True)],
    ids=label,
)
def test_steps_that_follow_single_paths_bias_euler_maruyama(
    method: StochasticRungeKutta, solves: int, biased: bool
) -> None:
    """The mean of a martingale at a tolerance of 0.1, in standard errors.

    Of the difference from the exact solution on the same path, whose mean is 1. What such steps
    leave of a bias with Milstein's terms is far below the tolerance.
    """
    generator = torch.Generator().manual_seed(SEED)
    sigma, differences, rejected = 0.8, [], 0
    with torch.no_grad():
        for _ in range(solves):
            problem = psn.SDEProblem(
                lambda t, u: 0 * u, lambda t, u: sigma * u, torch.ones(1).double(), (0.0, 1.0)
            )
            solution = psn.solve(
                problem, method, rtol=0.1, atol=0.1, dt0=0.5, generator=generator, engine="torch"
            )
            exact = torch.exp(sigma * solution.brownian(0.0, 1.0) - sigma**2 / 2)
            differences.append(solution.u1 - exact)
            rejected += solution.stats.nreject
    assert rejected > solves / 10
    found = torch.cat(differences)
    deviations = abs(found.mean().item()) / (found.std().item() / math.sqrt(solves))
    assert deviations > 5 if biased else deviations < 3
