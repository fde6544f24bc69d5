"""Two processes that train one model hold one budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from budgets.plant import Plant, train
from ranks import join

import pysciml_node as psn

WORKERS = 2


def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    join(store, rank, WORKERS)
    budget = psn.Budget(nfe=62)
    # Each has batches of its own, and those of one are dearer.
    plant = Plant(lag=20.0)
    plant.random.seed(rank)
    plant.dearest += 4.0 * rank
    train(budget, plant, 400)
    torch.save((budget.history.tensor(), 2 + 6 * (plant.steps + 0.5)), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_have_the_same_weight(tmp_path: Path) -> None:
    """Bit for bit, and the mean of their costs is the budget."""
    out = tmp_path / "budget"
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(out)), nprocs=WORKERS)
    (first, cost), (second, dearer) = (torch.load(f"{out}.{rank}") for rank in range(WORKERS))
    assert torch.equal(first, second)
    assert cost < dearer
    assert (cost + dearer) / 2 == pytest.approx(62.0, abs=3.0)
