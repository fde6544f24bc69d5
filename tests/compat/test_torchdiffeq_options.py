"""torchdiffeq's options, norms, callbacks and adjoint arguments do what they say."""

import math

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint, odeint_adjoint


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Counted(nn.Module):
    """`y' = -rate y + sin(9 t)`, with its evaluations counted and a parameter that it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(times(0.5))
        self.unused = nn.Parameter(times(1.0, 2.0))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return -self.rate * y + torch.sin(9 * t)


def evaluations(options, y0=None, **arguments):
    field = Counted()
    odeint(field, times(1.0, 0.1) if y0 is None else y0, times(0.0, 2.0), options=options)
    return field.nfe


def test_a_norm_drives_the_steps():
    largest = evaluations({"norm": lambda y: y.abs().max()})
    assert largest < evaluations({"norm": lambda y: 100 * y.abs().max()})
    assert evaluations({"norm": lambda y: y.abs().max() * 0.0}) < largest


def test_a_norm_sees_the_structure_of_the_state():
    seen = []

    def norm(state):
        seen.append(tuple(part.shape for part in state))
        return max(part.abs().max() for part in state)

    y0 = (times(1.0)[0], torch.ones(2, 3).double())
    odeint(lambda t, y: (-y[0], y[1]), y0, times(0.0, 1.0), options={"norm": norm})
    assert set(seen) == {((), (2, 3))}


def test_the_norm_of_a_tuple_is_that_of_its_largest_part():
    """A part beside many entries that are at rest is as accurate as alone."""
    still = torch.zeros(10_000).double()
    field = lambda t, y: (torch.cos(9 * t) * y[0], torch.zeros_like(y[1]))  # noqa: E731
    beside, _ = odeint(field, (times(1.0), still), times(0.0, 2.0), rtol=1e-5, atol=1e-5)
    alone = odeint(lambda t, y: torch.cos(9 * t) * y, times(1.0), times(0, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside, alone, rtol=1e-10, atol=0)


def test_min_step_takes_steps_whatever_their_error_is():
    field = Counted()
    options = {"min_step": 0.25}
    y = odeint(field, times(1.0), times(0.0, 2.0), options=options, rtol=1e-9, atol=1e-9)
    assert bool(torch.isfinite(y).all())
    # At most the eight steps of that size, and what starts the solve.
    assert field.nfe <= 8 * 6 + 3
    with pytest.raises(psn.SolverFailure):
        odeint(lambda t, y: y / (t < 0.5), times(1.0), times(0.0, 2.0), options=options)


@pytest.mark.filterwarnings("ignore:the corrector has not converged")
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "rk4", "gl4", "implicit_adams"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_callbacks_tell_of_every_step(method, adjoint):
    field, told = Counted(), {}

    def listener(name):
        def listen(t, y, dt):
            told.setdefault(name, []).append((float(t), float(dt)))
            assert isinstance(y, tuple) == name.endswith("adjoint")

        return listen

    adaptive = method in ("dopri5", "bosh3", "fehlberg2")
    names = ["callback_step", *(["callback_accept_step", "callback_reject_step"] * adaptive)]
    for name in names:
        setattr(field, name, listener(name))
        if adjoint:
            setattr(field, f"{name}_adjoint", listener(f"{name}_adjoint"))
    options = None if adaptive else {"step_size": 0.25}
    y0 = times(1.0).requires_grad_()
    solve = odeint_adjoint if adjoint else odeint
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    y = solve(field, y0, times(2.0, 0.0), method=method, options=options, **tolerances)
    y[-1].sum().backward()
    for suffix in ("", *(["_adjoint"] * adjoint)):
        steps = told[f"callback_step{suffix}"]
        if adaptive:
            accepted = told[f"callback_accept_step{suffix}"]
            rejected = told.get(f"callback_reject_step{suffix}", [])
            assert len(accepted) + len(rejected) == len(steps)
            steps = accepted
        else:
            assert len(steps) == 8
        # They follow one another through the interval.
        assert sum(dt for _, dt in steps) == pytest.approx(2.0)
        forward = suffix != ""
        assert steps[0][0] == (0.0 if forward else 2.0)
        assert [t for t, _ in steps] == sorted((t for t, _ in steps), reverse=not forward)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"adjoint_options": {"norm": "seminorm"}},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.02}},
        {"adjoint_method": "gl6", "adjoint_options": {"step_size": 0.1}},
        {"adjoint_rtol": 1e-9, "adjoint_atol": (1e-9, 1e-10)},
        {"adjoint_options": {"max_step": 0.1}},
        {"adjoint_options": {"norm": lambda state: max(part.abs().max() for part in state)}},
        {"adjoint_method": "implicit_adams", "adjoint_options": {"step_size": 0.02}},
    ],
)
def test_every_backward_pass_has_the_gradient(arguments):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    y0 = (times(0.3, -0.7, 0.2).requires_grad_(), times(1.0).requires_grad_())
    t = times(0.0, 0.7, 1.0).requires_grad_()

    def field(t, y):
        return torch.tanh(y[0] @ weight + t), (y[0].square().sum() - y[1]).reshape(1)

    def gradients(solve, **arguments):
        a, b = solve(field, y0, t, rtol=1e-9, atol=1e-9, **arguments)
        return torch.autograd.grad(a.square().sum() + b[1:].sum(), (*y0, t, weight))

    found, expected = gradients(odeint_adjoint, **arguments), gradients(odeint)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_parameters_that_are_not_used_have_gradients_of_zero(method):
    field = Counted()
    t = torch.linspace(0, 1, 5).double()
    odeint_adjoint(field, times(1.0), t, method=method)[-1].sum().backward()
    assert field.rate.grad is not None
    assert field.unused.grad is not None
    assert not field.unused.grad.any()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_params_restrict_and_need_not_be_leaves(method):
    leaf, other = times(0.3).requires_grad_(), times(0.2).requires_grad_()
    rate = leaf * 2
    t = torch.linspace(0, 1, 11).double()
    y = odeint_adjoint(
        lambda t, y: -(rate + other) * y, times(1.0), t, method=method, adjoint_params=(rate,)
    )
    found = torch.autograd.grad(y[-1].sum(), (leaf, other), allow_unused=True)
    torch.testing.assert_close(found[0], -2 * torch.exp(times(-0.8)), rtol=1e-4, atol=0)
    assert found[1] is None or not found[1].any()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_backward_solve_scales_with_the_loss(scale):
    field, y0 = Counted(), times(1.0, 0.3).requires_grad_()

    def gradient(factor):
        y = odeint_adjoint(field, y0, times(0.0, 2.0), adjoint_rtol=1e-5, adjoint_atol=1e-7)
        return torch.autograd.grad(factor * y[-1].square().sum(), (y0, field.rate))

    for a, b in zip(gradient(scale), gradient(1.0), strict=True):
        torch.testing.assert_close(a, scale * b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "euler", "rk4", "implicit_adams"])
def test_outputs_of_fields_broadcast_and_are_converted(method):
    t = torch.linspace(0, 1, 5)
    y = odeint(lambda t, y: torch.ones(1, dtype=torch.float64), torch.zeros(2, 3), t, method=method)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[-1], torch.ones(2, 3))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "radauIIA3"])
def test_tuples_of_mixed_dtypes_are_promoted(method):
    y0 = (torch.ones(2), times(1.0))
    t = torch.linspace(0, 1, 33).double()
    a, b = odeint(lambda t, y: (-y[0], y[1].float()), y0, t, method=method)
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a[-1], torch.full((2,), math.exp(-1)).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(b[-1], times(math.e), rtol=1e-5, atol=0)


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "fehlberg2", "rk4", "explicit_adams"])
def test_complex_states_turn(solve, method):
    rate = torch.tensor([1j - 0.3], dtype=torch.complex128, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.complex128, requires_grad=True)
    t = torch.linspace(0, 1, 65).double()
    # Of higher orders explicit Adams methods are unstable here.
    options = {"max_order": 5} if method == "explicit_adams" else None
    tolerances = {"rtol": 1e-8, "atol": 1e-8}
    y = solve(lambda t, y: rate * y, y0, t, method=method, options=options, **tolerances)[-1]
    torch.testing.assert_close(y, torch.exp(rate), rtol=1e-5, atol=0)
    found = torch.autograd.grad(y.abs().square().sum(), (y0, rate))
    expected = torch.autograd.grad((y0 * torch.exp(rate)).abs().square().sum(), (y0, rate))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_backward_grid_is_built_backward():
    seen = []

    def build(func, y0, t):
        seen.append(tuple(t.tolist()))
        return torch.linspace(float(t[0]), float(t[-1]), 11).double()

    x0 = times(1.0).requires_grad_()
    options = {"grid_constructor": build}
    y = odeint_adjoint(lambda t, y: y, x0, times(0, 1), method="euler", options=options)
    y[-1].sum().backward()
    assert seen == [(0.0, 1.0), (1.0, 0.0)]
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, times(1.1**10), rtol=1e-12, atol=0)
