"""Whether the value of an evaluation is in nobody else's hands, who could use its memory again."""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

_use_count = getattr(torch._C, "_storage_Use_Count", None)


def storage_uses(vector: Tensor) -> int | None:
    """Torch's count of the tensors that share a vector's memory; `None` where it has none."""
    return None if _use_count is None else int(_use_count(vector.untyped_storage()._cdata))


def own(value: Tensor) -> Tensor:
    """A flat value in memory that the field does not write to later.

    It is copied where the field may have kept its output, or a view of it.
    """
    return value if _holders(value) == _fewest() else value.clone()


def _holders(value: Tensor) -> tuple[int | None, int]:
    """How many tensors share a view's memory, and how many references what it is a view of has."""
    base = value._base
    return storage_uses(value), 0 if base is None else sys.getrefcount(base)


@cache
def _fewest() -> tuple[int | None, int] | None:
    """What `_holders` says of a view that is alone; `None` where a held one looks the same."""
    with torch.inference_mode(False), torch.enable_grad():
        outputs = [torch.ones(1, 2, requires_grad=True) * 2 for _ in range(3)]
        views = [x.reshape(-1) for x in outputs]
        part = outputs[1][0]
        del outputs[:2]
        alone, viewed, held = map(_holders, views)
        del part
    return None if None in alone or alone in (viewed, held) else alone
