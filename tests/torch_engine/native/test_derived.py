"""Fields with Jacobian products inside, of flows and regularizers, beside the loop in Python."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import pysciml_node as psn
from pysciml_node.torch_engine.native import prepared
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.translation import export

pytestmark = [
    pytest.mark.skipif(not available()[0], reason=available()[1]),
    pytest.mark.usefixtures("looks_in_both"),
]

D = torch.float64
STEPS: Any = {"controller": psn.FixedStep(), "dt0": 0.25}


def points(batch: int = 3, width: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, dtype=D, generator=generator)


class Layered(nn.Module):
    """A layer, a function of the hidden units, and a layer back."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = nn.Parameter(torch.randn(6, width, dtype=D, generator=generator) / 2)
        self.outer = nn.Parameter(torch.randn(width, 6, dtype=D, generator=generator) / 2)
        self.between = between

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.between(t, u @ self.inner.T) @ self.outer.T


def tanh() -> Layered:
    return Layered(lambda t, h: torch.tanh(h + t))


def rates() -> list[psn.Regularizer]:
    return [psn.JacobianFrobenius(0.3, exact=False), psn.KineticEnergy(0.2)]


def outcome(
    field: Any, compile: Any, x: Tensor, regularizers: Any = (), seed: int = 0, **options: Any
) -> list[Tensor]:
    """Points, densities, the penalty, and the gradients of all of them to data and parameters."""
    flow = psn.CNF(field, event_shape=x.shape[1], compile=compile, regularizers=regularizers,
                   **{**STEPS, **options})  # fmt: skip
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    density = flow(x)
    found = [density.u, density.log_prob, density.penalty]
    loss = density.u.square().sum() + density.log_prob.sum() + density.penalty
    inputs = [x, *flow.parameters()]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*found, *gradients]


def expect_equal(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth": lambda t, h: (
        torch.tanh(h + t) + torch.sigmoid(h) * t.sin() + functional.silu(h) + functional.gelu(h)
        + functional.gelu(h, approximate="tanh") + functional.mish(h)
        + functional.softplus(h) - functional.logsigmoid(h)
    ),
    "with kinks": lambda t, h: 0.2 * (
        functional.elu(h) + functional.selu(h) + functional.relu(h) ** 3
        + h * (functional.leaky_relu(h) + functional.softshrink(h))
        + torch.where(h > 0.1, h.sin(), h**3).clamp(-2, 2)
    ),
    "normalized": lambda t, h: 0.3 * (
        functional.layer_norm(h, (6,)) + functional.group_norm(h, 2).sin() + torch.softmax(h, 1)
        + torch.logsumexp(h, 1, keepdim=True) + h / (1 + h.norm(dim=1, keepdim=True))
        + h.std(1, keepdim=True)
    ),
    "in pieces": lambda t, h: (
        torch.cat([h[:, 3:] * h[:, :3], h[:, 1:4].sin()], 1) + h.detach() * h.sin()
        + functional.conv1d(h[:, None], h.new_ones(1, 1, 3), padding=1)[:, 0].tanh()
        + functional.scaled_dot_product_attention(*[h[:, :, None]] * 3)[..., 0]
    ),
    "constant": lambda t, h: torch.ones_like(h) * t,
}  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_densities_and_penalties_and_their_gradients_are_those_of_the_loop_in_python(
    between: Callable[[Tensor, Tensor], Tensor],
) -> None:
    field = Layered(between)
    native, eager = (
        outcome(field, compile, points(), rates(), exact=False) for compile in (True, False)
    )
    expect_equal(native, eager)


def test_exact_traces_are_those_of_the_loop_in_python_at_adaptive_steps() -> None:
    norm = psn.JacobianFrobenius(exact=True)
    field, tight = tanh(), {"rtol": 1e-9, "atol": 1e-9, "controller": psn.PIController()}
    native, eager = (
        outcome(field, compile, points(), [norm], exact=True, **tight) for compile in (True, False)
    )
    expect_equal(native, eager)


def test_each_solve_has_a_probe_of_its_own_and_the_program_of_the_first() -> None:
    field, flow_options = tanh(), {"exact": False}
    first = outcome(field, True, points(), rates(), seed=0, **flow_options)
    with mock.patch.object(export, "_translate", side_effect=AssertionError("translated again")):
        second = outcome(field, True, points(), rates(), seed=1, **flow_options)
    assert (first[1] - second[1]).abs().max() > 1e-3
    expect_equal(second, outcome(field, False, points(), rates(), seed=1, **flow_options))


def test_exact_traces_are_prepared_once_for_a_kind_of_state() -> None:
    """A second solve looks at what the field can reach, and at nothing else."""
    field = tanh()
    flow, eager = (
        psn.CNF(field, event_shape=4, compile=compile, exact=True, **STEPS)
        for compile in (True, False)
    )
    for batch in (3, 5):
        flow.log_prob(points(batch))
    with mock.patch.object(prepared, "translate", side_effect=AssertionError("looked again")):
        again = [flow.log_prob(points(batch, seed=2)) for batch in (3, 5)]
    expect_equal(again, [eager.log_prob(points(batch, seed=2)) for batch in (3, 5)])


def test_a_flow_that_has_changed_is_prepared_again() -> None:
    field, x = tanh(), points()
    flow, eager = (
        psn.CNF(field, event_shape=4, compile=compile, exact=True, **STEPS)
        for compile in (True, False)
    )
    flow.log_prob(x)
    found, expected = [], []

    def compare() -> None:
        found.append(flow.log_prob(x))
        expected.append(eager.log_prob(x))

    field.between = lambda t, h: torch.sin(h) * t
    compare()
    field.inner = nn.Parameter(field.inner.detach() * 2)
    compare()
    with torch.no_grad():
        field.outer.mul_(0.5)
    compare()
    for layer in (flow.node, eager.node):
        layer.tspan = (0.25, 1.25)
    compare()
    for layer in (flow.node, eager.node):
        layer.rtol = layer.atol = 1e-3
        layer.options["controller"] = psn.PIController()
    compare()
    assert len({round(float(y.detach().sum()), 6) for y in expected}) == len(expected)
    expect_equal(found, expected)


def test_dense_output_of_a_flow_is_that_of_the_field_as_it_was() -> None:
    """It is made when it is asked for, and then as if at the end of the solve."""
    # With this tolerance an error is in units of the state, of which it is a small difference.
    field, x, seen, tolerance = tanh(), points(), [], 1e-3
    steps = STEPS | {"rtol": 0.0, "atol": tolerance}
    for compile in (True, False):
        flow = psn.CNF(field, event_shape=4, compile=compile, exact=True, **steps)
        flow.node.register_solve_hook(lambda layer, solution: seen.append(solution))
        flow.log_prob(x)
    expected = seen[1](0.3).detach(), (tolerance * seen[1].step_estimates()[0].error).detach()
    field.between = lambda t, h: torch.sin(h) * t
    expect_equal([seen[0](0.3), tolerance * seen[0].step_estimates()[0].error], list(expected))


def test_the_density_of_a_linear_flow_is_exact() -> None:
    a = torch.tensor([[0.3, -1.0], [0.8, -0.1]], dtype=D)
    flow = psn.CNF(lambda t, u: u @ a.T, event_shape=2, rtol=1e-10, atol=1e-10, compile=True)
    x = points(5, 2)
    normal = torch.distributions.Normal(torch.zeros((), dtype=D), torch.ones((), dtype=D))
    end = x @ torch.linalg.matrix_exp(a).T
    expected = normal.log_prob(end).sum(1) + a.trace()
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("compile", [True, False])
def test_an_integrand_of_the_users_is_trained_and_stops_where_it_says(compile: bool) -> None:
    scale = nn.Parameter(torch.tensor([2.0, 3.0], dtype=D))

    def integrand(t: Tensor, u: Tensor, f: Tensor) -> Tensor:
        with torch.no_grad():
            factor = scale[1] * 1.0
        return (f * scale[0] * factor + scale[1].detach()).sum(1)

    node = psn.NeuralODE(
        lambda t, u: torch.ones_like(u), regularizers=[psn.Integral(integrand, "i")],
        compile=compile,
    )  # fmt: skip
    penalty = node(torch.zeros(3, 2, dtype=D)).penalty
    torch.testing.assert_close(penalty, torch.tensor(18.0, dtype=D))
    (gradient,) = torch.autograd.grad(penalty, scale)
    torch.testing.assert_close(gradient, torch.tensor([6.0, 0.0], dtype=D))


@pytest.mark.parametrize(
    "activation", [nn.Softplus(), nn.Softplus(2.0, 10.0), nn.ELU(), nn.SELU(), nn.CELU(0.5)],
    ids=repr,
)  # fmt: skip
def test_derivatives_of_exponentials_do_not_overflow(activation: nn.Module) -> None:
    field = Layered(lambda t, h: 0.01 * activation(1000 * h))
    native, eager = (
        outcome(field, compile, points(), rates(), exact=False) for compile in (True, False)
    )
    assert all(bool(x.isfinite().all()) for x in eager)
    for a, b in zip(native, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.detach().abs().max()))


def test_what_changes_between_solves_is_seen() -> None:
    speed = psn.KineticEnergy()
    node = psn.NeuralODE(lambda t, u: torch.full_like(u, 3.0), regularizers=[speed], compile=True)
    assert float(node(points()).penalty) == pytest.approx(9.0)
    speed.reduction = "sum"
    assert float(node(points()).penalty) == pytest.approx(36.0)
    node.field = lambda t, u: torch.full_like(u, -1.0)
    assert float(node(points()).penalty) == pytest.approx(4.0)


@pytest.mark.parametrize("keys", [("b", "a"), (0, 1)])
def test_states_of_several_parts_with_p_have_their_integrals(keys: Any) -> None:
    p = {"k": torch.tensor(0.7, dtype=D, requires_grad=True), "n": 2.0}

    def field(t: Tensor, u: Any, p: Any) -> Any:
        out = (
            torch.tanh(u[keys[1]].sum(1, keepdim=True) * p["k"]).expand(3, 2),
            p["n"] * u[keys[0]].sin(),
        )
        return dict(zip(keys, out, strict=True)) if isinstance(keys[0], str) else out

    def solved(compile: bool) -> list[Tensor]:
        node = psn.NeuralODE(field, regularizers=[psn.KineticEnergy()], compile=compile, **STEPS)
        parts = [points(3, 2).requires_grad_(), points(3, 2, 2).requires_grad_()]
        u0: Any = dict(zip(keys, parts, strict=True)) if isinstance(keys[0], str) else tuple(parts)
        solution = node(u0, p)
        loss = solution.penalty + sum(solution.u1[key].sum() for key in keys)
        return [solution.penalty, *torch.autograd.grad(loss, [*parts, p["k"]])]

    expect_equal(solved(True), solved(False))


def test_single_precision_and_backward_in_time() -> None:
    flow = psn.CNF(tanh().float(), event_shape=4, exact=True, compile=True)
    x = points().float()
    there = flow.transform(x)
    back = flow.inverse(there.u)
    torch.testing.assert_close(back.u, x, rtol=0, atol=1e-4)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=1e-4)


def test_estimates_of_steps_are_those_of_the_loop_in_python() -> None:
    # Errors that are far above rounding.
    loose = {"rtol": 0.1, "atol": 0.1, "dt0": 1.0}
    estimated = [psn.GlobalError(), psn.KineticEnergy()]
    found = [
        outcome(tanh(), compile, points(), estimated, exact=False, **loose)
        for compile in (True, False)
    ]
    expect_equal(*found)


class Ranked(nn.Module):
    """Its derivative needs the place of the greatest entry."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return u * u.max(1, keepdim=True)[0]


def test_a_derivative_without_native_code_is_named_and_goes_on_eagerly_with_auto() -> None:
    flow = psn.CNF(Ranked(), event_shape=4, compile=True, **STEPS)
    with pytest.raises(psn.CompileError, match=r"Ranked uses aten\.scatter"):
        flow.log_prob(points())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", psn.PsnWarning)
        auto = psn.CNF(Ranked(), event_shape=4, compile="auto", exact=True, **STEPS)
        eager = psn.CNF(Ranked(), event_shape=4, exact=True, **STEPS)
        torch.testing.assert_close(auto.log_prob(points()), eager.log_prob(points()))


def test_autocast_is_refused_by_name() -> None:
    flow = psn.CNF(tanh(), event_shape=4, compile=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(psn.CompileError, match="does not have autocast"),
    ):
        flow.log_prob(points())


def test_a_checkpoint_recomputes_a_flow_that_it_has_translated() -> None:
    flow, x = psn.CNF(tanh(), event_shape=4, exact=True, compile=True, **STEPS), points()
    x.requires_grad_()
    inside = checkpoint(flow.log_prob, x, use_reentrant=False)
    expected = torch.autograd.grad(flow.log_prob(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(inside.sum(), x), expected, rtol=0, atol=1e-12)


def test_a_number_that_decides_in_an_integrand_is_refused() -> None:
    def integrand(t: Tensor, u: Tensor, f: Tensor) -> Tensor:
        return f.sum(1) if float(u.sum()) > 0 else -f.sum(1)

    node = psn.NeuralODE(tanh(), regularizers=[psn.Integral(integrand, "i")], compile=True)
    with pytest.raises(psn.CompileError, match="cannot be exported"):
        node(points())


def test_taylor_derivatives_are_those_of_exponential_decay() -> None:
    node = psn.NeuralODE(
        lambda t, u: -u, regularizers=[psn.TaylorDerivative(3)], compile=True, rtol=1e-9, atol=1e-9
    )
    expected = (1 - math.exp(-2)) / 2
    assert float(node(torch.ones(2, 1, dtype=D)).penalty) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_of_a_batch_normalization_are_constants(affine: bool) -> None:
    layer = nn.BatchNorm1d(6, affine=affine, dtype=D).eval()
    layer.running_mean, layer.running_var = points(1, 6)[0], points(1, 6)[0].square() + 0.5
    field = Layered(lambda t, h: torch.tanh(layer(h + t)))
    native, eager = (
        outcome(field, compile, points(), rates(), exact=True) for compile in (True, False)
    )
    expect_equal(native, eager)
    layer.running_mean += 1.0
    expect_equal(*(outcome(field, compile, points(), exact=True) for compile in (True, False)))
    layer.train()
    with pytest.raises(psn.CompileError):
        outcome(field, True, points())


@pytest.mark.parametrize("track", [True, False])
def test_batch_normalization_in_training_is_refused_in_words_of_the_package(track: bool) -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, track_running_stats=track, dtype=D)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(self.norm(u))

    flow = psn.CNF(Field(), event_shape=2, compile=True)
    match = "changes its buffers .norm.running_mean" if track else "statistics of the batch"
    with pytest.raises(psn.CompileError, match=match):
        flow.log_prob(torch.ones(3, 2, dtype=D))


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=D))
        self.power = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x**self.power


@pytest.mark.parametrize("compiled", [True, False])
def test_what_an_integrand_reads_may_change_between_solves(compiled: bool) -> None:
    """Of `u' = -u` from 1 the integral of `c f^2` is `c (1 - exp(-2)) / 2`."""
    scale, c = _Scale(), 1.0
    node = psn.NeuralODE(
        lambda t, u: -u,
        rtol=1e-10,
        atol=1e-10,
        regularizers=[psn.Integral(lambda t, u, f: scale(c * f[:, 0] ** 2), "sum")],
        compile=compiled,
    )
    energy, regularizer = (1 - math.exp(-2)) / 2, node.regularizers[0]

    def expect(value: float, rows: int = 3) -> None:
        for _ in range(2):
            solution = node(torch.ones(rows, 1, dtype=D))
            assert solution.penalties["sum"].item() == pytest.approx(value, rel=1e-7)
            (slope,) = torch.autograd.grad(solution.penalty, scale.factor)
            assert (slope * scale.factor).item() == pytest.approx(value, rel=1e-7)

    expect(energy)
    c = 2.0
    expect(2 * energy)
    with torch.no_grad():
        scale.factor.mul_(3)
    expect(6 * energy)
    expect(6 * energy, rows=5)
    scale.power = 2  # c^2 f^4
    expect(3 * 4 * (1 - math.exp(-4)) / 4)
    regularizer.fn = lambda t, u, f: scale.factor * u[:, 0]
    expect(3 * (1 - math.exp(-1)))


@pytest.mark.parametrize(
    "regularizer",
    [
        psn.KineticEnergy(),
        psn.JacobianFrobenius(),
        psn.Integral(lambda t, u, f: f.square().sum(1), "squares"),
    ],
    ids=lambda x: x.name,
)
def test_integrands_of_equal_solves_are_translated_once(regularizer: psn.Regularizer) -> None:
    node, eager = (
        psn.NeuralODE(tanh(), regularizers=[regularizer], compile=compile, **STEPS)
        for compile in (True, False)
    )
    eager.load_state_dict(node.state_dict())
    for batch in (3, 5):
        node(points(batch))
    with mock.patch.object(prepared, "translate", side_effect=AssertionError("looked again")):
        again = [node(points(batch, seed=2)).penalty for batch in (3, 5)]
        with pytest.raises(AssertionError, match="again"):
            node(points(4))
    expect_equal(again, [eager(points(batch, seed=2)).penalty for batch in (3, 5)])
