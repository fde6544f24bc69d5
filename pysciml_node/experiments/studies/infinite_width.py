"""Finite networks against the kernels of infinite ones: the studies of global_convergence.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pysciml_node as psn
from pysciml_node import data, kernels
from pysciml_node._optional import require

Phi = Callable[[Tensor], Tensor]
PHI: dict[str, Phi] = {
    "softplus": F.softplus,
    "gelu": F.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Sizes:
    """The size of each study."""

    depth_widths: tuple[int, ...] = (100, 300, 1000)
    depths: tuple[int, ...] = (10, 32, 100, 316, 1000)
    ntk_widths: tuple[int, ...] = (50, 100, 200, 400, 800, 1600)
    ntk_seeds: int = 20
    horizons: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    horizon_width: int = 1000
    gaussian_widths: tuple[int, ...] = (4, 16, 64, 256)
    gaussian_networks: int = 4000
    training: tuple[tuple[str, int], ...] = (
        ("softplus", 250),
        ("softplus", 1000),
        ("softplus", 4000),
        ("gelu", 1000),
        ("relu", 1000),
    )
    training_steps: int = 100
    training_samples: int = 16
    training_layers: int = 10
    limit_widths: tuple[int, ...] = (250, 500, 1000, 2000, 4000)
    limit_networks: int = 8
    samples: int = 6


QUICK = Sizes(
    depth_widths=(50, 100),
    depths=(10, 32, 100),
    ntk_widths=(50, 100, 200, 400),
    ntk_seeds=6,
    horizon_width=200,
    gaussian_widths=(4, 64),
    gaussian_networks=1000,
    training=(("softplus", 500), ("relu", 500)),
    training_steps=30,
    training_samples=8,
    limit_widths=(125, 250, 500),
    limit_networks=4,
)


class WeightTied(nn.Module):
    """A network with one weight matrix in all layers and scales of 1; without `layers`, the ODE."""

    def __init__(
        self,
        d: int,
        width: int,
        phi: Phi,
        generator: torch.Generator,
        *,
        layers: int | None = None,
        T: float = 1.0,
        sigma_w: float = 1.0,
        rtol: float = 1e-6,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype))

        self.u, self.w, self.v = normal(width, d), normal(width, width), normal(width)
        self.phi, self.layers, self.T, self.rtol = phi, layers, T, rtol
        self.scale = sigma_w / math.sqrt(width)

    def rate(self, t: Tensor, h: Tensor) -> Tensor:
        """The vector field."""
        return self.scale * self.phi(h) @ self.w.T

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(B,)`."""
        h = x @ self.u.T / math.sqrt(x.shape[1])
        if self.layers is None:
            problem = psn.ODEProblem(self.rate, h, (0.0, self.T))
            h = psn.solve(problem, psn.Vern7(), rtol=self.rtol, atol=self.rtol).u1
        else:
            step = self.T / self.layers
            for _ in range(self.layers):
                h = h + step * self.rate(h.new_zeros(()), h)
        return self.phi(h) @ self.v / math.sqrt(len(self.v))


@dataclass(frozen=True)
class Digits:
    """Images `(N, d)` of squared norm d, labels 1 (digits 0 to 4) or -1, and their origin."""

    x: Tensor
    y: Tensor
    name: str


def load(data_dir: Path | None) -> Digits:
    """MNIST from a folder; without one the 8x8 digits of scikit-learn."""
    dtype = torch.float64
    if data_dir is None:
        splits, name = data.digits(dtype=dtype), "8x8 digits"
    else:
        splits, name = data.mnist(data_dir, download=False, dtype=dtype), "MNIST"
    x = splits.train.x.flatten(1)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
    return Digits(x, torch.where(splits.train.y < 5, 1.0, -1.0).to(dtype), name)


def slope(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def value_and_gradient(network: WeightTied, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of half their mean squared error in all parameters, flat."""
    out = network(x)
    loss = ((out - y) ** 2).mean() / 2
    grads = torch.autograd.grad(loss, list(network.parameters()))
    return out.detach(), torch.cat([grad.flatten() for grad in grads])


def depth_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    """Relative gaps between the ResNet of L layers and the ODE with the same weights."""
    x, y = digits.x[: sizes.samples], digits.y[: sizes.samples]
    curves = {}
    for activation in ("softplus", "relu"):
        for width in sizes.depth_widths:
            generator = torch.Generator().manual_seed(width)
            network = WeightTied(x.shape[1], width, PHI[activation], generator, rtol=1e-10)
            out, gradient = value_and_gradient(network, x, y)
            output_gaps, gradient_gaps = [], []
            for layers in sizes.depths:
                network.layers = layers
                resnet, resnet_gradient = value_and_gradient(network, x, y)
                output_gaps.append(float((resnet - out).norm() / out.norm()))
                gradient_gaps.append(float((resnet_gradient - gradient).norm() / gradient.norm()))
            depths = [float(layers) for layers in sizes.depths]
            curves[f"{activation}, width {width}"] = {
                "output": output_gaps,
                "gradient": gradient_gaps,
                "output_slope": slope(depths, output_gaps),
                "gradient_slope": slope(depths, gradient_gaps),
            }
    return {"depths": sizes.depths, "curves": curves}


def ntk_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    """Relative error of the neural ODE's tangent kernel against the continuous limit."""
    x = digits.x[: sizes.samples]
    curves = {}
    for activation in ("softplus", "gelu"):
        limit = kernels.ntk(x, activation=activation)
        means, spreads = [], []
        for width in sizes.ntk_widths:
            generator = torch.Generator().manual_seed(width)
            errors = []
            for _ in range(sizes.ntk_seeds):
                network = WeightTied(x.shape[1], width, PHI[activation], generator)
                measured = kernels.empirical_ntk(network, x, outputs="trace")
                errors.append(float((measured - limit).norm() / limit.norm()))
            means.append(float(np.sqrt(np.mean(np.square(errors)))))
            spreads.append(float(np.std(errors)))
        widths = [float(width) for width in sizes.ntk_widths]
        curves[activation] = {"error": means, "spread": spreads, "slope": slope(widths, means)}
    return {"widths": sizes.ntk_widths, "curves": curves}


def horizon_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    """Kernels of one input for several horizons, at constant `sw` and at `sw = 1/T`."""
    x = digits.x[:1]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for T in sizes.horizons:
        for sigma_w in sorted({1.0, 1.0 / T}):
            network = WeightTied(
                x.shape[1], sizes.horizon_width, F.softplus, generator, T=T, sigma_w=sigma_w
            )
            measured = kernels.empirical_ntk(network, x, outputs="trace")
            tangent = kernels.ntk(x, T=T, sigma_w=sigma_w)
            rows.append(
                {
                    "T": T,
                    "sigma_w": sigma_w,
                    "state_variance": float(
                        kernels.nngp(x, T=T, sigma_w=sigma_w, readout="linear")
                    ),
                    "nngp": float(kernels.nngp(x, T=T, sigma_w=sigma_w)),
                    "ntk": float(tangent),
                    "measured_ntk": float(measured),
                    "max_learning_rate": kernels.max_learning_rate(tangent),
                }
            )
    return {"width": sizes.horizon_width, "rows": rows}


def random_outputs(
    x: Tensor, width: int, networks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two output neurons of many random networks, for one input; all ODEs are solved at once."""
    outputs = []
    chunk = max(1, 2**24 // width**2)
    for start in range(0, networks, chunk):
        count = min(chunk, networks - start)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weights = normal(count, width, width) / math.sqrt(width)

        def rate(t: Tensor, h: Tensor, w: Tensor = weights) -> Tensor:
            return torch.bmm(w, F.softplus(h)[..., None])[..., 0]

        # U x / sqrt d has independent normal entries of variance |x|^2 / d
        h = normal(count, width) * float(x.norm()) / math.sqrt(x.shape[1])
        with torch.no_grad():
            h = psn.solve(psn.ODEProblem(rate, h, (0.0, 1.0)), rtol=1e-4, atol=1e-4).u1
        readout = normal(count, 2, width) / math.sqrt(width)
        outputs.append(torch.bmm(readout, F.softplus(h)[..., None])[..., 0])
    first, second = torch.cat(outputs).double().unbind(1)
    return first, second


def gaussian_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    """Tests of normality and independence of output neurons over random networks."""
    stats = require("scipy.stats", extra="examples", purpose="test distributions")
    x = digits.x[:1]
    variance = float(kernels.nngp(x))
    rows = []
    for width in sizes.gaussian_widths:
        generator = torch.Generator().manual_seed(width)
        first, second = random_outputs(x, width, sizes.gaussian_networks, generator)
        f, g = first.numpy(), second.numpy()
        rows.append(
            {
                "width": width,
                "variance": float(f.var()),
                "variance_limit": variance,
                "excess_kurtosis": float(stats.kurtosis(f)),
                "kurtosis_error": math.sqrt(24 / len(f)),
                "p_normal": float(stats.normaltest(f).pvalue),
                "p_limit": float(stats.kstest(f, "norm", args=(0, math.sqrt(variance))).pvalue),
                # uncorrelated by symmetry at any width; dependence shows in the squares
                "correlation_of_squares": float(stats.spearmanr(f**2, g**2).statistic),
                "p_independent": float(stats.spearmanr(f**2, g**2).pvalue),
                "outputs": f[:4000].tolist(),
            }
        )
    return {"networks": sizes.gaussian_networks, "rows": rows}


def descend(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float,
    steps: int,
    watch: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Losses `|f - y|^2 / 2m` of gradient descent; `watch` is called before every step."""
    losses: list[float] = []
    parameters: list[Tensor] = list(network.parameters())
    for step in range(steps + 1):
        watch(step)
        loss = ((network(x) - y) ** 2).sum() / (2 * len(x))
        losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, grads, alpha=-lr)
    return losses


def train(digits: Digits, sizes: Sizes, activation: str, width: int) -> dict[str, Any]:
    """Gradient descent at half the largest stable learning rate, measured and predicted."""
    m, layers = sizes.training_samples, sizes.training_layers
    x, y = digits.x[:m], digits.y[:m]
    generator = torch.Generator().manual_seed(1)
    network = WeightTied(x.shape[1], width, PHI[activation], generator, layers=layers)
    initial = network(x).detach()
    limit = kernels.GradientDescent(kernels.ntk(x, activation=activation, steps=layers), y, initial)
    empirical_kernel = kernels.empirical_ntk(network, x, outputs="trace")
    empirical = kernels.GradientDescent(empirical_kernel, y, initial)
    lr = limit.max_learning_rate() / 2
    smallest: dict[int, float] = {}

    def watch(step: int) -> None:
        if width <= 1000 and step % 10 == 0:
            kernel = kernels.empirical_ntk(network, x, outputs="trace")
            smallest[step] = float(kernels.spectrum(kernel)[-1])

    losses = descend(network, x, y, lr, sizes.training_steps, watch)
    by_limit = np.array([limit.loss(step, lr) for step in range(len(losses))])
    by_empirical = np.array([empirical.loss(step, lr) for step in range(len(losses))])
    half = len(losses) // 2
    return {
        "activation": activation,
        "width": width,
        "learning_rate": lr,
        "loss": losses,
        "by_limit": by_limit.tolist(),
        "by_own_kernel": by_empirical.tolist(),
        "worst_by_limit": float(np.max(np.abs(np.array(losses) / by_limit - 1))),
        "worst_by_own_kernel": float(np.max(np.abs(np.array(losses) / by_empirical - 1))),
        "rate": math.log(losses[half] / losses[-1]) / (len(losses) - 1 - half),
        "rate_by_limit": math.log(by_limit[half] / by_limit[-1]) / (len(losses) - 1 - half),
        "smallest_eigenvalue": smallest,
        "smallest_eigenvalue_limit": float(kernels.spectrum(limit.kernel)[-1]),
    }


def training_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    """The descents of all activations and widths."""
    return {"runs": [train(digits, sizes, *which) for which in sizes.training]}


def limit_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    """Losses of wide networks against the limit kernel's prediction from their first outputs.

    A network's deviation is the largest `|loss / prediction - 1|` over all steps. The deviation of
    the mean compares the mean loss of the networks of a width with their mean prediction. Float32
    fits twice the width into memory, and changes a loss by less than a ten-thousandth.
    """
    m, layers, steps = sizes.training_samples, sizes.training_layers, sizes.training_steps
    x, y = digits.x[:m], digits.y[:m]
    theta = kernels.ntk(x, steps=layers)
    lr = kernels.max_learning_rate(theta) / 2
    rows = []
    for width in sizes.limit_widths:
        generator = torch.Generator().manual_seed(width)
        measured, predicted = [], []
        for _ in range(sizes.limit_networks):
            network = WeightTied(
                x.shape[1], width, F.softplus, generator, layers=layers, dtype=torch.float32
            )
            prediction = kernels.GradientDescent(theta, y, network(x.float()).detach().double())
            measured.append(descend(network, x.float(), y.float(), lr, steps))
            predicted.append([prediction.loss(step, lr) for step in range(steps + 1)])
        losses, expected = np.array(measured), np.array(predicted)
        single = np.abs(losses / expected - 1).max(axis=1)
        rows.append(
            {
                "width": width,
                "deviations": single.tolist(),
                "deviation": float(np.sqrt(np.mean(single**2))),
                "deviation_of_mean": float(np.abs(losses.mean(0) / expected.mean(0) - 1).max()),
                "loss": losses.mean(0).tolist(),
                "by_limit": expected.mean(0).tolist(),
            }
        )
    widths = [float(width) for width in sizes.limit_widths]
    trend = slope(widths, [row["deviation"] for row in rows])
    return {"networks": sizes.limit_networks, "rows": rows, "slope": trend}
