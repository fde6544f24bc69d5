import math
from itertools import pairwise

import pytest
import torch
from kernels.networks import WeightTied, inputs

from pysciml_node.kernels import (
    KernelConvergenceError,
    empirical_ntk,
    nngp,
    ntk,
    rank,
    spectrum,
)

SMOOTH = ["softplus", "tanh", "erf", "gelu"]
ALL = [*SMOOTH, "relu", "elu"]


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kernel", [nngp, ntk])
@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("steps", [None, 12])
def test_only_the_product_of_horizon_and_scale_matters(kernel, activation, steps):
    x = inputs(4, 3)
    first = kernel(x, T=1.0, sigma_w=1.0, activation=activation, steps=steps)
    for T, sigma_w in ((4.0, 0.25), (8.0, 0.125), (0.3, 1 / 0.3)):
        other = kernel(x, T=T, sigma_w=sigma_w, activation=activation, steps=steps)
        assert relative(other, first) < 1e-10


@pytest.mark.parametrize("activation", ALL)
def test_euler_approaches_the_ode_at_order_one(activation):
    x = inputs(2, 5)
    for kernel in (nngp, ntk):
        limit = kernel(x, activation=activation)
        gaps = [
            relative(kernel(x, activation=activation, steps=steps), limit) for steps in (24, 48)
        ]
        assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("activation", ["softplus", "relu"])
@pytest.mark.parametrize("readout", ["activation", "linear"])
def test_extrapolated_euler_is_the_continuous_kernel(activation, readout):
    """Richardson's extrapolation from depths 12 to 96 removes the first three orders."""
    x = torch.cat([inputs(2, 4), 2 * inputs(1, 4)])
    for kernel in (nngp, ntk):
        table = [
            kernel(x, activation=activation, readout=readout, steps=12 * 2**k) for k in range(4)
        ]
        for order in (1, 2, 3):
            table = [
                (2**order * fine - coarse) / (2**order - 1) for coarse, fine in pairwise(table)
            ]
        assert relative(kernel(x, activation=activation, readout=readout), table[0]) < 1e-6


def test_identity_has_a_closed_form():
    """phi = identity: Sigma(1, 1) = c0 I_0(2 Tsw), from d2 Sigma/dt ds = (T sw)^2 Sigma."""
    x = inputs(5, 3)
    gram = x @ x.T / 3
    for scale in (0.5, 1.0, 3.0):
        expected = gram * torch.special.i0(torch.tensor(2 * scale, dtype=torch.float64))
        computed = nngp(x, sigma_w=scale, activation="identity", rtol=1e-10)
        torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)


def test_one_layer_by_hand():
    """L = 1, ReLU, linear readout: u^1 = u^0 + k sw W phi(u^0), with independent parts."""
    x = inputs(4, 6)
    gram = x @ x.T / 6
    norm = gram.diagonal().sqrt()
    cosine = (gram / norm / norm[:, None]).clamp(-1, 1)
    angle = torch.arccos(cosine)
    moment = norm * norm[:, None] * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
    expected = gram + 0.49 * moment
    computed = nngp(x, sigma_w=0.7, activation="relu", readout="linear", steps=1)
    torch.testing.assert_close(computed, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kernel", [nngp, ntk])
@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_two_sets_of_inputs_are_blocks_of_one(kernel, steps, activation):
    x = inputs(5, 4)
    whole = kernel(x, activation=activation, steps=steps)
    block = kernel(x[:2], x[1:], activation=activation, steps=steps)
    assert relative(block, whole[:2, 1:]) < 2e-6


@pytest.mark.parametrize("activation", ["softplus", "relu", "tanh"])
def test_homogeneous_kernels_are_symmetric_and_ordered(activation):
    x = inputs(12, 6)
    for kernel in (nngp, ntk):
        value = kernel(x, activation=activation)
        assert torch.equal(value, value.T)
        assert float(spectrum(value)[-1]) > 0
    gap = ntk(x, activation=activation) - nngp(x, activation=activation)
    assert float(spectrum(gap)[-1]) > 0  # what training U and W adds is a kernel itself


def test_relu_has_no_spurious_negative_eigenvalue():
    x = inputs(40, 8)
    for kernel in (nngp, ntk):
        for steps in (None, 10):
            values = spectrum(kernel(x, activation="relu", steps=steps))
            assert float(values[-1]) > 1e-4 * float(values[0])


@pytest.mark.parametrize("steps", [None, 10])
def test_linear_activation_has_rank_d(steps):
    x = inputs(12, 4)
    for kernel in (nngp, ntk):
        assert rank(kernel(x, activation="identity", steps=steps), rtol=1e-12) == 4
        assert rank(kernel(x, activation="softplus", steps=steps), rtol=1e-12) == 12


def test_relu_kernel_is_homogeneous():
    """phi(a u) = a phi(u) makes K(a x, b x') = a b K(x, x')."""
    x = inputs(3, 4)
    scales = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    for kernel in (nngp, ntk):
        scaled = kernel(scales[:, None] * x, activation="relu", rtol=1e-8)
        expected = kernel(x, activation="relu", rtol=1e-8) * scales * scales[:, None]
        torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_random_networks_average_to_the_kernels(activation):
    """Width 1000, 10 layers: means over seeds within 2 % of the largest entry."""
    x = inputs(3, 10, seed=1)
    phi = getattr(torch.nn.functional, activation)
    generator = torch.Generator().manual_seed(0)
    seeds = 12
    measured = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(seeds):
        network = WeightTied(10, 1000, 10, phi, generator)
        measured += empirical_ntk(network, x, outputs="trace") / seeds
    expected = ntk(x, activation=activation, steps=10)
    assert relative(measured, expected) < 0.02


def test_random_networks_have_the_predicted_covariance():
    """Width 1000: the conditional covariance given U, W is |phi(h_T)|^2 / n, no readout noise."""
    x = inputs(3, 10, seed=1)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3, 3, dtype=torch.float64)
    seeds = 40
    for _ in range(seeds):
        network = WeightTied(10, 1000, 20, torch.tanh, generator)
        with torch.no_grad():
            h = network.su * x @ network.u.T
            for _ in range(20):
                h = h + network.step * torch.tanh(h) @ network.w.T
        total += torch.tanh(h) @ torch.tanh(h).T / 1000 / seeds
    assert relative(total, nngp(x, activation="tanh", steps=20)) < 0.02


def test_blow_up_is_an_error():
    x = 3 * torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(KernelConvergenceError, match="blow up in finite time"):
        nngp(x, T=4.0, activation="exp")


def test_accuracy_that_is_not_reached_is_an_error():
    """A long horizon needs more than the ladder's degrees."""
    with pytest.raises(KernelConvergenceError, match="still differ by"):
        ntk(inputs(3, 4), T=30.0, activation="erf")


def test_one_input():
    x = inputs(1, 4)
    for activation in ("softplus", "relu"):
        assert ntk(x, activation=activation).shape == (1, 1)


def test_dtype_follows_the_inputs():
    x = inputs(3, 4)
    single = ntk(x.float(), activation="tanh")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), ntk(x, activation="tanh"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": -1.0}, "T must be finite"),
        ({"sigma_w": math.inf}, "sigma_w must be finite"),
        ({"steps": 0}, "steps must be a positive whole number"),
        ({"readout": "phi"}, "readout must be"),
        ({"rtol": 0.0}, "rtol must be at least 1e-12"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        ntk(inputs(2, 2), **change)


def test_inputs_are_checked():
    x = inputs(2, 2)
    with pytest.raises(ValueError, match="flatten"):
        ntk(x.reshape(2, 2, 1))
    with pytest.raises(ValueError, match="must agree"):
        ntk(x, inputs(2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        ntk(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be finite"):
        ntk(x / 0)
