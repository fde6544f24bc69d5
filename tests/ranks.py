"""Processes of a test that train together."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch.distributed as dist


def join(store: str | Path, rank: int, processes: int) -> None:
    """Become one of several processes on the CPU, which meet at a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
