"""Ten thousand Lorenz systems solved by other processes, or by a local Dask cluster.

    python examples/members_on_workers.py --on here processes dask

`here` is one call in this process, `processes` are joblib's, and `dask` is a cluster of two
processes on this machine (`pip install "dask[distributed]"`). Prints the seconds that a solve and
its gradient to all parameters take, each after a first solve that starts the workers, and how far
both are from those of one call.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import joblib
import torch
from torch import Tensor

import pysciml_node as psn


def lorenz(t: Tensor, u: Tensor, rho: Tensor) -> Tensor:
    """One Lorenz system."""
    x, y, z = u
    return torch.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z])


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """A Dask cluster on this machine, which joblib hands its work to."""
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as local,
        Client(local),
        joblib.parallel_config(backend="dask"),
    ):
        yield


def solve_all(size: int, members: psn.Parallel | None) -> tuple[float, Tensor, Tensor]:
    """Seconds, states at the end, and gradients of their sum to all parameters."""
    rho = torch.linspace(10, 40, size, dtype=torch.float64, requires_grad=True)
    one = psn.ODEProblem(lorenz, torch.ones(3, dtype=torch.float64), (0.0, 2.0), p=rho[0].detach())
    begun = time.perf_counter()
    solution = psn.solve(psn.EnsembleProblem(one, p=rho), rtol=1e-8, atol=1e-8, members=members)
    (gradient,) = torch.autograd.grad(solution.u1.sum(), rho)
    return time.perf_counter() - begun, solution.u1.detach(), gradient


def report(name: str, size: int, members: psn.Parallel | None) -> None:
    """Solve and print."""
    solve_all(8, members)
    seconds, u1, gradient = solve_all(size, members)
    _, exact, slopes = solve_all(size, None)
    off = (float((u1 - exact).abs().max()), float(((gradient - slopes) / slopes).abs().max()))
    print(f"{name}: {seconds:.1f} s, states {off[0]:.0e} and gradients {off[1]:.0e} off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--on", nargs="+", default=["here", "processes"], help="here, processes or dask"
    )
    parser.add_argument("--size", type=int, default=10_000, help="members")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    asked = parser.parse_args()
    for place in asked.on:
        if place == "here":
            report(place, asked.size, None)
        elif place == "processes":
            report(place, asked.size, psn.Parallel(workers=asked.workers))
        else:
            with cluster(asked.workers):
                report(place, asked.size, psn.Parallel())


if __name__ == "__main__":
    main()
