"""The local regularizers against an implementation of their own.

Coefficients: Ch. Tsitouras, Comput. Math. Appl. 62 (2011) 770-775, table 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.solutions.solution import StopGradient

C = (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
A = (
    (),
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (
        5.86145544294642,
        -12.92096931784711,
        8.159367898576159,
        -0.071584973281401,
        -0.028269050394068383,
    ),
    (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
    ),
)
B_ERROR = (
    -0.00178001105222577714,
    -0.0008164344596567469,
    0.007880878010261995,
    -0.1447110071732629,
    0.5823571654525552,
    -0.45808210592918697,
    1 / 66,
)
RADIUS = 3.5068
RTOL, ATOL = 1e-5, 1e-6
Field = Callable[[Tensor, Tensor], Tensor]
ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def first_step(f: Field, t: float, t1: float, u: Tensor) -> float:
    """Hairer's starting step, by the book (II.4): forward in time."""
    with torch.no_grad():
        f0 = f(u.new_tensor(t), u)
        scale = ATOL + u.abs() * RTOL
        d0, d1 = rms(u / scale).item(), rms(f0 / scale).item()
        h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
        h0 = min(h0, t1 - t)
        d2 = rms((f(u.new_tensor(t + h0), u + h0 * f0) - f0) / scale).item() / h0
        largest = max(d1, d2)
        h1 = max(1e-6, 1e-3 * h0) if largest <= 1e-15 else 10 ** (-(2 + np.log10(largest)) / 5)
        return min(100 * h0, h1, t1 - t)


def tsit5(
    f: Field, t: float, h: float, u: Tensor, stop_gradient: StopGradient
) -> tuple[list[Tensor], list[Tensor]]:
    """The stages and their arguments."""
    ks: list[Tensor] = []
    arguments: list[Tensor] = []
    for c, row in zip(C, A, strict=True):
        argument = u + h * sum((a * k for a, k in zip(row, ks, strict=True)), torch.zeros_like(u))
        k = f(u.new_tensor(t + c * h), argument)
        ks.append(k.detach() if stop_gradient is True and not ks else k)
        arguments.append(argument)
    return ks, arguments


def local_error(f: Field, t: float, h: float, u: Tensor, stop_gradient: StopGradient) -> Tensor:
    """`h * rms(h sum b_error_i k_i / (atol + max(|u|, |u1|) rtol))`."""
    ks, arguments = tsit5(f, t, h, u, stop_gradient)
    error = h * sum(b * k for b, k in zip(B_ERROR, ks, strict=True))
    return h * rms(error / (ATOL + torch.maximum(u.abs(), arguments[-1].abs()) * RTOL))


def local_stiffness(f: Field, t: float, h: float, u: Tensor, stop_gradient: StopGradient) -> Tensor:
    """`|k_7 - k_6| / |g_7 - g_6| / 3.5068`."""
    ks, arguments = tsit5(f, t, h, u, stop_gradient)
    return (ks[6] - ks[5]).norm() / (arguments[6] - arguments[5]).norm() / RADIUS


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = nn.Linear(3, 8).double()
        self.outer = nn.Linear(8, 2).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.5)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        time = t.expand(*u.shape[:-1], 1)
        return self.outer(torch.tanh(self.inner(torch.cat((u, time), -1))))


def start() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 2, generator=generator, dtype=torch.float64)


class At(psn.LocalError):
    """Local error at a given time."""

    time = 0.0

    def sample_time(self, solution: psn.Solution) -> float:
        return self.time


class StiffnessAt(psn.LocalStiffness):
    """Local stiffness at a given time."""

    time = 0.0

    def sample_time(self, solution: psn.Solution) -> float:
        return self.time


def solve(network: Network, **options: Any) -> psn.Solution:
    problem = psn.ODEProblem(network, start(), (0.0, 1.0))
    return psn.solve(problem, psn.Tsit5(), rtol=RTOL, atol=ATOL, **options)


PAIRS = [(At, local_error), (StiffnessAt, local_stiffness)]
both = pytest.mark.parametrize(("kind", "reference"), PAIRS, ids=["error", "stiffness"])


@both
@pytest.mark.parametrize("step_size", ["hairer", "solver"])
@pytest.mark.parametrize("stop_gradient", [True, "state", False])
@pytest.mark.parametrize("t", [0.0, 0.31, 0.9, 0.97])
def test_value_and_gradient(
    kind: type[At],
    reference: Callable[..., Tensor],
    step_size: str,
    stop_gradient: StopGradient,
    t: float,
) -> None:
    """With `stop_gradient=True` the parameters are reached through the stages 2 to 7 alone."""
    network = Network()
    solution = solve(network)
    regularizer = kind(step_size=step_size, stop_gradient=stop_gradient)
    regularizer.time = t
    value = regularizer(solution)
    u = solution(t)
    u = u.detach() if stop_gradient else u
    if step_size == "hairer":
        h = first_step(network, t, 1.0, u.detach())
    else:
        h = min(solution.step_size(t), 1.0 - t)
    expected = reference(network, t, h, u, stop_gradient)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    parameters = list(network.parameters())
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    manual = torch.autograd.grad(expected, parameters)
    # The estimate is a difference of nearly equal stages: what is left of their digits agrees.
    for one, other in zip(found, manual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


@both
def test_stopping_the_gradient_changes_it(kind: type[At], reference: Callable[..., Tensor]) -> None:
    network = Network()
    gradients = []
    for stop_gradient in (True, False):
        regularizer = kind(stop_gradient=stop_gradient)
        regularizer.time = 0.5
        value = regularizer(solve(network))
        gradients.append(torch.autograd.grad(value, network.inner.weight)[0])
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert difference.item() > 1e-2


@both
@every_adjoint
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_every_adjoint(
    kind: type[At],
    reference: Callable[..., Tensor],
    adjoint: psn.DirectAdjoint,
    stop_gradient: StopGradient,
) -> None:
    """The same value and gradient by all, at the error of the continuous ones."""
    found = []
    for way in (psn.DirectAdjoint(), adjoint):
        network = Network()
        regularizer = kind(stop_gradient=stop_gradient, step_size="solver")
        regularizer.time = 0.4
        solution = solve(network, adjoint=way, controller=psn.FixedStep(), dt0=0.04)
        value = regularizer(solution)
        gradients = torch.autograd.grad(value, list(network.parameters()))
        found.append((value, gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [-4.0, 0.5])
def test_stiffness_of_a_linear_field(rate: float) -> None:
    node = psn.NeuralODE(lambda t, u: rate * u, regularizers=[psn.LocalStiffness()])
    solution = node(start())
    assert solution.penalty.item() == pytest.approx(abs(rate) / RADIUS, rel=1e-6)


def test_stiffness_of_a_rotation() -> None:
    """All eigenvalues have one modulus, and so has every quotient."""
    turn = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)
    node = psn.NeuralODE(lambda t, u: u @ turn, regularizers=[psn.LocalStiffness("biased")])
    assert node(start()).penalty.item() == pytest.approx(3.0 / RADIUS, rel=1e-6)


def test_methods_without_a_stiffness_estimate_are_refused() -> None:
    regularizer = psn.LocalStiffness(algorithm=psn.Midpoint())
    with pytest.raises(ValueError, match=r"Midpoint.*no stiffness estimate(.|\n)*Tsit5"):
        regularizer(solve(Network()))


def test_another_pair_than_the_solves() -> None:
    """The step is Tsit5's, whatever the solve used, unless another is named."""
    network = Network()
    solution = psn.solve(
        psn.ODEProblem(network, start(), (0.0, 1.0)), psn.BS3(), rtol=RTOL, atol=ATOL
    )
    regularizer = At()
    regularizer.time = 0.3
    u = solution(0.3).detach()
    h = first_step(network, 0.3, 1.0, u)
    expected = local_error(network, 0.3, h, u, True)
    torch.testing.assert_close(regularizer(solution), expected, rtol=1e-6, atol=0)
    lower = At(algorithm=psn.BS3())
    lower.time = 0.3
    assert lower(solution).item() > regularizer(solution).item()


def test_reverse_time() -> None:
    """The penalty is positive, and that of the mirrored field."""
    network = Network()
    values = []
    for field, span in ((network, (0.0, 1.0)), (lambda t, u: -network(-t, u), (0.0, -1.0))):
        problem = psn.ODEProblem(field, start(), span)
        solution = psn.solve(problem, rtol=RTOL, atol=ATOL)
        regularizer = At()
        regularizer.time = 0.37 * span[1]
        values.append(regularizer(solution))
    assert values[0].item() > 0
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def uneven() -> psn.Solution:
    """A solution whose steps are short near its start."""
    problem = psn.ODEProblem(
        lambda t, u: -u / (t + 0.01), torch.ones(1, dtype=torch.float64), (0.0, 2.0)
    )
    return psn.solve(problem, rtol=1e-6, atol=1e-6)


def draws(solution: psn.Solution, count: int, **options: object) -> list[float]:
    generator = torch.Generator().manual_seed(11)
    regularizer = psn.LocalError(generator=generator, **options)
    return [regularizer.sample_time(solution) for _ in range(count)]


def test_unbiased_times_are_uniform(uneven: psn.Solution) -> None:
    found = draws(uneven, 4000, sampling="unbiased")
    assert min(found) >= 0.0
    assert max(found) < 2.0
    assert stats.kstest(found, stats.uniform(0.0, 2.0).cdf).pvalue > 1e-3


def test_unbiased_times_in_reverse() -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (1.0, -1.0))
    found = draws(psn.solve(problem), 2000, sampling="unbiased")
    assert stats.kstest(found, stats.uniform(-1.0, 2.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize("include_start", [False, True])
def test_biased_times_are_uniform_over_the_steps(uneven: psn.Solution, include_start: bool) -> None:
    """Never the end; the start where it is asked for."""
    times = uneven.t.tolist()
    expected = times[0 if include_start else 1 : -1]
    counts = Counter(draws(uneven, 6000, sampling="biased", include_start=include_start))
    assert set(counts) <= set(expected)
    assert stats.chisquare([counts[t] for t in expected]).pvalue > 1e-3
    # Short steps are drawn more often than their share of time.
    assert np.mean([t < 0.2 for t in counts.elements()]) > 0.3


def test_a_solve_of_one_step_has_its_start_alone() -> None:
    problem = psn.ODEProblem(lambda t, u: 0 * u, torch.ones(1, dtype=torch.float64), (0.0, 1.0))
    solution = psn.solve(problem, dt0=1.0)
    assert solution.stats.naccept == 1
    assert set(draws(solution, 10, sampling="biased")) == {0.0}


def test_times_come_from_the_generator() -> None:
    """The same seed draws the same, and the global generator is left alone."""
    solution = solve(Network())
    before = torch.get_rng_state()
    first, second = draws(solution, 5), draws(solution, 5)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


def test_the_estimate_costs_one_step() -> None:
    """Dense output at the time, Hairer's two evaluations and the six further stages."""
    network = Network()
    solution = solve(network)
    before = solution.stats.nfe
    regularizer = At()
    regularizer.time = 0.4
    regularizer(solution)
    assert solution.stats.nfe - before == 7 + 2 + 6


def test_structures() -> None:
    """Parts of a state count like the entries of one tensor."""
    network = Network()
    flat = solve(network)
    parts = psn.solve(
        psn.ODEProblem(
            lambda t, s: tuple(network(t, torch.cat(s)).split((1, 3))),
            tuple(start().split((1, 3))),
            (0.0, 1.0),
        ),
        rtol=RTOL,
        atol=ATOL,
    )
    regularizer = At()
    regularizer.time = 0.6
    torch.testing.assert_close(regularizer(parts), regularizer(flat), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampling": "uniform"}, r'sampling.*"unbiased".*"biased".*\'uniform\''),
        ({"step_size": 0.1}, r'step_size.*"hairer".*"solver".*0.1'),
        ({"weight": float("nan")}, r"weight must be finite.*nan"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        psn.LocalError(**options)


def test_bad_weights() -> None:
    with pytest.raises(TypeError, match="weight must be a number or a schedule"):
        psn.LocalError(weight="large")  # type: ignore[arg-type]
