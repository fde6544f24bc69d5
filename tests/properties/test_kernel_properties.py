from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysciml_node.kernels import GradientDescent, empirical_ntk, nngp, ntk

activations = st.sampled_from(["relu", "leaky_relu", "erf", "sin", "cos", "softplus", "tanh"])
scales = st.floats(0.2, 1.5)
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def smallest(kernel):
    """Smallest eigenvalue, against the largest."""
    values = torch.linalg.eigvalsh(kernel)
    return float(values[0] / values[-1])


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(1, 6), d=st.integers(1, 4), act=activations, sw=scales)
def test_continuous_kernels_are_positive_semidefinite(seed, n, d, act, sw):
    x = normal(seed, n, d)
    for kernel in (nngp, ntk):
        value = kernel(x, sigma_w=sw, activation=act, rtol=1e-5)
        assert torch.equal(value, value.T)
        assert smallest(value) > -n * 1e-5


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(1, 6), d=st.integers(1, 4), act=activations, sw=scales)
def test_euler_kernels_are_positive_semidefinite_to_rounding(seed, n, d, act, sw):
    """The kernel of a network that exists: no tolerance enters."""
    x = normal(seed, n, d)
    for kernel in (nngp, ntk):
        assert smallest(kernel(x, sigma_w=sw, activation=act, steps=5)) > -1e-8


@settings(max_examples=15, deadline=None)
@given(seed=seeds, act=activations, T=scales, factor=st.floats(0.1, 10.0))
def test_time_can_be_rescaled(seed, act, T, factor):
    x = normal(seed, 3, 3)
    one = ntk(x, T=T, activation=act, steps=4)
    other = ntk(x, T=T * factor, sigma_w=1 / factor, activation=act, steps=4)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, act=activations)
def test_kernels_are_rotation_and_permutation_invariant(seed, act):
    x = normal(seed, 4, 3)
    rotation, _ = torch.linalg.qr(normal(seed + 1, 3, 3))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    expected = ntk(x, activation=act, steps=4)
    rotated = ntk((x @ rotation)[order], activation=act, steps=4)
    torch.testing.assert_close(rotated, expected[order][:, order], rtol=1e-7, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, sv=st.floats(0.1, 3.0), readout=st.sampled_from(["activation", "linear"]))
def test_the_readout_scale_is_a_factor(seed, sv, readout):
    x = normal(seed, 3, 3)
    one = ntk(x, readout=readout, steps=3)
    scaled = ntk(x, readout=readout, steps=3, sigma_v=sv)
    torch.testing.assert_close(scaled, sv**2 * one, rtol=1e-12, atol=1e-14)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, o=st.integers(1, 3))
def test_empirical_kernels_are_positive_semidefinite(seed, o):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, o))
    kernel = empirical_ntk(module.double(), normal(seed, 4, 3))
    assert smallest(kernel.permute(0, 2, 1, 3).reshape(4 * o, 4 * o)) > -1e-12


@settings(max_examples=20, deadline=None)
@given(seed=seeds, n=st.integers(1, 6), part=st.floats(0.05, 0.95))
def test_stable_gradient_descent_never_raises_the_loss(seed, n, part):
    root = normal(seed, n, n)
    dynamics = GradientDescent(root @ root.T + 1e-3 * torch.eye(n), normal(seed + 1, n))
    lr = part * dynamics.max_learning_rate()
    losses = [dynamics.loss(step, lr) for step in range(20)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
