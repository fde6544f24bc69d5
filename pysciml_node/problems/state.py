"""States as one flat vector: a tensor of any shape, or a tuple, named tuple or dict of tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pysciml_node import checks

L = TypeVar("L")
State = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


# Classes of tensors and numbers that are nothing else.
_BARE = frozenset((Tensor, nn.Parameter, float, int))


def bare_entries(tree: Any) -> list[Any] | None:
    """What is in a dict, tuple or list of nothing but tensors and numbers; `None` of others.

    Most that are not a tensor are one, and need no walk.
    """
    kind = type(tree)
    if kind is dict:
        entries = [*tree.values()]
    elif kind is tuple or kind is list:
        entries = [*tree]
    else:
        return None
    return entries if _BARE.issuperset(map(type, entries)) else None


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tensor, or of a (nested) tuple, list or dict of them."""
    entries = bare_entries(tree)
    if entries is None:
        return _leaves_of(tree, Tensor)
    return iter([x for x in entries if isinstance(x, Tensor)])


def _leaves_of(tree: Any, kind: type[L]) -> Iterator[L]:
    if isinstance(tree, kind):
        yield tree
    elif tree is None or isinstance(tree, float):
        return
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _leaves_of(value, kind)
    elif type(tree) is dict or isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves_of(value, kind)


def map_tensors(fn: Any, tree: Any) -> Any:
    """Apply `fn` to the tensors of a (nested) tuple, list or dict; other leaves stay."""
    return _map_leaves(fn, tree, Tensor)


def _map_leaves(fn: Any, tree: Any, kind: type) -> Any:
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, Mapping):
        return {key: _map_leaves(fn, value, kind) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map_leaves(fn, value, kind) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_map_leaves(fn, value, kind) for value in tree)
    return tree


def as_state(u0: Any) -> Any:
    """A state whose parts are tensors, as far as they can be made some.

    Arrays that speak DLPack are lent to torch. A number alone, or a list of numbers, has no dtype
    of its own and gets torch's default one.
    """
    if isinstance(u0, Tensor):
        return u0
    if isinstance(u0, tuple | Mapping):
        parts = u0.values() if isinstance(u0, Mapping) else u0
        if all(isinstance(part, Tensor) for part in parts):
            return u0
        converted = [_as_part(part) for part in parts]
        if isinstance(u0, Mapping):
            return dict(zip(u0, converted, strict=True))
        return _named(u0)._make(converted) if _named(u0) else tuple(converted)
    if _of_numbers(u0):
        with contextlib.suppress(ValueError):  # rows of different lengths
            tensor = torch.tensor(u0)
            return tensor if tensor.is_complex() else tensor.to(torch.get_default_dtype())
    return _as_part(u0)


def _named(state: tuple[Any, ...]) -> Any:
    """The class of a named tuple, `None` for another tuple."""
    return type(state) if hasattr(state, "_fields") else None


def _as_part(part: Any) -> Any:
    tensor = checks.as_tensor(part)
    return part if tensor is None else tensor


def as_parameters(p: Any) -> Any:
    """An extra argument in which NumPy's arrays are tensors, as they are in a state.

    One that contains itself is left to the check of its tensors.
    """
    if bare_entries(p) is not None:
        return p
    with contextlib.suppress(RecursionError):
        if next(_leaves_of(p, np.ndarray), None) is not None:
            return _map_leaves(_as_part, p, np.ndarray)
    return p


def _of_numbers(x: Any) -> bool:
    """Whether it is a number, or a list of numbers, which may be nested."""
    if isinstance(x, list):
        return all(map(_of_numbers, x))
    return isinstance(x, int | float | complex) and not isinstance(x, bool)


def recording() -> bool:
    """Whether derivatives are being taken, in reverse or in forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def moves(x: Any) -> bool:
    """Whether a value is a tensor whose derivative is being taken, in either mode."""
    if not isinstance(x, Tensor):
        return False
    return x.requires_grad or (forward_ad._current_level >= 0 and tangent_of(x) is not None)


def tangent_of(x: Tensor) -> Tensor | None:
    """The derivative that a tensor carries in forward mode."""
    tangent: Tensor | None = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return tangent


def without_graph(x: Tensor) -> Tensor:
    """A tensor without its graph of reverse mode; it keeps its derivative in forward mode."""
    tangent = tangent_of(x) if forward_ad._current_level >= 0 else None
    if tangent is None:
        return x.detach()
    dual: Tensor = forward_ad.make_dual(x.detach(), tangent.detach())  # type: ignore[no-untyped-call]
    return dual


@cache
def kind_of(device: torch.device) -> str:
    """The kind of a device, such as `"cpu"`, for which the device itself makes a text each time."""
    return device.type


def full_precision(state: Any) -> Any:
    """A state in single precision, where autocast has halved its precision."""
    return map_tensors(_unhalved, state)


def _unhalved(x: Tensor) -> Tensor:
    halved = x.dtype in HALVED
    return x.float() if halved and torch.is_autocast_enabled(x.device.type) else x


HALVED = frozenset((torch.float16, torch.bfloat16))
"""What autocast makes of floating-point numbers."""


def refuse_batched(x: Tensor) -> None:
    """Refuse a tensor that `torch.vmap` has made a batch of."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            refuse_vmap()
        x = functorch.get_unwrapped(x)


def refuse_vmap() -> NoReturn:
    """Refuse a solve inside `torch.vmap`."""
    raise RuntimeError(
        "a solve was called inside torch.vmap, but its steps depend on the values that vmap "
        "hides.\n  Use EnsembleProblem(problem, u0=..., p=...), whose members have steps of their "
        "own, or solve the batch as one u0; solution(times) takes many times at once."
    )


_DTYPES = frozenset((torch.float32, torch.float64, torch.complex64, torch.complex128))


def _check_part(name: str, part: Any) -> None:
    """Refuse a part of a state that cannot be integrated."""
    if not isinstance(part, Tensor):
        raise TypeError(
            f"{name} must be a tensor, but is {type(part).__name__}.\n"
            "  Convert it: torch.as_tensor(...)."
        )
    if part.layout != torch.strided or part.is_quantized:
        checks.refuse(name, "a dense tensor", part, "Convert it: u0.to_dense().", ValueError)
    if not (part.is_floating_point() or part.is_complex()):
        raise TypeError(
            f"{name} must be a floating-point or complex tensor, but is {part.dtype}.\n"
            "  Convert it: u0.float() or u0.double()."
        )
    if part.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, complex64 or complex128, but is "
            f"{part.dtype}, which cannot resolve the steps of a solve.\n"
            "  Solve in u0.float(), and let autocast run the field in half precision."
        )


def _is_usual(part: Any) -> bool:
    """Whether a part is what most are, and so passes."""
    return type(part) is Tensor and part.dtype in _DTYPES and part.layout is torch.strided


def _check_filled(entries: int) -> None:
    """Refuse a state without entries."""
    if not entries:
        raise ValueError(
            "u0 has no entries: there is nothing to solve.\n"
            "  Give a state with at least one entry; skip the solve of an empty batch."
        )


@dataclass(frozen=True)
class StateSpec:
    """The structure of a state, and the way to and from its flat vector.

    Args:
        keys: `None` for a single tensor, the positions of a tuple, or the keys of a dict.
        shapes: shape of each part.
        dtype: the parts' common dtype.
        device: the parts' common device.
        named: class of a state that is a named tuple.
    """

    keys: tuple[Any, ...] | None
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    named: Any = None
    ends_at_arguments: ClassVar[bool] = True  # where a field holds one

    @classmethod
    def of(cls, u0: Any) -> StateSpec:
        """The structure of `u0`.

        Raises:
            TypeError: a part is no tensor, or of a dtype that cannot be integrated.
            ValueError: there are no entries, or the parts differ in dtype or device.
        """
        keys: tuple[Any, ...] | None
        named = None
        if isinstance(u0, Tensor):
            shape = u0.shape
            if u0.dtype not in _DTYPES or u0.layout is not torch.strided or 0 in shape:
                _check_part("u0", u0)
                _check_filled(u0.numel())
            return _spec(None, (shape,), u0.dtype, u0.device)
        if isinstance(u0, tuple):
            keys, parts, named = tuple(range(len(u0))), u0, _named(u0)
        elif isinstance(u0, Mapping):
            keys, parts = tuple(u0), tuple(u0.values())
            names: list[Any] = list(u0)
            if not all(isinstance(name, str) for name in names):
                raise TypeError(
                    f"the keys of a dict u0 must be strings, but are {names}.\n"
                    "  Use names, or a tuple of the parts."
                )
        else:
            stacked = isinstance(u0, list) and any(isinstance(x, Tensor) for x in u0)
            raise TypeError(
                f"u0 must be a tensor, or a tuple or dict of tensors, but is {type(u0).__name__}.\n"
                f"  Convert it: torch.{'stack' if stacked else 'as_tensor'}(u0)."
            )
        if not all(map(_is_usual, parts)):
            for key, part in zip(keys, parts, strict=True):
                _check_part(f"u0[{key!r}]", part)
        _check_filled(sum(part.numel() for part in parts))
        first = parts[0]
        for attribute in ("dtype", "device"):
            values = [getattr(part, attribute) for part in parts]
            if len(set(values)) > 1:
                raise ValueError(
                    f"the parts of u0 must share one {attribute}, but have "
                    + ", ".join(str(value) for value in values)
                    + ".\n  Convert them with .to(...) before the solve."
                )
        return _spec(keys, tuple(part.shape for part in parts), first.dtype, first.device, named)

    @cached_property
    def real_dtype(self) -> torch.dtype:
        """Dtype of times, errors and norms."""
        return self.dtype.to_real()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each part."""
        return tuple(math.prod(shape) for shape in self.shapes)

    def parts(self, state: Any) -> tuple[Any, ...]:
        """The parts of a state in the order of the flat vector."""
        if self.keys is None:
            return (state,)
        return tuple(state[key] for key in self.keys)

    def matches(self, value: Any) -> bool:
        """Whether a value has the parts of a state, and no others."""
        if self.keys is None:
            return not isinstance(value, tuple | list | dict)
        if isinstance(self.keys[0], int):
            return isinstance(value, tuple | list) and len(value) == len(self.keys)
        return isinstance(value, dict) and set(value) == set(self.keys)

    def fits(self, state: Any) -> bool:
        """Whether the parts of a state have its shapes: tensors may be given other data."""
        if self.keys is None:
            same: bool = state.shape == self.shapes[0]
            return same
        return all(x.shape == y for x, y in zip(self.parts(state), self.shapes, strict=True))

    def assemble(self, parts: list[Tensor]) -> Any:
        """The inverse of `parts`."""
        if self.keys is None:
            return parts[0]
        if isinstance(self.keys[0], int):
            return tuple(parts) if self.named is None else self.named._make(parts)
        return dict(zip(self.keys, parts, strict=True))

    def flatten(self, state: Any) -> Tensor:
        """The state as one vector of shape `(N,)`."""
        if self.keys is None:
            flat: Tensor = state.reshape(-1)
            return flat
        # Every evaluation goes this way and back, and calls of torch take their time.
        return torch.cat([x if x.dim() == 1 else x.reshape(-1) for x in self.parts(state)])

    def copied(self, state: Any) -> Tensor:
        """A copy of a state: in its own shape where it is one tensor, or as one vector, `(N,)`."""
        whole: Tensor = state if self.keys is None else self.flatten(state)
        return whole.clone(memory_format=torch.contiguous_format)

    def unflatten(self, flat: Tensor) -> Any:
        """The state that a vector `(..., N)` stands for; leading dimensions are kept."""
        if self.keys is None:
            shape = self.shapes[0]
            # Every evaluation of a field comes this way; torch reads numbers faster than a shape.
            if shape and flat.dim() == 1:
                return flat.view(*shape)
            return flat.view(flat.shape[:-1] + shape)
        lead = flat.shape[:-1]
        pieces = zip(flat.split_with_sizes(self.sizes, -1), self.shapes, strict=True)
        if not lead:
            return self.assemble([x if len(y) == 1 else x.reshape(y) for x, y in pieces])
        return self.assemble([x.reshape(lead + y) for x, y in pieces])

    def locate(self, index: int) -> str:
        """The place of a flat index in the state, in words for an error message."""
        for key, shape, size in zip(self.keys or ("",), self.shapes, self.sizes, strict=True):
            if index < size:
                place = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]
                part = "" if self.keys is None else f"part {key!r}, "
                if len(place) >= 2:
                    return f"{part}sample {place[0]}, component {tuple(place[1:])}"
                return f"{part}component {tuple(place)}"
            index -= size
        raise IndexError(index)


@lru_cache(maxsize=1024)
def _spec(
    keys: tuple[Any, ...] | None,
    shapes: tuple[torch.Size, ...],
    dtype: torch.dtype,
    device: torch.device,
    named: Any = None,
) -> StateSpec:
    """One for equal structures, which are told apart at once, and whose sizes are known."""
    return StateSpec(keys, shapes, dtype, device, named)
