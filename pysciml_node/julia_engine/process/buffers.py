"""Tensors as Julia sees them: real numbers, one after the other, at an address.

Julia works on vectors of float32 or float64. A complex state is the vector of its real and
imaginary parts; half precision is refused where the engine is chosen.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from pysciml_node.problems.state import StateSpec

CODES = {torch.float32: 0, torch.float64: 1}
"""The numbers that name real dtypes at the boundary."""


def device_code(device: torch.device) -> int:
    """The number that names a device at the boundary: 0 for the processor, 1 for CUDA."""
    return 1 if device.type == "cuda" else 0


def real_length(tensor: Tensor) -> int:
    """Real numbers in a tensor."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def real_size(spec: StateSpec) -> int:
    """Real numbers in a state."""
    return sum(spec.sizes) * (2 if spec.dtype.is_complex else 1)


def to_real(vector: Tensor) -> Tensor:
    """A flat vector `(N,)`, real and contiguous; a complex one as real and imaginary parts.

    Leading dimensions are kept.
    """
    if vector.is_complex():
        return torch.view_as_real(vector.resolve_conj()).flatten(-2).contiguous()
    return vector.contiguous()


def from_real(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_real`, without copying; leading dimensions are kept."""
    if not dtype.is_complex:
        return vector
    return torch.view_as_complex(vector.reshape(*vector.shape[:-1], vector.shape[-1] // 2, 2))


def doubles(numbers: Sequence[float] = ()) -> array[float]:
    """Numbers in double precision whose memory Julia can read and write."""
    return array("d", numbers)


def room_for(count: int) -> array[float]:
    """Memory for so many numbers in double precision, which is quicker to have than a tensor."""
    return array("d", bytes(8 * count))


def integers(numbers: Sequence[int] = ()) -> array[int]:
    """Whole numbers of 64 bits whose memory Julia can read and write."""
    return array("q", numbers)


def address(numbers: array[float] | array[int]) -> int:
    """The address of the first number; valid as long as the array lives and keeps its length."""
    return numbers.buffer_info()[0]


def pointer(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's numbers; 0 for `None` and for no numbers."""
    return 0 if tensor is None else tensor.data_ptr()
