import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pysciml_node.kernels import LeakyReLU, Polynomial, Sinusoid, activation_report, nngp


@pytest.mark.parametrize(
    ("act", "lipschitz", "second"),
    [
        ("softplus", 1.0, 0.25),
        ("tanh", 1.0, 4 / (3 * math.sqrt(3))),
        ("sigmoid", 0.25, 1 / (6 * math.sqrt(3))),
        ("erf", 2 / math.sqrt(math.pi), math.sqrt(8 / math.pi / math.e)),
        ("gelu", 1.12890, math.sqrt(2 / math.pi)),
        ("silu", 1.09984, 0.5),
        ("elu", 1.0, 1.0),
        ("sin", 1.0, 1.0),
        (Sinusoid(3.0, 0.2), 3.0, 9.0),
        ("relu", 1.0, math.inf),
        (LeakyReLU(-2.0), 2.0, math.inf),
        (nn.PReLU(), 1.0, math.inf),
        (F.hardtanh, 1.0, math.inf),
        ("identity", 1.0, 0.0),
        ("quadratic", math.inf, 1.0),
        ("exp", math.inf, math.inf),
        (torch.sign, math.inf, math.inf),
        (lambda u: u.abs().sqrt(), math.inf, math.inf),
        (lambda u: (u - 1.234).abs().sqrt(), math.inf, math.inf),
        (lambda u: torch.tanh(u).sign() * torch.tanh(u).abs() ** (1 / 3), math.inf, math.inf),
        (lambda u: torch.tanh(torch.xlogy(u, u.abs())), math.inf, math.inf),
        (lambda u: F.softplus(u) + 0.1 * torch.tanh(u).abs().sqrt(), math.inf, math.inf),
        # max of (3/2) sqrt(t) (1 - t^2) over t = |tanh u|, at t = 1 / sqrt(5)
        (lambda u: torch.tanh(u).abs() ** 1.5, 1.2 * 5**-0.25, math.inf),
        (nn.ELU(inplace=True), 1.0, 1.0),
        (torch.tanh_, 1.0, 4 / (3 * math.sqrt(3))),
    ],
)
def test_lipschitz_constants(act, lipschitz, second):
    report = activation_report(act)
    assert report.lipschitz == pytest.approx(lipschitz, rel=1e-3)
    assert report.derivative_lipschitz == pytest.approx(second, rel=1e-3, abs=1e-6)
    assert report.forward_well_posed == math.isfinite(lipschitz)
    assert report.backward_well_posed == (math.isfinite(lipschitz) and math.isfinite(second))


@pytest.mark.parametrize(
    ("act", "smoothness", "kinks"),
    [
        (torch.sign, "discontinuous", (0.0,)),
        ("relu", "C0", (0.0,)),
        ("selu", "C0", (0.0,)),
        (F.relu6, "C0", (0.0, 6.0)),
        (F.hardswish, "C0", (-3.0, 3.0)),
        ("elu", "C1", ()),
        ("softplus", "C2 or smoother", ()),
        (lambda u: u.abs().sqrt(), "C0", (0.0,)),
        (lambda u: torch.tanh(u).sign() * torch.tanh(u).abs() ** (1 / 3), "C0", (0.0,)),
        (lambda u: torch.tanh(u - 2).abs() ** 1.5, "C1", (2.0,)),
    ],
)
def test_smoothness_and_kinks(act, smoothness, kinks):
    report = activation_report(act)
    assert report.smoothness == smoothness
    assert report.kinks == pytest.approx(kinks, abs=1e-5)


@pytest.mark.parametrize(
    ("act", "degree"),
    [
        ("identity", 1),
        ("quadratic", 2),
        (Polynomial((1.0, 0.0, 0.0, 2.0)), 3),
        (lambda u: torch.ones_like(u), 0),
        ("tanh", None),
        ("relu", None),
    ],
)
def test_polynomials_are_recognised(act, degree):
    report = activation_report(act)
    assert report.polynomial_degree == degree
    assert report.kernel_positive_definite == (degree is None)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("relu", "gradients need not agree"),
        ("quadratic", "can blow up in finite time"),
        ("quadratic", "polynomial of degree 2"),
        ("identity", "rank d"),
        ("exp", "not covered by the theory"),
        (torch.sign, "a solution need not exist"),
        ("softplus", "linear rate"),
    ],
)
def test_the_words(act, words):
    assert words in str(activation_report(act))


def test_expectations_without_a_function_are_refused():
    from pysciml_node.kernels.expectations import Erf

    with pytest.raises(TypeError, match="Pass the function itself"):
        activation_report(Erf())


@pytest.mark.parametrize("act", [lambda u: torch.softmax(u, -1), nn.RReLU(), nn.Dropout(0.1)])
@pytest.mark.parametrize("use", [activation_report, lambda act: nngp(torch.eye(2), activation=act)])
def test_functions_that_are_not_elementwise_are_refused(use, act):
    with pytest.raises(ValueError, match="what stands beside it, or on chance"):
        use(act)


def test_a_slope_without_bound_is_named():
    report = activation_report(lambda u: u.abs().sqrt())
    assert report.steep == (0.0,)
    assert "several solutions" in str(report)
