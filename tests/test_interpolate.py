"""Paths through data, against SciPy's splines and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline, CubicSpline
from torch import Tensor

from pysciml_node import interpolate
from pysciml_node.interpolate import PiecewisePolynomial

MAKERS = [interpolate.linear, interpolate.hermite_cubic, interpolate.natural_cubic]
T = torch.tensor([0.0, 0.3, 1.0, 1.1, 2.0, 3.5, 4.0], dtype=torch.float64)


def data(missing: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, len(T), 4, generator=generator, dtype=torch.float64)
    if missing:
        gone = torch.rand(x.shape, generator=generator) < 0.4
        gone[0, 0, :, 0] = True  # never observed
        gone[0, 1, :, 0] = torch.arange(len(T)) != 3  # once
        x[gone] = torch.nan
    return x


def held(values: np.ndarray) -> np.ndarray:
    """The ends filled by the first and the last observation."""
    values, seen = values.copy(), np.flatnonzero(~np.isnan(values))
    if not len(seen):
        return np.zeros_like(values)
    values[: seen[0]], values[seen[-1] :] = values[seen[0]], values[seen[-1]]
    return values


@pytest.mark.parametrize("missing", [False, True])
def test_natural_cubic_splines_are_scipys(missing: bool) -> None:
    x, at = data(missing), torch.linspace(0, 4, 41, dtype=torch.float64)
    path = interpolate.natural_cubic(x, T)
    values, slopes = path(at), path.derivative(at)
    for index in np.ndindex(2, 3, 4):
        b, s, c = index
        series = held(x[b, s, :, c].numpy())
        known = ~np.isnan(series)
        spline = CubicSpline(T.numpy()[known], series[known], bc_type="natural")
        np.testing.assert_allclose(values[b, s, :, c], spline(at), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(slopes[b, s, :, c], spline(at, 1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("missing", [False, True])
def test_lines_and_hermite_cubics(missing: bool) -> None:
    x, at = data(missing), torch.linspace(0, 3.99, 40, dtype=torch.float64)
    line, cubic = interpolate.linear(x, T)(at), interpolate.hermite_cubic(x, T)(at)
    for b, s, c in np.ndindex(2, 3, 4):
        series = held(x[b, s, :, c].numpy())
        known = ~np.isnan(series)
        full = np.interp(T.numpy(), T.numpy()[known], series[known])
        expected = np.interp(at.numpy(), T.numpy(), full)
        np.testing.assert_allclose(line[b, s, :, c], expected, rtol=1e-9, atol=1e-9)
        slope = np.diff(full) / np.diff(T.numpy())
        back = np.concatenate((slope[:1], slope))
        # Each piece ends with its own line's slope, which is the next one's start.
        expected = CubicHermiteSpline(T.numpy(), full, back)(at.numpy())
        np.testing.assert_allclose(cubic[b, s, :, c], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("maker", MAKERS)
def test_paths_go_through_what_was_observed(maker: object) -> None:
    x = data(missing=True)
    seen = ~x.isnan()
    path = maker(x, T)  # type: ignore[operator]
    torch.testing.assert_close(path(T)[seen], x[seen], rtol=1e-10, atol=1e-10)
    assert bool(path(T).isfinite().all())
    again = PiecewisePolynomial(path.coefficients, path.knots)
    assert torch.equal(again(0.7), path(torch.tensor(0.7, dtype=torch.float64)))
    assert path.interval == (0.0, 4.0)
    single = maker(x[1, 2], T)(0.7)  # type: ignore[operator]
    torch.testing.assert_close(single, path(0.7)[1, 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_reach_the_observations(maker: object) -> None:
    x = data(missing=True)[0, 0, :, 1:3]
    seen = ~x.isnan()

    def value(observed: Tensor) -> Tensor:
        filled = torch.full_like(x, torch.nan).masked_scatter(seen, observed)
        path = maker(filled, T)  # type: ignore[operator]
        return torch.cat((path(0.7), path.derivative(2.1)))

    assert torch.autograd.gradcheck(value, x[seen].requires_grad_())


def test_rectilinear_paths_move_along_one_axis_at_a_time() -> None:
    nan = torch.nan
    x = torch.tensor([[0.0, 1.0], [2.0, nan], [3.0, 5.0]])
    path = interpolate.rectilinear(x)
    corners = [[0.0, 1.0], [2.0, 1.0], [2.0, 1.0], [3.0, 1.0], [3.0, 5.0]]
    assert torch.equal(path(torch.arange(5.0)), torch.tensor(corners))
    # Later observations do not change earlier parts.
    other = interpolate.rectilinear(torch.cat((x[:2], torch.tensor([[9.0, 9.0]]))))
    assert torch.equal(path(torch.linspace(0, 2, 9)), other(torch.linspace(0, 2, 9)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interpolate.linear(torch.ones(1, 3)), "n of at least 2"),
        (lambda: interpolate.linear(torch.ones(3, 3), [0.0, 1.0]), "one for each observation"),
        (lambda: interpolate.natural_cubic(torch.ones(3, 3), [0.0, 1.0, 1.0]), "do not increase"),
        (lambda: interpolate.rectilinear(torch.ones(3, 3), 3), "time_channel must be"),
        (lambda: interpolate.rectilinear(torch.full((3, 2), torch.nan)), "times must be there"),
        (lambda: PiecewisePolynomial(torch.ones(3, 2, 1), torch.ones(3)), "for 3 knots"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_times_and_interval_are_those_of_the_knots_now() -> None:
    x, later = data(False), interpolate.linear(data(False, seed=1), T + 5)
    assert later.interval == (5.0, 9.0)
    later.load_state_dict(interpolate.linear(x, T).state_dict())
    assert later.interval == (0.0, 4.0)
    assert later.times == T.tolist()
    later.float()
    assert later.times == T.float().tolist()


@pytest.mark.parametrize("make", MAKERS)
def test_times_before_observations_are_refused_as_exchanged(make):
    x, t = torch.rand(2, 5, 3), torch.linspace(0.0, 1.0, 5)
    with pytest.raises(ValueError, match="observations come first and their times second"):
        make(t, x)
    assert make(x, t).channels == 3
