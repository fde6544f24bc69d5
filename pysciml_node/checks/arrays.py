"""Sequences, shapes and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from math import isnan
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pysciml_node.checks.values import as_float, instance, number, refuse, whole, written

T = TypeVar("T")


def sequence(name: str, value: Any, kind: type[T], *, example: str) -> list[T]:
    """Objects of one class, given as a sequence or as a single one.

    Raises:
        TypeError: other objects.
    """
    if isinstance(value, kind):
        return [value]
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Tensor)
    if not listed or getattr(value, "ndim", 1) == 0:
        refuse(name, f"a sequence of objects such as {example}", value, f"Write {example}.")
    return [instance(f"{name}[{i}]", entry, kind, example=example) for i, entry in enumerate(value)]


def numbers(name: str, value: Any, *, hint: str = "") -> list[float]:
    """Real numbers of a sequence, or of a tensor or array with one axis; never NaN.

    Raises:
        TypeError: no sequence, or an entry that is no number.
        ValueError: another number of axes, or NaN.
    """
    if isinstance(value, Tensor):
        tensor(name, value, real=True)
    axes = getattr(value, "ndim", 1)
    if axes > 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"{name} must be one-dimensional, but has shape {shape}.\n"
            f"  Write {name}.reshape(-1) to put its entries into one axis."
        )
    words = isinstance(value, str | bytes)
    unordered = isinstance(value, Mapping | Set)
    if not isinstance(value, Iterable) or axes == 0 or words or unordered:
        refuse(name, "a sequence of numbers", value, hint or written(name, "[0.0, 1.0]"))
    entries = value.detach().tolist() if isinstance(value, Tensor) else list(value)
    # Thousands of output times are looked at without a call for each.
    if {*map(type, entries)} <= {float} and not any(map(isnan, entries)):
        return entries
    return [number(f"{name}[{i}]", x, infinite=True) for i, x in enumerate(entries)]


def shape(name: str, value: Any, *, axes: int | None = None) -> tuple[int, ...]:
    """Sizes of axes, given as a sequence or as one number.

    Args:
        name: of the argument.
        value: what was given.
        axes: how many there must be.

    Raises:
        TypeError: no sequence of whole numbers.
        ValueError: a negative size, or another number of axes.
    """
    if isinstance(value, Tensor):
        value = tensor(name, value, axes=1).tolist()
    if as_float(value) is not None:
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse(name, "a sequence of sizes", value, written(name, "(2, 3)"))
    sizes = tuple(whole(f"{name}[{i}]", size, at_least=0) for i, size in enumerate(value))
    if axes is not None and len(sizes) != axes:
        refuse(name, f"{axes} sizes", sizes, "Give one size for each axis.", ValueError)
    return sizes


def tensor(
    name: str,
    value: Any,
    *,
    axes: int | None = None,
    real: bool = False,
    floating: bool = False,
    precise: bool = False,
    finite: bool = False,
    filled: bool = False,
) -> Tensor:
    """A tensor that holds values, or anything that speaks DLPack, such as a NumPy array.

    Args:
        name: of the argument.
        value: what was given.
        axes: how many it must have.
        real: whether complex numbers and booleans are refused.
        floating: whether integers are refused too.
        precise: whether half precision is refused too.
        finite: whether NaN and infinity are refused.
        filled: whether a tensor without entries is refused.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape, no values (the meta device), not dense, or not finite.
    """
    x = as_tensor(value)
    if x is None:
        refuse(name, "a tensor", value, f"Convert it: torch.as_tensor({name}).")
    if (real or floating or precise) and (x.is_complex() or x.dtype == torch.bool):
        view = f"torch.view_as_real({name})" if x.is_complex() else f"{name}.float()"
        refuse(name, "a tensor of real numbers", x, f"Give {view}.")
    double = f"Convert it: {name}.double()."
    if precise and x.dtype not in (torch.float32, torch.float64):
        refuse(name, "a floating-point tensor, float32 or float64", x, double)
    if floating and not x.is_floating_point():
        refuse(name, "a floating-point tensor", x, double)
    if x.device.type == "meta":
        hint = "It is on the meta device, where tensors have no values: make it on another."
        refuse(name, "a tensor with values", x, hint, ValueError)
    if x.layout != torch.strided or x.is_quantized:
        dense = f"It is {x.layout}: write {name}.to_dense()."
        refuse(name, "a dense tensor", x, dense, ValueError)
    if axes is not None and x.ndim != axes:
        count = f"{axes} ax{'i' if axes == 1 else 'e'}s"
        refuse(name, f"a tensor with {count}", x, f"Reshape it to {count}.", ValueError)
    if filled and x.numel() == 0:
        refuse(name, "a tensor with entries", x, "Give at least one entry.", ValueError)
    if finite and not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{name} must be finite, but holds NaN or infinity.\n"
            f"  Where they are says torch.isfinite({name}).logical_not().nonzero()."
        )
    return x


def as_tensor(value: Any) -> Tensor | None:
    """A tensor, or a view of what speaks DLPack; `None` for what does not, or not of numbers."""
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__dlpack__") or isinstance(value, type):
        return None
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        return None  # torch has no masks, and would take the numbers below them
    try:
        lent: Tensor = from_dlpack(value)
        return lent
    except (RuntimeError, TypeError, ValueError, BufferError):
        pass
    try:  # an array that must not be written to is not lent, but can be copied
        return torch.tensor(value)
    except (RuntimeError, TypeError, ValueError):
        return None
