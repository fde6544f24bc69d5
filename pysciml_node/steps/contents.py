"""What tensors hold, so that a change is seen which torch does not count.

It counts none by `.data`, and none by memory that something else shares, such as a NumPy array.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

# Bytes of a tensor up to which a copy of it costs less than a fingerprint.
_COPIED = 2**19

# Words that are taken at once, each with a weight of its own; and what the sums of such blocks are
# multiplied by. The weights are odd: a change of one word never leaves its product as it was.
_BLOCK = 2**17
_FACTOR = 6364136223846793005


def is_comparable(x: Tensor) -> bool:
    """Whether a tensor has values in memory that can be compared."""
    if x.is_meta or x.is_nested or is_lazy(x):
        return False
    # A field may keep what a transform of torch.func has shown it, and that is dead behind it.
    return x.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(x)


class Contents:
    """The contents of tensors: copies of small ones, and fingerprints, which take no memory.

    Args:
        tensors: those to look at; the others are passed over later.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with torch.no_grad():  # entered once: it takes as long as two copies
            self._seen = {id(x): _noted(x) for x in tensors if is_comparable(x)}

    def settle(self, tensors: Iterable[Tensor]) -> None:
        """Pass over what has changed by now: it is left to whoever changes it."""
        for x in self.changed(tensors):
            del self._seen[id(x)]

    def changed(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that hold something else than in the beginning."""
        return [
            x for x in tensors if (seen := self._seen.get(id(x))) is not None and not _is(x, seen)
        ]


_Noted = tuple[torch.Size, torch.dtype, Tensor | int]


def _noted(x: Tensor) -> _Noted:
    return x.shape, x.dtype, x.clone() if x.nbytes <= _COPIED else fingerprint(x)


def _is(x: Tensor, noted: _Noted) -> bool:
    """Whether a tensor holds what was noted."""
    shape, dtype, seen = noted
    if x.shape != shape or x.dtype != dtype:
        return False
    if isinstance(seen, int):
        return fingerprint(x) == seen
    # What is not a number is equal to nothing.
    return torch.equal(x, seen.to(x.device)) or fingerprint(x) == fingerprint(seen)


@torch.no_grad()
def fingerprint(x: Tensor) -> int:
    """A number that is another for other contents, but for a chance of `2**-32`."""
    flat = x.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    if flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        words = flat.view(torch.int64)
    else:
        words = flat.view(torch.uint8).long()
    if words.numel() <= _BLOCK:
        return int(_sum(words))
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for block in torch.split(words, _BLOCK):
        total = total * _FACTOR + _sum(block)
    return int(total)


def _sum(words: Tensor) -> Tensor:
    # The upper half onto the lower one: of products modulo 2^64 the upper bits go out at the top,
    # the signs of numbers among them. Only words of which every bit differs become the same.
    words = words ^ (words >> 32)
    weights = _weights(words.device)[: words.numel()]
    # Torch has sums of products of integers on the host alone.
    return torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers without order, as many as there are words in a block."""
    with torch.inference_mode(False):
        drawn = torch.randint(
            -(2**62), 2**62, (_BLOCK,), generator=torch.Generator().manual_seed(0)
        )
        return (2 * drawn + 1).to(device)
