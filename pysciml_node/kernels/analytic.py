"""The infinite-width kernels of the weight-tied neural ODE and of its Euler network."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.kernels.activations import Activation, resolve
from pysciml_node.kernels.continuous import continuous_kernels
from pysciml_node.kernels.inputs import Layout, Model, Readout, Values, check_scale, pair_inputs
from pysciml_node.kernels.recursion import euler_kernels


@torch.no_grad()
def _kernels(
    x1: Tensor,
    x2: Tensor | None,
    horizon: float,
    sigmas: tuple[float, float, float],
    activation: Activation,
    readout: Readout,
    steps: int | None,
    rtol: float,
) -> tuple[Values, Layout]:
    names = ("sigma_u", "sigma_w", "sigma_v")
    sigma_u, sigma_w, sigma_v = map(check_scale, names, sigmas)
    horizon = check_scale("T", horizon)
    readout = checks.choice("readout", readout, get_args(Readout))
    if steps is not None:
        steps = checks.whole("steps", steps, hint="It is the depth of the Euler network.")
    rtol = checks.number("rtol", rtol, at_least=1e-12, below=1)
    pairs, layout = pair_inputs(x1, x2, sigma_u)
    model = Model(
        expectation=resolve(activation, rtol),
        coupling=(horizon * sigma_w) ** 2,
        readout_variance=sigma_v**2,
        linear_readout=readout == "linear",
        rtol=rtol,
    )
    if steps is None:
        return continuous_kernels(model, pairs), layout
    return euler_kernels(model, pairs, steps), layout


def nngp(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    T: float = 1.0,
    sigma_u: float = 1.0,
    sigma_w: float = 1.0,
    sigma_v: float = 1.0,
    activation: Activation = "softplus",
    readout: Readout = "activation",
    steps: int | None = None,
    rtol: float = 1e-6,
) -> Tensor:
    """Covariance of a random, infinitely wide neural ODE's output (its Gaussian-process kernel).

    The model, with `U`, `W`, `v` of independent standard normal entries, is

        h_0 = (sigma_u / sqrt d) U x,  dh/dt = (sigma_w / sqrt n) W phi(h),  0 <= t <= T,
        f(x) = (sigma_v / sqrt n) v.phi(h_T)        (or v.h_T with the linear readout).

    Because `W` is the same at all times, the covariance couples all pairs of times:
    `d2 Sigma / dt ds = sigma_w^2 E[phi(u_t) phi(u'_s)]`, `Sigma(0, s) = Sigma(t, 0) =
    sigma_u^2 x.x'/d`, and the kernel is `sigma_v^2 E[phi(u_T) phi(u'_T)]`. It depends on `T`
    and `sigma_w` through their product alone.

    Args:
        x1: inputs `(n1, d)`. Computed in float64 whatever their dtype.
        x2: inputs `(n2, d)`; None means `x1`, at half the cost and with equal inputs known.
        T: horizon.
        sigma_u: scale of the input layer.
        sigma_w: scale of the vector field.
        sigma_v: scale of the readout.
        activation: a name (`"softplus"`, `"relu"`, ...), an elementwise callable, an
            `nn.Module`, or `Polynomial`, `Sinusoid`, `LeakyReLU`.
        readout: `"activation"` for `v.phi(h_T)`, `"linear"` for `v.h_T`.
        steps: None for the neural ODE; `L` for the network of `L` Euler steps, exactly.
        rtol: accuracy, as a part of `sqrt(K(x, x) K(x', x'))`.

    Returns:
        The kernel `(n1, n2)`, in the dtype and on the device of `x1`; no gradient.

    Raises:
        KernelConvergenceError: if `rtol` cannot be met, or the variance blows up before `T`.

    Examples:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> nngp(x, T=0.0, activation="relu")
        tensor([[0.2500, 0.0796],
                [0.0796, 0.2500]], dtype=torch.float64)

    Reference: Gao, Sun, Liu and Gao, arXiv 2509.22436, Proposition 3 and Theorem 1.
    """
    sigmas = (sigma_u, sigma_w, sigma_v)
    values, layout = _kernels(x1, x2, T, sigmas, activation, readout, steps, rtol)
    return layout.matrix(values.nngp)


def ntk(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    T: float = 1.0,
    sigma_u: float = 1.0,
    sigma_w: float = 1.0,
    sigma_v: float = 1.0,
    activation: Activation = "softplus",
    readout: Readout = "activation",
    steps: int | None = None,
    rtol: float = 1e-6,
) -> Tensor:
    """Neural tangent kernel of the infinitely wide neural ODE, all of `U`, `W`, `v` trained.

    With the model and `Sigma` of `nngp`, `C = E[phi phi']`, `D` the same for the derivative
    of `phi`, and the backward covariance `d2 Gamma / dt ds = sigma_w^2 D Gamma`,
    `Gamma = sigma_v^2 D(T, T)` where either time is `T` (`sigma_v^2` for a linear readout),

        Theta = K + sigma_w^2 int int C Gamma dt ds + sigma_u^2 (x.x'/d) Gamma(0, 0),

    where `K` is the kernel of `nngp`. Under gradient descent the network's outputs follow the
    linear dynamics of `Theta` (see `GradientDescent`).

    Args:
        x1: inputs `(n1, d)`. Computed in float64 whatever their dtype.
        x2: inputs `(n2, d)`; None means `x1`, at half the cost and with equal inputs known.
        T: horizon.
        sigma_u: scale of the input layer.
        sigma_w: scale of the vector field.
        sigma_v: scale of the readout.
        activation: as for `nngp`.
        readout: as for `nngp`.
        steps: None for the neural ODE; `L` for the network of `L` Euler steps, exactly.
        rtol: accuracy, as a part of `sqrt(Theta(x, x) Theta(x', x'))`.

    Returns:
        The kernel `(n1, n2)`, in the dtype and on the device of `x1`; no gradient.

    Raises:
        KernelConvergenceError: if `rtol` cannot be met, or the variance blows up before `T`.

    Examples:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> bool((torch.linalg.eigvalsh(ntk(x, activation="tanh")) > 0).all())
        True

    Reference: Gao, Sun, Liu and Gao, arXiv 2509.22436, Proposition 4 and Theorem 2.
    """
    sigmas = (sigma_u, sigma_w, sigma_v)
    values, layout = _kernels(x1, x2, T, sigmas, activation, readout, steps, rtol)
    return layout.matrix(values.ntk)
