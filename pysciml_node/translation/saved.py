"""What autograd saves while a field is traced or computed, kept out of the hooks of others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Saved = tuple[Tensor, int | None]


def saved_by(saved: Callable[[Tensor], Saved]) -> AbstractContextManager[None]:
    """What is saved for derivatives stays here: a checkpoint around the solve counts it."""
    return torch.autograd.graph.saved_tensors_hooks(saved, _unchanged)


def as_it_is(x: Tensor) -> Saved:
    """What is traced: a graph would show a `detach`."""
    return x, None if x.is_inference() else x._version


def without_graph(x: Tensor) -> Saved:
    """What is computed: torch puts the graph back, and an output with its own would never go."""
    return as_it_is(x.detach())


def _unchanged(saved: Saved) -> Tensor:
    """What was saved; hooks do without the check of it that autograd makes otherwise."""
    x, version = saved
    if version is not None and version != x._version:
        raise RuntimeError(
            "a value that its derivative needs was changed in place.\n  Change a clone of it."
        )
    return x
