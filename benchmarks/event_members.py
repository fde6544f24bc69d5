"""Ensembles with events: bouncing balls, each with a height and a restitution, on one core.

    python benchmarks/event_members.py [--sizes 10 1000] [--only native ...] [--repeats 3]

A ball falls from 1 to 3 m, keeps 0.8 to 0.95 of its speed at each bounce, and is followed for 4 s
by Tsit5 at tolerance 1e-8 in float64. The gradient is that of the sum of all heights at the end, to
heights and restitutions.

A row gives the bounces of a ball, the largest error of a height at the end and of the gradient,
against the closed form, and milliseconds of CPU time for all balls: medians, without compilation,
all rows taken in turn. diffrax has no row: its events end a solve, and do not change the state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from timing import pin, processor, show_members, versions

CORE = pin(None)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pysciml_node as psn  # noqa: E402

D = torch.float64
END, GRAVITY, TOLERANCE = 4.0, 9.81, 1e-8
OPTIONS: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE, "engine": "torch"}
PACKAGES = ("torch", "pysciml_node")
Solve = Callable[[Tensor, Tensor], Tensor]


def fall(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Height and velocity."""
    return torch.stack((u[1], u.new_tensor(-GRAVITY)))


BOUNCE = psn.Event(
    lambda t, u: u[0], direction=-1, affect=lambda t, u, p: torch.stack((u[0], -p * u[1]))
)


def at_once(compile: bool) -> Solve:
    """All balls in one solve."""

    def solve(heights: Tensor, restitutions: Tensor) -> Tensor:
        start = torch.stack((heights, torch.zeros_like(heights)), dim=1)
        one = psn.ODEProblem(fall, start[0].detach(), (0.0, END), p=restitutions[0].detach())
        many = psn.EnsembleProblem(one, start, restitutions)
        solution = psn.solve(
            many,
            psn.Tsit5(),
            events=BOUNCE,
            compile=compile,
            **OPTIONS,
        )
        return solution.u1[:, 0]

    return solve


def one_by_one(heights: Tensor, restitutions: Tensor) -> Tensor:
    """A native solve of each ball."""
    ends = []
    for height, restitution in zip(heights.unbind(), restitutions.unbind(), strict=True):
        start = torch.stack((height, torch.zeros_like(height)))
        problem = psn.ODEProblem(fall, start, (0.0, END), p=restitution)
        solution = psn.solve(
            problem,
            psn.Tsit5(),
            events=BOUNCE,
            compile=True,
            **OPTIONS,
        )
        ends.append(solution.u1[0])
    return torch.stack(ends)


def exact(heights: Tensor, restitutions: Tensor) -> tuple[Tensor, Tensor]:
    """The heights at the end, and how often each ball has bounced."""
    speed = torch.sqrt(2 * GRAVITY * heights)
    t, height, count = speed / GRAVITY, heights - GRAVITY * END**2 / 2, torch.zeros_like(heights)
    while bool((t < END).any()):
        speed = speed * restitutions
        rest = END - t
        under_way = t < END
        height = torch.where(under_way, speed * rest - GRAVITY * rest**2 / 2, height)
        count += under_way
        t = t + 2 * speed / GRAVITY
    return height, count


CANDIDATES: dict[str, Solve] = {
    "native": at_once(True),
    "native, one by one": one_by_one,
    "one batch": at_once(False),
}


def balls(size: int) -> tuple[Tensor, Tensor]:
    """Heights and restitutions, `(M,)` each."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(2, size, generator=generator, dtype=D)
    return (1 + 2 * shares[0]).requires_grad_(), (0.8 + 0.15 * shares[1]).requires_grad_()


def rows(size: int, names: list[str], repeats: int) -> list[list[str]]:
    """The rows of one size."""
    inputs = balls(size)
    expected, bounces = exact(*inputs)
    pulled = torch.cat(torch.autograd.grad(expected.sum(), inputs))
    errors: dict[str, list[str]] = {}
    times: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:  # the first calls compile
        with torch.no_grad():
            CANDIDATES[name](*inputs)
        ends = CANDIDATES[name](*inputs)
        bars = torch.cat(torch.autograd.grad(ends.sum(), inputs))
        off = (ends - expected).abs().max(), ((bars - pulled) / pulled.abs().max()).abs().max()
        errors[name] = [f"{float(x.detach()):.0e}" for x in off]
        times[name] = ([], [])
    for _ in range(repeats):
        for name in names:
            before = time.process_time()
            with torch.no_grad():
                CANDIDATES[name](*inputs)
            between = time.process_time()
            torch.autograd.grad(CANDIDATES[name](*inputs).sum(), inputs)
            times[name][0].append(between - before)
            times[name][1].append(time.process_time() - between)
    return [
        [
            *(name, str(size), f"{float(bounces.mean()):.1f}", *errors[name]),
            *(f"{1e3 * median(spent):.3g}" for spent in times[name]),
        ]
        for name in names
    ]


def main() -> None:
    torch.set_num_threads(1)
    show_members(__doc__, list(CANDIDATES), rows, "bounces")
    print(f"{processor()}, core {CORE}; {versions(PACKAGES)}")


if __name__ == "__main__":
    main()
