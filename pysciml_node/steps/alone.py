"""Whether the value of an evaluation is in nobody else's hands, who could use its memory again."""

from __future__ import annotations

from collections.abc import Callable, Set
from sys import getrefcount
from weakref import getweakrefcount

import torch
from torch import Tensor

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def storage_uses(vector: Tensor) -> int | None:
    """Torch's count of the tensors that share a vector's memory; `None` where it has none."""
    return None if _use_count is None else int(_use_count(vector.untyped_storage()._cdata))


def own(value: Tensor) -> Tensor:
    """A flat value in memory that the field does not write to later.

    It is copied where the field may have kept its output, or a view of it.
    """
    if value._base is None and not value.is_inference():
        return value  # a copy has been made
    holders = _holders(value)
    return value if _is_alone(holders, _FEWEST, value._base) else value.clone()


def _is_alone(
    holders: tuple[int, ...] | None, fewest: Set[tuple[int, ...] | None], made: Tensor | None
) -> bool:
    """Whether a value is in nobody's hands.

    Args:
        holders: of its memory, as they were counted.
        fewest: of a value that is alone.
        made: what an operation has made, of which the value may be a view.
    """
    if holders is None:
        return False
    uses, *others = holders
    return holders in fewest or ((uses - 1, *others) in fewest and _is_saved(made))


def _is_saved(made: Tensor | None) -> bool:
    """Whether the operation that made a tensor keeps it for its own derivative, as `tanh` does.

    Where it is kept by hooks, in whatever way, its memory is not.
    """
    if made is None or (saved := getattr(made.grad_fn, "_raw_saved_result", None)) is None:
        return False
    kept = saved.data
    return isinstance(kept, Tensor) and kept.data_ptr() == made.data_ptr()


def _holders(value: Tensor) -> tuple[int, ...] | None:
    """How many tensors share a view's memory, and how many references there are to the memory.

    And how many to what it is a view of, weak ones too. `None` where that is not known.
    """
    base = value._base
    if base is None or _use_count is None or value.layout is not torch.strided or _wrapped(value):
        return None
    memory = value.untyped_storage()
    uses = _use_count(memory._cdata)
    return uses, getrefcount(memory), getrefcount(base), getweakrefcount(base)


def _fewest() -> frozenset[tuple[int, ...] | None]:
    """What `_holders` says of a view that is alone; nothing where a held one looks the same."""
    with torch.inference_mode(False), torch.enable_grad():
        outputs = [torch.ones(1, 2, device="cpu", requires_grad=True) * 2 for _ in range(3)]
        views = [x.reshape(-1) for x in outputs]
        part = outputs[1][0]
        del outputs[:2]
        alone, viewed, held = map(_holders, views)
        del part
    return frozenset((alone,)) - {viewed, held}


def own_whole(value: Tensor) -> Tensor:
    """The same of a value as the field has returned it, which its caller alone refers to."""
    if value._version or value.is_inference():  # a buffer, perhaps, that is used again
        return value.clone()
    holders, base = _holders_of_whole(value), value._base
    made = value if base is None else base
    return value if _is_alone(holders, _FEWEST_OF_WHOLE, made) else value.clone()


def _holders_of_whole(value: Tensor) -> tuple[int, ...] | None:
    """As `_holders`, and how many references there are to the value itself, which may be a view."""
    if _use_count is None or value.layout is not torch.strided or _wrapped(value):
        return None
    base, memory = value._base, value.untyped_storage()
    uses = _use_count(memory._cdata), getrefcount(memory)
    held = *uses, getrefcount(value), getweakrefcount(value)
    return held if base is None else (*held, getrefcount(base), getweakrefcount(base))


def _fewest_of_whole() -> frozenset[tuple[int, ...] | None]:
    """What `_holders_of_whole` says of values that are alone, but not of held ones."""
    held: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        held.append(x)
        return x

    def viewed(x: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        held.append(view(x))
        return x

    def holders(make: Callable[[], Tensor]) -> tuple[int, ...] | None:
        value = make()  # one reference, as an evaluation has, and one more where it is handed on
        return handed(value)

    def handed(value: Tensor) -> tuple[int, ...] | None:
        return _holders_of_whole(value)

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 2, device="cpu", requires_grad=True)
        alone = lambda: x * 2, lambda: (x * 2)[0]
        kept = lambda: keep(x * 2), lambda: keep((x * 2)[0]), lambda: keep(x * 2)[0]
        views = lambda: viewed(x * 2, lambda y: y[0]), lambda: viewed(x * 2, Tensor.detach)
        return frozenset(map(holders, alone)) - frozenset(map(holders, (*kept, *views)))


# Counted before anything else looks at frames: while torch's compiler does, a call has more
# references to its arguments, and values are copied.
_FEWEST, _FEWEST_OF_WHOLE = _fewest(), _fewest_of_whole()
