"""Every method of torchdiffeq converges as its theory says, with its derivatives."""

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint, odeint_adjoint
from pysciml_node.compat.torchdiffeq.multistep import adams_weights

ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
    "implicit_euler": 1,
    "implicit_midpoint": 2,
    "trapezoid": 2,
    "radauIIA3": 3,
    "radauIIA5": 5,
    "gl4": 4,
    "gl6": 6,
    "sdirk2": 2,
    "trbdf2": 2,
}
IMPLICIT = tuple(ORDERS)[5:]
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def growth(t, y):
    """Of `exp(sin t)`, which is neither linear in time nor a polynomial."""
    return torch.cos(t) * y


@pytest.mark.parametrize("method", ORDERS)
def test_fixed_steps_have_their_order(method):
    errors = []
    coarse = 6 if ORDERS[method] > 2 else 24
    for steps in (coarse, 2 * coarse):
        options = {"step_size": 1.5 / steps}
        y = odeint(growth, times(1.0), times(0.0, 1.5), method=method, options=options)
        errors.append(abs(float(y[-1]) - math.exp(math.sin(1.5))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.35)


@pytest.mark.parametrize("method", IMPLICIT)
def test_implicit_methods_damp_what_is_stiff(method):
    """Steps 500 times too long for an explicit method; both directions of coupling."""
    fast = torch.tensor([[-1000.0, 999.0], [0.0, -1.0]], dtype=torch.float64)
    y = odeint(
        lambda t, y: y @ fast.T,
        times(2.0, 1.0),
        times(0.0, 1.0),
        method=method,
        options={"step_size": 1 / 64},
    )[-1]
    # The first component follows the second, but where a method's stability function is near -1.
    bound = {"implicit_euler": 1e-2, "gl4": 3e-2, "gl6": 3e-2}.get(method, 2e-3)
    if method not in ("implicit_midpoint", "trapezoid"):
        torch.testing.assert_close(y, torch.full_like(y, math.exp(-1)), rtol=bound, atol=bound)
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("method", IMPLICIT)
def test_implicit_steps_have_derivatives_of_both_orders(method):
    y0, rate = times(0.4, -0.3).requires_grad_(), times(0.7).requires_grad_()

    def final(y0, rate, t=None):
        t = times(0.0, 0.4) if t is None else t
        return odeint(lambda t, y: rate * torch.sin(y) - t * y.flip(0) ** 2, y0, t, method=method)

    assert torch.autograd.gradcheck(final, (y0, rate, times(0.0, 0.3, 0.7).requires_grad_()))
    assert torch.autograd.gradgradcheck(final, (y0, rate))


def test_implicit_steps_that_have_no_solution_fail():
    options = {"step_size": 1.0}
    with pytest.raises(psn.SolverFailure):
        # k = 1 + (y + k)^2 has no real root.
        odeint(
            lambda t, y: 1 + y**2,
            times(1.0),
            times(0.0, 1.0),
            method="implicit_euler",
            options=options,
        )


@pytest.mark.parametrize("method", ADAMS)
def test_adams_methods_follow_grids_of_any_steps(method):
    grid = torch.linspace(0, 1.5, 61, dtype=torch.float64) ** 1.2
    y = odeint(growth, times(1.0), grid, method=method, options={"max_order": 6})
    torch.testing.assert_close(y[:, 0], torch.exp(torch.sin(grid)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("method", ADAMS)
def test_adams_methods_have_derivatives(method):
    y0, t = times(0.4).requires_grad_(), torch.linspace(0, 1, 8).double().requires_grad_()
    options = {"max_iters": 60} if method != "explicit_adams" else {}
    tight = {"rtol": 1e-14, "atol": 1e-14, "options": options}

    def solve(y0, t):
        return odeint(lambda t, y: torch.sin(y) * t, y0, t, method=method, **tight)

    assert torch.autograd.gradcheck(solve, (y0, t))


def test_adams_weights_of_equal_steps():
    """Bashforth and Moulton: Hairer, Norsett and Wanner I, table III.1.1 and III.1.2."""
    bashforth = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    assert adams_weights(times(0, -1, -2, -3)).tolist() == pytest.approx(bashforth, rel=1e-13)
    moulton = [9 / 24, 19 / 24, -5 / 24, 1 / 24]
    assert adams_weights(times(1, 0, -1, -2)).tolist() == pytest.approx(moulton, rel=1e-13)


def test_a_corrector_that_does_not_converge_says_so():
    with pytest.warns(psn.PsnWarning, match="has not converged in 2 iterations"):
        odeint(
            lambda t, y: -3 * y,
            times(1.0),
            torch.linspace(0, 2, 11).double(),
            method="implicit_adams",
            options={"max_iters": 2},
        )


@pytest.mark.parametrize("solver", ["RK45", "DOP853", "Radau", "BDF", "LSODA"])
@pytest.mark.parametrize("direction", [1, -1])
def test_scipys_solvers(solver, direction):
    pytest.importorskip("scipy")
    t = direction * torch.linspace(0, 1, 4, dtype=torch.float64)
    y0 = (times(1.0), times(2.0, 3.0).view(2, 1))
    a, b = odeint(
        lambda t, y: (-y[0], 2 * y[1]), y0, t, method="scipy_solver", options={"solver": solver}
    )
    torch.testing.assert_close(a[:, 0], torch.exp(-t), rtol=1e-5, atol=0)
    torch.testing.assert_close(b[:, 1, 0], 3 * torch.exp(2 * t), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["scipy_solver", "implicit_adams", "rk4", "fehlberg2"])
def test_the_adjoint_of_any_method(method):
    rate = times(0.7).requires_grad_()
    y0, t = times(1.3).requires_grad_(), torch.linspace(0, 1, 21).double().requires_grad_()
    tolerances = {"rtol": 1e-8, "atol": 1e-8}
    y = odeint_adjoint(lambda t, y: -rate * y * t, y0, t, method=method, **tolerances)[-1]
    found = torch.autograd.grad(y, (y0, rate, t))
    decay = torch.exp(-rate / 2)
    torch.testing.assert_close(found[0], decay.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], (-y0 / 2 * decay).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2][-1:], (-rate * y).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_float32_rounds_once_a_step(method):
    """The rounding of long solves is that of the additions to the state, and no more."""

    def run(dtype):
        t = torch.linspace(0, 1, 2001, dtype=torch.float64)
        y0 = torch.linspace(0.5, 2.0, 64, dtype=torch.float64)
        return odeint(lambda t, y: torch.sin(3 * t) * y, y0.to(dtype), t.to(dtype), method=method)

    difference = (run(torch.float32)[-1].double() / run(torch.float64)[-1] - 1).abs()
    eps = torch.finfo(torch.float32).eps
    # Rounding to nearest walks: the root of the number of steps, with room for times in float32.
    assert float(difference.max()) < 0.5 * eps * math.sqrt(2000) * 3


def test_steps_cannot_tell_where_a_grid_was_cut():
    """A grid with and without gradients gives the same states."""
    t = torch.linspace(0, 1, 7, dtype=torch.float64) ** 2
    for method in (*ORDERS, *ADAMS[:2]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain, moving = (
                odeint(growth, times(1.0), t.clone().requires_grad_(needs), method=method)
                for needs in (False, True)
            )
        torch.testing.assert_close(plain, moving.detach(), rtol=1e-11, atol=1e-12)


def test_interp_between_the_times_of_the_grid():
    t, ends = times(0.0, 0.3, 1.0), (0.0, 0.5, 1.0)
    field = growth
    states = [times(1.0)]
    for start, end in itertools.pairwise(ends):
        states.append(states[-1] + (end - start) * field(times(start)[0], states[-1]))
    slopes = [field(times(time)[0], y) for time, y in zip(ends, states, strict=True)]
    x = 0.6
    linear = states[0] + x * (states[1] - states[0])
    h00, h10, h11 = 2 * x**3 - 3 * x**2 + 1, x**3 - 2 * x**2 + x, x**3 - x**2
    cubic = h00 * states[0] + (1 - h00) * states[1] + 0.5 * h10 * slopes[0] + 0.5 * h11 * slopes[1]
    for interp, expected in (("linear", linear), ("cubic", cubic)):
        options = {"step_size": 0.5, "interp": interp}
        y = odeint(field, times(1.0), t, method="euler", options=options)
        torch.testing.assert_close(y[1], expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(y[2], states[2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "implicit_adams"])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_times_that_fall_on_ends_of_steps_have_their_gradients(method, interp):
    """As beside the ends: a state moves along the steps, and not with where they end."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cos(t) * y

    def gradients(shift: float) -> torch.Tensor:
        t = times(0.0, 0.25 - shift, 0.5 + shift, 1.0).requires_grad_()
        options = {"step_size": 0.0625, "interp": interp}
        y = odeint(field, times(1.0), t, method=method, options=options)
        found = torch.autograd.grad((y[:, 0] * times(0.0, 1.0, 2.0, 1.0)).sum(), t)
        return found[0]

    on, beside = gradients(0.0), gradients(1e-7)
    # Steps on both sides of an end have other slopes, of which either is right.
    torch.testing.assert_close(on, beside, rtol=0.1, atol=0)
    exact = torch.exp(torch.sin(times(0.25, 0.5))) * torch.cos(times(0.25, 0.5)) * times(1.0, 2.0)
    torch.testing.assert_close(on[1:3], exact, rtol=0.1, atol=0)
