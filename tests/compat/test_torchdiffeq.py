"""The adapter keeps torchdiffeq's semantics; closed forms and formulas take its place here."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "tsit5", "adaptive_heun")
# One step of each fixed-step method, as a formula.
FIXED = {
    "euler": lambda f, t, h, y: y + h * f(t, y),
    "midpoint": lambda f, t, h, y: y + h * f(t + h / 2, y + h / 2 * f(t, y)),
    "heun2": lambda f, t, h, y: y + h / 2 * (f(t, y) + f(t + h, y + h * f(t, y))),
    "heun3": lambda f, t, h, y: (
        y
        + h
        / 4
        * (f(t, y) + 3 * f(t + 2 * h / 3, y + 2 * h / 3 * f(t + h / 3, y + h / 3 * f(t, y))))
    ),
}


def three_eighths(f, t, h, y):
    k1 = f(t, y)
    k2 = f(t + h / 3, y + h * k1 / 3)
    k3 = f(t + 2 * h / 3, y + h * (k2 - k1 / 3))
    k4 = f(t + h, y + h * (k1 - k2 + k3))
    return y + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


FIXED["rk4"] = three_eighths


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def oscillator(t, y):
    return torch.stack((y[..., 1], -y[..., 0]), -1)


class Tanh(nn.Module):
    """A small field of time and state, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        self.calls: list[float] = []

    def forward(self, t, y):
        self.calls.append(float(t.detach()))
        return torch.tanh(y @ self.weight + torch.sin(3 * t))


@pytest.fixture
def y0() -> Tensor:
    return times(0.3, -0.7).requires_grad_()


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("direction", [1, -1])
def test_closed_form(method, direction):
    t = direction * torch.linspace(0, 2, 9, dtype=torch.float64)
    y = odeint(oscillator, times(1.0, 0.0), t, method=method, rtol=1e-7, atol=1e-9)
    exact = torch.stack((torch.cos(t), -torch.sin(t)), -1)
    torch.testing.assert_close(y, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_fixed_steps_go_from_one_time_to_the_next(method, interface):
    field = Tanh()
    t = times(1.0, 0.8, 0.75, 0.2)
    states = [times(0.3, -0.7)]
    for start, end in itertools.pairwise(t):
        states.append(FIXED[method](field, start, end - start, states[-1]))
    y = interface(field, states[0], t, method=method)
    torch.testing.assert_close(y, torch.stack(states), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", FIXED)
def test_step_size_counts_from_the_start_and_ends_on_the_last_time(method):
    field = Tanh()
    state, grid = times(0.3, -0.7), (0.0, 0.3, 0.6, 0.9, 1.0)
    for start, end in itertools.pairwise(grid):
        state = FIXED[method](field, times(start)[0], end - start, state)
    options = {"step_size": 0.3}
    y = odeint(field, times(0.3, -0.7), times(0.0, 1.0), method=method, options=options)
    torch.testing.assert_close(y[-1], state, rtol=1e-13, atol=1e-13)


def test_fixed_steps_see_the_grids_own_times():
    """A field that looks its values up by time; one that jumps there sees each side once."""
    table = times(0.0, 1.0, 2.0, 3.5, 0.0)
    t = times(0.0, 0.25, 0.5, 0.75, 1.0)

    def field(t, y):
        return table[(t * 4).long()] * torch.ones_like(y)

    assert odeint(field, times(0.0), t, method="rk4")[-1].item() == 1.625
    recorder = Tanh()
    odeint(recorder, times(0.3, -0.7), times(0.1, 0.3, 0.7), method="rk4")
    assert [recorder.calls[i] for i in (0, 3, 4, 7)] == [0.1, 0.3, 0.3, 0.7]


def test_perturb_never_calls_at_the_ends_of_steps():
    field = Tanh()
    options = {"step_size": 0.25, "perturb": True}
    y = odeint(field, times(0.3, -0.7), times(0.0, 1.0), method="rk4", options=options)
    assert not {0.0, 0.25, 0.5, 0.75, 1.0} & set(field.calls)
    plain = odeint(
        field, times(0.3, -0.7), times(0.0, 1.0), method="rk4", options={"step_size": 0.25}
    )
    torch.testing.assert_close(y, plain, rtol=1e-14, atol=1e-14)


def test_grid_constructor():
    t = times(0.0, 1.0)
    grid = times(0.0, 0.1, 0.5, 1.0)
    options = {"grid_constructor": lambda func, y0, t: grid}
    built = odeint(oscillator, times(1.0, 0.0), t, method="midpoint", options=options)
    listed = odeint(oscillator, times(1.0, 0.0), grid, method="midpoint")
    torch.testing.assert_close(built[-1], listed[-1], rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="grid_constructor must return times from"):
        odeint(
            oscillator,
            times(1.0, 0.0),
            t,
            method="euler",
            options={"grid_constructor": lambda func, y0, t: grid[1:]},
        )


def test_tuple_state_and_its_tolerances():
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    y0 = (torch.ones(2, 3, dtype=torch.float64), times(2.0))
    a, b = odeint(lambda t, y: (-y[0], 3 * y[1]), y0, t, rtol=(1e-8, 1e-6), atol=1e-9)
    assert a.shape == (4, 2, 3)
    torch.testing.assert_close(a[:, 0, 0], torch.exp(-t), rtol=1e-6, atol=0)
    torch.testing.assert_close(b[:, 0], 2 * torch.exp(3 * t), rtol=1e-5, atol=0)


def test_one_time_is_the_start():
    y = odeint(oscillator, times(1.0, 0.0), times(3.0))
    assert torch.equal(y, times(1.0, 0.0).unsqueeze(0))


def test_field_is_called_inside_the_interval_only(y0):
    field = Tanh()
    for method in ADAPTIVE:
        odeint(field, y0, times(0.5, 1.1), method=method, rtol=1e-4, atol=1e-4)
    assert min(field.calls) >= 0.5
    assert max(field.calls) <= 1.1


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_gradients_by_finite_differences(method, y0):
    field = Tanh()
    t = times(0.0, 0.13, 0.31, 0.42).requires_grad_()
    # No step is ever rejected: steps of 0.05, so that the derivative of their sizes is zero.
    options = {"first_step": 0.05, "max_step": 0.05} if method in ADAPTIVE else None

    def loss(y0, t, weight):
        return torch.cumsum(
            odeint(
                lambda s, y: torch.tanh(y @ weight + torch.sin(3 * s)),
                y0,
                t,
                method=method,
                rtol=1.0,
                atol=1.0,
                options=options,
            ).sum(1),
            0,
        )

    assert torch.autograd.gradcheck(loss, (y0, t, field.weight), atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"adjoint": psn.DiscreteAdjoint()}])
def test_adjoint_agrees_with_backpropagation(options, y0):
    field = Tanh()
    t = times(0.0, 0.5, 1.0).requires_grad_()
    inputs = (y0, t, field.weight)
    expected = torch.autograd.grad(odeint(field, y0, t, rtol=1e-10).square().sum(), inputs)
    y = odeint_adjoint(field, y0, t, rtol=1e-10, options=options)
    for found, wanted in zip(torch.autograd.grad(y.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_double_backward():
    rate = times(0.7).requires_grad_()
    t = times(0.0, 2.0)
    y = odeint(lambda t, y: -rate * y, times(1.0), t, rtol=1e-10, atol=1e-12)[-1]
    (first,) = torch.autograd.grad(y, rate, create_graph=True)
    (second,) = torch.autograd.grad(first, rate)
    torch.testing.assert_close(first, -2 * torch.exp(-2 * rate), rtol=1e-8, atol=0)
    torch.testing.assert_close(second, 4 * torch.exp(-2 * rate), rtol=1e-6, atol=0)


def test_adjoint_params_reaches_what_the_start_does_not_show():
    late = times(2.0).requires_grad_()

    def field(t, y):
        return late * y if t > 0.5 else y

    options = {"jump_t": times(0.5)}
    y = odeint_adjoint(field, times(1.0), times(0.0, 1.0), options=options, adjoint_params=(late,))
    (found,) = torch.autograd.grad(y[-1].sum(), late)
    torch.testing.assert_close(found, 0.5 * torch.exp(times(1.5)), rtol=1e-5, atol=0)


def test_jumps_keep_the_order_and_are_seen_from_both_sides():
    calls = []

    def field(t, y):
        calls.append(float(t))
        return torch.where(t < 0.5, -y, 2 * y)

    def run(options):
        calls.clear()
        y = odeint(field, times(1.0), times(0.0, 0.25, 0.75, 1.0), options=options)
        exact = torch.exp(times(0.0, -0.25, 0.0, 0.5)).unsqueeze(1)
        return float((y - exact).abs().max()), len(calls)

    plain_error, plain_calls = run(None)
    error, count = run({"jump_t": times(0.5)})
    assert error < 1e-6
    assert error < plain_error
    assert count < plain_calls / 2


def test_step_t_is_stepped_on_and_its_times_have_gradients():
    stops = times(0.3, 0.6)
    field = Tanh()
    t = times(0.0, 0.3, 0.6, 1.0).requires_grad_()
    y = odeint(field, times(0.3, -0.7), t, options={"step_t": stops})
    # The steps on either side come as near as floating point allows, each from its own side.
    for stop in (0.3, 0.6):
        sides = {math.nextafter(stop, -math.inf), math.nextafter(stop, math.inf)}
        assert sides <= set(field.calls)
    (found,) = torch.autograd.grad(y[2, 0], t)
    with torch.no_grad():
        slope = field(t[2], y[2])[0]
        start = field(t[0], y[0])
    torch.testing.assert_close(found[2], slope, rtol=1e-5, atol=0)
    assert found[1].abs() < 1e-6 * start.abs().max()


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.1})])
def test_event_of_a_falling_body(interface, method, options):
    # h + v s - g s^2 / 2 = 0 at s after t0
    t0, h, v, g = (times(x).requires_grad_() for x in (0.5, 10.0, 1.0, 9.8))
    time, (height, speed) = odeint_event(
        lambda t, y: (y[1], -g * torch.ones_like(y[1])),
        (h, v),
        t0,
        event_fn=lambda t, y: y[0],
        odeint_interface=interface,
        method=method,
        options=options,
    )
    exact = t0 + (v + torch.sqrt(v**2 + 2 * g * h)) / g
    torch.testing.assert_close(time.reshape(1), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(height, torch.stack((h, 0 * h)), rtol=0, atol=1e-10)
    torch.testing.assert_close(speed[-1], v - g * (exact - t0), rtol=1e-12, atol=0)
    inputs = (t0, h, v, g)
    for found, wanted in ((time, exact), (speed[-1], v - g * (exact - t0))):
        got = torch.autograd.grad(found.sum(), inputs, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(wanted.sum(), inputs, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            a = torch.zeros_like(b) if a is None else a
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_first_of_several_events_backward_in_time():
    time, y = odeint_event(
        oscillator, times(1.0, 0.2), 0.0, event_fn=lambda t, y: y - 0.5, reverse_time=True
    )
    # y = (cos t + 0.2 sin t, -sin t + 0.2 cos t): the second reaches 0.5 before the first does.
    root = -math.asin(0.5 / math.hypot(1, 0.2)) + math.atan(0.2)
    assert float(time) == pytest.approx(root, abs=1e-7)
    assert float(y[-1, 1]) == pytest.approx(0.5, abs=1e-7)


def test_event_at_the_start_and_no_event():
    start = times(1.0, 0.0)
    time, y = odeint_event(oscillator, start, 3.0, event_fn=lambda t, y: y[1])
    assert float(time) == 3.0
    assert torch.equal(y, torch.stack((start, start)))
    with pytest.raises(psn.SolverFailure, match="event_fn did not change sign"):
        odeint_event(lambda t, y: torch.ones_like(y), start, 0.0, event_fn=lambda t, y: y.sum() + 1)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5"])
def test_dense_covers_the_interval_with_both_ends(method):
    dense = odeint_dense(
        oscillator, times(1.0, 0.0), torch.tensor(0.0), torch.tensor(3.0), method=method
    )
    t = torch.linspace(0, 3, 31, dtype=torch.float64)
    torch.testing.assert_close(dense(t)[:, 0], torch.cos(t), rtol=0, atol=1e-6)
    torch.testing.assert_close(dense(3.0), dense(t)[-1])
    a, b = odeint_dense(lambda t, y: (-y[0], y[1]), (times(1.0), times(1.0)), 0.0, 1.0)(0.5)
    torch.testing.assert_close(a * b, times(1.0), rtol=1e-6, atol=0)


def test_float32_state_with_float64_times():
    t = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
    y = odeint_adjoint(lambda t, y: -y, torch.ones(2), t, rtol=1e-5, atol=1e-6)
    assert y.dtype == torch.float32
    y[-1].sum().backward()
    assert t.grad is not None
    assert t.grad.dtype == torch.float64
    torch.testing.assert_close(t.grad[-1], times(-2 / math.e)[0], rtol=1e-4, atol=0)


FIELD = {"func": lambda t, y: -y, "y0": times(1.0), "t": times(0.0, 1.0)}
BAD = [
    ({"method": "fehlberg"}, ValueError, "method must be one of dopri8, dopri5, tsit5"),
    ({"options": {"norm": "max"}}, TypeError, "a function of the state"),
    ({"options": {"norm": lambda y: y}, "y0": times(1.0, 2.0)}, ValueError, "return one number"),
    ({"method": "explicit_adams", "options": {"max_order": 13}}, ValueError, "at most 12"),
    ({"options": {"max_num_steps": 3}}, psn.SolverFailure, "max_steps=3"),
    ({"t": times(0.0, 1.0, 0.5)}, ValueError, "strictly increasing or strictly decreasing"),
    ({"t": times(0.0, 0.0)}, ValueError, "strictly increasing or strictly decreasing"),
    ({"t": [0.0, 1.0]}, TypeError, "t must be a tensor"),
    ({"t": torch.tensor([0, 1])}, TypeError, "t must be a tensor of real times"),
    ({"t": times(0.0, 1.0).view(1, 2)}, ValueError, "one-dimensional"),
    ({"t": times(0.0, 1.0, 2.0), "event_fn": lambda t, y: y}, ValueError, "two times"),
    ({"method": "rk4", "event_fn": lambda t, y: y}, ValueError, "step_size"),
    ({"method": "rk4", "options": {"interp": "quintic"}}, ValueError, "linear or cubic"),
    (
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": max}},
        ValueError,
        "both given",
    ),
    ({"func": lambda t, y: y / 0 * 0}, psn.SolverFailure, "NaN"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_wrong_calls_say_what_to_do(change, error, message):
    with pytest.raises(error, match=message):
        odeint(**{**FIELD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adjoint_method": "rk4", "options": {"first_step": 0.1}}, "Give adjoint_options"),
        ({"adjoint_method": "rk5"}, "method must be one of"),
        (
            {"adjoint_rtol": 1e-3, "options": {"adjoint": psn.GaussAdjoint()}},
            "cannot be combined",
        ),
    ],
)
def test_wrong_adjoint_calls(change, message):
    with pytest.raises(ValueError, match=message):
        odeint_adjoint(**{**FIELD, **change})


def test_adjoint_options_that_are_understood(y0):
    options = {"first_step": 0.1}
    y = odeint_adjoint(
        Tanh(),
        y0,
        times(0.0, 1.0),
        options=options,
        adjoint_rtol=1e-5,
        adjoint_method="dopri5",
        adjoint_options={**options, "norm": "seminorm", "max_num_steps": 500},
    )
    y.sum().backward()
    assert y0.grad is not None
    with pytest.raises(RuntimeError, match="max_steps"):
        odeint_adjoint(
            Tanh(), y0, times(0.0, 9.0), adjoint_options={"max_num_steps": 1}
        ).sum().backward()


def test_jumps_in_dense_output_are_refused():
    with pytest.raises(ValueError, match="between the jumps"):
        odeint_dense(oscillator, times(1.0, 0.0), 0.0, 1.0, options={"jump_t": times(0.5)})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rk4", {"step_sizes": 1.0}, "step_sizes"),
        ("dopri5", {"step_size": 0.1}, "not an option of method 'dopri5'"),
        ("dopri5", {"first_stop": 0.1}, "Did you mean 'first_step'"),
        ("gl4", {"first_step": 0.1}, "not an option of method 'gl4'"),
        ("implicit_adams", {"first_step": 0.1}, "Unexpected arguments first_step"),
        ("scipy_solver", {"first_step": 0.1}, "Unexpected arguments first_step"),
    ],
)
def test_options_that_a_method_does_not_have_warn(method, options, message):
    with pytest.warns(psn.PsnWarning, match=message):
        odeint(**FIELD, method=method, options=options)
