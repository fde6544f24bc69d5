import math

import pytest
import torch
from kernels.networks import inputs

from pysciml_node.kernels import (
    GradientDescent,
    condition_number,
    max_learning_rate,
    ntk,
    posterior,
    rank,
    spectrum,
)


def problem(n=6, m=4, outputs=2):
    x = inputs(n + m, 5)
    kernel = ntk(x, activation="tanh")
    y = inputs(n, outputs, seed=7)
    return kernel[:n, :n], kernel[n:, :n], kernel[n:, n:], y


def test_posterior_is_conditioning_a_gaussian():
    train, cross, prior, y = problem()
    noise = 0.1
    inverse = torch.linalg.inv(train + noise * torch.eye(6))
    mean, variance = posterior(train, cross, prior, y, noise)
    torch.testing.assert_close(mean, cross @ inverse @ y)
    torch.testing.assert_close(variance, (prior - cross @ inverse @ cross.T).diagonal())
    torch.testing.assert_close(posterior(train, cross, prior.diagonal(), y, noise)[1], variance)


def test_posterior_interpolates_without_noise():
    train, _, _, y = problem()
    mean, variance = posterior(train, train, train, y)
    torch.testing.assert_close(mean, y, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(variance, torch.zeros_like(variance), rtol=0, atol=1e-9)
    assert posterior(train, train, train, y[:, 0])[0].shape == (6,)


def test_gradient_descent_in_closed_form_is_the_iteration():
    train, cross, _, y = problem()
    f, g = 0.3 * inputs(6, 2, seed=8), 0.3 * inputs(4, 2, seed=9)
    dynamics = GradientDescent(train, y, f)
    lr = 0.9 * dynamics.max_learning_rate()
    start = g
    for step in range(30):
        torch.testing.assert_close(dynamics.outputs(step, lr), f)
        torch.testing.assert_close(dynamics.predict(cross, step, lr, start), g)
        expected = float(((f - y) ** 2).sum()) / 12
        assert dynamics.loss(step, lr) == pytest.approx(expected, rel=1e-10)
        error = f - y
        f, g = f - lr / 6 * train @ error, g - lr / 6 * cross @ error


def test_small_steps_are_gradient_flow():
    train, cross, _, y = problem()
    dynamics = GradientDescent(train, y)
    gaps = []
    for steps in (2000, 4000):
        gap = dynamics.predict(cross, steps, 3.0 / steps) - dynamics.predict(cross, 3.0)
        gaps.append(float(gap.abs().max()))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1.0, abs=0.02)


def test_training_to_the_end_is_regression():
    train, cross, prior, y = problem()
    dynamics = GradientDescent(train, y)
    mean, variance = posterior(train, cross, prior, y)
    torch.testing.assert_close(dynamics.predict(cross, math.inf), mean, rtol=1e-7, atol=1e-9)
    ensemble = dynamics.ensemble_variance(cross, (train, cross, prior), math.inf)
    torch.testing.assert_close(ensemble, variance, rtol=1e-7, atol=1e-9)
    untrained = dynamics.ensemble_variance(cross, (train, cross, prior), 0.0)
    torch.testing.assert_close(untrained, prior.diagonal())


def test_largest_learning_rate_is_the_edge_of_stability():
    train, _, _, y = problem()
    dynamics = GradientDescent(train, y)
    edge = dynamics.max_learning_rate()
    assert edge == pytest.approx(max_learning_rate(train), rel=1e-12)
    assert dynamics.loss(5000, 0.999 * edge) < dynamics.loss(0)
    assert dynamics.loss(5000, 1.01 * edge) > 1e6 * dynamics.loss(0)


def test_slowest_rate():
    train, _, _, y = problem()
    dynamics = GradientDescent(train, y)
    late = 20 / dynamics.rate()
    measured = math.log(dynamics.loss(late) / dynamics.loss(late + 1))
    assert measured == pytest.approx(dynamics.rate(), rel=1e-3)


def test_spectrum_helpers():
    kernel = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    assert spectrum(kernel).tolist() == [4.0, 1.0, 0.0]
    assert condition_number(kernel) == math.inf
    assert condition_number(kernel[[0, 2]][:, [0, 2]]) == 4.0
    assert rank(kernel) == 2


def test_arguments_are_checked():
    train, cross, prior, y = problem()
    with pytest.raises(ValueError, match="must be square"):
        spectrum(cross)
    with pytest.raises(ValueError, match="must be symmetric"):
        spectrum(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="targets must have shape"):
        posterior(train, cross, prior, y[:3])
    with pytest.raises(ValueError, match="cross must have shape"):
        posterior(train, cross.T, prior, y)
    with pytest.raises(ValueError, match="not positive definite"):
        posterior(torch.ones(6, 6), cross.float(), prior.float(), y.float())
    with pytest.raises(ValueError, match="initial must have the shape"):
        GradientDescent(train, y, y[:, 0])
