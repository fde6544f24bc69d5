"""The random numbers of a run: a stream for each purpose, so that none depends on another's use."""

from typing import Literal, get_args

import torch

Stream = Literal["parameters", "batches", "penalty", "training", "evaluation", "pixels"]

# Results were published with these numbers: a seed goes on giving the same run.
_OFFSETS: dict[Stream, int] = {
    "parameters": 0,
    "batches": 1_000_003,
    "penalty": 2_000_003,
    "training": 3_000_003,
    "evaluation": 4_000_003,
    "pixels": 3_000_017,
}


def streams(seed: int) -> dict[Stream, torch.Generator]:
    """Generators of a run's random numbers, at their starts.

    Runs of equal seed see the same initial parameters, batches and pixels whatever their penalty.

    Args:
        seed: of the run.

    Returns:
        For the initial parameters, the order of the batches, the penalties' times and probes, what
        the model itself draws in training and in evaluation, and the noise of pixels.

    Examples:
        >>> first, again = streams(1), streams(1)
        >>> _ = torch.rand(5, generator=first["penalty"])
        >>> float(torch.rand((), generator=first["batches"])) == float(
        ...     torch.rand((), generator=again["batches"])
        ... )
        True
    """
    return {name: torch.Generator().manual_seed(seed + _OFFSETS[name]) for name in get_args(Stream)}
