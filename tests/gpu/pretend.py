"""A device that is not the CPU, on machines that have no other: to find what a GPU would refuse.

Tensors on it are kept in the CPU's memory and computed there, so results are those of the CPU. What
differs is what torch sees: another device. As on a GPU, an operation that mixes devices is an
error, and a value that Python reads has to be fetched; `Reads` counts these.

The device is torch's `privateuseone`, as a backend written in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

# What copies between devices by its nature.
_MOVES = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
# What ends in a value or a shape that Python sees: the device is waited for.
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class Reads:
    """How often values were fetched from the device while the block ran."""

    count = 0
    _open: ClassVar[list[Reads]] = []

    def __enter__(self) -> Reads:
        Reads._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Reads._open.remove(self)

    @staticmethod
    def one_more(read: bool) -> None:
        """Count one for everybody who counts, if something was read."""
        for reads in Reads._open:
            reads.count += read


class PretendTensor(torch.Tensor):
    """A tensor of the pretended device; `held` is the CPU tensor with its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("pretended", 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"pretended({self.held!r})"

    def tolist(self) -> Any:
        """The values; torch itself refuses this method for tensors of subclasses."""
        Reads.one_more(True)
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As on a GPU: only by way of the CPU."""
        if not force:
            raise TypeError("can't convert a tensor of the pretended device to numpy.")
        return self.held.detach().numpy()

    def data_ptr(self) -> int:
        """As if nobody but the device could read there."""
        raise RuntimeError("The CPU asked for an address on the pretended device.")

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` on the CPU tensors; its results on the device that torch would have left them on."""
    target = kwargs.get("device")
    to_cpu = target is not None and torch.device(target).type == "cpu"
    if func not in _MOVES:
        _one_device(func, (args, kwargs))
    Reads.one_more(
        func in _READS
        or (func is aten._to_copy.default and to_cpu)
        or (func is aten.copy_.default and not isinstance(args[0], PretendTensor))
    )
    inside = dict(kwargs) if target is None else kwargs | {"device": torch.device("cpu")}
    result = func(
        *tree_map_only(PretendTensor, _held, tuple(args)),
        **tree_map_only(PretendTensor, _held, inside),
    )
    if to_cpu or (func is aten.copy_.default and not isinstance(args[0], PretendTensor)):
        return result
    wrapped = tree_map_only(torch.Tensor, PretendTensor, result)
    return return_and_correct_aliasing(func, tuple(args), kwargs, wrapped)


def _one_device(func: Any, inputs: object) -> None:
    """Refuse a mixture of devices, except numbers: tensors without dimensions on the CPU."""
    strangers: list[torch.Tensor] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, PretendTensor) and tensor.dim() > 0:
            strangers.append(tensor)
        return tensor

    tree_map_only(torch.Tensor, look, inputs)
    if strangers:
        raise RuntimeError(
            f"{func} was given tensors on the device and one of shape "
            f"{tuple(strangers[0].shape)} on the CPU."
        )


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> Any:
    Reads.one_more(isinstance(source, PretendTensor) and not isinstance(target, PretendTensor))
    _held(target).copy_(_held(source))
    return target


def _factory(overload: Any) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return _run(overload, args, kwargs | {"device": torch.device("pretended", 0)})

    return make


class PretendGenerator(torch.Generator):
    """A generator that says it is of the pretended device; its numbers are those of the CPU."""

    _place: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> PretendGenerator:
        """A generator of the CPU, or one that says otherwise."""
        made = super().__new__(cls)
        made._place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        """Where the numbers are asked for."""
        return self._place


_library = torch.library.Library("aten", "IMPL")
# Operations that make a tensor from numbers alone.
_FACTORIES = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    *(getattr(aten.arange, name) for name in ("default", "start", "start_step")),
    *(getattr(aten.eye, name) for name in ("default", "m")),
    aten.linspace.default,
    aten.randperm.default,
    aten.randperm.generator,
)


@cache
def device() -> torch.device:
    """The pretended device, registered at the first call."""
    _setup_privateuseone_for_python_backend("pretended")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    for overload in _FACTORIES:
        _library.impl(overload, _factory(overload), "PrivateUse1")
    return torch.device("pretended", 0)
