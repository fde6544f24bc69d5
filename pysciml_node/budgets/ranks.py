"""Numbers that all processes of a distributed training agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def mean_over_ranks(values: Sequence[float]) -> list[float]:
    """The mean of each value over all processes, the same in all of them; the values without any.

    Args:
        values: of this process; as many in every process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    # NCCL exchanges what lies on the process's own device.
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    shared = torch.tensor(values, dtype=torch.float64, device=place)
    dist.all_reduce(shared)
    means: list[float] = (shared / dist.get_world_size()).tolist()
    return means
