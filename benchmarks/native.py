"""Native code beside the loop in Python, on small fields, on one core.

One step of a small field shows what a solve takes besides its steps.

    python benchmarks/native.py
    python benchmarks/native.py --threads 1 2
    python benchmarks/native.py --penalties

For each field: a whole solve and a solve with its gradient, by the loop and by native code, and of
the latter the time that is spent inside the library. The last row is what torch takes for the graph
of a function of the same tensors that computes nothing: no solve can be faster with its gradient.
On a machine that does other work as well the fastest sample says most. With `--threads` a batch of
512 states of 784 entries takes the place of the small fields (`workloads.py`), on all cores, with
each of these numbers of threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import pin, processor, table
from torch import Tensor, nn
from workloads import mnist

import pysciml_node as psn
from pysciml_node.torch_engine.native import departure
from pysciml_node.torch_engine.native.library import Library


class Spiral(nn.Module):
    """torchdiffeq's spiral field, 2-50-2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 50), nn.Linear(50, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the derivative at `y`, shape `(20, 2)`."""
        out: Tensor = self.second(torch.tanh(self.first(y**3)))
        return out


class VanDerPol(nn.Module):
    """Stiff but for its jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(1e3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the derivative at `y`, shape `(2,)`."""
        return torch.stack((y[1], self.stiffness * (1 - y[0] ** 2) * y[1] - y[0]))


class LotkaVolterra(nn.Module):
    """Growth and decay with a 2-5-5-2 network for what the species do to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.3, -1.8]))
        layers = [nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative at `u`, shape `(2,)`."""
        out: Tensor = self.rates * u + self.net(u)
        return out


def inside() -> list[float]:
    """Seconds that each call of a library took, from now on, with what fills its request, and makes
    the tensors that it writes to.
    """
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = time.perf_counter()
            returned = call(*given)
            spent.append(time.perf_counter() - start)
            return returned

        return run

    for name in ("march", "sweep"):
        setattr(Library, name, timed(getattr(Library, name)))

    def timed_made(make: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            call = make(*given)
            return None if call is None else timed(call)

        return run

    for name in ("call_of", "steps_of", "pull_of"):
        setattr(departure, name, timed_made(getattr(departure, name)))
    return spent


def fastest(run: Callable[[], object], samples: int, spent: list[float]) -> tuple[float, float]:
    """Milliseconds of the fastest run, and those inside the library in the fastest of these."""
    run()
    whole, library = [], []
    for _ in range(samples):
        spent.clear()
        start = time.perf_counter()
        run()
        whole.append(time.perf_counter() - start)
        library.append(sum(spent))
    return min(whole) * 1e3, min(library) * 1e3


@dataclass
class Case:
    """A field and how it is solved."""

    name: str
    field: nn.Module
    u0: Tensor
    end: float
    algorithm: Any
    options: dict[str, Any]
    samples: int = 50  # of the loop

    def __post_init__(self) -> None:
        self.inputs = [self.u0, *self.field.parameters()]

    def solve(self, compile: bool) -> Any:
        """One solve."""
        return psn.solve(
            psn.ODEProblem(self.field, self.u0, (0.0, self.end)),
            self.algorithm,
            compile=compile,
            engine="torch",
            **{"controller": psn.IController(), **self.options},
        )

    def forward(self, compile: bool) -> Any:
        """One solve without gradients."""
        with torch.no_grad():
            return self.solve(compile)

    def gradient(self, compile: bool) -> Any:
        """One solve and its gradient."""
        solution = self.solve(compile)
        loss = solution.u.sum() if "saveat" in self.options else solution.u1.sum()
        return torch.autograd.grad(loss, self.inputs)


class Nothing(torch.autograd.Function):
    """A function in torch's graph that computes nothing, nor does its gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """A state."""
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs."""
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def bare(case: Case, samples: int, spent: list[float]) -> list[str]:
    """The row of a function that computes nothing."""
    inputs = case.inputs

    def forward() -> Tensor:
        out: Tensor = Nothing.apply(*inputs)  # type: ignore[no-untyped-call]
        return out

    def gradient() -> Any:
        return torch.autograd.grad(forward().sum(), inputs)

    with torch.no_grad():
        cells = [f"{fastest(forward, samples, spent)[0]:.3f}", ""]
    return ["nothing", "torch", "0", "", *cells, f"{fastest(gradient, samples, spent)[0]:.3f}", ""]


def measure(case: Case, compile: bool, samples: int, spent: list[float]) -> list[str]:
    """A row of the table."""
    start = time.perf_counter()
    nfe = case.forward(compile).stats.nfe
    first = time.perf_counter() - start
    cells = [case.name, "native" if compile else "loop", str(nfe), f"{first:.2f}"]
    for run in (case.forward, case.gradient):
        whole, library = fastest(partial(run, compile), samples, spent)
        cells += [f"{whole:.3f}", f"{library:.3f}" if compile else ""]
    return cells


def in_threads(numbers: list[int], spent: list[float]) -> None:
    """A large batch with so many threads, in turns; print the table."""
    work = mnist()
    options = {"rtol": work.tolerance, "atol": work.tolerance}
    u0 = work.u0.requires_grad_()
    case = Case("", work.field, u0, work.times[-1], psn.Tsit5(), options)
    kinds = [(compile, count) for compile in (False, True) for count in numbers]
    best = dict.fromkeys(kinds, (float("inf"), float("inf")))
    for _ in range(4):
        for compile, count in kinds:
            torch.set_num_threads(count)
            times = [
                fastest(partial(run, compile), 1, spent)[0] for run in (case.forward, case.gradient)
            ]
            best[compile, count] = tuple(map(min, times, best[compile, count]))
    rows = [
        ["native" if compile else "loop", str(count), *(f"{time:.0f}" for time in times)]
        for (compile, count), times in best.items()
    ]
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{processor()}, {os.cpu_count()} cores, load {load}; {work.description}; ms.\n")
    print(table(["", "threads", "forward", "with gradient"], rows))


def training() -> None:
    """Training steps with each penalty, in turns; print the table."""
    net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
    u0 = torch.randn(20, 2)
    penalties: dict[str, list[psn.Regularizer]] = {
        "none": [],
        'LocalError("unbiased")': [psn.LocalError("unbiased")],
        "the same, stop_gradient=False": [psn.LocalError("unbiased", stop_gradient=False)],
        "GlobalError()": [psn.GlobalError()],
    }

    def step(node: psn.NeuralODE) -> None:
        solution = node(u0)
        loss = solution.u1.square().mean() + solution.penalty
        loss.backward()
        net.zero_grad()

    nodes = {
        (name, compile): psn.NeuralODE(
            net, psn.Tsit5(), rtol=1e-4, atol=1e-4, regularizers=listed, compile=compile
        )
        for name, listed in penalties.items()
        for compile in (False, True)
    }
    best = dict.fromkeys(nodes, float("inf"))
    for _ in range(10):
        for key, node in nodes.items():
            for _ in range(20):
                start = time.thread_time()
                step(node)
                best[key] = min(best[key], (time.thread_time() - start) * 1e3)
    rows = [
        [name, *(f"{best[name, compile]:.2f}" for compile in (False, True))] for name in penalties
    ]
    print(f"{processor()}, torch {torch.__version__}; fastest training step, ms of the thread.\n")
    print(table(["penalty", "loop", "native"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--penalties", action="store_true")
    arguments = parser.parse_args()
    threads = arguments.threads
    spent = inside()
    if threads:
        in_threads(threads, spent)
        return
    core = pin(None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.penalties:
        training()
        return
    times = torch.linspace(0, 3, 31).tolist()
    pair = torch.ones(2, dtype=torch.float64, requires_grad=True)
    spiral, u0 = Spiral(), torch.randn(20, 2, requires_grad=True)
    slow = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    switched = {"controller": psn.PIController(), "rtol": 1e-5, "atol": 1e-7}
    one_step = {"controller": psn.FixedStep(), "dt0": 1.0}
    cases = [
        Case("spiral", spiral, u0, 1.0, psn.DP5(), {}),
        Case("spiral, one Euler step", spiral, u0, 1.0, psn.Euler(), one_step),
        Case("Lotka-Volterra", LotkaVolterra().double(), pair, 3.0, psn.Tsit5(), {"saveat": times}),
        Case("Van der Pol", VanDerPol().double(), slow, 900.0, psn.AutoTsit5(), switched, 3),
    ]
    rows = [
        measure(case, compile, samples, spent)
        for case in cases
        for compile, samples in ((False, case.samples), (True, 1000))
    ]
    rows.append(bare(cases[0], 1000, spent))
    print(f"{processor()}, core {core}, torch {torch.__version__}; fastest sample, ms.\n")
    header = ["", "", "NFE", "first, s", "forward", "inside", "with gradient", "inside"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
