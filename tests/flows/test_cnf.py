"""Continuous normalizing flows against closed forms, quadrature and autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import pysciml_node as psn
from pysciml_node.flows import CNF
from pysciml_node.layers import augmented
from pysciml_node.layers.timed import TimedField
from pysciml_node.steps.graph import pull_back

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(batch: int = 5, width: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64, generator=generator(seed))


class Linear(nn.Module):
    """`u' = A u`."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        a = torch.randn(width, width, dtype=torch.float64, generator=generator(seed))
        self.a = nn.Parameter(a / math.sqrt(width))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return u @ self.a.T


def curved(width: int = 2, hidden: int = 6, seed: int = 3) -> TimedField:
    """A nonlinear field that depends on time."""
    return TimedField.mlp(
        width,
        (hidden,),
        time="concatsquash",
        start_at_rest=False,
        generator=generator(seed),
    ).double()


def gaussian(field: Linear) -> MultivariateNormal:
    """What a standard normal base becomes under a linear field over [0, 1]."""
    back = torch.linalg.matrix_exp(-field.a.detach())
    zero = torch.zeros(len(back), dtype=torch.float64)
    return MultivariateNormal(zero, covariance_matrix=back @ back.T)


@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Vern7(), psn.DP5()])
def test_samples_have_the_exact_density_of_a_linear_flow(width: int, algorithm: Any) -> None:
    field = Linear(width)
    flow = CNF(field, algorithm, event_shape=width, exact=True, **TIGHT)
    x = flow.sample((4, 8), generator())
    expected = gaussian(field).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-6)


def test_samples_have_the_covariance_of_a_linear_flow() -> None:
    field = Linear(2)
    x = CNF(field, event_shape=2).sample((40_000,), generator())
    expected = gaussian(field).covariance_matrix
    # Entries of a sample covariance have standard errors below sqrt(2 / n) times the largest.
    bound = 4 * math.sqrt(2 / len(x)) * expected.abs().max().item()
    torch.testing.assert_close(torch.cov(x.T), expected, rtol=0, atol=bound)


def test_the_density_integrates_to_one() -> None:
    flow = CNF(curved(hidden=16), event_shape=2, rtol=1e-7, atol=1e-7)
    side = torch.linspace(-8, 8, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(mass.item() - 1) < 1e-3


def test_the_inverse_takes_back_what_forward_does() -> None:
    flow = CNF(curved(), psn.Vern7(), tspan=(0.2, 1.5), **TIGHT)
    x = points()
    there = flow.transform(x)
    back = flow.inverse(there.u)
    torch.testing.assert_close(back.u, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=1e-7)
    torch.testing.assert_close(flow.decode(there.u), x, rtol=0, atol=1e-7)


def test_the_log_determinant_is_that_of_the_flow_map() -> None:
    flow = CNF(curved(3), psn.Vern7(), adjoint=psn.DirectAdjoint(), exact=True, **TIGHT)
    x = points(3, 3)
    found = flow.transform(x).log_det
    for row, value in zip(x, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda u: flow.node(u[None]).u1[0], row)
        torch.testing.assert_close(value, torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_right_in_expectation(distribution: str) -> None:
    """The field is linear: the estimate is linear in `e e^T`, whose mean is the identity."""
    field, copies = Linear(6), 4000
    flow = CNF(field, exact=False, distribution=distribution, generator=generator())
    found = flow.transform(points(1, 6).expand(copies, 6)).log_det.detach()
    error = found.std().item() / math.sqrt(copies)
    assert abs(found.mean().item() - field.a.trace().item()) < 4 * error


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_one_probe_serves_a_whole_solve_and_the_frobenius_norm(distribution: str) -> None:
    """Where `J = a I`: trace estimate `a |e|^2`, norm estimate `a^2 |e|^2 / D`."""
    a, width = 0.7, 8
    flow = CNF(
        lambda t, u: a * u,
        exact=False,
        distribution=distribution,
        generator=generator(),
        regularizers=[psn.JacobianFrobenius(exact=False, distribution=distribution)],
        **TIGHT,
    )
    first, second = flow(points(5, width)), flow(points(5, width))
    norm = first.penalties["JacobianFrobenius"]
    torch.testing.assert_close(norm, a * first.log_det.mean() / width, rtol=1e-9, atol=0)
    assert torch.equal(first.log_det, second.log_det) == (distribution == "rademacher")


def test_sharing_the_probe_shares_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return pull_back(*arguments)

    def products(*regularizers: psn.Regularizer, exact: bool) -> float:
        calls.clear()
        flow = CNF(curved(6), exact=exact, regularizers=regularizers)
        with torch.no_grad():
            nfe = flow(points(5, 6)).nfe
        return len(calls) / nfe

    monkeypatch.setattr(augmented, "pull_back", counted)
    rnode = [psn.KineticEnergy(), psn.JacobianFrobenius(exact=False)]
    assert products(exact=False) == products(*rnode, exact=False) == 1
    assert products(psn.JacobianFrobenius(exact=True), exact=True) == 6


def test_the_generator_decides_the_probes() -> None:
    def log_prob(seed: int) -> Tensor:
        return CNF(curved(6), exact=False, generator=generator(seed)).log_prob(points(5, 6))

    assert torch.equal(log_prob(0), log_prob(0))
    assert not torch.equal(log_prob(0), log_prob(1))


def test_gradients_are_those_of_finite_differences() -> None:
    field = curved()
    flow = CNF(field, psn.RK4(), controller=psn.FixedStep(), dt0=0.25, event_shape=2)
    x = points(3).requires_grad_()
    parameters = list(field.parameters())

    def density(x: Tensor, *parameters: Tensor) -> Tensor:
        return flow.log_prob(x)

    assert torch.autograd.gradcheck(density, (x, *parameters))

    def samples(*parameters: Tensor) -> Tensor:
        return flow.rsample((3,), generator())

    assert torch.autograd.gradcheck(samples, tuple(parameters))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("exact", [True, False])
def test_every_adjoint_has_the_gradient_of_direct_differentiation(
    adjoint: Any, exact: bool
) -> None:
    def gradients(chosen: Any) -> list[Tensor]:
        field, x = curved(), points().requires_grad_()
        flow = CNF(
            field,
            psn.Vern7(),
            exact=exact,
            generator=generator(),
            adjoint=chosen,
            regularizers=[psn.KineticEnergy(0.1), psn.JacobianFrobenius(0.2, exact=exact)],
            **TIGHT,
        )
        density = flow(x)
        loss = -density.log_prob.mean() + density.penalty
        return list(torch.autograd.grad(loss, [x, *field.parameters()]))

    for found, expected in zip(gradients(adjoint), gradients(psn.DirectAdjoint()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def quadrature(flow: CNF, x: Tensor, integrand: Any) -> float:
    """`int integrand(t, u) dt`, mean over samples, by Gauss-Legendre on the dense solution."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    t0, t1 = flow.node.tspan
    with torch.no_grad():
        times = torch.tensor(t0 + (t1 - t0) * (nodes + 1) / 2)
        states = flow.node.integrate(x, regularize=False)(times)
    values = [integrand(t, u).mean() for t, u in zip(times, states, strict=True)]
    return float((torch.stack(values).detach() * torch.tensor(weights)).sum() * (t1 - t0) / 2)


def jacobians(field: nn.Module, t: Tensor, u: Tensor) -> Tensor:
    one = torch.func.jacrev(lambda x: field(t, x[None])[0])
    return torch.stack([one(x) for x in u])


def test_penalties_and_log_determinant_are_integrals_along_the_solution() -> None:
    field, x = curved(), points()
    flow = CNF(
        field,
        psn.Vern7(),
        tspan=(0.5, 2.0),
        regularizers=[
            psn.KineticEnergy(0.5),
            psn.JacobianFrobenius(0.25),
            psn.TaylorDerivative(2),
            psn.Integral(lambda t, u, f: f.norm(dim=1), "length"),
        ],
        **TIGHT,
    )
    density = flow(x)
    along = {
        "KineticEnergy": lambda t, u: field(t, u).square().mean(1),
        "JacobianFrobenius": lambda t, u: jacobians(field, t, u).square().sum((1, 2)) / 2,
        "length": lambda t, u: field(t, u).norm(dim=1),
    }
    for name, integrand in along.items():
        expected = quadrature(flow, x, integrand)
        assert math.isclose(density.penalties[name].item(), expected, rel_tol=1e-6)
    trace = quadrature(flow, x, lambda t, u: jacobians(field, t, u).diagonal(dim1=1, dim2=2).sum(1))
    assert math.isclose(density.log_det.mean().item(), trace, rel_tol=1e-6)
    found = density.penalties
    weighted = (
        0.5 * found["KineticEnergy"]
        + 0.25 * found["JacobianFrobenius"]
        + found["TaylorDerivative"]
        + found["length"]
    )
    torch.testing.assert_close(density.penalty, weighted)


def test_eval_mode_solves_without_regularizers() -> None:
    regularizers = [psn.KineticEnergy(), psn.JacobianFrobenius(), psn.LocalError()]
    field, x = curved(), points()
    flow, plain = CNF(field, regularizers=regularizers), CNF(field)
    training, evaluating, expected = flow.train()(x), flow.eval()(x), plain(x)
    assert set(training.penalties) == {"KineticEnergy", "JacobianFrobenius", "LocalError"}
    assert not evaluating.penalties
    assert evaluating.penalty.item() == 0
    assert evaluating.nfe == expected.nfe < training.nfe
    assert torch.equal(evaluating.log_prob, expected.log_prob)
    # Nor do the integrals of training drive its steps.
    torch.testing.assert_close(training.log_prob, expected.log_prob, rtol=0, atol=1e-12)


def test_the_log_determinant_drives_the_steps() -> None:
    """A state at rest asks for a few steps, its oscillating divergence for many."""
    flow = CNF(lambda t, u: torch.cos(40 * t) * u, rtol=1e-8, atol=1e-8)
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = flow.transform(x)
    expected = 2 * math.sin(40.0) / 40
    torch.testing.assert_close(found.log_det.item(), expected, rtol=0, atol=1e-6)
    assert flow.node.integrate(x).stats.naccept < 10


def test_estimates_are_those_of_the_system_that_drives_the_steps() -> None:
    """State and log-determinant, solved as one plain problem with the same steps."""
    field, u0 = curved(), points()
    flow = CNF(field, regularizers=[psn.GlobalError(), psn.KineticEnergy()])

    def both(t: Tensor, u: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = u[0] if u[0].grad_fn is not None else u[0].detach().requires_grad_()
            f = field(t, x)
            rows = [torch.autograd.grad(f[:, i].sum(), x, create_graph=True)[0] for i in (0, 1)]
        return f, rows[0][:, 0] + rows[1][:, 1]

    plain = psn.NeuralODE(both, regularizers=[psn.GlobalError()], adjoint=psn.DirectAdjoint())
    expected = plain((u0, torch.zeros(len(u0), dtype=torch.float64)))
    found = flow(u0).penalties["GlobalError"]
    torch.testing.assert_close(found, expected.penalties["GlobalError"], rtol=1e-6, atol=0)
    solution = flow.node.integrate(u0, driven={"log_det": flow._divergence})
    estimate, other = (s.local_estimate(0.4, dt=0.1) for s in (solution, expected))
    torch.testing.assert_close(estimate.error, other.error, rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.step_stiffness, expected.step_stiffness)
    assert solution(0.3).shape == solution.u1.shape == u0.shape


@pytest.mark.parametrize(
    "regularizer",
    [
        psn.LocalError(step_size="solver", generator=generator()),
        psn.LocalStiffness(generator=generator()),
        psn.GlobalError(),
        psn.GlobalStiffness(),
        psn.TaylorDerivative(2),
        psn.RandomEndTime(0.2, generator=generator()),
    ],
    ids=lambda regularizer: type(regularizer).__name__,
)
def test_every_regularizer_trains_the_field(regularizer: psn.Regularizer) -> None:
    field = curved()
    density = CNF(field, regularizers=[regularizer])(points())
    (-density.log_prob.mean() + density.penalty).backward()
    assert all(bool(p.grad.isfinite().all()) for p in field.parameters())
    if not isinstance(regularizer, psn.RandomEndTime):
        assert density.penalties[regularizer.name] > 0


def test_another_base() -> None:
    base = Independent(Normal(torch.tensor([1.0, -1.0]).double(), 0.5), 1)
    flow = CNF(lambda t, u: 0.3 * u, base=base, **TIGHT)
    assert flow.event_shape == (2,)
    x = flow.sample((7,))
    z = math.exp(0.3) * x
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(z) + 0.6, rtol=0, atol=1e-7)


def test_shapes_of_a_distribution() -> None:
    flow = CNF(curved(4).float(), event_shape=4, rtol=1e-3, atol=1e-3)
    assert flow.sample().shape == (4,)
    assert flow.sample((3, 5)).shape == (3, 5, 4)
    assert flow.log_prob(flow.sample((3, 5))).shape == (3, 5)
    assert flow.log_prob(flow.sample()).shape == ()
    assert flow.sample((2,)).dtype is torch.float32
    assert not flow.sample((2,)).requires_grad
    assert flow.rsample((2,)).requires_grad
    image = CNF(TimedField.conv(2, (3,)), event_shape=(2, 4, 4), rtol=1e-3, atol=1e-3)
    assert image.sample((3,)).shape == (3, 2, 4, 4)
    assert image.log_prob(image.sample((3,))).shape == (3,)


def test_schedules_are_stepped_and_saved() -> None:
    def flow() -> CNF:
        weight = psn.schedules.Exponential(1.0, 0.25, 2)
        return CNF(curved(), regularizers=[psn.KineticEnergy(weight)])

    first, second = flow(), flow()
    first.step_schedules()
    second.load_state_dict(first.state_dict())
    assert second.node.regularizers[0].current_weight == 0.5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CNF(3), TypeError, "field must be callable"),
        (lambda: CNF(curved(), base=3), TypeError, "torch.distributions"),
        (lambda: CNF(curved(), base=Normal(torch.zeros(2), 1.0)), ValueError, "Independent"),
        (lambda: CNF(curved(), event_shape=3, base=gaussian(Linear(2))), ValueError, "base must"),
        (lambda: CNF(curved(), distribution="uniform"), ValueError, "distribution must be"),
        (lambda: CNF(curved(), saveat=[0.5]), TypeError, "saveat"),
        (lambda: CNF(curved()).sample((3,)), ValueError, "event_shape"),
        (lambda: CNF(curved(), event_shape=2).log_prob(points(3, 4)), ValueError, r"\(2,\)"),
        (lambda: CNF(curved(), event_shape=2)(points(3)[0]), ValueError, r"\(B, 2\)"),
        (
            lambda: CNF(curved(), base=gaussian(Linear(2))).sample((3,), generator()),
            ValueError,
            "generator",
        ),
        (
            lambda: CNF(curved(), regularizers=[psn.KineticEnergy(name="log_det")])(points()),
            ValueError,
            "'log_det', which is taken",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
