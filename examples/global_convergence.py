"""What infinitely wide neural ODEs predict about finite ones.

The experiments of Gao, Sun, Liu and Gao, "Global Convergence in Neural ODEs: Impact of Activation
Functions" (arXiv:2509.22436), on the weight-tied network

    h_0 = (su / sqrt d) U x,  h' = (sw / sqrt n) W phi(h) on [0, T],  f = (sv / sqrt n) v.phi(h_T):

depth:     outputs and gradients of the ResNet of L layers approach the ODE's like 1/L
ntk:       the tangent kernel of a network of width n approaches its limit like 1/sqrt(n)
horizon:   kernels grow with T, unless sw goes like 1/T
gaussian:  outputs of random networks become Gaussian and independent as the width grows
training:  gradient descent follows the kernel's prediction, and the smallest eigenvalue of the
           tangent kernel stays away from zero

    python examples/global_convergence.py --data-dir data/mnist

writes results.json and a picture a study, and prints a table. Without --data-dir the data are the
8x8 digits of scikit-learn. Widths, rates and scales are not published; those used are in the
results. Inputs are scaled to |x|^2 = d.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pysciml_node as psn
from pysciml_node import data, kernels
from pysciml_node._optional import require
from pysciml_node.doctor import environment
from pysciml_node.experiments.figures import new_figure, save_figure

Phi = Callable[[Tensor], Tensor]
PHI: dict[str, Phi] = {
    "softplus": F.softplus,
    "gelu": F.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Sizes:
    """How large each study is."""

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
)


class WeightTied(nn.Module):
    """The network above, with all scales 1 unless given; `layers=None` solves the ODE."""

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
    ) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

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
    dtype = torch.float64
    if data_dir is None:
        splits, name = data.digits(dtype=dtype), "8x8 digits"
    else:
        splits, name = data.mnist(data_dir, download=False, dtype=dtype), "MNIST"
    x = splits.train.x.flatten(1)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
    return Digits(x, torch.where(splits.train.y < 5, 1.0, -1.0).to(dtype), name)


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def value_and_gradient(network: WeightTied, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
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
                other, other_gradient = value_and_gradient(network, x, y)
                output_gaps.append(float((other - out).norm() / out.norm()))
                gradient_gaps.append(float((other_gradient - gradient).norm() / gradient.norm()))
            depths = [float(layers) for layers in sizes.depths]
            curves[f"{activation}, width {width}"] = {
                "output": output_gaps,
                "gradient": gradient_gaps,
                "output_slope": slope(depths, output_gaps),
                "gradient_slope": slope(depths, gradient_gaps),
            }
    return {"depths": sizes.depths, "curves": curves}


def draw_depth(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2)
    depths = result["depths"]
    for ax, kind in zip(axes, ("output", "gradient"), strict=True):
        for name, curve in result["curves"].items():
            ax.loglog(depths, curve[kind], "o-" if "softplus" in name else "s--", label=name)
        first = next(iter(result["curves"].values()))[kind][0]
        ax.loglog(depths, [first * depths[0] / depth for depth in depths], "k:", label="slope -1")
        ax.set(xlabel="layers L", ylabel=f"relative {kind} gap", title="ResNet against ODE")
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


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


def draw_ntk(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2)
    for name, curve in result["curves"].items():
        axes[0].errorbar(result["widths"], curve["error"], yerr=curve["spread"], fmt="o-")
        axes[1].loglog(result["widths"], curve["error"], "o-", label=name)
    first = next(iter(result["curves"].values()))["error"][0]
    line = [first * math.sqrt(result["widths"][0] / width) for width in result["widths"]]
    axes[1].loglog(result["widths"], line, "k:", label="slope -1/2")
    axes[1].legend()
    for ax in axes:
        ax.set(xlabel="width n", ylabel="relative error of the NTK", title="NTK against its limit")
    save_figure(figure, path)


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


def draw_horizon(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(1)
    for rule, power in (("sw = 1", 0), ("sw = 1/T", 1)):
        rows = [row for row in result["rows"] if row["sigma_w"] == row["T"] ** -power]
        horizons = [row["T"] for row in rows]
        (line,) = axes.loglog(horizons, [row["ntk"] for row in rows], "-", label=f"limit, {rule}")
        axes.loglog(
            horizons,
            [row["measured_ntk"] for row in rows],
            "o",
            color=line.get_color(),
            label=f"width {result['width']}, {rule}",
        )
    axes.set(xlabel="horizon T", ylabel="NTK(x, x)", title="The horizon and the scale of W")
    axes.legend()
    save_figure(figure, path)


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


def draw_gaussian(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2)
    for row in result["rows"]:
        scaled = np.array(row["outputs"]) / math.sqrt(row["variance_limit"])
        axes[0].hist(
            scaled,
            bins=np.linspace(-5, 5, 61),
            density=True,
            histtype="step",
            label=f"width {row['width']}",
        )
    z = np.linspace(-5, 5, 201)
    axes[0].semilogy(z, np.exp(-z * z / 2) / math.sqrt(2 * math.pi), "k:", label="normal")
    axes[0].set(xlabel="output / standard deviation of the limit", ylim=(1e-4, 1), title="Outputs")
    axes[0].legend()
    widths = [row["width"] for row in result["rows"]]
    for key, label in (
        ("excess_kurtosis", "excess kurtosis"),
        ("correlation_of_squares", "rank correlation of squares of two outputs"),
    ):
        axes[1].semilogx(widths, [row[key] for row in result["rows"]], "o-", label=label)
    axes[1].axhline(0, color="k", lw=0.5)
    axes[1].set(xlabel="width n", title="Distance from independent Gaussians")
    axes[1].legend(fontsize=8)
    save_figure(figure, path)


def train(digits: Digits, sizes: Sizes, activation: str, width: int) -> dict[str, Any]:
    """Gradient descent at half the largest stable learning rate, measured and predicted."""
    m, layers = sizes.training_samples, sizes.training_layers
    x, y = digits.x[:m], digits.y[:m]
    generator = torch.Generator().manual_seed(1)
    network = WeightTied(x.shape[1], width, PHI[activation], generator, layers=layers)
    initial = network(x).detach()
    limit = kernels.GradientDescent(kernels.ntk(x, activation=activation, steps=layers), y, initial)
    own_kernel = kernels.empirical_ntk(network, x, outputs="trace")
    own = kernels.GradientDescent(own_kernel, y, initial)
    lr = limit.max_learning_rate() / 2
    losses: list[float] = []
    smallest: dict[int, float] = {}
    for step in range(sizes.training_steps + 1):
        if width <= 1000 and step % 10 == 0:
            kernel = kernels.empirical_ntk(network, x, outputs="trace")
            smallest[step] = float(kernels.spectrum(kernel)[-1])
        loss = ((network(x) - y) ** 2).sum() / (2 * m)
        losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(network.parameters(), grads, strict=True):
                parameter.sub_(lr * grad)
    by_limit = np.array([limit.loss(step, lr) for step in range(len(losses))])
    by_own = np.array([own.loss(step, lr) for step in range(len(losses))])
    half = len(losses) // 2
    return {
        "activation": activation,
        "width": width,
        "learning_rate": lr,
        "loss": losses,
        "by_limit": by_limit.tolist(),
        "by_own_kernel": by_own.tolist(),
        "worst_by_limit": float(np.max(np.abs(np.array(losses) / by_limit - 1))),
        "worst_by_own_kernel": float(np.max(np.abs(np.array(losses) / by_own - 1))),
        "rate": math.log(losses[half] / losses[-1]) / (len(losses) - 1 - half),
        "rate_by_limit": math.log(by_limit[half] / by_limit[-1]) / (len(losses) - 1 - half),
        "smallest_eigenvalue": smallest,
        "smallest_eigenvalue_limit": float(kernels.spectrum(limit.kernel)[-1]),
    }


def training_study(digits: Digits, sizes: Sizes) -> dict[str, Any]:
    return {"runs": [train(digits, sizes, *which) for which in sizes.training]}


def draw_training(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2)
    for run in result["runs"]:
        name = f"{run['activation']}, width {run['width']}"
        (line,) = axes[0].semilogy(run["loss"], label=name)
        axes[0].semilogy(run["by_limit"], ":", color=line.get_color())
        if run["smallest_eigenvalue"]:
            steps, values = zip(*run["smallest_eigenvalue"].items(), strict=True)
            axes[1].plot(steps, values, "o-", color=line.get_color(), ms=3, label=name)
            axes[1].axhline(run["smallest_eigenvalue_limit"], color=line.get_color(), ls=":")
    axes[0].set(xlabel="step", ylabel="loss", title="Gradient descent (dotted: limit NTK)")
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="step", title="Smallest NTK eigenvalue (dotted: limit)", ylim=(0, None))
    axes[1].legend(fontsize=8)
    save_figure(figure, path)


STUDIES: dict[str, tuple[Callable[[Digits, Sizes], dict[str, Any]], Callable[..., None]]] = {
    "depth": (depth_study, draw_depth),
    "ntk": (ntk_study, draw_ntk),
    "horizon": (horizon_study, draw_horizon),
    "gaussian": (gaussian_study, draw_gaussian),
    "training": (training_study, draw_training),
}


def summary(name: str, result: dict[str, Any]) -> list[str]:
    """What the study found, a line each."""
    if name == "depth":
        return [
            f"{key:24s} slope in L: output {curve['output_slope']:.3f}, "
            f"gradient {curve['gradient_slope']:.3f}   (theory -1)"
            for key, curve in result["curves"].items()
        ]
    if name == "ntk":
        return [
            f"{key:24s} slope in n: {curve['slope']:.3f}   (theory -0.5); error at width "
            f"{result['widths'][-1]}: {curve['error'][-1]:.4f}"
            for key, curve in result["curves"].items()
        ]
    if name == "horizon":
        return [
            f"T = {row['T']:4.1f}, sigma_w = {row['sigma_w']:5.3f}     var h_T "
            f"{row['state_variance']:8.4f}   NTK {row['ntk']:8.4f}   measured "
            f"{row['measured_ntk']:8.4f}   largest rate {row['max_learning_rate']:.4f}"
            for row in result["rows"]
        ]
    if name == "gaussian":
        return [
            f"width {row['width']:4d}               excess kurtosis {row['excess_kurtosis']:7.3f} "
            f"+- {row['kurtosis_error']:.3f}   p(normal) {row['p_normal']:.3g}   p(limit) "
            f"{row['p_limit']:.3g}   p(independent) {row['p_independent']:.3g}"
            for row in result["rows"]
        ]
    return [
        f"{run['activation']:9s} width {run['width']:4d}     worst deviation of the loss: "
        f"{run['worst_by_limit']:.1%} of the limit NTK's prediction, "
        f"{run['worst_by_own_kernel']:.1%} of its own NTK's; rate {run['rate']:.2e} "
        f"(predicted {run['rate_by_limit']:.2e})"
        for run in result["runs"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's files; default: digits")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/global_convergence"))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--panels", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    args = parser.parse_args()
    digits, sizes = load(args.data_dir), QUICK if args.quick else Sizes()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"data": digits.name, "sizes": asdict(sizes), "environment": environment()}
    for name in args.panels:
        study, draw = STUDIES[name]
        started = time.perf_counter()
        result = study(digits, sizes)
        results[name] = result | {"seconds": time.perf_counter() - started}
        path.write_text(json.dumps(results, indent=1))
        draw(result, args.output_dir / f"{name}.png")
        print(f"{name} ({digits.name}, {results[name]['seconds']:.0f} s)")
        print("\n".join(f"  {line}" for line in summary(name, result)), flush=True)


if __name__ == "__main__":
    main()
