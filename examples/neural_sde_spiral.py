"""A neural SDE fitted to the moments of a noisy spiral, with and without regularization.

The experiment of Pal, Ma, Shah and Rackauckas, "Opening the Blackbox" (arXiv:2105.03918, section
4.2). The data are means and variances, over 10,000 paths, of

    du = A u^3 dt + 0.2 u dW,   A = [[-0.1, 2], [-2, -0.1]],   u(0) = (2, 0),   t in (0, 1).

A drift with one hidden layer of 50 units on u^3 and a linear diffusion are fitted to them with 100
paths a step. Differences to the paper: Adam instead of AdaBelief, output at the 33 multiples of
1/32 instead of 30 times. One call trains one variant and adds it to OUTPUT_DIR/results.json:

    for variant in none local-unbiased local-biased global-error; do
        python examples/neural_sde_spiral.py --regularize $variant --seed 0
    done
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.experiments.reporting.figures import new_figure, save_figure
from pysciml_node.steps.progress import ProgressLine

REGULARIZERS: dict[str, tuple[type[psn.Regularizer], dict[str, Any], float]] = {
    "none": (psn.Regularizer, {}, 0.0),
    "local-unbiased": (psn.LocalError, {"sampling": "unbiased"}, 10.0),
    "local-biased": (psn.LocalError, {"sampling": "biased"}, 10.0),
    "global-error": (psn.GlobalError, {}, 1.0),
    "local-stiffness": (psn.LocalStiffness, {"sampling": "unbiased"}, 1.0),
    "global-stiffness": (psn.GlobalStiffness, {"aggregate": "sum"}, 0.2),
}
TIMES = torch.linspace(0.0, 1.0, 33)
START = torch.tensor([2.0, 0.0])
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
DATA_PATHS = 10_000


class Drift(nn.Module):
    """A network on the cubes of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The drift."""
        out: Tensor = self.net(u**3)
        return out


class Diffusion(nn.Module):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The diffusion."""
        out: Tensor = self.linear(u)
        return out


@dataclass(frozen=True)
class Moments:
    """Mean and variance over paths at `TIMES`, each `(33, 2)`."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, states: Tensor) -> "Moments":
        """From states `(33, paths, 2)`."""
        return cls(states.mean(1), states.var(1))

    def distance(self, other: "Moments") -> Tensor:
        """Mean squared difference of the means, plus that of the variances."""
        means = (self.mean - other.mean).square().mean()
        return means + (self.variance - other.variance).square().mean()


def true_moments(engine: str, seed: int) -> Moments:
    """What is fitted; the same for every variant."""
    problem = psn.SDEProblem(
        lambda t, u: u**3 @ SPIRAL.T,
        lambda t, u: 0.2 * u,
        START.repeat(DATA_PATHS, 1),
        (0.0, 1.0),
    )
    with torch.no_grad():
        solution = psn.solve(
            problem,
            psn.SRIW1(),
            dt0=1 / 512,
            controller=psn.FixedStep(),
            saveat=TIMES,
            engine=engine,
            generator=torch.Generator().manual_seed(10_000 + seed),
        )
    return Moments.of(solution.u)


def make_model(arguments: argparse.Namespace) -> psn.NeuralSDE:
    torch.manual_seed(arguments.seed)
    kind, options, usual = REGULARIZERS[arguments.regularize]
    weight = usual if arguments.weight is None else arguments.weight
    stiff = arguments.regularize.endswith("stiffness")
    return psn.NeuralSDE(
        Drift(),
        Diffusion(),
        psn.SOSRI2(delta=1 / 6) if stiff else psn.SOSRI(delta=1 / 6),
        rtol=arguments.tolerance,
        atol=arguments.tolerance,
        regularizers=[] if arguments.regularize == "none" else [kind(weight=weight, **options)],
        engine=arguments.engine,
        generator=torch.Generator().manual_seed(arguments.seed),
    )


def train(
    model: psn.NeuralSDE, target: Moments, arguments: argparse.Namespace
) -> tuple[float, list[float], list[int]]:
    """CPU seconds, and loss and drift evaluations of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.learning_rate)
    line, losses, nfe = ProgressLine(arguments.regularize), [], []
    started = time.process_time()
    for step in range(arguments.steps):
        optimizer.zero_grad()
        solution = model(START.repeat(arguments.paths, 1), saveat=TIMES)
        loss = Moments.of(solution.u).distance(target)
        (loss + solution.penalty).backward()
        optimizer.step()
        model.step_schedules()
        losses.append(loss.item())
        nfe.append(solution.stats.nfe)
        last = step + 1 == arguments.steps
        line.show((step + 1) / arguments.steps, f"loss={losses[-1]:.4f} nfe={nfe[-1]}", final=last)
    return time.process_time() - started, losses, nfe


def evaluate(model: psn.NeuralSDE, target: Moments, paths: int) -> tuple[dict[str, float], Moments]:
    """Fit over new paths, and the cost of a prediction of the end alone."""
    model.eval()
    generator = torch.Generator().manual_seed(999)
    with torch.no_grad():
        found = Moments.of(model(START.repeat(paths, 1), saveat=TIMES, generator=generator).u)
        started = time.process_time()
        runs = [model(START.repeat(100, 1), generator=generator) for _ in range(10)]
        seconds = (time.process_time() - started) / len(runs)
    return {
        "test_mse": found.distance(target).item(),
        "test_nfe": sum(run.stats.nfe for run in runs) / len(runs),
        "prediction_cpu_seconds": seconds,
    }, found


def draw(target: Moments, found: Moments, losses: list[float], path: Path) -> None:
    figure, (plane, over_time, loss_axes) = new_figure(3)
    plane.plot(*target.mean.T, "k.", label="data: mean")
    plane.plot(*found.mean.T, color="#0072b2", label="neural SDE: mean")
    plane.set(xlabel="$u_1$", ylabel="$u_2$", aspect="equal")
    plane.legend()
    for i, color in enumerate(("#0072b2", "#d55e00")):
        deviation = found.variance[:, i].sqrt()
        low, high = found.mean[:, i] - deviation, found.mean[:, i] + deviation
        over_time.fill_between(TIMES, low, high, color=color, alpha=0.3, linewidth=0)
        over_time.plot(TIMES, found.mean[:, i], color=color, label=f"$u_{i + 1}$")
        bars = target.variance[:, i].sqrt()
        over_time.errorbar(TIMES, target.mean[:, i], bars, fmt="k.", markersize=3, linewidth=0.6)
    over_time.set(xlabel="t", title="mean and standard deviation; data in black")
    over_time.legend()
    loss_axes.semilogy(losses, color="#444444")
    loss_axes.set(xlabel="step", ylabel="loss")
    save_figure(figure, path)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fit a neural SDE to the moments of a noisy spiral.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--regularize", choices=list(REGULARIZERS), default="none", help="which penalty to add")
    add("--weight", type=float, help="of the penalty [default: one for each kind]")
    add("--steps", type=int, default=250, help="optimizer steps")
    add("--paths", type=int, default=100, help="paths a step")
    add("--learning-rate", type=float, default=0.01, help="of Adam")
    add("--tolerance", type=float, default=0.05, help="relative and absolute")
    add("--seed", type=int, default=0, help="of parameters and paths")
    add("--engine", default="auto", help="auto, torch or julia")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--output-dir", type=Path, default=Path("runs/neural_sde_spiral"), help="what is written")
    add("--quick", action="store_true", help="half a minute's look: 60 steps, 50 paths")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    output = arguments.output_dir
    if arguments.quick:
        arguments.steps, arguments.paths = 60, 50
        output = output / "quick"
    target = true_moments(arguments.engine, seed=0)
    model = make_model(arguments)
    seconds, losses, nfe = train(model, target, arguments)
    figures, found = evaluate(model, target, paths=1000)
    name = f"{arguments.regularize}-seed{arguments.seed}"
    output.mkdir(parents=True, exist_ok=True)
    draw(target, found, losses, output / f"{name}.png")
    results = output / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    known[name] = {
        **figures,
        "train_cpu_seconds": seconds,
        "train_nfe_last": nfe[-1],
        "settings": settings,
    }
    results.write_text(json.dumps(known, indent=2) + "\n")
    print(
        f"{'run':24s} {'test MSE':>10s} {'test NFE':>9s} {'train s':>8s} {'predict s':>10s}  (CPU)"
    )
    for run, row in known.items():
        print(
            f"{run:24s} {row['test_mse']:10.4f} {row['test_nfe']:9.1f} "
            f"{row['train_cpu_seconds']:8.1f} {row['prediction_cpu_seconds']:10.4f}"
        )
    print(f"written: {results}, {output / name}.png")


if __name__ == "__main__":
    main()
