import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pysciml_node.kernels import KernelConvergenceError, LeakyReLU, Polynomial, Sinusoid
from pysciml_node.kernels.activations import as_function, resolve
from pysciml_node.kernels.hermite import HermiteSeries, derivative
from pysciml_node.kernels.kinked import KinkedSeries, jumps_at_zero

NAMES = [
    *("relu", "leaky_relu", "abs", "erf", "sin", "cos", "exp", "identity", "softplus"),
    *("tanh", "sigmoid", "gelu", "silu", "mish", "elu", "selu", "quadratic"),
]


def moments(activation, q1, q2, r, rtol=1e-7):
    """`(C, D)` at one pair of variances, for several correlations."""
    expectation = resolve(activation, rtol)
    features = expectation.features(torch.tensor([q1, q2], dtype=torch.float64))
    pair = expectation.pair(
        tuple(part[:, :1] for part in features), tuple(part[:, 1:] for part in features)
    )
    c = torch.as_tensor(r, dtype=torch.float64) * math.sqrt(q1 * q2)
    return pair.value(c), pair.slope(c)


def by_quadrature(fn, q1, q2, r):
    """The double integral over `u` and `v` given `u`, each cut where its argument is 0."""
    x, w = np.polynomial.legendre.leggauss(24)

    def panels(edges):
        half = np.diff(edges) / 2
        z = (edges[:-1, None] + half[:, None] * (x + 1)).ravel()
        return z, (half[:, None] * w).ravel() * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    z1, w1 = panels(np.linspace(-11, 11, 45))
    spread = math.sqrt(1 - r * r)
    inner = torch.zeros(2, len(z1), dtype=torch.float64)
    for k, z in enumerate(z1):
        cut = min(max(-r * z / spread, -11.0), 11.0)
        z2, w2 = panels(np.union1d(np.linspace(-11, 11, 23), [cut]))
        v = torch.as_tensor(math.sqrt(q2) * (r * z + spread * z2))
        inner[:, k] = torch.stack([fn(v), derivative(fn, v)]) @ torch.as_tensor(w2)
    u, weight = torch.as_tensor(math.sqrt(q1) * z1), torch.as_tensor(w1)
    return (fn(u) * inner[0]) @ weight, (derivative(fn, u) * inner[1]) @ weight


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_the_double_integrals(name):
    q1, q2 = (0.3, 0.8) if name == "exp" else (1.3, 2.6)
    for r in (-0.4, 0.7):
        value, slope = moments(name, q1, q2, [r])
        expected = by_quadrature(as_function(name), q1, q2, r)
        # the quadrature of the derivative of a kinked function is the less accurate side
        torch.testing.assert_close(value[0], expected[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(slope[0], expected[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative_of_value(name):
    """Price's theorem: E[phi' phi'] = d E[phi phi] / dc."""
    q1, q2, h = 0.5, 0.9, 1e-5
    r = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    step = h / math.sqrt(q1 * q2)
    above, below = (moments(name, q1, q2, r + s)[0] for s in (step, -step))
    torch.testing.assert_close(
        moments(name, q1, q2, r)[1], (above - below) / (2 * h), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("relu", nn.ReLU()),
        ("relu", LeakyReLU()),
        ("relu", lambda u: u.clamp_min(0)),
        ("leaky_relu", nn.LeakyReLU(0.01)),
        ("erf", lambda u: torch.erf(u)),
        ("sin", Sinusoid()),
        ("cos", lambda u: torch.cos(u)),
        ("identity", Polynomial((0.0, 1.0))),
        ("quadratic", lambda u: u * u / 2),
        ("softplus", nn.Softplus()),
        ("gelu", F.gelu),
        (LeakyReLU(0.25), nn.PReLU()),
    ],
)
def test_the_same_activation_said_differently(one, other):
    r = [-0.95, -0.3, 0.0, 0.5, 0.99]
    for a, b in zip(moments(one, 0.7, 1.9, r), moments(other, 0.7, 1.9, r), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_polynomial_moments_by_hand():
    """E[u^2 v^2] = q1 q2 + 2 c^2; E[2u 2v] = 4c."""
    value, slope = moments(Polynomial((0.0, 0.0, 1.0)), 2.0, 3.0, [0.5])
    c = 0.5 * math.sqrt(6)
    assert float(value[0]) == pytest.approx(6 + 2 * c * c, rel=1e-13)
    assert float(slope[0]) == pytest.approx(4 * c, rel=1e-13)


def test_kinks_at_zero_are_found():
    assert jumps_at_zero(torch.relu) == (1.0, 0.0, 0.0)
    assert jumps_at_zero(F.softplus) == (0.0, 0.0, 0.0)
    first, second, third = jumps_at_zero(F.elu)
    assert first == 0.0
    assert (second, third) == pytest.approx((-1.0, -1.0), abs=1e-4)
    assert isinstance(resolve("elu", 1e-6), KinkedSeries)
    assert isinstance(resolve("gelu", 1e-6), HermiteSeries)


def test_accuracy_that_cannot_be_reached_is_refused():
    """Kinks away from zero leave a slow series: no silent wrong digits."""
    with pytest.raises(KernelConvergenceError, match="hardtanh leaves out"):
        moments(F.hardtanh, 1.0, 1.0, [0.5])


def test_zero_variance():
    for name in ("relu", "softplus", "elu", "quadratic"):
        value, _ = moments(name, 0.0, 1.0, [0.0])
        fn = as_function(name)
        z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
        mean = torch.trapezoid(fn(z) * torch.exp(-z * z / 2), z) / math.sqrt(2 * math.pi)
        at_zero = fn(torch.zeros(1, dtype=torch.float64))[0]
        assert float(value[0]) == pytest.approx(float(at_zero * mean), abs=1e-6)


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="'rulu' is not known"):
        resolve("rulu", 1e-6)
    with pytest.raises(TypeError, match="must be a name"):
        resolve(3, 1e-6)
    with pytest.raises(ValueError, match="at least one coefficient"):
        Polynomial(())
