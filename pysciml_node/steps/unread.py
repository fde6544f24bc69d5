"""Whether a function reads certain tensors: a change of what it does not read is none of its."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from pysciml_node.steps.contents import is_comparable

Look = Callable[[Any], None]

# Functions that read numbers, or hand out memory, without an operation.
_HAND_OUT = frozenset(
    (
        *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "_typed_storage"),
        *("__array__", "__dlpack__", "to_dlpack", "__reduce_ex__", "__deepcopy__", "__repr__"),
    )
)
# Operations that read nothing but shapes.
_BLIND = ("zeros_like", "ones_like", "empty_like", "full_like", "new_", "rand_like", "randn_like")


@contextmanager
def unread(tensors: Sequence[Tensor], found: Callable[[Tensor], NoReturn]) -> Iterator[None]:
    """A context in which an operation of torch that is given one of some tensors raises an error.

    Or one that shares its memory. It sees what code without Python computes, too. It takes its
    time: tens of microseconds for each operation.

    Args:
        tensors: the tensors, often none.
        found: raises the error.
    """
    by_address = {address: x for x in tensors for address in _addresses((x,))}
    if not by_address:
        yield
        return

    def look(given: Any) -> None:
        for address in _addresses(pytree.tree_leaves(given)):
            if address in by_address:
                found(by_address[address])

    with _Calls(look), _Operations(look):
        yield


def _addresses(values: Iterable[Any]) -> Iterator[int]:
    """Where the memory of the tensors among some values begins."""
    for x in values:
        if isinstance(x, Tensor) and is_comparable(x) and x.numel():
            yield x.untyped_storage().data_ptr()


class _Calls(TorchFunctionMode):
    """Shows what functions and methods of torch are given."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self._look = look

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", None) in _HAND_OUT:
            self._look((args, kwargs))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows what operations are given, whoever calls them."""

    def __init__(self, look: Look) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._look = look

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.__name__.startswith(_BLIND):
            self._look((args, kwargs))
        return func(*args, **(kwargs or {}))
