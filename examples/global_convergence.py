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
limit:     the loss curve of a network of width n approaches the limit kernel's like 1/sqrt(n)

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pysciml_node.cli.doctor import environment
from pysciml_node.experiments.reporting.figures import new_figure, save_figure
from pysciml_node.experiments.studies.infinite_width import (
    QUICK,
    Digits,
    Sizes,
    depth_study,
    gaussian_study,
    horizon_study,
    limit_study,
    load,
    ntk_study,
    training_study,
)


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


def draw_limit(result: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2)
    for row in result["rows"]:
        (line,) = axes[0].semilogy(row["loss"], label=f"width {row['width']}")
        axes[0].semilogy(row["by_limit"], ":", color=line.get_color())
    axes[0].set(xlabel="step", ylabel="mean loss", title="Gradient descent (dotted: limit NTK)")
    axes[0].legend(fontsize=8)
    widths = [row["width"] for row in result["rows"]]
    for row in result["rows"]:
        axes[1].loglog([row["width"]] * len(row["deviations"]), row["deviations"], "k.", ms=3)
    for key, label in (
        ("deviation", "a network (root mean square)"),
        ("deviation_of_mean", f"mean of {result['networks']} networks"),
    ):
        axes[1].loglog(widths, [row[key] for row in result["rows"]], "o-", label=label)
    axes[1].axhline(0.05, color="k", lw=0.5)
    axes[1].set(xlabel="width n", ylabel="worst relative deviation", title="Loss against limit NTK")
    axes[1].legend(fontsize=8)
    save_figure(figure, path)


STUDIES: dict[str, tuple[Callable[[Digits, Sizes], dict[str, Any]], Callable[..., None]]] = {
    "depth": (depth_study, draw_depth),
    "ntk": (ntk_study, draw_ntk),
    "horizon": (horizon_study, draw_horizon),
    "gaussian": (gaussian_study, draw_gaussian),
    "training": (training_study, draw_training),
    "limit": (limit_study, draw_limit),
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
    if name == "limit":
        return [
            f"width {row['width']:4d}               worst deviation of the loss: a network "
            f"{row['deviation']:.1%} (root mean square of {result['networks']}), their mean "
            f"{row['deviation_of_mean']:.1%}"
            for row in result["rows"]
        ] + [f"slope in n: {result['slope']:.3f}   (theory -0.5)"]
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
