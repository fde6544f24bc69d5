"""Blocks of pairs over threads: one block a thread, not one operation over all threads.

A block is small enough for the cache, so its operations are too short to be shared: threads that
wait for each other after every one of them take ten times the processor time on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


@torch.no_grad()
def map_blocks(solve: Callable[[Tensor], Tensor], blocks: Sequence[Tensor]) -> Tensor:
    """Join `solve(block)` of all blocks along the last axis.

    On the CPU as many blocks are worked on at once as torch has threads.

    Args:
        solve: values `(..., P)` of the `P` pairs of a block; no gradient is recorded.
        blocks: positions of pairs.
    """
    count = min(torch.get_num_threads(), len(blocks))
    if count <= 1 or blocks[0].device.type != "cpu":
        return torch.cat([solve(block) for block in blocks], -1)

    def work(block: Tensor) -> Tensor:
        with torch.no_grad():  # a setting of the thread
            return solve(block)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(work, blocks)), -1)
    finally:
        # The call holds for the thread that makes it, but also for threads that start later.
        torch.set_num_threads(threads)
