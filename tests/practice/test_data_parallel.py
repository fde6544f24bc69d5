"""Several processes that share a model: gradients are those of one process with all samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pysciml_node as psn

D = torch.float64
WORKERS = 2


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=D)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(u)) * torch.cos(t)


def model(what: str) -> nn.Module:
    torch.manual_seed(0)
    if what == "density":
        return psn.CNF(Field(), event_shape=3, rtol=1e-10, atol=1e-10)
    return psn.NeuralODE(
        Field(), rtol=1e-10, atol=1e-10, saveat=[0.5, 1.0], regularizers=[psn.KineticEnergy()]
    )


def loss(what: str, solution: Any) -> Tensor:
    """A mean over samples of something that is read off a solution, or off a density."""
    read = {
        "density": lambda: solution.log_prob,
        "u1": lambda: solution.u1,
        "u": lambda: solution.u[0],
        "dense": lambda: solution(0.3),
        "steps": lambda: solution.trajectory.states()[1],
    }
    squares: Tensor = read[what]().square().mean()
    return squares + 0.1 * solution.penalty


def samples() -> Tensor:
    return torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(1))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("u1", {"static_graph": True}),
    ("u", {"static_graph": True}),
    ("dense", {"static_graph": True}),
    ("steps", {"static_graph": True}),
    ("density", {"static_graph": True}),
    ("u1", {"find_unused_parameters": True}),
]


def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    join(store, rank, WORKERS)
    found = []
    for what, options in CASES:
        parallel = DistributedDataParallel(model(what), **options)
        for _ in range(2):  # a static graph is learned in the first iteration
            parallel.zero_grad()
            loss(what, parallel(samples()[rank::WORKERS])).backward()
        found.append([p.grad for p in parallel.parameters()])
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_all_processes_agree(tmp_path: Path) -> None:
    out = tmp_path / "gradients"
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(out)), nprocs=WORKERS)
    found = [torch.load(f"{out}.{rank}") for rank in range(WORKERS)]
    for i, (what, _) in enumerate(CASES):
        node = model(what)
        # The steps of half a batch are not those of the whole: as two solves.
        halves = [loss(what, node(samples()[rank::WORKERS])) for rank in range(WORKERS)]
        torch.stack(halves).mean().backward()
        for gradients in found:
            for p, gradient in zip(node.parameters(), gradients[i], strict=True):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-7, atol=1e-12)


def test_data_parallel_without_devices_is_the_module() -> None:
    node = model("u1")
    found = nn.DataParallel(node)(samples())
    torch.testing.assert_close(found.u1, node(samples()).u1, rtol=0, atol=0)
